"""What a job does first in a process that a launcher started: the command is restored, and one GPU is its own."""

import json
import os
import signal
import stat
import sys
import tempfile
import threading
import time
from _thread import interrupt_main
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from initlab import stops
from initlab.errors import UsageError
from initlab.runs.lock import hold_lock, is_locked
from initlab.runs.schema import COMMAND

LAUNCHER = ".launcher"  # in the folder of a sweep: a lock that its own process holds while others work for it
LOOKS = 0.5  # seconds between two looks at it
GRACE = 2.0  # seconds that a job has to come to its end when the sweep has


def is_worker() -> bool:
    """Was this process started by a launcher?"""
    return os.environ.get("INITLAB_PARENT", str(os.getpid())) != str(os.getpid())


@contextmanager
def as_worker(device: str) -> Iterator[None]:
    """Around a job in a process that a launcher started: the command that is recorded, and one GPU for it alone."""
    if not is_worker():
        yield
        return
    sys.argv = json.loads(os.environ[COMMAND])
    gpus = os.environ.get("INITLAB_GPUS")
    if gpus == "all":
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    elif gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    with end_with_launcher():
        import torch

        if device == "cpu" or not torch.cuda.is_available():
            yield
            return
        with lock_one_of(
            [f"gpu-{torch.cuda.get_device_properties(k).uuid}" for k in range(torch.cuda.device_count())]
        ) as k:
            torch.cuda.set_device(k)
            yield


@contextmanager
def end_with_launcher() -> Iterator[None]:
    """Within the block the process ends with the sweep that it works for, however that ends, two seconds after it.

    It does not outlive a signal of its own either: it would begin the next job.
    """
    folder = os.environ.get("INITLAB_SWEEP")
    if folder is None:  # a cluster's processes are the cluster's
        yield
        return
    stops.install()
    _end_with_parent()
    over = threading.Event()

    def watch() -> None:
        while is_locked(Path(folder), LAUNCHER):
            if over.wait(LOOKS):
                return
        if not stops.is_stopping():
            interrupt_main(signal.SIGTERM)
        over.wait(GRACE)
        stops.end(signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        stops.work(False)
        over.set()
        if stops.is_stopping():
            stops.end(stops.exit_code() - 128)


@cache  # once in a process, which may run one job after another
def _end_with_parent() -> None:
    """From now on this process ends when the one that started it is gone, also while it waits for a job.

    A job that runs then has its time to come to an end first.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOKS)
        time.sleep(LOOKS + 2 * GRACE)
        stops.end(signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def lock_one_of(names: list[str], seconds: float = 0.2) -> Iterator[int]:
    """Wait until one of the named things is nobody's, and have it until the end of the block: its index.

    Every process of this user on this machine that asks in this way is counted, also those of another sweep.
    Errors: a folder of locks that is not this user's alone.
    """
    folder = Path(tempfile.gettempdir()) / f"initlab-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if hasattr(os, "getuid") and (
        not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022
    ):
        raise UsageError(f"{folder}: is no folder of this user's alone; remove it, or let TMPDIR be another folder")
    while True:
        for k, name in enumerate(names):
            with hold_lock(folder / f"{name}.lock") as held:
                if held:
                    yield k
                    return
        time.sleep(seconds)
