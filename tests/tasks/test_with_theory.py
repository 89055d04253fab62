from collections.abc import Mapping

import pandas as pd
import pytest

from initlab.errors import UsageError
from initlab.tasks.ensemble.with_theory import Seen


def test_frames_pass_and_what_is_chosen_is_compared() -> None:
    passed: list[Mapping[str, pd.DataFrame]] = []
    seen = Seen(passed.append, True, lambda stats: stats[stats["step"] == 0])
    for step in (0, 1, 0):
        seen.add({"stats": pd.DataFrame({"step": [step]}), "losses": pd.DataFrame({"loss": [1.0]})})
    assert seen.compare(lambda stats: stats) == ""
    assert [list(frames) for frames in passed] == [["stats", "losses"]] * 3 + [["theory"]]
    assert passed[-1]["theory"]["step"].tolist() == [0, 0]


def test_a_prediction_that_fails_is_a_note() -> None:
    def broken(stats: pd.DataFrame) -> pd.DataFrame:
        raise ZeroDivisionError("of\n the ruler")

    passed: list[Mapping[str, pd.DataFrame]] = []
    seen = Seen(passed.append, True, lambda stats: stats)
    assert seen.compare(broken) == ""  # nothing was seen
    seen.add({"stats": pd.DataFrame({"step": [0]})})
    assert seen.compare(broken) == "theory: no prediction, a fault of ours (ZeroDivisionError: of the ruler)"

    def unknown(stats: pd.DataFrame) -> pd.DataFrame:
        raise UsageError("init=later: not known here")

    assert seen.compare(unknown) == "theory: no prediction (init=later: not known here)"
    assert len(passed) == 1


def test_nothing_is_kept_where_none_is_wanted() -> None:
    seen = Seen(lambda frames: None, False, lambda stats: stats)
    seen.add({"stats": pd.DataFrame({"step": [0]})})
    assert seen.compare(lambda stats: 1 / 0) == ""  # type: ignore[return-value, arg-type]


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, ValueError])
def test_what_was_measured_before_the_end_is_compared_by_formulas(end: type[BaseException]) -> None:
    passed: list[Mapping[str, pd.DataFrame]] = []
    methods: list[str] = []

    def beside(stats: pd.DataFrame, method: str) -> pd.DataFrame:
        methods.append(method)
        return stats

    def stopped() -> None:
        seen.add({"stats": pd.DataFrame({"step": [0]})})
        raise end

    seen = Seen(passed.append, True, lambda stats: stats)
    with pytest.raises(end):
        seen.around(stopped, beside, "simulation")
    assert [list(frames) for frames in passed] == [["stats"], ["theory"]] and methods == ["closed"]
    assert seen.around(lambda: None, beside, "simulation") == "" and methods[-1] == "simulation"
