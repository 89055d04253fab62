"""One run to a folder: a lock that only a living process can hold.

It is a lock of the operating system on a file of the folder. It ends with its process, however that ends: what run.json
calls running and nobody holds was killed. Between machines it reaches as far as the file system's locks do.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from initlab.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows has other locks; there only run.json tells that a folder is in use
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


def take_lock(path: Path) -> int | None:
    """Take the lock on a file that is made if need be; None if it is taken, by another process or by this one.

    The descriptor that is returned keeps it; closing it gives it back.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if fcntl is None:
            return descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:  # a file system without locks: as good as on Windows
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # its last holder removed the file between our two calls


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """The folder is this process's until the end of the block; a UsageError if it is another's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor = take_lock(path)
    if descriptor is None:
        raise UsageError(f"{folder}: another process is working in it; wait for its end or stop it")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock goes, so that nobody waits on a file without a name
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Is a living process working in the folder?"""
    path = folder / LOCK
    if not path.exists():
        return False
    descriptor = take_lock(path)
    if descriptor is None:
        return True
    path.unlink(missing_ok=True)
    os.close(descriptor)
    return False
