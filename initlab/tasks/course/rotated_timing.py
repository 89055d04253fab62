"""Calls timed against each other: samples long enough for the clock, rounds in rotated order, ratios within a round.

Each round times all calls in turn, so that a machine that slows down slows all of them, and the order rotates, so that
none always follows the same neighbour. On a CPU they run with the number of threads that torch is set to.
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], Any]
Clock = Callable[[], float]  # seconds since anything

SAMPLE_SECONDS = 0.005  # asking the clock takes some 1e-7 s
FEWEST_SAMPLES = 3  # of a call that takes seconds; below that there are no quartiles


def wall() -> float:
    """Seconds of the clock on the wall."""
    return time.perf_counter()


@dataclass
class Runner:
    """A call, how it is sampled and what was found; all times are seconds a call."""

    call: Call
    inner: int = 1  # calls a sample
    seconds: float = math.nan  # roughly
    rounds: int = 0  # in how many it takes part
    samples: dict[int, float] = field(default_factory=dict)  # round -> seconds


def seconds_each(call: Call, times: int, device: torch.device, clock: Clock = wall) -> float:
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
    begun = clock()
    for _ in range(times):
        call()
    return (clock() - begun) / times


def calibrate(runner: Runner, device: torch.device, clock: Clock = wall) -> None:
    """Find how many calls make a sample long enough, and the seconds of one."""
    runner.inner = 1
    while (each := max(seconds_each(runner.call, runner.inner, device, clock), 1e-9)) * runner.inner < SAMPLE_SECONDS:
        runner.inner = max(2 * runner.inner, math.ceil(SAMPLE_SECONDS / each))
    runner.seconds = each


def share_rounds(runners: Sequence[Runner], rounds: int, seconds: float) -> None:
    """Give each calibrated call about `seconds`: at most `rounds` rounds, and at least 3."""
    for runner in runners:
        if not math.isnan(runner.seconds):
            runner.rounds = min(rounds, max(FEWEST_SAMPLES, int(seconds / (runner.inner * runner.seconds))))


def run_rounds(
    runners: Sequence[Runner],
    device: torch.device,
    clock: Clock = wall,
    warm: float = 0.0,
    done: Callable[[], Any] = lambda: None,
) -> None:
    """Round by round, all in turn; a slow call takes part in the first round and in some others, evenly spread.

    A call of many to a sample, or one of less than `warm` seconds, runs once unwatched before its sample: that brings
    back what the call before drove out of the cache. `done()` is called after each round.
    """
    rounds = max((runner.rounds for runner in runners), default=0)
    was_enabled = gc.isenabled()  # as for `timeit`: a collection would hit whichever call runs when it is due
    gc.collect()
    gc.disable()
    try:
        for k in range(rounds):
            due = [runner for runner in runners if k * runner.rounds % rounds < runner.rounds]
            for turn in range(len(due)):
                runner = due[(turn + k) % len(due)]
                if runner.inner > 1 or runner.seconds < warm:
                    runner.call()
                runner.samples[k] = seconds_each(runner.call, runner.inner, device, clock)
            done()
    finally:
        if was_enabled:
            gc.enable()


def round_ratios(over: Runner, under: Runner) -> list[float]:
    """Each sample of `over` against that of `under` in the same round, or in its last one before; empty without any."""
    if not over.samples or not under.samples:
        return []
    before = {k: max(r for r in under.samples if r <= k) for k in over.samples}
    return [each / under.samples[before[k]] for k, each in over.samples.items()]
