"""Timing a ladder: versions of one computation, side by side, with their memory and their agreement in the same run.

Every version is warmed up and compared with the reference before all of them are timed in rounds. On a CPU they run
with the number of threads that torch is set to.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from initlab.errors import UsageError, choose
from initlab.scratch.agreement import unit_in_last_place
from initlab.stats.dtypes import format_of
from initlab.stats.summarize import relative_error
from initlab.tasks.course.rotated_timing import Call, Runner, calibrate, round_ratios, run_rounds, share_rounds
from initlab.tasks.ensemble.device import find_device
from initlab.tasks.ensemble.memory import free_memory, is_out_of_memory, peak_bytes, readable
from initlab.terminal import Bar

COLUMNS: dict[str, str] = {
    "version": "name of the row of the ladder",
    "shape": "what was computed",
    "median": "seconds a call, median of the samples",
    "q25": "their lower quartile",
    "q75": "their upper quartile",
    "ratio": "time over the reference's time, median of the rounds' ratios; 1 for the reference",
    "peak_bytes": "most bytes that one call holds at once, its result included, its inputs not",
    "relative_error": "||a - b|| / ||b|| against the reference, the largest of the outputs; nan where not finite",
    "ulp": "largest |a - b| in units in the last place of the reference's largest entry",
    "note": "why there is no number, or what is wrong with it; empty if nothing is",
}


@dataclass
class _Version:
    """A row in the making; its call gives a tensor, or tuples and lists of them, nested."""

    name: str
    runner: Runner
    note: str = ""
    peak: float = math.nan
    error: float = math.nan
    ulp: float = math.nan


def time_ladder(
    versions: Mapping[str, Call],
    shape: str = "",
    reference: str | None = None,
    skip: Mapping[str, str] | None = None,
    needs: Mapping[str, float] | None = None,
    memory_limit: float | None = None,
    device: str = "cpu",
    rounds: int = 15,
    seconds: float = 0.3,
    progress: bool = False,
) -> pd.DataFrame:
    """One row per version, in their order, with the columns of `COLUMNS`.

    `reference` is the version that the others are compared with, by default the last that runs. `skip` gives reasons
    for versions not to be run; `needs` the bytes that a version is expected to hold, and one that needs more than
    `memory_limit` (default: half of the free memory) is not run: all of these stay in the table with nan and a note,
    as does a version that raises a `UsageError` or runs out of memory. Each version is sampled for about `seconds`, in
    at most `rounds` rounds and at least 3.
    """
    if not versions:
        raise UsageError("nothing to time: at least one version")
    if rounds < 1:
        raise UsageError(f"rounds={rounds}: must be at least 1")
    if not 0 < seconds < math.inf:
        raise UsageError(f"seconds={seconds:g}: must be a finite number above 0")
    if reference is not None:
        choose(versions, reference, "reference")
    where = find_device(device)
    limit = free_memory(where) / 2 if memory_limit is None else memory_limit
    rows = [_Version(name, Runner(call), (skip or {}).get(name, "")) for name, call in versions.items()]
    for row in rows:
        if not row.note and (needed := (needs or {}).get(row.name, 0)) > limit:
            row.note = f"skipped: needs {readable(needed)}, allowed are {readable(limit)}"
    with Bar(total=len(rows) + rounds, desc=shape, unit="step", disable=None if progress else True) as bar:
        chosen = compare_first_calls(rows, reference, where, bar)
        runners = [row.runner for row in rows]
        share_rounds(runners, rounds, seconds)
        run_rounds(runners, where, done=bar.update)
    table = []
    for row in rows:
        quartiles = np.quantile(list(row.runner.samples.values()) or [math.nan], (0.5, 0.25, 0.75))
        ratios = [] if chosen is None else round_ratios(row.runner, chosen.runner)
        ratio = float(np.median(ratios or [math.nan]))
        table.append((row.name, shape, *quartiles.tolist(), ratio, row.peak, row.error, row.ulp, row.note))
    return pd.DataFrame(table, columns=list(COLUMNS))


def compare_first_calls(rows: list[_Version], reference: str | None, device: torch.device, bar: Bar) -> _Version | None:
    """First calls: the reference's, then the others', each compared with it; then memory and the length of a sample."""
    chosen, expected = None, None
    for row in reversed(rows):
        if reference in (None, row.name) and (given := first_call(row)) is not None:
            chosen, expected = row, [t.clone() for t in given]  # versions may share the tensors that they write
            break
    for row in rows:
        out = expected if row is chosen else first_call(row)
        if out is not None:
            row.note = "not compared: the reference did not run"
            if expected is not None and chosen is not None:
                row.error, row.ulp, row.note = differences(out, expected, chosen.name)
            del out  # or it would be in memory while the others run
            row.peak = peak_bytes(row.runner.call, device)
            calibrate(row.runner, device)
        bar.update()
    return chosen


def first_call(row: _Version) -> list[Tensor] | None:
    """What the version gives, or None and a note where it cannot run."""
    if row.note:
        return None
    try:
        return list(leaf_tensors(row.runner.call()))
    except UsageError as fault:
        row.note = f"unavailable: {fault}"
    except (RuntimeError, MemoryError) as fault:
        if not is_out_of_memory(fault):
            raise
        row.note = "ran out of memory"
    return None


def leaf_tensors(out: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples and lists, in their order."""
    if isinstance(out, (tuple, list)):
        for part in out:
            yield from leaf_tensors(part)
    else:
        yield torch.as_tensor(out).detach()


# --- agreement ----------------------------------------------------------------------------------------------------


def differences(
    out: Sequence[Tensor], expected: Sequence[Tensor], name: str = "the reference"
) -> tuple[float, float, str]:
    """Relative error and units in the last place, the largest of all pairs of outputs, and a note where they differ.

    A result of other shapes is infinitely far off; where anything is not finite both numbers are nan.
    """
    shapes, wanted = ([tuple(t.shape) for t in tensors] for tensors in (out, expected))
    if shapes != wanted:
        return math.inf, math.inf, f"differs from {name}: gives {shapes}, not {wanted}"
    errors, ulps, equal = [0.0], [0.0], True
    for x, y in zip(out, expected, strict=True):
        if not y.numel():
            continue
        x, y = x.reshape(1, -1), y.reshape(1, -1)
        errors.append(float(relative_error(x, y)[0]))
        y = y if y.is_floating_point() else y.double()
        ulps.append(float((x.double() - y.double()).abs().amax()) / float(unit_in_last_place(y.abs().amax())))
        equal &= errors[-1] <= format_of(y.dtype).loop_tolerance
    if any(map(math.isnan, errors)):
        return math.nan, math.nan, f"cannot be compared with {name}: not finite"
    return max(errors), max(ulps), "" if equal else f"differs from {name} by more than rounding"


def agreement(frame: pd.DataFrame, dtype: str | torch.dtype = "float32") -> str:
    """One sentence on the whole table: equal up to rounding, or which versions are not."""
    allowed = format_of(dtype).loop_tolerance
    ran = frame[frame["median"].notna()]
    if ran.empty:
        return "No version ran."
    blind = ran[ran["relative_error"].isna()]
    if len(blind):
        return f"Not compared: {', '.join(blind['version'].unique())} (not finite, or no reference)."
    wrong = ran[ran["relative_error"] > allowed]
    if len(wrong):
        worst = wrong["relative_error"].max()
        names = ", ".join(wrong["version"].unique())
        return f"NOT equal: {names} (relative error up to {worst:.2g}, rounding explains {allowed:.0e})."
    error, ulp, count = ran["relative_error"].max(), ran["ulp"].max(), ran["version"].nunique()
    numbers = f"relative error at most {error:.2g}, {ulp:.2g} units in the last place"
    return f"All {count} versions are equal up to rounding: {numbers}."
