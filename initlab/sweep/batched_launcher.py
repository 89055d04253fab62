"""The launcher `hydra/launcher=batched`: jobs of a sweep that agree in all but their networks, as one program."""

import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from initlab.errors import Fault, UsageError, report_disk
from initlab.job.life_cycle import as_ended, begin, outcome
from initlab.job.options import read_config
from initlab.job.settings import Config
from initlab.runs.lock import lock_folder
from initlab.sweep.hydra_private import MODULE, register

if TYPE_CHECKING:  # what measures is imported when there is something to measure
    from initlab.job.prepare import Job

log = logging.getLogger("initlab")

WINDOW = 1024  # jobs that are looked at together


@dataclass
class BatchedConfig:
    _target_: str = f"{MODULE}.Batched"


@dataclass(frozen=True)
class ComposedJob:
    """What is kept of a composed job: its configuration takes half a megabyte, and there may be thousands.

    `config` is typed, or the mistake in it; `files` are those that Hydra writes, by name. `by_hydra`: a setting
    concerns the whole process (its folder, its environment), so Hydra itself must run the job.
    """

    number: int
    overrides: Sequence[str]
    config: Config | UsageError
    choices: dict[str, str | None]
    folder: Path
    files: dict[str, str]
    job_logging: dict[str, Any]
    by_hydra: bool


def read_composed(composed: DictConfig, overrides: Sequence[str], number: int) -> ComposedJob:
    """Number a composed configuration, which is used up, and read off what `ComposedJob` keeps of it."""
    number_job(composed, number)
    hydra = composed.hydra
    about = OmegaConf.to_yaml(OmegaConf.masked_copy(composed, "hydra"))
    overridden = OmegaConf.to_yaml(hydra.overrides.task)
    choices, folder = dict(hydra.runtime.choices), Path(hydra.runtime.output_dir)
    job_logging: dict[str, Any] = OmegaConf.to_container(hydra.job_logging, resolve=True)  # type: ignore[assignment]
    whole_process = hydra.job.chdir or hydra.job.env_set or hydra.output_subdir is None or len(hydra.callbacks) > 1
    with read_write(composed), open_dict(composed):
        del composed["hydra"]
    files = {"config.yaml": OmegaConf.to_yaml(composed), "hydra.yaml": about, "overrides.yaml": overridden}
    by_hydra = bool(whole_process) or "${hydra:" in files["config.yaml"] + about
    try:
        config: Config | UsageError = read_config(composed)
    except UsageError as error:
        config = error
    return ComposedJob(number, overrides, config, choices, folder, files, job_logging, by_hydra)


def number_job(composed: DictConfig, number: int) -> None:
    """Say in the configuration which job of the sweep it is, and the folder that follows from it, as Hydra does."""
    with read_write(composed.hydra), open_dict(composed.hydra):
        composed.hydra.job.id = composed.hydra.job.num = number
        folder = Path(str(composed.hydra.sweep.dir), str(composed.hydra.sweep.subdir))
        composed.hydra.runtime.output_dir = os.path.abspath(folder)  # noqa: PTH100 - links are not resolved


class Batched(Launcher):
    """Runs the jobs of a sweep in this process, those that agree in all but their networks as one program.

    Every job gets the folder that Hydra's own launcher would make. What cannot share a program runs in its turn.
    """

    __module__ = MODULE

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._task, self._config = hydra_context, task_function, config
        self._pickled: dict[tuple[str, ...], bytes] = {}  # a composed configuration in 20 kB

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose every job before the first one begins, and keep it for `launch`. Errors: those of Hydra."""
        for overrides in batch:
            composed = self._compose(overrides)
            with suppress(pickle.PicklingError):  # a type that another plugin hides: it is composed again
                self._pickled[tuple(overrides)] = pickle.dumps(composed)

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        if (pickled := self._pickled.get(tuple(overrides))) is not None:
            return pickle.loads(pickled)  # type: ignore[no-any-return]
        return self._context.config_loader.load_sweep_config(self._config, list(overrides))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs, numbered from `initial_job_idx` on; what became of each, in their order."""
        setup_globals()
        self._log_as_hydra()
        Path(str(self._config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        log.info("Launching %d jobs in batches", len(job_overrides))
        found: dict[int, JobReturn] = {}
        for start in range(0, len(job_overrides), WINDOW):
            numbered = enumerate(job_overrides[start : start + WINDOW], initial_job_idx + start)
            jobs = [read_composed(self._compose(overrides), overrides, number) for number, overrides in numbered]
            for pack in _packs(jobs):
                found |= self._run(pack)
        return [found[number] for number in sorted(found)]

    def _log_as_hydra(self) -> None:
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)

    @contextmanager
    def _log_as_job(self, one: ComposedJob) -> Iterator[None]:
        """What is logged meanwhile goes where the job's log goes."""
        configure_log(OmegaConf.create(one.job_logging), self._config.hydra.verbose)
        try:
            yield
        finally:
            self._log_as_hydra()

    def _run(self, pack: Sequence[ComposedJob]) -> dict[int, JobReturn]:
        from initlab.sweep.batch import SHARING, run_jobs

        for one in pack:
            log.info("\t#%d : %s", one.number, " ".join(filter_overrides(one.overrides)))
        first = pack[0]
        mistaken = isinstance(first.config, UsageError)  # which is found on the way of a batch too
        if len(pack) == 1 and (first.by_hydra or not (mistaken or first.config.task in SHARING)):  # type: ignore[union-attr]
            composed = self._compose(first.overrides)
            number_job(composed, first.number)
            done = run_job(self._task, composed, "hydra.sweep.dir", "hydra.sweep.subdir", self._context)
            self._log_as_hydra()
            return {first.number: done}
        found: dict[int, JobReturn] = {}
        begun: list[tuple[ComposedJob, Job]] = []
        with ExitStack() as locks:
            for one in pack:
                try:
                    locks.enter_context(lock_folder(one.folder))
                    begun.append((one, self._begin(one)))
                except Exception as error:  # of the folder, say: the others have folders of their own
                    mistake = error if isinstance(error, UsageError) else as_ended(error, one.folder)
                    found[one.number] = self._job_return(one, mistake)
            if len(pack) == 1 and begun:  # what is logged on the way is about this job only
                with self._log_as_job(first):
                    (fault,) = run_jobs([begun[0][1]])
                    return {first.number: self._end(*begun[0], fault)}
            for (one, job), fault in zip(begun, run_jobs([job for _, job in begun]), strict=True):
                with self._log_as_job(one):
                    found[one.number] = self._end(one, job, fault)
        return found

    def _begin(self, one: ComposedJob) -> "Job":
        """The job, in a folder as Hydra would have made it. Errors: mistakes of the user."""

        def config() -> Config:  # asked for in a folder that is free, before the job is prepared
            about = one.folder / str(self._config.hydra.output_subdir)
            with report_disk(one.folder):
                about.mkdir(parents=True, exist_ok=True)
                for name, text in one.files.items():
                    (about / name).write_text(text, encoding="utf-8")
                for handler in one.job_logging.get("handlers", {}).values():
                    if "filename" in handler:
                        Path(handler["filename"]).touch()
            if isinstance(one.config, UsageError):
                raise one.config
            return one.config

        outcome.started.append(one.folder)
        return begin(config, one.choices, one.folder, resumed=self._config.resume is not None)

    def _end(self, one: ComposedJob, job: "Job", fault: Exception | None) -> JobReturn:
        """Draw the job's figures and log how it ended; whoever calls has the job's own log open."""
        from initlab.runs.folders import path_text

        try:
            if fault is not None:
                raise fault
            job.finish()
            job.write_page()
            log.info("done: %s", path_text(one.folder))
        except Exception as error:
            return self._job_return(one, as_ended(error, one.folder))
        return self._job_return(one, job.value)

    def _job_return(self, one: ComposedJob, end: UsageError | Fault | float | None) -> JobReturn:
        """As of a job that Hydra ran: a mistake of the user comes back as its line, the sweeper raises a fault."""
        done = JobReturn(overrides=list(one.overrides), working_dir=str(Path.cwd()))
        done.task_name = JobRuntime.instance().get("name")
        done.status = JobStatus.FAILED if isinstance(end, Fault) else JobStatus.COMPLETED
        done.return_value = str(end) if isinstance(end, UsageError) else end
        self._context.callbacks.on_job_end(config=self._config, job_return=done)
        return done


def _packs(jobs: Sequence[ComposedJob]) -> Iterator[list[ComposedJob]]:
    """Jobs that run together, in the order of the first of each program; the rest one by one."""
    from initlab.sweep.batch import count_networks, most_networks, pack_jobs, program_key

    programs: dict[object, list[tuple[ComposedJob, Config]]] = {}
    for one in jobs:
        key = None if isinstance(one.config, UsageError) or one.by_hydra else program_key(one.config)
        programs.setdefault(one.number if key is None else key, []).append((one, one.config))  # type: ignore[arg-type]
    for members in programs.values():
        if len(members) == 1:
            yield [members[0][0]]
            continue
        sizes = [count_networks(config) for _, config in members]
        yield from pack_jobs([one for one, _ in members], sizes, most_networks(members[0][1], sizes))


def install() -> None:
    """Let `hydra/launcher=batched` be this one."""
    register(Batched, "hydra/launcher", "batched", BatchedConfig())
