"""One run to a folder: a lock that only a living process can hold.

It is a lock of the operating system on a file of the folder. It ends with its process, however that ends: what run.json
calls running and nobody holds was killed. Between machines it reaches as far as the file system's locks do.
"""

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from initlab.errors import UsageError, report_disk

LOCK = ".lock"
PATIENCE = 0.3  # seconds: whoever only asks holds a lock for a moment


@contextmanager
def hold_lock(path: Path, patience: float = 0.0) -> Iterator[bool]:
    """Hold the lock on a file, made if need be, until the end of the block; False if another process or thread has it.

    Errors: an OSError where the file cannot be made or opened.
    """
    from filelock import FileLock, Timeout  # takes 20 ms to import

    lock = FileLock(path, timeout=patience, poll_interval=0.02)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        left = True
        with suppress(OSError):  # Windows removes no open file
            path.unlink(missing_ok=True)  # while it is held, so that nobody waits on a file without a name
            left = False
        lock.release()
        if left:
            with suppress(OSError):
                path.unlink(missing_ok=True)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """The folder is this process's until the end of the block; a UsageError if it is another's or cannot be made."""
    with ExitStack() as stack:
        with report_disk(folder / LOCK):
            folder.mkdir(parents=True, exist_ok=True)
            held = stack.enter_context(hold_lock(folder / LOCK, PATIENCE))
        if not held:
            raise UsageError(f"{folder}: another process is working in it; wait for its end or stop it")
        yield


def is_locked(folder: Path | str, name: str = LOCK) -> bool:
    """Is a living process working in the folder? Of a lock that may not be tried nobody knows: then it is."""
    path = Path(folder, name)
    if not path.exists():
        return False
    try:
        with hold_lock(path) as held:
            return not held
    except OSError as error:
        return error.errno != errno.EROFS  # where nobody can write nobody works
