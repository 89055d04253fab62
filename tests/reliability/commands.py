"""The command line in processes that cost no import: a server imports all of it once, and forks for each command.

A forked process can be told to send itself signals at its n-th event: a write, a renaming or a removal of a file, just
before it or just after. Every part that it has flushed is kept beside the run, so that nothing can be lost unseen.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import initlab

PRELOADED = (
    "initlab.__main__", "initlab.job.life_cycle", "initlab.job.options", "initlab.job.prepare", "initlab.runs.recorder",
    "initlab.runs.read", "initlab.sweep.batched_launcher", "initlab.sweep.batch", "initlab.sweep.resume",
    "initlab.sweep.sweeper", "initlab.sweep.workers", "initlab.tasks.stack", "initlab.tasks.train", "polars",
    "torch._dynamo",  # the first optimizer imports it: two thirds of what a short training costs
)  # fmt: skip
FLUSHED = "flushed"  # folder beside the runs: a second name of every part that was flushed


@dataclass
class Ended:
    """How a command ended: its exit code (less than 0: the signal that killed it), and what it printed."""

    code: int
    out: str
    err: str


class Running:
    """A command that runs; `wait` for its end, or send it signals before."""

    def __init__(self, server: "subprocess.Popen[str]", folder: Path, pid: int) -> None:
        self.server, self.folder, self.pid = server, folder, pid

    def wait(self) -> Ended:
        assert self.server.stdout is not None
        code = os.waitstatus_to_exitcode(int(self.server.stdout.readline()))
        out, err = ((self.folder / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err"))
        return Ended(code, out, err)


class Forks:
    """Starts commands, one at a time."""

    def __init__(self) -> None:
        root = Path(initlab.__file__).parents[1]
        paths = os.pathsep.join([str(Path(__file__).parents[2]), str(root)])
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.commands"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, process_group=0,
        )  # fmt: skip

    def start(
        self,
        folder: Path,
        words: Sequence[str],
        signals: Mapping[int, int] | None = None,
        refuse: Mapping[str, int] | None = None,
        gone: Mapping[str, Any] | None = None,
        largest: int = 0,
        **patches: Any,
    ) -> Running:
        """`initlab WORDS` in a folder. signals: number of an event -> the signal. patches: `module__NAME` -> value.

        refuse: the `errno` of `count` events from the `first` on. gone: `how` the folder x is taken away at an `event`.
        largest: no file may have more bytes than this.
        """
        folder.mkdir(parents=True, exist_ok=True)
        asked = {"folder": str(folder), "words": list(words), "signals": signals or {}, "patches": patches}
        asked |= {"refuse": refuse or {}, "gone": gone or {}, "largest": largest}
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        return Running(self._server, folder, int(self._server.stdout.readline()))

    def run(self, folder: Path, words: Sequence[str], **asked: Any) -> Ended:
        return self.start(folder, words, **asked).wait()

    def close(self) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


@contextmanager
def forks() -> Iterator[Forks]:
    server = Forks()
    try:
        yield server
    finally:
        server.close()


# --- in the forked process --------------------------------------------------------------------------------------------


def watch_events(asked: Mapping[str, Any], folder: Path) -> list[int]:
    """Send the signals at their events, and refuse what is refused; the list holds how many events there have been."""
    import pyarrow.parquet as pq

    events = [0]
    signals = {int(n): number for n, number in asked["signals"].items()}
    refuse, gone = asked["refuse"], asked["gone"]

    def event() -> None:
        events[0] += 1
        if events[0] in signals:
            os.kill(os.getpid(), signals[events[0]])
        if gone and gone["event"] == events[0]:
            take_away(folder / "x", gone["how"])
        if refuse and refuse["first"] <= events[0] < refuse["first"] + refuse["count"]:
            raise OSError(refuse["errno"], os.strerror(refuse["errno"]))

    def watched(owner: Any, name: str, after: Callable[..., None] = lambda *_: None) -> None:
        own = getattr(owner, name)

        def act(self: Any, *given: Any, **options: Any) -> Any:
            event()
            found = own(self, *given, **options)
            after(self, *given)
            if signals:
                event()
            else:
                events[0] += 1
            return found

        setattr(owner, name, act)

    def keep(source: Path, target: Path) -> None:
        target = Path(target)
        if target.parent.name == "parts":
            kept = folder / FLUSHED / target.parents[1].absolute().relative_to(folder)
            kept.mkdir(parents=True, exist_ok=True)
            os.link(target, kept / f"{target.stem}-{time.monotonic_ns()}.parquet")

    watched(Path, "replace", keep)
    watched(Path, "mkdir")
    watched(Path, "write_text")
    watched(Path, "touch")
    watched(Path, "unlink")
    watched(pq.ParquetWriter, "write_table")
    return events


def limit_files(most: int) -> None:
    """From now on the system refuses larger files."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def take_away(folder: Path, how: str) -> None:
    """Remove a folder, or the parts in it, or move it."""
    if how == "remove parts":
        for parts in list(folder.rglob("parts")):
            shutil.rmtree(parts, ignore_errors=True)
    elif how == "remove":
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.rename(folder.with_name("moved"))


def _become_command(asked: Mapping[str, Any]) -> int:
    folder = Path(asked["folder"])
    os.chdir(folder)
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    for name, value in asked["patches"].items():
        module, _, attribute = name.rpartition("__")
        setattr(import_module(module.replace("__", ".")), attribute, value)
    if asked["largest"]:
        limit_files(asked["largest"])
    events = watch_events(asked, folder)
    sys.argv = ["initlab", *asked["words"]]
    from initlab.__main__ import main

    try:
        code = main()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    if not asked["refuse"] and not asked["largest"]:
        (folder / "events").write_text(str(events[0]))
    return code


def serve() -> None:
    for name in PRELOADED:
        import_module(name)
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _become_command(json.loads(line))
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    serve()
