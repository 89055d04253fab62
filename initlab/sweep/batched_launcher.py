"""The launcher `hydra/launcher=batched`: jobs of a sweep that agree in all but their networks, as one program."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from initlab.errors import Fault, UsageError
from initlab.job.life_cycle import as_ended, begin, outcome
from initlab.job.settings import Config
from initlab.runs.lock import claim
from initlab.sweep.composing import Composed, Composer
from initlab.sweep.plugins import PLACE, register

if TYPE_CHECKING:  # what measures is imported when there is something to measure
    from initlab.job.prepare import Job

log = logging.getLogger("initlab")

WINDOW = 1024  # jobs that are looked at together


@dataclass
class BatchedConfig:
    _target_: str = f"{PLACE}.Batched"


class _Sent(NamedTuple):
    """A job that was handed to the launcher."""

    number: int
    overrides: Sequence[str]
    composed: Composed


class Batched(Launcher):
    """Runs the jobs of a sweep in this process, those that agree in all but their networks as one program.

    Every job gets the folder that it would have had alone. What cannot share a program runs by itself, in its turn.
    """

    __module__ = PLACE

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._composer = Composer(hydra_context.config_loader, config)
        self._context, self._task, self._config = hydra_context, task_function, config

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Whether every job can be composed, asked before the first one begins. Errors: those of Hydra."""
        for overrides in batch:
            self._composer.check(overrides)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        self._hydra_logging()
        Path(str(self._config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        log.info("Launching %d jobs in batches", len(job_overrides))
        found: dict[int, JobReturn] = {}
        for start in range(0, len(job_overrides), WINDOW):
            numbered = enumerate(job_overrides[start : start + WINDOW], initial_job_idx + start)
            sent = [_Sent(k, given, self._composer.compose(given, k)) for k, given in numbered]
            for pack in _packs(sent):
                found |= self._run(pack)
        return [found[number] for number in sorted(found)]

    def _hydra_logging(self) -> None:
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)

    @contextmanager
    def _job_logging(self, composed: Composed) -> Iterator[None]:
        """What is logged meanwhile goes where the job's log goes."""
        configure_log(OmegaConf.create(composed.job_logging), self._config.hydra.verbose)
        try:
            yield
        finally:
            self._hydra_logging()

    def _run(self, pack: Sequence[_Sent]) -> dict[int, JobReturn]:
        from initlab.sweep.batch import run_jobs

        for one in pack:
            log.info("\t#%d : %s", one.number, " ".join(filter_overrides(one.overrides)))
        if len(pack) == 1 and not _batches(pack[0].composed):
            return {pack[0].number: self._by_hydra(pack[0])}
        found: dict[int, JobReturn] = {}
        begun: list[tuple[_Sent, Job]] = []
        with ExitStack() as claims:
            for one in pack:
                folder = one.composed.folder
                try:
                    claims.enter_context(claim(folder))
                    begun.append((one, self._begin(one)))
                except Exception as error:  # of the folder, say: the others have folders of their own
                    mistake = error if isinstance(error, UsageError) else as_ended(error, folder)
                    found[one.number] = self._returned(one, mistake)
            if len(pack) == 1 and begun:  # what is logged on the way is about this job alone
                with self._job_logging(pack[0].composed):
                    (fault,) = run_jobs([begun[0][1]])
                    return {pack[0].number: self._end(*begun[0], fault)}
            for (one, job), fault in zip(begun, run_jobs([job for _, job in begun]), strict=True):
                with self._job_logging(one.composed):
                    found[one.number] = self._end(one, job, fault)
        return found

    def _begin(self, one: _Sent) -> "Job":
        """The job, in a folder as Hydra would have made it. Errors: mistakes of the user."""

        def config() -> Config:  # asked for in a folder that is free, before the job is prepared
            about = one.composed.folder / str(self._config.hydra.output_subdir)
            about.mkdir(parents=True, exist_ok=True)
            for name, text in one.composed.files.items():
                (about / name).write_text(text, encoding="utf-8")
            for handler in one.composed.job_logging.get("handlers", {}).values():
                if "filename" in handler:
                    Path(handler["filename"]).touch()
            return _config(one.composed)

        outcome.started.append(one.composed.folder)
        resumed = self._config.resume is not None
        return begin(config, one.composed.choices, one.composed.folder, resumed)

    def _end(self, one: _Sent, job: "Job", fault: Exception | None) -> JobReturn:
        """Draw and say what there is to say; whoever calls has the job's own log open."""
        from initlab.job.printout import shown

        folder = one.composed.folder
        try:
            if fault is not None:
                raise fault
            job.draw()
            log.info("done: %s", shown(folder))
        except Exception as error:
            return self._returned(one, as_ended(error, folder))
        return self._returned(one)

    def _returned(self, one: _Sent, error: UsageError | Fault | None = None) -> JobReturn:
        """As of a job that Hydra ran: a mistake of the user is told by its line, a fault is raised by the sweeper."""
        done = JobReturn(overrides=list(one.overrides), working_dir=str(Path.cwd()))
        done.task_name = JobRuntime.instance().get("name")
        done.status = JobStatus.FAILED if isinstance(error, Fault) else JobStatus.COMPLETED
        done.return_value = str(error) if isinstance(error, UsageError) else error
        self._context.callbacks.on_job_end(config=self._config, job_return=done)
        return done

    def _by_hydra(self, one: _Sent) -> JobReturn:
        done = run_job(
            hydra_context=self._context,
            task_function=self._task,
            config=self._composer.of_its_own(one.overrides, one.number),
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        self._hydra_logging()
        return done


def _config(composed: Composed) -> Config:
    if isinstance(composed.typed, UsageError):
        raise composed.typed
    return composed.typed


def _batches(composed: Composed) -> bool:
    """Whether the launcher runs the job itself; a mistake in it is found on that way too."""
    from initlab.sweep.batch import SHARING

    return not composed.alone and (isinstance(composed.typed, UsageError) or composed.typed.task in SHARING)


def _packs(sent: Sequence[_Sent]) -> Iterator[list[_Sent]]:
    """Jobs that run together, in the order of the first of each program; the rest one by one."""
    from initlab.sweep.batch import most_together, packs, shared_by, size_of

    programs: dict[object, list[_Sent]] = {}
    for one in sent:
        given = one.composed.typed
        key = None if isinstance(given, UsageError) or one.composed.alone else shared_by(given)
        programs.setdefault(one.number if key is None else key, []).append(one)
    for jobs in programs.values():
        if len(jobs) == 1:
            yield jobs
            continue
        configs = [_config(one.composed) for one in jobs]
        sizes = [size_of(one) for one in configs]
        yield from packs(jobs, sizes, most_together(configs[0], sizes))


def install() -> None:
    """Let `hydra/launcher=batched` be this one."""
    register(Batched, "hydra/launcher", "batched", BatchedConfig())
