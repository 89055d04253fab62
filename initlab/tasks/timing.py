"""Timing a ladder: versions of one computation, side by side, with their memory and their agreement in the same run.

Fair means: every version is warmed up, a sample lasts long enough for the clock, and each round times all versions in
turn, in rotated order, so that a machine that slows down slows all of them. Knows nothing of what the versions compute.
On a CPU they run with the number of threads that torch is set to.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from initlab.errors import UsageError, choose
from initlab.signal.stats import relative_error
from initlab.tasks.memory import free_memory, is_out_of_memory, peak_bytes, readable
from initlab.tasks.place import DTYPES, find_device

Call = Callable[[], Any]  # gives a tensor, or tuples and lists of them, nested

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

# What rounding may do to sums of up to some 10,000 terms taken in another order: about sqrt(terms) eps, with room for
# a naive sum. The half formats are for loops that round every partial sum.
TOLERANCES: dict[torch.dtype, float] = {
    torch.float16: 3e-2,
    torch.bfloat16: 2e-1,
    torch.float32: 1e-5,
    torch.float64: 1e-12,
}

SAMPLE_SECONDS = 0.005  # asking the clock takes some 1e-7 s
FEWEST_SAMPLES = 3  # of a version that takes seconds; below that there are no quartiles


def check_timing(versions: Sized, rounds: int, seconds: float) -> None:
    """Refuse a ladder without rungs, no rounds, or a budget that is no time."""
    if not len(versions):
        raise UsageError("nothing to time: at least one version")
    if rounds < 1:
        raise UsageError(f"rounds={rounds}: must be at least 1")
    if not 0 < seconds < math.inf:
        raise UsageError(f"seconds={seconds:g}: must be a finite number above 0")


@dataclass
class _Version:
    """A row in the making."""

    name: str
    call: Call
    note: str = ""
    inner: int = 1  # calls a sample
    seconds: float = math.nan  # a call, roughly
    rounds: int = 0
    samples: dict[int, float] = field(default_factory=dict)  # round -> seconds a call
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
    check_timing(versions, rounds, seconds)
    if reference is not None:
        choose(versions, reference, "reference")
    place = find_device(device)
    limit = free_memory(place) / 2 if memory_limit is None else memory_limit
    rows = [_Version(name, call, (skip or {}).get(name, "")) for name, call in versions.items()]
    for row in rows:
        if not row.note and (needed := (needs or {}).get(row.name, 0)) > limit:
            row.note = f"skipped: needs {readable(needed)}, allowed are {readable(limit)}"
    with tqdm(total=len(rows) + rounds, desc=shape, unit="step", disable=None if progress else True) as bar:
        chosen = _prepare(rows, reference, place, bar)
        for row in rows:
            if not math.isnan(row.seconds):
                row.rounds = min(rounds, max(FEWEST_SAMPLES, int(seconds / (row.inner * row.seconds))))
        _sample([row for row in rows if row.rounds], place, bar)
    return pd.DataFrame([_as_row(row, shape, chosen) for row in rows], columns=list(COLUMNS))


def _prepare(rows: list[_Version], reference: str | None, device: torch.device, bar: tqdm) -> _Version | None:
    """First calls: the reference's, then the others', each compared with it; then memory and the length of a sample."""
    chosen, expected = None, None
    for row in reversed(rows):
        if reference in (None, row.name) and (given := _first_call(row)) is not None:
            chosen, expected = row, [t.clone() for t in given]  # versions may share the tensors that they write
            break
    for row in rows:
        out = expected if row is chosen else _first_call(row)
        if out is not None:
            row.note = "not compared: the reference did not run"
            if expected is not None and chosen is not None:
                row.error, row.ulp, row.note = differences(out, expected, chosen.name)
            del out  # or it would be in memory while the others run
            row.peak = peak_bytes(row.call, device)
            row.inner, row.seconds = _calibrated(row.call, device)
        bar.update()
    return chosen


def _first_call(row: _Version) -> list[Tensor] | None:
    """What the version gives, or None and a note where it cannot run."""
    if row.note:
        return None
    try:
        return list(_leaves(row.call()))
    except UsageError as fault:
        row.note = f"unavailable: {fault}"
    except (RuntimeError, MemoryError) as fault:
        if not is_out_of_memory(fault):
            raise
        row.note = "ran out of memory"
    return None


def _leaves(out: Any) -> Iterator[Tensor]:
    if isinstance(out, (tuple, list)):
        for part in out:
            yield from _leaves(part)
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
    pairs = [_difference(x, y) for x, y in zip(out, expected, strict=True) if y.numel()]
    if any(math.isnan(error) for error, _, _ in pairs):
        return math.nan, math.nan, f"cannot be compared with {name}: not finite"
    note = "" if all(equal for *_, equal in pairs) else f"differs from {name} by more than rounding"
    return max((error for error, *_ in pairs), default=0.0), max((ulp for _, ulp, _ in pairs), default=0.0), note


def _difference(x: Tensor, y: Tensor) -> tuple[float, float, bool]:
    """Relative error, units in the last place, and whether rounding explains them."""
    x, y = x.reshape(1, -1), y.reshape(1, -1)
    error = float(relative_error(x, y)[0])
    number = y.dtype if y.is_floating_point() else torch.float64
    exponent = int(torch.frexp(y.abs().amax().double()).exponent) - 1 if not math.isnan(error) else 0
    info = torch.finfo(number)
    ulp = info.eps * max(2.0**exponent, info.tiny)
    return error, float((x.double() - y.double()).abs().amax()) / ulp, error <= TOLERANCES.get(number, 0.0)


def agreement(frame: pd.DataFrame, dtype: str = "float32") -> str:
    """One sentence on the whole table: equal up to rounding, or which versions are not."""
    allowed = TOLERANCES[choose(DTYPES, dtype, "dtype")]
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


# --- time ---------------------------------------------------------------------------------------------------------


def seconds_each(call: Call, times: int, device: torch.device) -> float:
    """Seconds a call, over `times` calls; on a GPU by its own events."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            event: Any = torch.cuda.Event
            start, end = (event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(times):
                call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3 / times
    begun = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begun) / times


def _calibrated(call: Call, device: torch.device) -> tuple[int, float]:
    """Calls that make a sample long enough, and the seconds of one."""
    inner = 1
    while (each := max(seconds_each(call, inner, device), 1e-9)) * inner < SAMPLE_SECONDS:
        inner = max(2 * inner, math.ceil(SAMPLE_SECONDS / each))
    return inner, each


def _sample(rows: list[_Version], device: torch.device, bar: tqdm) -> None:
    """Round by round, all in turn; a slow version takes part in the first round and in some others, evenly spread."""
    rounds = max((row.rounds for row in rows), default=0)
    with _no_garbage_collection():
        for k in range(rounds):
            due = [row for row in rows if k * row.rounds % rounds < row.rounds]
            for place in range(len(due)):
                row = due[(place + k) % len(due)]
                if row.inner > 1:
                    row.call()  # brings back what the version before drove out of the cache
                row.samples[k] = seconds_each(row.call, row.inner, device)
            bar.update()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """As `timeit` does: a collection would hit whichever version runs when it is due."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _ratio(row: _Version, reference: _Version) -> float:
    """Median over the row's samples of each against the reference's of the same round, or of its last one before."""
    before = {k: max(r for r in reference.samples if r <= k) for k in row.samples}
    return float(np.median([each / reference.samples[before[k]] for k, each in row.samples.items()]))


def _as_row(row: _Version, shape: str, reference: _Version | None) -> dict[str, object]:
    q25, median, q75 = np.quantile(list(row.samples.values()) or [math.nan], (0.25, 0.5, 0.75))
    ratio = _ratio(row, reference) if row.samples and reference is not None else math.nan
    measured = (median, q25, q75, ratio, row.peak, row.error, row.ulp)
    return dict(zip(COLUMNS, (row.name, shape, *(float(x) for x in measured), row.note), strict=True))
