"""What the bands of a prediction are, apart from how they are computed: for readers of tables, who need no torch."""

NO_LAW = "no law is known here"  # the method of a row that has the limit of infinite width alone
OUTSIDE = "outside its range"  # added to the method of a formula that does not hold
NARROW, WIDE = 0.9944579, 1.9953933  # standard deviations to 16 and 84 %, 2.3 and 97.7 %
