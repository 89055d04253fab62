"""What surrounds the jobs of a sweep: where its folder is, who works in it, how far it is, what is said at the end."""

import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from initlab.output.claim import claim

FINISHED = ".finished"  # a byte for each job that ended in another process, wherever that was
SECONDS = 0.5  # between two looks at it


class Sweep(Callback):
    """Hydra's callback: remembers the sweep's folder and what its study expects, for what comes after the last job."""

    folder: ClassVar[Path | None] = None
    expect: ClassVar[list[Any]] = []
    plots: ClassVar[bool] = True
    mistakes: ClassVar[list[str]] = []  # of the user, in jobs that ran elsewhere
    notes: ClassVar[list[str]] = []  # what should be known of the result
    _bar: ClassVar[Any] = None
    _after: ClassVar[ExitStack] = ExitStack()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        Sweep.expect, Sweep.plots = [OmegaConf.to_container(one) for one in config.expect], bool(config.plots)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if Sweep._bar is not None:
            Sweep._bar.update()
        elif "num" in config.hydra.job and Path(config.hydra.sweep.dir, FINISHED).exists():
            with Path(config.hydra.sweep.dir, FINISHED).open("ab") as file:
                file.write(b".")

    @classmethod
    def forget(cls) -> None:
        """Nothing is known yet: a process may run one command after another."""
        cls.folder, cls.expect, cls.plots, cls.mistakes, cls.notes = None, [], True, [], []

    @classmethod
    def claim(cls, folder: Path) -> None:
        """From now to `close` the folder is this process's; a UsageError if another sweep is working in it."""
        cls._after.enter_context(claim(folder))

    @classmethod
    def begin(cls, folder: Path, jobs: int) -> None:
        """Nothing stands in the way of the jobs: show how far they are."""
        cls.folder = folder.absolute()
        cls._bar = tqdm(total=jobs, desc="sweep", unit="job", disable=None)
        cls._after.callback(cls._bar.close)
        if not cls._bar.disable:
            ended, over = folder / FINISHED, threading.Event()
            ended.write_bytes(b"")
            watch = threading.Thread(target=_watch, args=(ended, cls._bar, over), daemon=True)
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


def _watch(ended: Path, bar: Any, over: threading.Event) -> None:
    """Move the bar by the jobs that ended in other processes."""
    seen = 0
    while not over.wait(SECONDS):
        now = ended.stat().st_size
        bar.update(now - seen)
        seen = now
