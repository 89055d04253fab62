"""What Windows has not, and what it forbids: a run ends as well as elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import initlab
from initlab.runs.folders import read_run_json

# The command line where fcntl cannot be imported, a file that is open can be neither removed nor renamed nor replaced,
# and there is no /proc, no user's number and no list of processors.
WINDOWS = """
import os, pathlib, shutil, sys, warnings
sys.modules["fcntl"] = None
os.environ["USERNAME"] = "somebody"
proc = "/proc/self/fd"
def opened():
    found = set()
    for name in os.listdir(proc):
        try:
            found.add(os.readlink(f"{proc}/{name}"))
        except OSError:
            pass
    return found
def forbidding(name):
    own = getattr(os, name)
    def act(*paths, **options):
        whole = [os.path.abspath(os.fspath(path)) for path in paths if not options.get("dir_fd")]
        if set(whole) & opened():
            raise PermissionError(13, "being used by another process", whole[0])
        return own(*paths, **options)
    setattr(os, name, act)
for name in ("unlink", "remove", "rename", "replace"):
    forbidding(name)
for name in ("getuid", "sched_getaffinity", "fork", "setsid"):
    delattr(os, name)
seen = pathlib.Path.exists
pathlib.Path.exists = lambda self, **how: False if str(self).startswith("/proc") else seen(self, **how)
from initlab.__main__ import main
words = sys.argv[1:]
code = main()
sys.argv[1:] = [word for word in words if word not in ("-m", "seed=0,5")] + ["hydra.run.dir=x/2"]
sys.exit(code or main())
"""


@pytest.mark.long
def test_runs_and_sweeps_end_as_elsewhere(tmp_path: Path) -> None:
    words = ["task=lab", "depth=3", "width=5", "batch=4", "seeds=2", "train.steps=5", "train.width=4", "train.batch=8"]
    words += ["-m", "seed=0,5", "hydra.sweep.dir=x"]
    flags = ["-W", "ignore:only soft file lock"]  # filelock has a better one on Windows itself
    done = subprocess.run(
        [sys.executable, *flags, "-c", WINDOWS, *words, "plots=false", "report=false"],
        cwd=tmp_path, capture_output=True, text=True,
        check=False, env=os.environ | {"PYTHONPATH": str(Path(initlab.__file__).parents[1])},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    jobs = sorted(path.parent for path in (tmp_path / "x").glob("*/run.json"))
    assert len(jobs) == 3 and {read_run_json(job)["status"] for job in jobs} == {"done"}
    for job in jobs:
        left = {path.name for path in job.iterdir()}
        assert left == {
            ".hydra", "initlab.log", "run.json", "verdict.json",
            "stats.parquet", "theory.parquet", "losses.parquet", "parity.parquet",
        }  # fmt: skip
    assert len(initlab.read(tmp_path / "x")) > 0
