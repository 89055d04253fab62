"""Stages whose networks run as one batched program, those of one job or of many jobs, and are compared with theory.

A job's networks may lie on a grid; each point of it is an ensemble, with a prediction of its own. Every table that the
program emits carries the column `network`, a network's number in it, by which rows are given back to their job.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import pandas as pd

from initlab.errors import UsageError
from initlab.nn.init import Rule
from initlab.stats.row_order import NETWORK, row_order
from initlab.tasks.ensemble.networks import Emit, Ensemble, Frames
from initlab.terminal import Bar
from initlab.theory.z_scores import as_categories
from initlab.verdict.finding import Verdict

Prediction: TypeAlias = pd.DataFrame | Exception  # the table `theory` of one point of a grid, or why there is none
QUICK = "closed"  # the method for a run that is being stopped: a quarter of a second


class TableSink(Protocol):
    """Where a stage's tables and notes go: a recorder of a run folder, or something that stands for it."""

    def add(self, frames: Frames) -> None:
        """Take tables, by name; a column `network` numbers the networks of the stage and is not kept."""

    def note(self, text: str) -> None:
        """Take a sentence for the reader of the run; empty texts are ignored."""

    def keep_verdict(self, verdict: Verdict) -> None:
        """Take what was found, for `verdict.json`."""


@dataclass(frozen=True)
class EnsembleStage:
    """A stage of a job: a program, the networks that it runs, and what theory says of them.

    program: measures an ensemble and emits its tables. predict: makes the table `theory` of rows of `stats`, a rule and
    a method; None where no prediction is wanted. at_once: `predict` takes several ensembles of one rule together, which
    the column `member` distinguishes. step: the only training step that theory knows, None where it knows all rows.
    """

    program: Callable[[Ensemble, Emit], object]
    ensemble: Ensemble
    predict: Callable[[pd.DataFrame, Rule, str], pd.DataFrame] | None
    method: str
    step: int | None = None
    at_once: bool = False
    note: str = ""

    def __call__(self, sink: TableSink) -> str:
        """Measure and record; the text to be printed."""
        return run_together([self], [sink])[0]

    def first_networks(self) -> range:
        """The first network of every point of the grid."""
        return range(0, len(self.ensemble), len(self.ensemble) // self.ensemble.points)


class Tap:
    """Passes a stage's tables on to its sink, and keeps the rows that theory can predict."""

    def __init__(self, stage: EnsembleStage, sink: TableSink) -> None:
        self.stage, self.sink = stage, sink
        self._kept: list[pd.DataFrame] = []

    def add(self, frames: Frames) -> None:
        """Add the columns in which the points of the grid differ."""
        named = {}
        for name, frame in frames.items():
            who = frame["network"].to_numpy()
            columns = {column: values[who] for column, values in self.stage.ensemble.columns.items()}
            named[name] = frame.assign(**columns)
        self.sink.add(named)
        if self.stage.predict is not None and "stats" in frames:
            stats = frames["stats"]
            self._kept.append(stats if self.stage.step is None else stats[stats["step"] == self.stage.step])

    def points(self) -> list[pd.DataFrame]:
        """What was kept, a frame for each point of the grid; none where nothing was measured."""
        if not self._kept:
            return []
        stats = pd.concat(self._kept, ignore_index=True)
        point = stats[NETWORK].to_numpy()
        order = row_order(stats, point)
        firsts, point = self.stage.first_networks(), point[order]
        stats = stats.drop(columns=NETWORK).iloc[order].reset_index(drop=True)
        return [stats[point // firsts.step == k] for k in range(len(firsts))] if len(firsts) > 1 else [stats]


def run_together(stages: Sequence[EnsembleStage], sinks: Sequence[TableSink]) -> list[str]:
    """Run the stages of several jobs as one program; the text of each to be printed.

    stages: of one program, which may differ in their networks. sinks: one for each stage. However measuring ends, what
    was emitted is compared with theory, where it is stopped by formulas; but for a fault of several stages, which are
    then measured again.
    """
    taps = [Tap(stage, sink) for stage, sink in zip(stages, sinks, strict=True)]
    ensembles = [stage.ensemble for stage in stages]
    sizes = [len(one) for one in ensembles]
    owner, first = np.repeat(np.arange(len(stages)), sizes), np.concatenate([[0], np.cumsum(sizes)])

    def emit(frames: Frames) -> None:
        parts: dict[int, dict[str, pd.DataFrame]] = {}
        for name, frame in frames.items():
            for k, rows in _by_code(frame, owner[frame["network"].to_numpy()]):
                parts.setdefault(k, {})[name] = rows.assign(network=rows["network"].to_numpy() - first[k])
        for k in sorted(parts):
            taps[k].add(parts[k])

    rules, seeds, rates = ([x for one in ensembles for x in getattr(one, name)] for name in ("rules", "seeds", "rates"))
    whole = Ensemble(rules, seeds, rates, {"network": np.arange(len(owner))})
    try:
        stages[0].program(whole, emit if len(taps) > 1 else taps[0].add)
    except BaseException as stop:
        if len(stages) == 1 or not isinstance(stop, Exception):
            add_theory(taps, QUICK)
        raise
    add_theory(taps, stages[0].method)
    return [stage.note for stage in stages]


def _by_code(frame: pd.DataFrame, code: np.ndarray) -> list[tuple[int, pd.DataFrame]]:
    """The rows of each code that occurs, in their order."""
    order = np.argsort(code, kind="stable")
    found, starts = np.unique(code[order], return_index=True)
    if len(found) == 1:
        return [(int(found[0]), frame)]
    parts = np.split(order, starts[1:])
    return [(int(k), frame.iloc[part].reset_index(drop=True)) for k, part in zip(found, parts, strict=True)]


def add_theory(taps: Sequence[Tap], method: str) -> None:
    """Give every sink its table `theory`, or a note that says why it has none.

    Whatever goes wrong with a prediction, what was measured is not lost by it. Where predictions can be made for many
    points at once, those of one rule are compared with theirs in one go.
    """
    found: list[list[Prediction]] = [[] for _ in taps]
    groups: dict[Any, list[tuple[int, int, pd.DataFrame]]] = {}
    for k, tap in enumerate(taps):
        for point, rows in enumerate(tap.points()):
            found[k].append(UsageError("nothing was measured"))
            if len(rows):  # else stopped before
                rule = tap.stage.ensemble.rules[tap.stage.first_networks()[point]]
                groups.setdefault((rule, None if tap.stage.at_once else (k, point)), []).append((k, point, rows))
    for (rule, _), members in Bar(groups.items(), desc="theory", unit="prediction", disable=None, ticks=True):
        predict = taps[members[0][0]].stage.predict
        assert predict is not None
        single = len(members) == 1
        parts: Sequence[Prediction]
        try:
            every = [rows if single else rows.assign(member=n) for n, (*_, rows) in enumerate(members)]
            table = predict(pd.concat(every, ignore_index=True), rule, method)
            of_member = {} if single else dict(_by_code(table.drop(columns="member"), table["member"].to_numpy()))
            parts = [table] if single else [of_member.get(n, table[:0]) for n in range(len(members))]
        except Exception as error:
            parts = [error] * len(members)
        for (k, point, _), part in zip(members, parts, strict=True):
            found[k][point] = part
    for tap, predictions in zip(taps, found, strict=True):
        if predictions:
            _add_theory(tap, predictions)


def _add_theory(tap: Tap, parts: Sequence[Prediction]) -> None:
    """Give one sink its table; a point that theory cannot be asked about leaves a note, if others can."""
    errors = [part for part in parts if isinstance(part, Exception)]
    faults = [error for error in errors if not isinstance(error, UsageError)]
    if faults:
        text = f"{type(faults[0]).__name__}: {' '.join(str(faults[0]).split())}"
        tap.sink.note(f"theory: no prediction, a fault of ours ({text})")
        return
    if len(errors) == len(parts):
        tap.sink.note(f"theory: no prediction ({errors[0]})")
        return
    tap.sink.note("\n".join(dict.fromkeys(f"theory: no prediction for some networks ({error})" for error in errors)))
    firsts = tap.stage.first_networks()
    known = [
        part.assign(network=first) for part, first in zip(parts, firsts, strict=True) if not isinstance(part, Exception)
    ]
    tap.add({"theory": as_categories(pd.concat(known, ignore_index=True)) if len(firsts) > 1 else known[0]})
