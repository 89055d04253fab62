"""The same options give the same tables to the last bit, whatever the machine is told besides.

A run or a sweep is repeated with another launcher, number of cores, of threads in the environment, umask, seed of
Python's hashes, or rhythm of writing. The batched launcher may round what is measured elsewhere; its predictions and
keys may differ in nothing.
"""

import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

import initlab
from tests.reliability.attack import Case

LARGE = 60
SHARED = 6  # cases that are held against one reference
TABLES = ("stats", "losses", "theory", "parity", "histograms", "jacobian", "phase")
PREDICTED = ("predicted", "band_low", "band_high", "band68_low", "band68_high", "limit")

PROGRAM = """
import os, sys
os.umask({umask})
if {cores}:
    os.sched_setaffinity(0, {cores})
if {flush} is not None:
    from initlab.stats import buffer
    buffer.FLUSH_SECONDS = {flush}
from initlab.__main__ import main
sys.exit(main())
"""


def options(seed: int, number: int) -> tuple[str, ...]:
    """What is asked for: small, and anything; a sweep where it begins with -m."""
    rng = random.Random(f"determinism {seed} {number}")
    task = rng.choice(["lab", "lab", "stack", "train", "jacobian", "phase"])
    words = [f"task={task}", f"seeds={rng.randint(1, 3)}", f"seed={rng.randint(0, 99)}"]
    words += [f"depth={rng.randint(1, 6)}", f"width={rng.randint(2, 40)}", f"batch={rng.randint(2, 30)}"]
    words += [f"train.depth={rng.randint(0, 3)}", f"train.width={rng.randint(2, 40)}", "train.steps=4"]
    words += [f"train.batch={rng.randint(2, 60)}", f"train.optimizer={rng.choice(['sgd', 'momentum', 'adam'])}"]
    words += [f"init={rng.choice(['kaiming', 'orthogonal', 'torch_default', 'lsuv'])}"] if task != "phase" else []
    words += [f"threads={rng.choice([1, 1, 2])}", f"every={rng.randint(1, 2)}", "histograms=true"]
    words += ["phase.sw.points=3", "phase.sb.points=2", f"train.loss={rng.choice(['cross_entropy', 'mse'])}"]
    if rng.random() < 0.6 and task not in ("jacobian", "phase"):
        return ("-m", *words, f"activation=relu,{rng.choice(['tanh', 'gelu'])}")
    return (*words, f"activation={rng.choice(['relu', 'tanh', 'gelu', 'linear'])}")


def variation(rng: random.Random, sweep: bool) -> tuple[dict[str, Any], dict[str, str], tuple[str, ...]]:
    """What is different: of the process, of its environment, and on its command line."""
    cores = rng.choice([set(), set(), {0}, {max(os.sched_getaffinity(0))}])
    process: dict[str, Any] = {"umask": rng.choice([0o002, 0o022, 0o077]), "cores": cores, "flush": None}
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {name: str(rng.choice([1, 2, 3, 8])) for name in names if rng.random() < 0.6}
    if rng.random() < 0.4:  # imports numpy before the program does
        process["flush"], environment = rng.choice([0.0, 0.01, 0.3]), dict.fromkeys(names, "1")
    environment["PYTHONHASHSEED"] = str(rng.randint(0, 9999))
    launcher = rng.choice(["basic", "batched", "joblib"]) if sweep else "basic"
    return process, environment, (f"hydra/launcher={launcher}",) if launcher != "basic" else ()


def tables(folder: Path, words: Sequence[str], process: Mapping[str, Any], environment: Mapping[str, str]) -> Any:
    """All tables of a run or a sweep by name, or what it said where it failed."""
    where = "hydra.sweep.dir=out" if words[0] == "-m" else "hydra.run.dir=out"
    folder.mkdir(parents=True)
    paths = os.pathsep.join([str(Path(initlab.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(**process), *words, where, "plots=false", "report=false"],
        capture_output=True, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": paths} | environment, check=False,
    )  # fmt: skip
    if done.returncode:
        return f"exit code {done.returncode}: {done.stderr[-300:]}"
    found = {}
    for name in TABLES:
        files = sorted(folder.glob(f"out/**/{name}.parquet"))
        if files:
            found[name] = pd.concat([pd.read_parquet(path) for path in files], ignore_index=True)
    return found


@cache
def reference(folder: Path, words: tuple[str, ...]) -> Any:
    return tables(folder, words, {"umask": 0o022, "cores": set(), "flush": None}, {})


def difference(ours: Any, theirs: Any, batched: bool) -> str:
    """The first table and column that is another one, or nothing."""
    if isinstance(ours, str) or isinstance(theirs, str):
        return "" if ours == theirs else f"{ours if isinstance(ours, str) else theirs}"
    if ours.keys() != theirs.keys():
        return f"tables {sorted(ours)} and {sorted(theirs)}"
    for name, frame in ours.items():
        other = theirs[name]
        if list(frame) != list(other) or len(frame) != len(other):
            return f"{name}: {frame.shape} and {other.shape}"
        exact = [c for c in frame if not batched or frame[c].dtype.kind != "f" or c in PREDICTED]
        for column in exact:
            rows = frame[column].map(repr) != other[column].map(repr)
            if rows.any():
                return f"{name}.{column}: {rows.sum()} of {len(rows)} rows differ"
    return ""


def cases(count: int, seed: int, folder: Path) -> Iterator[Case]:
    for number in range(count):
        rng = random.Random(f"determinism variation {seed} {number}")
        words = options(seed, number // SHARED)
        process, environment, launcher = variation(rng, words[0] == "-m")
        expected = reference(folder / f"reference-{number // SHARED}", words)
        found = tables(folder / str(number), (*words, *launcher), process, environment)
        what = f"{' '.join((*words, *launcher))}; {process} {environment}"
        wrong = difference(found, expected, "batched" in str(launcher))
        yield Case(what, wrong or (expected if isinstance(expected, str) else ""))
