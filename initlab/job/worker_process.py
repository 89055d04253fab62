"""What a job does first in a process that a launcher started: the command is restored, and one GPU is its own."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from initlab.runs.lock import take_lock


def is_worker() -> bool:
    """Was this process started by a launcher?"""
    return os.environ.get("INITLAB_PARENT", str(os.getpid())) != str(os.getpid())


@contextmanager
def as_worker(device: str) -> Iterator[None]:
    """Around a job in a process that a launcher started: the command that is recorded, and one GPU for it alone."""
    if not is_worker():
        yield
        return
    sys.argv = json.loads(os.environ["INITLAB_COMMAND"])
    gpus = os.environ.get("INITLAB_GPUS")
    if gpus == "all":
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    elif gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
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
def lock_one_of(names: list[str], seconds: float = 0.2) -> Iterator[int]:
    """Wait until one of the named things is nobody's, and have it until the end of the block: its index.

    Every process of this user on this machine that asks in this way is counted, also those of another sweep.
    """
    folder = Path(tempfile.gettempdir()) / f"initlab-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    folder.mkdir(mode=0o700, exist_ok=True)
    while True:
        for k, name in enumerate(names):
            descriptor = take_lock(folder / f"{name}.lock")
            if descriptor is not None:
                try:
                    yield k
                finally:
                    os.close(descriptor)
                return
        time.sleep(seconds)
