"""The situations that `python -m benchmarks.sees` asks about: initlab says the truth."""

import pytest

from benchmarks.planted import SITUATIONS, Situation
from benchmarks.sees import ask_initlab


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda s: s.name)
def test_initlab_says_the_truth(situation: Situation) -> None:
    """To 1e-4: an update of float32 weights is rounded to their last digit, 2^-24 of them."""
    truth = situation.answer()
    assert ask_initlab(situation) == (truth if isinstance(truth, str) else pytest.approx(truth, rel=1e-4))
