"""What surrounds the jobs of a sweep: its study, checked before the first job; its folder; its progress bar."""

import math
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf

from initlab.errors import UsageError
from initlab.job.life_cycle import study_of
from initlab.job.options import HYDRA_MISTAKES, as_usage_error
from initlab.runs.lock import lock_folder
from initlab.runs.recorder import refuse_used
from initlab.studies.study import Study
from initlab.terminal import Bar, choose_lines, is_aside

MOST_JOBS = 100_000  # of a sweep: their words alone take 100 MB
FINISHED = ".finished"  # a byte for each job that ended in another process, wherever that was
SECONDS = 0.5  # between two looks at it
OURS = "basic"  # the sweeper that runs all values


class Refused(BaseException):
    """A mistake found before the first job. Hydra makes warnings of the exceptions of a callback, but not of this."""


class Sweep(Callback):
    """Hydra's callback: remembers the sweep's folder and its study, for what comes after the last job."""

    folder: ClassVar[Path | None] = None
    single: ClassVar[Path | None] = None  # the folder of a run that is no sweep
    place: ClassVar[str] = ""  # the folder of either, from the first moment
    study: ClassVar[Study | None] = None
    plots: ClassVar[bool] = True
    report: ClassVar[bool] = True
    _bar: ClassVar[Any] = None
    _after: ClassVar[ExitStack] = ExitStack()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before Hydra writes of this run over what it wrote of another."""
        with _refuse_mistakes():
            _refuse_other_subdir(config)
            Sweep.place = str(config.hydra.run.dir)
            Sweep.single = Path(Sweep.place)
            refuse_used(Sweep.single)
            choose_lines(bool(config.json), 1)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with _refuse_mistakes():
            _refuse_other_subdir(config)
            Sweep.place = str(config.hydra.sweep.dir)
            parse_overrides(config.hydra.overrides.task, OmegaConf.select(config, "hydra.sweeper.params"))
            _refuse_without_objective(config)
            Sweep.study = study_of(config, config.hydra.job.config_name, config.hydra.overrides.task)
            Sweep.plots, Sweep.report = bool(config.plots), bool(config.report)
            choose_lines(bool(config.json), int(OmegaConf.select(config, "hydra.sweeper.n_trials") or 0))
        if Sweep.study.question:
            print(Sweep.study.question, file=sys.stderr if is_aside() else sys.stdout)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if _read_sweeper(config) != OURS and Path(Sweep.place).is_dir():  # a sweeper of others has run the jobs
            Sweep.folder = Path(Sweep.place).absolute()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if Sweep._bar is not None:
            Sweep._bar.update()
        elif "num" in config.hydra.job and Path(config.hydra.sweep.dir, FINISHED).exists():
            with suppress(OSError), Path(config.hydra.sweep.dir, FINISHED).open("ab") as file:
                file.write(b".")

    @classmethod
    def forget(cls) -> None:
        """Nothing is known yet: a process may run one command after another."""
        cls.folder, cls.single, cls.place, cls.study = None, None, "the working folder", None
        cls.plots = cls.report = True

    @classmethod
    def lock(cls, folder: Path) -> None:
        """From now to `close` the folder is this process's; a UsageError if another sweep is working in it."""
        cls._after.enter_context(lock_folder(folder))

    @classmethod
    def begin(cls, folder: Path, jobs: int) -> None:
        """Nothing stands in the way of the jobs: show how far they are."""
        cls.folder = folder.absolute()
        choose_lines(is_aside(), jobs)
        cls._bar = Bar(total=jobs, desc="sweep", unit="job", disable=None, smoothing=0)
        cls._after.callback(cls._bar.close)
        if not cls._bar.disable:
            ended, over = folder / FINISHED, threading.Event()
            ended.write_bytes(b"")
            watch = threading.Thread(target=watch_others, args=(ended, cls._bar, over), daemon=True)
            cls._after.enter_context(suppress(OSError))
            cls._after.callback(ended.unlink, missing_ok=True)
            cls._after.callback(watch.join)
            cls._after.callback(over.set)
            watch.start()

    @classmethod
    def close(cls) -> Path | None:
        """End the bar; the folder of the sweep, if one was begun. It stays this process's until `release`."""
        folder, cls.folder = cls.folder, None
        if cls._bar is not None:
            cls._bar.close()
            cls._bar = None
        return folder

    @classmethod
    def release(cls) -> None:
        """The folder is free again."""
        cls._after.close()
        cls._after = ExitStack()


@contextmanager
def _refuse_mistakes() -> Iterator[None]:
    """A mistake of the user in the block, however it is raised, ends the command: Hydra would go on with a warning."""
    try:
        yield
    except (UsageError, *HYDRA_MISTAKES) as error:
        raise Refused(str(error if isinstance(error, UsageError) else as_usage_error(error))) from error


def _read_sweeper(config: DictConfig) -> str:
    return str(config.hydra.runtime.choices.get("hydra/sweeper"))


def _refuse_without_objective(config: DictConfig) -> None:
    """A sweeper that seeks the best value must know of what, and begins anew each time."""
    kind = _read_sweeper(config)
    if kind == OURS:
        return
    if not config.objective:
        example = "objective.table=losses objective.statistic=loss objective.reduce=mean"
        raise UsageError(f"hydra/sweeper={kind}: needs an objective, such as {example}")
    if config.resume is not None:
        raise UsageError(f"resume={config.resume}: is for sweeps of all values; hydra/sweeper={kind} begins anew")


def _refuse_other_subdir(config: DictConfig) -> None:
    """The overrides that Hydra keeps there are read again: by `read` for what was swept, by `resume` for its jobs."""
    if config.hydra.output_subdir != ".hydra":
        raise UsageError(f"hydra.output_subdir={config.hydra.output_subdir}: must be .hydra, where runs are looked up")


def parse_overrides(arguments: Iterable[str], params: Mapping[str, Any] | None, loader: Any = None) -> list[Override]:
    """What the study's file (`params`) and the command line say of a sweep, as Hydra parses it.

    loader: Hydra's, of configurations; with it `glob` is known. Errors: a sweep of no jobs, or of too many.
    """
    if isinstance(arguments, ListConfig):
        arguments = OmegaConf.to_container(arguments, resolve=False)  # type: ignore[assignment]
    texts = [*(f"{key}={value}" for key, value in (params or {}).items()), *arguments]
    overrides = list(OverridesParser.create(config_loader=loader).parse_overrides(texts))
    counts = {override.get_key_element(): (_count_values(override), str(override.input_line)) for override in overrides}
    jobs = math.prod(count for count, _ in counts.values())
    if jobs > MOST_JOBS:
        swept = " ".join(word for count, word in counts.values() if count > 1)
        raise UsageError(f"{swept}: a sweep of {float(jobs):.6g} jobs; at most {MOST_JOBS:,}")
    return overrides


def _count_values(override: Override) -> int:
    """How many values an override has in a sweep, none of them made; at least one."""
    given, word = override.value(), override.input_line
    if isinstance(given, RangeSweep):
        start, stop, step = (math.nan if end is None else end for end in (given.start, given.stop, given.step))
        if step == 0 or not all(map(math.isfinite, (start, stop, step))):
            raise UsageError(f"{word}: a range needs finite ends, and a step that is not 0")
        count = max(0, math.ceil((stop - start) / step))
    elif isinstance(given, ChoiceSweep):
        count = len(given.list)
    else:
        count = 1
    if not count:
        raise UsageError(f"{word}: has no values, the sweep is empty")
    return count


def watch_others(ended: Path, bar: Any, over: threading.Event) -> None:
    """Move the bar by the jobs that ended in other processes."""
    seen = 0
    while not over.wait(SECONDS):
        with suppress(OSError):  # whoever removes it sees no bar
            now = ended.stat().st_size
            if now > seen:
                bar.update(now - seen)
            else:  # the time that has passed
                bar.refresh()
            seen = now
