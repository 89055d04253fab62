"""What the bands of a prediction are, apart from how they are computed: for readers of tables, who need no torch."""

NARROW, WIDE = 0.9944579, 1.9953933  # standard deviations to 16 and 84 %, 2.3 and 97.7 %
