"""What surrounds the jobs of a sweep: its study, checked before the first job; its folder; its progress bar."""

import threading
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from tqdm import tqdm

from initlab.errors import UsageError
from initlab.job.life_cycle import study_of
from initlab.runs.lock import lock_folder
from initlab.runs.recorder import refuse_used
from initlab.studies.study import Study

FINISHED = ".finished"  # a byte for each job that ended in another process, wherever that was
SECONDS = 0.5  # between two looks at it


class Refused(BaseException):
    """A mistake found before the first job. Hydra makes warnings of the exceptions of a callback, but not of this."""


class Sweep(Callback):
    """Hydra's callback: remembers the sweep's folder and its study, for what comes after the last job."""

    folder: ClassVar[Path | None] = None
    study: ClassVar[Study | None] = None
    plots: ClassVar[bool] = True
    _bar: ClassVar[Any] = None
    _after: ClassVar[ExitStack] = ExitStack()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before Hydra writes of this run over what it wrote of another."""
        try:
            refuse_used(Path(str(config.hydra.run.dir)))
        except UsageError as error:
            raise Refused(str(error)) from error

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            overrides = parse_overrides(config.hydra.overrides.task, config.hydra.sweeper.get("params"))
        except HydraException:  # which Hydra itself will say
            overrides = []
        try:
            for override in overrides:
                listed = override.is_choice_sweep() or override.is_range_sweep()
                if listed and next(iter(override.sweep_string_iterator()), None) is None:
                    raise UsageError(f"{override.input_line}: has no values, the sweep is empty")
            Sweep.study = study_of(config, config.hydra.job.config_name, config.hydra.overrides.task)
        except UsageError as error:
            raise Refused(str(error)) from error
        Sweep.plots = bool(config.plots)
        if Sweep.study.question:
            print(Sweep.study.question)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if Sweep._bar is not None:
            Sweep._bar.update()
        elif "num" in config.hydra.job and Path(config.hydra.sweep.dir, FINISHED).exists():
            with suppress(OSError), Path(config.hydra.sweep.dir, FINISHED).open("ab") as file:
                file.write(b".")

    @classmethod
    def forget(cls) -> None:
        """Nothing is known yet: a process may run one command after another."""
        cls.folder, cls.study, cls.plots = None, None, True

    @classmethod
    def lock(cls, folder: Path) -> None:
        """From now to `close` the folder is this process's; a UsageError if another sweep is working in it."""
        cls._after.enter_context(lock_folder(folder))

    @classmethod
    def begin(cls, folder: Path, jobs: int) -> None:
        """Nothing stands in the way of the jobs: show how far they are."""
        cls.folder = folder.absolute()
        cls._bar = tqdm(total=jobs, desc="sweep", unit="job", disable=None)
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


def parse_overrides(arguments: Iterable[str], params: Mapping[str, Any] | None) -> list[Override]:
    """What the study's file (`params`) and the command line say of a sweep, as Hydra parses it."""
    texts = [*(f"{key}={value}" for key, value in (params or {}).items()), *arguments]
    return list(OverridesParser.create().parse_overrides(texts))


def watch_others(ended: Path, bar: Any, over: threading.Event) -> None:
    """Move the bar by the jobs that ended in other processes."""
    seen = 0
    while not over.wait(SECONDS):
        with suppress(OSError):  # whoever removes it sees no bar
            now = ended.stat().st_size
            bar.update(now - seen)
            seen = now
