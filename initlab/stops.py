"""How a signal ends the program. Three states, and a signal moves on by one:

idle      nothing is being measured (imports, options, after the end): the program ends at once.
at work   every open run says in its run.json that it was interrupted; then an exception ends what is measured. While
          a file is being written the signal is only remembered, and the exception comes when the file is whole.
stopping  what was measured is being put in order: the next signal ends the program at once, parts stay as they are.

What ends at once is as safe as a kill: files bear their names only when they are whole.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name))

_at_work = False
_asked: int | None = None  # the signal that the program is obeying
_writing = 0  # files that are being written, one inside the other
_first: dict[object, Callable[[], object]] = {}  # what is done first, before the exception


class Stopped(KeyboardInterrupt):
    """Raised where a signal ends what is going on. (Of a plain KeyboardInterrupt Python kills itself in the end.)"""


def install() -> None:
    """Obey signals from now on in the state `idle`; in a thread that cannot, nothing changes."""
    global _at_work, _asked
    if threading.current_thread() is threading.main_thread():
        _at_work, _asked = False, None
        for number in NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, _obey)


def work(begun: bool = True) -> None:
    """From here on there is something to put in order, or not any more."""
    global _at_work
    _at_work = begun


def is_stopping() -> bool:
    """Whether a signal has asked the program to end."""
    return _asked is not None


def exit_code() -> int:
    """As a shell has it: 128 and the number of the signal; 0 where none came."""
    return 0 if _asked is None else 128 + _asked


def check() -> None:
    """Go on stopping where a library has swallowed the exception, and in threads, which get none."""
    if _asked is not None and not isinstance(sys.exception(), Stopped):
        raise Stopped


@contextmanager
def first(do: Callable[[], object]) -> Iterator[None]:
    """Within the block a signal does this before anything else."""
    name = object()
    _first[name] = do
    try:
        yield
    finally:
        _first.pop(name, None)


@contextmanager
def whole() -> Iterator[None]:
    """No signal comes between the lines of the block: it is obeyed at its end."""
    global _writing
    if threading.current_thread() is not threading.main_thread():  # which gets none
        yield
        return
    _writing += 1
    try:
        yield
    finally:
        _writing -= 1
        if not _writing and _asked is not None:
            _prepare()
            check()


def end(number: int, line: str = "") -> NoReturn:
    """End the program at once, with a line on standard error: nothing of it runs any more."""
    if line:
        with suppress(OSError):
            os.write(2, f"initlab: {line}\n".encode())
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # it may be in use
            stream.flush()
    os._exit(128 + number)


def _obey(number: int, frame: FrameType | None) -> None:
    global _asked
    if not _at_work and _asked is None:
        end(number, "stopped")
    if _asked is not None:
        _prepare()
        end(number, "stopped at once; what was written is kept")
    _asked = number
    if not _writing:
        _prepare()
        raise Stopped


def _prepare() -> None:
    """What comes first, each once; a signal on the way does what is left of it."""
    global _writing
    _writing += 1  # what is written here ends in no exception
    while _first:
        name = next(iter(_first))
        with suppress(Exception):
            _first[name]()
        _first.pop(name, None)
    _writing -= 1
