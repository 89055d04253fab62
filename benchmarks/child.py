"""Fresh processes: what they take of the processor and of the memory."""

import contextlib
import io
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.race import NotAvailable

ROOT = Path(__file__).parents[1]


def python(words: Sequence[str], threads: int, folder: Path = ROOT) -> tuple[float, str]:
    """CPU seconds (user and system) of `python WORDS`, and what it printed; run in `folder`, this checkout first."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    before = cpu_seconds()
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    spent = cpu_seconds() - before
    if done.returncode:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise NotAvailable(f"`python {' '.join(words)}` ended with {done.returncode}: {said}")
    return spent, done.stdout


def cpu_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def type_command(words: Sequence[str]) -> None:
    """Run `initlab WORDS` in this process, a child, in an empty folder and without a word."""
    from initlab.__main__ import main

    sys.argv = ["initlab", *words, "plots=false", "report=false", "device=cpu"]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        if main() != 0:
            raise NotAvailable(f"`{' '.join(sys.argv)}` failed")
