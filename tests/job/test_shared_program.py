"""Stages as one program: rows find back to their job, and theory is added however measuring ends."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest

from initlab.errors import UsageError
from initlab.job.shared_program import EnsembleStage, run_together
from initlab.nn.init import Rule, rule
from initlab.tasks.ensemble.networks import Ensemble

Frames = Mapping[str, pd.DataFrame]
Program = Callable[[Ensemble, Callable[[Frames], None]], object]


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.frames: list[Frames] = []
        self.notes: list[str] = []

    def add(self, frames: Frames) -> None:
        self.frames.append(frames)

    def note(self, text: str) -> None:
        if text:
            self.notes.append(text)


def rows(ensemble: Ensemble, step: int = 0) -> pd.DataFrame:
    return pd.DataFrame({"seed": list(ensemble.seeds), "step": step, "network": np.arange(len(ensemble))})


def measured(ensemble: Ensemble, emit: Callable[[Frames], None]) -> None:
    for step in (0, 1, 0):
        emit({"stats": rows(ensemble, step), "losses": rows(ensemble, step)})


def echo(stats: pd.DataFrame, one: Rule, method: str) -> pd.DataFrame:
    return stats.assign(method=method)


def stage(program: Program = measured, predict: Any = echo, ensemble: Ensemble | None = None) -> EnsembleStage:
    return EnsembleStage(program, ensemble or Ensemble([Rule()] * 2, [4, 7]), predict, "simulation", step=0)


def test_tables_pass_and_the_rows_that_theory_knows_are_compared() -> None:
    sink = Kept()
    stage()(sink)
    assert [list(frames) for frames in sink.frames] == [["stats", "losses"]] * 3 + [["theory"]]
    assert sink.frames[-1]["theory"]["step"].tolist() == [0] * 4 and not sink.notes
    assert list(sink.frames[0]["stats"]) == ["seed", "step", "network"]  # by which the recorder puts rows in order


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (
            ZeroDivisionError("of\n the ruler"),
            "theory: no prediction, a fault of ours (ZeroDivisionError: of the ruler)",
        ),
        (UsageError("init=later: not known here"), "theory: no prediction (init=later: not known here)"),
    ],
)
def test_a_prediction_that_fails_is_a_note(error: Exception, note: str) -> None:
    def broken(*arguments: object) -> pd.DataFrame:
        raise error

    sink = Kept()
    stage(lambda ensemble, emit: None, broken)(sink)
    assert not sink.frames and not sink.notes  # nothing was measured
    stage(predict=broken)(sink)
    assert sink.notes == [note] and len(sink.frames) == 3


def test_nothing_is_predicted_where_nothing_is_wanted() -> None:
    sink = Kept()
    stage(predict=None)(sink)
    assert len(sink.frames) == 3 and not sink.notes


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, ValueError])
def test_what_was_measured_before_the_end_is_compared_by_formulas(end: type[BaseException]) -> None:
    def stopped(ensemble: Ensemble, emit: Callable[[Frames], None]) -> None:
        measured(ensemble, emit)
        raise end

    sink = Kept()
    with pytest.raises(end):
        stage(stopped)(sink)
    assert list(sink.frames[-1]) == ["theory"] and set(sink.frames[-1]["theory"]["method"]) == {"closed"}
    stage()(sink)
    assert set(sink.frames[-1]["theory"]["method"]) == {"simulation"}


def test_rows_of_one_program_find_back_to_their_jobs() -> None:
    grid = Ensemble([rule("naive"), rule("small")] * 1, [3, 3], columns={"init": np.array(["a", "b"])}, points=2)
    sinks = [Kept(), Kept()]
    run_together([stage(), stage(ensemble=grid)], sinks)
    first, second = (sink.frames[0]["stats"] for sink in sinks)
    assert first["seed"].tolist() == [4, 7] and list(first) == ["seed", "step", "network"]
    assert second["seed"].tolist() == [3, 3] and second["init"].tolist() == ["a", "b"]
    assert sinks[1].frames[-1]["theory"]["init"].tolist() == ["a", "a", "b", "b"]


def test_a_point_without_a_prediction_leaves_the_others_theirs() -> None:
    def fussy(stats: pd.DataFrame, one: Rule, method: str) -> pd.DataFrame:
        if one == rule("small"):
            raise UsageError("too small")
        return echo(stats, one, method)

    grid = Ensemble([rule("naive"), rule("small")], [3, 3], columns={"init": np.array(["a", "b"])}, points=2)
    sink = Kept()
    stage(predict=fussy, ensemble=grid)(sink)
    assert sink.notes == ["theory: no prediction for some networks (too small)"]
    assert set(sink.frames[-1]["theory"]["init"]) == {"a"}
