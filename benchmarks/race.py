"""A race: contestants timed in rotated rounds, and the ratios that are asked of it.

At one thread the clock is the process's CPU time, which other programs on the machine disturb least; at more threads
it is the time on the wall; on a GPU the device's own events. Knows nothing of what the contestants compute.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from benchmarks.rows import Missing, Row, quartiles
from initlab.tasks.course.rotated_timing import Clock, Runner, calibrate, round_ratios, run_rounds, share_rounds, wall

WARM_SECONDS = 0.05  # a shorter call runs once unwatched first, so that its own data are in the cache


class NotAvailable(Exception):
    """A contestant cannot run here; the message is the reason."""


class Contestant(NamedTuple):
    """A call that does `work` units of work (steps, networks), and what ends it."""

    call: Callable[[], Any]
    work: int = 1
    close: Callable[[], Any] = lambda: None


Builds = dict[str, Callable[[], Contestant]]  # name -> what makes the contestant, when its race begins


class Asked(NamedTuple):
    """The time of `over` divided by that of `under`, per unit of work."""

    id: str
    variant: str
    over: str
    under: str


class Setting(NamedTuple):
    """How long and where: `seconds` a contestant in at most `rounds` rounds; which ids and variants are measured."""

    threads: int = 1
    device: str = "cpu"
    rounds: int = 15
    seconds: float = 1.5
    quick: bool = False
    wanted: Callable[[str, str], bool] = lambda name, variant: True

    @property
    def clock(self) -> Clock:
        return time.process_time if self.threads == 1 else wall


@dataclass
class Outcome:
    """What a group brings home."""

    rows: list[Row] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # contestant -> median seconds a unit of work

    def add(self, other: "Outcome") -> None:
        self.rows += other.rows
        self.missing += other.missing
        self.seconds |= other.seconds


def row(asked_id: str, variant: str, samples: Sequence[float], setting: Setting, unit: str = "ratio") -> Row:
    """Median and quartiles of the samples."""
    return Row(asked_id, variant, *quartiles(samples), unit, setting.threads, setting.device, torch.__version__)


def run(builds: Builds, asked: Sequence[Asked], setting: Setting) -> Outcome:
    """Build the contestants, race them, close them, and divide.

    Only what is wanted is measured. A contestant whose build raises `NotAvailable` takes no part; what is asked of it
    comes back as missing.
    """
    left_out = {name for one in asked for name in (one.over, one.under)}
    asked = [one for one in asked if setting.wanted(one.id, one.variant)]
    left_out -= {name for one in asked for name in (one.over, one.under)}
    builds = {name: build for name, build in builds.items() if name not in left_out}
    contestants: dict[str, Contestant] = {}
    absent: dict[str, str] = {}
    outcome = Outcome()
    try:
        for name, build in builds.items():
            try:
                contestants[name] = build()
            except NotAvailable as reason:
                absent[name] = str(reason)
        runners = _timed(contestants, setting)
    finally:
        for contestant in contestants.values():
            contestant.close()
    for name, runner in runners.items():
        outcome.seconds[name] = quartiles(list(runner.samples.values()))[0] / contestants[name].work
    for question in asked:
        reasons = [absent[name] for name in (question.over, question.under) if name in absent]
        if reasons:
            outcome.missing.append(Missing(question.id, question.variant, reasons[0]))
            continue
        share = contestants[question.under].work / contestants[question.over].work
        ratios = [share * each for each in round_ratios(runners[question.over], runners[question.under])]
        outcome.rows.append(row(question.id, question.variant, ratios, setting))
    return outcome


def _timed(contestants: Mapping[str, Contestant], setting: Setting) -> dict[str, Runner]:
    place = torch.device(setting.device)
    runners = {name: Runner(contestant.call) for name, contestant in contestants.items()}
    for runner in runners.values():
        runner.call()  # the first call may compile, capture or allocate
        calibrate(runner, place, setting.clock)
    share_rounds(list(runners.values()), setting.rounds, setting.seconds)
    run_rounds(list(runners.values()), place, setting.clock, warm=WARM_SECONDS)
    return runners
