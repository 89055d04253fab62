"""Where lines and bars of one program meet: neither overwrites the other, and tables are as wide as the terminal.

Every bar is a `Bar`, and every line of a job is written by `LineHandler`, Hydra's console.
"""

import html
import json
import logging
import math
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

with warnings.catch_warnings():  # that it is experimental, and of a notebook that has no ipywidgets
    warnings.simplefilter("ignore")
    from tqdm.autonotebook import tqdm  # tqdm.auto without asyncio, whose import takes longer

if TYPE_CHECKING:
    import pandas as pd

LINES = "INITLAB_LINES"  # variable of the environment: which lines there are
ONE_BAR = "TQDM_DISABLE"  # variable of the environment: the bar is another process's
SECOND = 1.0
FEW_JOBS = 20  # of a sweep: each has a line; where there are more the bar and the table say it
OF_A_JOB = re.compile(r"\t#\d+ : |done: |Launching \d+ jobs? ")


IN_NOTEBOOK = any(one.__name__ == "tqdm_notebook" for one in tqdm.__mro__)


class Bar(tqdm):  # type: ignore[misc] # tqdm has no types
    """A bar of tqdm's as wide as the terminal, gone when its work is done, without an estimate of no time.

    In a notebook it is one of ipywidgets, where they are installed.
    ticks: show every second how much time has passed, for steps that take many.
    """

    def __init__(self, *given: Any, ticks: bool = False, **options: Any) -> None:
        elsewhere = {"disable": True} if os.environ.get(ONE_BAR) else {}
        if IN_NOTEBOOK and options.get("disable", False) is None:  # which is: unless there is a terminal
            options["disable"] = False
        super().__init__(*given, **{"leave": False, "dynamic_ncols": True, **options, **elsewhere})
        self._over, self._clock = threading.Event(), threading.Thread(target=self._watch_time, daemon=True)
        if ticks and not self.disable:
            self._clock.start()

    def _watch_time(self) -> None:
        while not self._over.wait(SECOND):
            self.refresh()

    def close(self) -> None:
        """Remove the bar."""
        if hasattr(self, "_clock") and self._clock.is_alive():  # tqdm closes what it could not make
            self._over.set()
            self._clock.join()
        super().close()

    @staticmethod
    def format_meter(*given: Any, **options: Any) -> str:
        """The text of the bar; an estimate that is not known yet, or below a second, is left out."""
        return re.sub(r"<(\?|00:00)(?=[,\]])", "", tqdm.format_meter(*given, **options))


def text_as_html(one: object) -> str:
    """What `print` gives of an object, for a notebook."""
    return f"<pre>{html.escape(str(one))}</pre>"


class NotebookText:
    """What `print` gives of an object is what a notebook shows of it."""

    def _repr_html_(self) -> str:
        return text_as_html(self)


def choose_lines(aside: bool, jobs: int) -> None:
    """What lines there are, here and in all processes that are started from here.

    aside: standard output is another program's, and lines go to standard error. jobs: how many there are; where they
    are many they have no lines of their own.
    """
    os.environ[LINES] = " ".join(["aside"] * aside + ["few"] * (jobs > FEW_JOBS))


def is_aside() -> bool:
    """Whether standard output is another program's."""
    return "aside" in os.environ.get(LINES, "")


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes a line of the log above all bars, if `choose_lines` wants it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(sys.stderr if is_aside() else stream)

    def emit(self, record: logging.LogRecord) -> None:
        few = "few" in os.environ.get(LINES, "") and record.levelno <= logging.INFO
        if few and OF_A_JOB.match(record.getMessage()):
            return
        with Bar.external_write_mode(file=self.stream):
            if os.environ.get(ONE_BAR) and self.stream.isatty():
                self.stream.write("\r\x1b[K")  # the bar of another process stands there, and is soon drawn again
            super().emit(record)


def print_start(words: Sequence[str]) -> None:
    """Say on a terminal what is run, before the first second is over: imports take longer."""
    if sys.stderr.isatty():
        text = " ".join(words) or "all defaults"
        print(f"initlab: {text}"[: max(20, shutil.get_terminal_size().columns - 1)], file=sys.stderr, flush=True)


def find_width() -> int | None:
    """Columns of the terminal that standard output is; None where it is a file or another program."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrap_columns(table: "pd.DataFrame", fixed: int, width: int | None) -> str:
    """A table of texts without its index, in as many blocks as lines of `width` characters need; None for one block.

    fixed: how many columns name the rows; every block begins with them.
    """
    names = list(table)
    blocks, columns = [], names[:fixed]
    for name in names[fixed:]:
        line = table[[*columns, name]].to_string(index=False).split("\n")[0] if width else ""
        if len(columns) > fixed and len(line) > (width or 0):
            blocks.append(columns)
            columns = names[:fixed]
        columns = [*columns, name]
    return "\n\n".join(str(table[some].to_string(index=False)) for some in [*blocks, columns])


def as_plain(value: Any) -> Any:
    """What JSON can hold of a value; what is not finite stands as a text."""
    if isinstance(value, Mapping):
        return {str(name): as_plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(one) for one in value]
    if hasattr(value, "item"):  # numpy's
        return as_plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def as_json(found: Mapping[str, Any]) -> str:
    """An object as JSON; numbers that JSON has not, nan and inf, are texts.

    >>> as_json({"loss": float("inf")})
    '{\\n "loss": "inf"\\n}'
    """

    return json.dumps(as_plain(found), indent=1, ensure_ascii=False)


def close_pipe() -> None:
    """The reader of a pipe has seen enough: what is left is written to nowhere, also when Python ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
