"""Cases in forked children of a fresh interpreter: each costs milliseconds, and none can harm the next."""

import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tests.reliability.attack import Case

ROOT = Path(__file__).parents[2]


def isolate(topic: str, count: int, seed: int, folder: Path) -> Iterator[Case]:
    """The cases of a topic's `attempts`, in an interpreter of its own: what tests left in this one cannot fork."""
    program = (
        f"from tests.reliability import forks, {topic}; forks.send({topic}.attempts({count}, {seed}, {str(folder)!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT, env=environment
    ) as process:
        for line in process.stdout or ():
            yield Case(**json.loads(line))
    assert process.returncode == 0


def send(attempts: Iterable[Case]) -> None:
    """Hand each case over as a line."""
    for case in attempts:
        print(json.dumps(vars(case)), flush=True)


def run_forked(call: Callable[[], int], folder: Path, seconds: int = 60, memory: int = 0) -> tuple[int, str, str]:
    """Exit code, output and errors of a call in a child with a folder and standard streams of its own.

    seconds: of CPU that it may take. memory: bytes that it may take beyond those that this process has; 0 for any.
    """
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            signal.alarm(20 * seconds)  # one that waits for ever ends, too
            if memory:
                now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, name in ((1, ".out"), (2, ".err")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
            sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
            sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
            code = call()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    out, err = ((folder / name).read_bytes().decode("utf-8", "replace") for name in (".out", ".err"))
    for name in (".out", ".err"):
        (folder / name).unlink()
    return os.waitstatus_to_exitcode(status), out, err
