"""A rule passes few hands between the command line and the numbers, and a task imports no other task.

The route is traced: in a fresh process `task=stack init=kaiming depth=3` runs under `sys.setprofile`, which sees every
call of a function. A function of the package carries the rule if one of its arguments, `self` among them, is a `Rule`,
or a list, tuple, dictionary or dataclass that has a `Rule` directly among its entries or fields. What is reached only
through two containers, and the rule's name as a text, are not counted. Comprehensions count as their function.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import initlab

TRACE = """
import dataclasses, json, os, re, sys
import initlab.__main__
from initlab.nn.init import Rule

found = set()
folder = os.path.dirname(initlab.__file__)

def holds(value):
    if isinstance(value, Rule):
        return True
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = vars(value).values()
    return any(isinstance(part, Rule) for part in parts)

def profile(frame, event, _):
    code = frame.f_code
    if event != "call" or not code.co_filename.startswith(folder):
        return
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
    if any(holds(frame.f_locals[name]) for name in code.co_varnames[:count] if name in frame.f_locals):
        name = re.sub(r"(\\.<locals>\\.<\\w+>)+$", "", code.co_qualname)
        found.add((os.path.relpath(code.co_filename, folder), name))

sys.argv[1:] = ["task=stack", "init=kaiming", "depth=3", "width=8", "seeds=2", "plots=false", "report=false"]
sys.setprofile(profile)
try:
    code = initlab.__main__.main()
finally:
    sys.setprofile(None)
    print("ROUTE", json.dumps(sorted(found)))
sys.exit(code)
"""


def run(folder: Path, *words: str) -> str:
    paths = os.pathsep.join([str(Path(initlab.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-c", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, env=environment).stdout


@pytest.mark.long
def test_a_rule_passes_few_hands(tmp_path: Path) -> None:
    (line,) = [line for line in run(tmp_path, TRACE).splitlines() if line.startswith("ROUTE ")]
    route = json.loads(line.removeprefix("ROUTE "))
    assert {"draw", "predict"} <= {name for _, name in route}  # else the trace has seen nothing
    assert len(route) <= 25 and len({file for file, _ in route}) <= 10, "\n".join(map(str, route))


# The libraries are imported once; then a process is forked for each task.
IMPORTS = """
import os, sys
import hydra, pandas, polars, pyarrow.parquet, torch
import initlab.__main__
for task in ("gains", "stack", "train", "explain"):
    sys.stdout.flush()
    if os.fork() == 0:
        sys.argv[1:] = [f"task={task}", f"hydra.run.dir={task}", "plots=false", "report=false"]
        sys.argv += ["seeds=1", "depth=2", "train.steps=1"]
        code = initlab.__main__.main()
        print("TASKS", task, *(name for name in sys.modules if name.startswith("initlab.tasks.")), flush=True)
        os._exit(code)
    assert os.wait()[1] == 0
"""
SHARED = {"data", "ensemble"}  # what tasks have in common: no task is in there


OWN = {"gains": {"gains"}, "stack": {"stack"}, "train": {"train", "twins"}, "explain": {"course"}}


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs to fork")
def test_a_task_imports_no_other_task(tmp_path: Path) -> None:
    lines = [line.split()[1:] for line in run(tmp_path, IMPORTS).splitlines() if line.startswith("TASKS ")]
    assert {task: {name.split(".")[2] for name in names} - SHARED for task, *names in lines} == OWN
    assert all("initlab.tasks.course.graph" not in names for task, *names in lines if task == "explain")
