"""Jobs of a sweep as one program: which can share one, how many at a time, and what becomes of each.

A fault in a shared program is looked for in halves, down to the job that has it; the others are measured all the same.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TypeVar

import pandas as pd

from initlab import stops
from initlab.errors import UsageError
from initlab.job.options import seeds
from initlab.job.prepare import Job
from initlab.job.settings import Config
from initlab.job.shared_program import EnsembleStage, run_together
from initlab.nn.init import RULES
from initlab.tasks.ensemble.device import find_device
from initlab.tasks.ensemble.plan import CACHED

SHARING = ("lab", "stack", "train")  # the tasks whose stages are all ensembles
NETWORKS_ON_GPU = 1024  # networks whose rows are in memory at once
JOBS = 256  # whose folders are locked at once: each lock is an open file
PATIENCE = 30.0  # seconds that rows of a short stage wait in memory before they are written

T = TypeVar("T")


def program_key(config: Config) -> str | None:
    """What jobs of one program have in common, as text; None for a job that runs by itself.

    They may differ in their networks: rule, gain, seed, and where gradient descent trains them also learning rate. A
    rule that looks at data runs by itself, since it logs how it went.
    """
    given = asdict(config)
    known = RULES.get(config.init.name)
    attempts = (known.attempts if known else 0) if config.init.attempts is None else config.init.attempts
    fitted = attempts or any(name in RULES and RULES[name].attempts for name in config.sweep.init or ())
    if config.task not in SHARING or fitted:
        return None
    for name in ("init", "seed", "seeds", "sweep", "study", "expect"):
        del given[name]
    if config.train.optimizer == "sgd" or config.task == "stack":
        del given["train"]["lr"]
    else:
        given["factors"] = (config.init.name, config.init.base_width, config.sweep.init)
    return repr(given)


def count_networks(config: Config) -> int:
    """Networks of a job."""
    axes = (config.sweep.init, config.sweep.gain, config.sweep.lr)
    return len(seeds(config)) * math.prod(len(axis) for axis in axes if axis is not None)


def pack_jobs(jobs: Iterable[T], sizes: Iterable[int], most: int) -> Iterator[list[T]]:
    """Whole jobs in their order, as many as have `most` networks, at least one and at most JOBS."""
    pack: list[T] = []
    count = 0
    for job, size in zip(jobs, sizes, strict=True):
        if pack and (count + size > most or len(pack) == JOBS):
            yield pack
            pack, count = [], 0
        pack.append(job)
        count += size
    if pack:
        yield pack


def most_networks(config: Config, sizes: Sequence[int]) -> int:
    """Networks of one program for jobs of these sizes: on a CPU what a cache holds.

    Stacks whose chunks are whole jobs anyway go on in one program: what is then shared is the comparison with theory.
    """
    try:
        if find_device(config.device).type != "cpu":
            return NETWORKS_ON_GPU
    except UsageError:  # raised again when the job is prepared
        return 1
    return 8 * CACHED if config.task == "stack" and all(size % CACHED == 0 for size in sizes) else CACHED


class _RunningJob:
    """A job that is measured: records the rows of its networks until something of its own goes wrong."""

    def __init__(self, job: Job) -> None:
        self.job, self.recorder, self.note = job, job.recorder, job.recorder.note
        self.keep_verdict = job.recorder.keep_verdict
        self.fault: Exception | None = None
        self.recorder.patience = PATIENCE
        self.closed = False

    def attempt(self, do: Callable[..., object], *given: object) -> None:
        """What fails is a fault of this job, and the first one counts."""
        try:
            do(*given)
        except Exception as fault:
            self.fault = self.fault or fault

    def add(self, frames: Mapping[str, pd.DataFrame]) -> None:
        if self.fault is None:
            self.attempt(self.recorder.add, frames)

    def close(self, stop: BaseException | None) -> None:
        if not self.closed:
            ended = self.fault or stop
            self.attempt(self.recorder.__exit__, type(ended) if ended else None, ended, None)
            self.closed = True


def run_jobs(jobs: Sequence[Job]) -> list[Exception | None]:
    """Measure and record all jobs, stage by stage in shared programs; the fault of each that has one.

    Jobs must be of one program, see `program_key`. However it ends, every run folder says how.
    """
    running = [_RunningJob(job) for job in jobs]
    try:
        with _write_in_time(running):
            for one in running:
                one.attempt(one.recorder.__enter__)
            for k in range(len(jobs[0].stages) if jobs else 0):
                _run_stage([one for one in running if one.fault is None], k)
        for one in running:
            one.close(None)
    except BaseException as stop:
        for one in running:
            one.close(stop)
        raise
    return [one.fault for one in running]


@contextmanager
def _write_in_time(running: Sequence[_RunningJob]) -> Iterator[None]:
    """Within the block rows are written when they have waited for long, whether others come or not."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(PATIENCE / 10):
            for one in running:
                with suppress(UsageError):  # it is met again when the job itself writes
                    one.recorder.flush(PATIENCE)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _run_stage(running: Sequence[_RunningJob], k: int) -> None:
    if not running:
        return
    marks = [one.recorder.mark() for one in running]
    stages = [one.job.stages[k] for one in running]
    shared = [stage for stage in stages if isinstance(stage, EnsembleStage)]
    try:
        if len(shared) == len(stages):
            run_together(shared, running)
        else:  # a stage that only one job can have
            stages[0](running[0].recorder)
    except Exception as fault:
        stops.check()  # what a signal broke is no fault
        if len(running) == 1:
            running[0].fault = fault
            return
        for one, mark in zip(running, marks, strict=True):
            one.attempt(one.recorder.rewind, mark)
        middle = len(running) // 2
        _run_stage([one for one in running[:middle] if one.fault is None], k)
        _run_stage([one for one in running[middle:] if one.fault is None], k)
