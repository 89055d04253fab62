"""The life of a job: claimed, prepared, measured, printed and drawn; and how it ended, for the exit code.

Hydra calls `run_composed` for every job, in this process or in one that a launcher started. `outcome` collects what is
to be said when the command ends. A user's mistake leaves no folder; a fault leaves what was measured.
"""

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from initlab import stops
from initlab.errors import DISK, Fault, UsageError, disk_error, show
from initlab.terminal import is_aside

if TYPE_CHECKING:  # torch and pandas are imported when a job begins: a mistake in an option is found before
    from initlab.job.prepare import Job
    from initlab.job.settings import Config
    from initlab.studies.study import Study

log = logging.getLogger("initlab")


@dataclass
class Outcome:
    """What the command has to say at its end, and what its exit code follows from."""

    started: list[Path] = field(default_factory=list)  # folders of the jobs that this process began
    mistakes: list[str] = field(default_factory=list)  # of the user
    notes: list[str] = field(default_factory=list)  # what should be known of the result
    failed: list[str] = field(default_factory=list)  # expectations of a study
    ill: list[Path] = field(default_factory=list)  # folders of models that task=diagnose found an error in

    def clear(self) -> None:
        """A process may run one command after another."""
        for kept in vars(self).values():
            kept.clear()


outcome = Outcome()


def run_composed(cfg: DictConfig) -> str | float | None:
    """Run one job of Hydra's: the value of its objective, or the mistake of the user that ended it. Raises `Fault`."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from initlab.job.options import HYDRA_MISTAKES, as_usage_error
    from initlab.job.worker_process import as_worker
    from initlab.runs.lock import lock_folder
    from initlab.runs.recorder import discard

    setting = HydraConfig.get()
    folder = Path(setting.runtime.output_dir)
    single = setting.mode == RunMode.RUN
    outcome.started.append(folder)
    try:
        if cfg.resume is not None and single:
            discard(folder)
            raise UsageError(f"resume={cfg.resume}: is for a sweep; put -m before the options")
        with as_worker(str(cfg.device)), lock_folder(folder):
            return _run(cfg, folder, single)
    except HYDRA_MISTAKES as error:  # an interpolation of nothing, met before the configuration is read whole
        discard(folder)
        outcome.mistakes.append(str(as_usage_error(error)))
        return outcome.mistakes[-1]
    except UsageError as error:
        outcome.mistakes.append(str(error))
        return str(error)


def _run(cfg: DictConfig, folder: Path, single: bool) -> float | None:
    from hydra.core.hydra_config import HydraConfig

    from initlab.job.options import read_config
    from initlab.runs.folders import path_text
    from initlab.runs.recorder import discard

    setting = HydraConfig.get()
    resumed = cfg.resume is not None
    job = begin(lambda: read_config(cfg), dict(setting.runtime.choices), folder, resumed)
    study = None
    if single:  # the study of a sweep is judged after its last job
        try:
            study = study_of(cfg, setting.job.config_name, setting.overrides.task)
        except UsageError:
            discard(folder)
            raise
        if study.question:
            log.info(study.question)
    try:
        printed = job.run()
        if study is not None:
            if cfg.json:
                print(printed)
            else:
                log.info(printed)
            answer(folder, study, bool(cfg.plots))
        job.write_page()
    except Exception as error:
        raise as_ended(error, folder) from error
    if cfg.task == "diagnose" and not job.recorder.ok:
        outcome.ill.append(folder)
    if study is None:
        log.info("done: %s", path_text(folder))
    return job.value


def begin(config: "Callable[[], Config]", choices: dict[str, str | None], folder: Path, resumed: bool) -> "Job":
    """The job of this folder, prepared. After a `UsageError` the folder is gone, unless an earlier command made it."""
    from initlab.job import prepare
    from initlab.runs.recorder import clear, discard, refuse_used
    from initlab.tasks.ensemble.memory import is_out_of_memory

    if not gc.isenabled():  # the first job of this process; later ones leave garbage that must not be kept
        gc.freeze()  # what was imported stays, and no collection need look at it again
        gc.enable()
    if not resumed:
        refuse_used(folder)
    try:
        prepared = prepare.prepare(config(), choices, folder)
    except Exception as error:  # nothing is measured yet
        if not resumed:
            discard(folder)
        if is_out_of_memory(error):
            raise UsageError("out of memory before anything is measured; make it smaller") from error
        raise
    if resumed:
        clear(folder)  # of a run that did not end: the sweep asks for no other
    return prepared


def as_ended(error: Exception, folder: Path) -> UsageError | Fault:
    """What ended a job, as it goes on from here: a mistake of the user, or a fault that has been logged."""
    from initlab.runs.folders import path_text
    from initlab.tasks.ensemble.memory import is_out_of_memory

    stops.check()  # what a signal broke is no fault
    where = path_text(folder)
    if isinstance(error, UsageError):
        return error
    if isinstance(error, OSError) and (error.errno in DISK or str(error.filename).startswith(str(folder))):
        return disk_error(error, error.filename or where)
    if is_out_of_memory(error):
        return UsageError(f"out of memory; make seeds, width, depth or batch smaller. What was measured is in {where}")
    log.error("%s; what was measured is in %s", type(error).__name__, where, exc_info=error)
    return Fault(f"{where}: {type(error).__name__}: {error}")


def study_of(cfg: DictConfig, name: str | None, overrides: Any) -> "Study":
    """The study that a composed configuration is; raises `UsageError` where its form is wrong."""
    from initlab.job.options import option_names
    from initlab.studies.study import prepare

    about: Any
    expect: Any
    about, expect = (  # what an interpolation stands for has any type
        OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if OmegaConf.is_config(node) else node
        for node in (cfg.study, cfg.expect)
    )
    if not isinstance(about, dict):
        raise UsageError(f"study={show(about)}: must be a dictionary")
    for option, value, kind in (
        ("study.cost", about["cost"], dict),
        ("study.figure", about["figure"], dict),
        ("expect", expect, list),
    ):
        if not isinstance(value, kind):
            raise UsageError(f"{option}={value}: must be a {'list' if kind is list else 'dictionary'}")
    words: Any = OmegaConf.to_container(overrides, resolve=False)  # `width=${depth}` as it was typed
    return prepare(str(name), about, expect, option_names(), words)


def answer(folder: Path, study: "Study", plots: bool) -> None:
    """Print which expectations hold and draw the study's figure; a failure is remembered for the exit code."""
    from initlab.job.printout import read_tables
    from initlab.runs.folders import path_text
    from initlab.runs.read import find_runs
    from initlab.studies import study as studies

    if not study:
        return
    found = read_tables(find_runs(folder), study.tables())
    answers, mistakes = studies.answer(study, found, folder)
    for one in answers:
        log.info(str(one))
    path = None
    try:
        path = studies.draw(study, found, folder, answers) if plots else None
    except UsageError as error:
        mistakes.append(error)
    outcome.mistakes.extend(map(str, mistakes))
    if path is not None:
        log.info("figure: %s", path_text(path))
    if answers:
        log.info(studies.count(answers, len(study.expect)))
    outcome.failed.extend(one.say for one in answers if not one.as_said)


def finish_sweep(folder: Path, study: "Study | None", plots: bool, report: bool) -> None:
    """The short table, the comparing figures or the study's own, answers and page, where jobs left something."""
    from initlab.job.printout import report_sweep
    from initlab.runs.recorder import discard

    if next(folder.rglob("run.json"), None) is None:
        discard(folder)
        return
    printed, ended = report_sweep(folder, plots and not (study and study.figure), report)
    if is_aside():
        print(printed)
    else:
        log.info(printed)
    if study is not None:
        answer(folder, study, plots)
    if report:
        ended.write_page()
