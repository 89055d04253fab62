"""Stages whose networks can share a program: one job's grid of networks, or the networks of many jobs at once.

Knows plain values and whatever has an `add` for frames; nothing of folders.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import pandas as pd

from initlab.errors import UsageError
from initlab.job.network_grid import Grid
from initlab.nn.init import Rule
from initlab.tasks.ensemble.split import Share, run_shared
from initlab.tasks.ensemble.with_theory import QUICK, Seen
from initlab.theory.z_scores import as_categories


class Takes(Protocol):
    """A recorder, as far as a stage knows it."""

    def add(self, frames: Mapping[str, pd.DataFrame]) -> None: ...

    def note(self, text: str) -> None: ...


def _all(stats: pd.DataFrame) -> pd.DataFrame:
    return stats


@dataclass(frozen=True)
class Ensemble:
    """A stage: `program` takes init, seeds, emit and, with `rates`, lr; all else is fixed in it.

    `predict` makes the table `theory` of the rows of one rule that are `chosen`, by a method; None where none is
    wanted. `at_once`: for several ensembles of the rule too, told apart by the column `member`.
    """

    program: Callable[..., Any]
    grid: Grid
    predict: Callable[[pd.DataFrame, Rule, str], pd.DataFrame] | None
    method: str
    chosen: Callable[[pd.DataFrame], pd.DataFrame] = _all
    rates: bool = False
    at_once: bool = False
    note: str = ""

    def __call__(self, recorder: Takes) -> str:
        return run_together([self], [recorder])[0]


def run_together(stages: Sequence[Ensemble], recorders: Sequence[Takes]) -> list[str]:
    """Run the stages of several jobs as one program, which must be the same but for grids; what each has to say.

    A single stage without axes runs as `program` runs by itself. However measuring ends, what was handed over is
    compared with theory, where it is stopped by formulas; but for a fault of several, which are then measured again.
    """
    seen = [_seen(stage, recorder) for stage, recorder in zip(stages, recorders, strict=True)]
    grids, program = [stage.grid for stage in stages], stages[0].program
    if stages[0].rates:
        rates = [rate for grid in grids for rate in grid.rates]
        program = partial(program, lr=rates[0] if len(set(rates)) == 1 else rates)
    try:
        if len(stages) == 1 and not grids[0].columns:
            program(init=grids[0].rules[0], seeds=grids[0].seeds, emit=seen[0].add)
        else:
            run_shared(program, [Share(grid.rules, grid.seeds, one.add) for grid, one in zip(grids, seen, strict=True)])
    except BaseException as stop:
        if len(stages) == 1 or not isinstance(stop, Exception):
            _compare(stages, seen, QUICK)
        raise
    for note, recorder in zip(_compare(stages, seen, stages[0].method), recorders, strict=True):
        recorder.note(note)
    return [stage.note for stage in stages]


def _seen(stage: Ensemble, recorder: Takes) -> Seen:
    def add(frames: Mapping[str, pd.DataFrame]) -> None:
        recorder.add({name: stage.grid.named(frame) for name, frame in frames.items()})

    return Seen(add, stage.predict is not None, stage.chosen)


def _compare(stages: Sequence[Ensemble], seen: Sequence[Seen], method: str) -> list[str]:
    """Hand over the tables `theory`; of each stage a note where there is none."""
    predicted = _predicted(stages, seen, method)
    said = []
    for k, one in enumerate(seen):
        missing: list[str] = []
        note = one.compare(lambda _, k=k, missing=missing: _table(predicted[k], stages[k].grid, missing))  # type: ignore[misc]
        said.append("\n".join(text for text in (note, *dict.fromkeys(missing)) if text))
    return said


def _predicted(stages: Sequence[Ensemble], seen: Sequence[Seen], method: str) -> list[list[pd.DataFrame | Exception]]:
    """Of every stage and every point of its grid the table `theory`, or why there is none.

    Where predictions can be made for many at once, points of one rule are compared with theirs in one go.
    """
    found: list[list[pd.DataFrame | Exception]] = [[] for _ in stages]
    groups: dict[Any, list[tuple[int, int, pd.DataFrame]]] = {}
    for k, (stage, one) in enumerate(zip(stages, seen, strict=True)):
        stats = one.rows()
        if stats is None:
            continue
        for point, (first, rows) in enumerate(zip(stage.grid.firsts(), _points(stats, stage.grid), strict=True)):
            found[k].append(UsageError("nothing was measured"))
            if rows.empty:  # stopped before
                continue
            alike = stage.grid.rules[first] if stage.at_once else (k, point)
            groups.setdefault(alike, []).append((k, point, rows))
    for members in groups.values():
        k, point, _ = members[0]
        stage = stages[k]
        assert stage.predict is not None
        try:
            together = [rows.assign(member=n) if len(members) > 1 else rows for n, (*_, rows) in enumerate(members)]
            table = stage.predict(
                pd.concat(together, ignore_index=True), stage.grid.rules[stage.grid.firsts()[point]], method
            )
            parts: Sequence[pd.DataFrame | Exception] = _by_member(table, len(members))
        except Exception as error:
            parts = [error] * len(members)
        for (k, point, _), part in zip(members, parts, strict=True):
            found[k][point] = part
    return found


def _points(stats: pd.DataFrame, grid: Grid) -> list[pd.DataFrame]:
    if grid.points == 1:
        return [stats]
    point = stats["network"].to_numpy() // grid.firsts().step
    return [stats[point == k] for k in range(grid.points)]


def _by_member(table: pd.DataFrame, members: int) -> list[pd.DataFrame]:
    if members == 1:
        return [table]
    member = table["member"].to_numpy()
    order = np.argsort(member, kind="stable")
    ends = np.cumsum(np.bincount(member, minlength=members))
    whole = table.drop(columns="member")
    parts = np.split(order, ends[:-1])
    return [whole.iloc[part].reset_index(drop=True) for part in parts]


def _table(parts: Sequence[pd.DataFrame | Exception], grid: Grid, missing: list[str]) -> pd.DataFrame:
    """The points of one grid in one table; a point that theory cannot be asked about leaves a note, if others can."""
    for part in parts:
        if isinstance(part, Exception) and (len(parts) == 1 or not isinstance(part, UsageError)):
            raise part
    errors = [part for part in parts if isinstance(part, Exception)]
    if len(errors) == len(parts):
        raise errors[0]
    missing += [f"theory: no prediction for some networks ({error})" for error in errors]
    if not grid.columns:
        return next(part for part in parts if not isinstance(part, Exception))
    known = [
        part.assign(network=first)
        for part, first in zip(parts, grid.firsts(), strict=True)
        if not isinstance(part, Exception)
    ]
    return as_categories(pd.concat(known, ignore_index=True))
