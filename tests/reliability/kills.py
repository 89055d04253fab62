"""Runs and sweeps that are killed or stopped, anywhere: while a file is written, between two, at the end, twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

import initlab
from initlab.errors import UsageError
from initlab.runs.folders import read_run_json
from initlab.runs.schema import TABLES
from tests.reliability.attack import Case
from tests.reliability.commands import FLUSHED, Ended, Forks, forks

LARGE = 400
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SMALL = (
    "plots=false",
    "report=false",
    "device=cpu",
    "seeds=2",
    "depth=4",
    "width=6",
    "batch=4",
    "train.width=4",
    "train.batch=8",
)
AXES = ("-m", "init=naive,kaiming", "seed=0,5")


class Command(NamedTuple):
    """What is run, and the constants that make it write often."""

    words: tuple[str, ...]
    patches: dict[str, Any]


def draw_command(rng: random.Random) -> Command:
    """A run or a sweep; with few rows in memory, groups and tables of few rows, or as usual."""
    launcher = rng.choice(["", "basic", "batched"])
    task, theory, histograms = rng.choice(
        [("train", "off", "true"), ("lab", "closed", "false"), ("train", "closed", "false"), ("stack", "off", "false")]
    )
    words = [*SMALL, f"task={task}", f"theory={theory}", f"histograms={histograms}", "train.steps=12"]
    if launcher:
        words = [*AXES, f"hydra/launcher={launcher}", *words]
    patches: dict[str, Any] = {"initlab__tasks__twins__FLUSH_ROWS": 200, "initlab__tasks__stack__FLUSH_ROWS": 8}
    if rng.random() < 0.7:  # with small data what is done for large ones
        patches |= {"initlab__runs__recorder__KEPT": 0, "initlab__runs__parts__GROUP": 64}
        patches |= {"initlab__runs__parts__AT_ONCE": 128, "initlab__sweep__batch__PATIENCE": 0.01}
    return Command(tuple(words), patches)


class Whole(NamedTuple):
    """The same command when nobody stops it."""

    events: int
    seconds: float
    tables: dict[str, pd.DataFrame]


def read_tables(folder: Path) -> dict[str, pd.DataFrame]:
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in TABLES:
            try:
                found[name] = initlab.read(folder, table=name)
            except UsageError:
                continue
    return {name: frame.assign(run=[str(Path(run).name) for run in frame["run"]]) for name, frame in found.items()}


def where(words: Sequence[str], folder: str) -> tuple[str, ...]:
    return (*words, f"hydra.{'sweep' if '-m' in words else 'run'}.dir={folder}")


def run_whole(server: Forks, command: Command, folder: Path) -> Whole:
    begun = time.monotonic()
    ended = server.run(folder, where(command.words, "x"), **command.patches)
    assert ended.code == 0, ended.err
    return Whole(int((folder / "events").read_text()), time.monotonic() - begun, read_tables(folder / "x"))


def keys_of(frame: pd.DataFrame, table: str) -> list[str]:
    names = [*TABLES[table].keys, "seed", "init", "run"]
    return [name for name in names if name in frame]


def faults_of_rows(folder: Path) -> list[str]:
    """Rows that stand twice, and rows that were flushed and are gone."""
    faults = []
    for table, frame in read_tables(folder / "x").items():
        keys = keys_of(frame, table)
        if not TABLES[table].keys and "layer" in frame:
            keys = [*keys, "stage", "implementation", "step", "layer", "tensor", "direction"]
        if frame.duplicated(keys).any():
            faults.append(f"{frame.duplicated(keys).sum()} of {len(frame)} rows of {table} twice")
        files = sorted((folder / FLUSHED).rglob(f"{table}-*.parquet"))
        if files:
            flushed = pd.concat([pd.read_parquet(file).assign(run=file.parent.name) for file in files])
            left = flushed[keys].astype(str).merge(frame[keys].astype(str), "left", indicator=True)["_merge"]
            if (left == "left_only").any():
                faults.append(f"{(left == 'left_only').sum()} flushed rows of {table} lost")
    tables = {file.name.split("-")[0] for file in (folder / FLUSHED).rglob("*.parquet")}
    gone = [table for table in tables if not list((folder / "x").rglob(f"{table}*.parquet"))]
    return [*faults, *(f"all flushed rows of {table} lost" for table in gone)]


def faults_of_end(folder: Path, ended: Ended, sent: Sequence[int]) -> list[str]:
    """What the exit code, the error stream and the statuses say."""
    faults = []
    allowed = {0, *(-number if number == signal.SIGKILL else 128 + number for number in sent)}
    if ended.code not in allowed:
        faults.append(f"exit code {ended.code}")
    if "Traceback" in ended.err or "Error" in ended.err:
        faults.append(f"on standard error: {' | '.join(ended.err.splitlines()[-3:])}")
    for path in (folder / "x").rglob("run.json"):
        status = read_run_json(path.parent)["status"]
        raw = json.loads(path.read_text())["status"]
        if status not in ("done", "interrupted", "killed"):
            faults.append(f"{path.parent.name} is {status}")
        elif raw == "running" and signal.SIGKILL not in sent:
            faults.append(f"{path.parent.name} says running after {ended.code}")
    return faults


def faults_of_resuming(server: Forks, command: Command, folder: Path, whole: Whole) -> list[str]:
    if not (folder / "x" / "multirun.yaml").exists():
        return []
    ended = server.run(folder, (*command.words, "resume=x"), **command.patches)
    if ended.code:
        return [f"resuming ends with {ended.code}: {ended.err[-300:]}"]
    now = read_tables(folder / "x")
    if set(now) != set(whole.tables):
        return [f"resumed: tables {sorted(now)}"]
    faults = []
    for name, frame in whole.tables.items():
        try:
            pd.testing.assert_frame_equal(now[name], frame, check_exact=True, check_categorical=False)
        except AssertionError as error:
            faults.append(f"resumed: {name} differs: {' '.join(str(error).split())[:200]}")
    return faults


def forked_case(server: Forks, rng: random.Random, folder: Path, known: dict[str, Whole]) -> Case:
    """A signal at an event, or at a moment, perhaps a second one soon after."""
    command = draw_command(rng)
    key = repr(command)
    command.patches["initlab__runs__recorder__SMALL"] = rng.choice([0, 2**26])
    if key not in known:
        known[key] = run_whole(server, command, folder / "whole")
    whole = known[key]
    numbers = [rng.choice(SIGNALS)]
    if numbers[0] != signal.SIGKILL and rng.random() < 0.5:
        numbers.append(rng.choice(SIGNALS))
    if rng.random() < 0.75:
        first = rng.randint(1, whole.events)
        moments = [first, first + rng.randint(1, 12)][: len(numbers)]
        what = f"{dict(zip(moments, numbers, strict=True))} of {whole.events} events"
        signals = dict(zip(moments, map(int, numbers), strict=True))
        ended = server.start(folder, where(command.words, "x"), signals, **command.patches).wait()
    else:
        delays = [rng.uniform(0, whole.seconds), rng.choice([0.0, 0.01, 0.1])]
        what = f"{[int(n) for n in numbers]} after {delays[0]:.3f} and {delays[1]} s"
        running = server.start(folder, where(command.words, "x"), **command.patches)
        for delay, number in zip(delays, numbers, strict=False):
            time.sleep(delay)
            with suppress(ProcessLookupError):  # it has ended
                os.kill(running.pid, number)
        ended = running.wait()
        if ended.code in (-signal.SIGINT, -signal.SIGTERM) and not (folder / "x").exists():
            ended = Ended(0, "", "")  # before the command was one
    faults = faults_of_end(folder, ended, numbers) + faults_of_rows(folder)
    if "-m" in command.words:
        faults += faults_of_resuming(server, command, folder, whole)
    return Case(f"{command} signals {what}", "; ".join(faults))


def importing_case(rng: random.Random, folder: Path) -> Case:
    """Ctrl-C or SIGTERM while a real process imports what it needs."""
    folder.mkdir(parents=True, exist_ok=True)
    number, delay = rng.choice(SIGNALS[1:]), rng.uniform(0.1, 3.0)
    words = [*SMALL, "task=train", "hydra.run.dir=x"]
    process = subprocess.Popen(
        [sys.executable, "-c", "import initlab.__main__ as m, sys; print(flush=True); sys.exit(m.main())", *words],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(initlab.__file__).parents[1])},
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(delay - 0.1)
    process.send_signal(number)
    ended = Ended(*(lambda out_err: (process.returncode, *out_err))(process.communicate()))
    return Case(f"{number.name} after {delay:.2f} s", "; ".join(faults_of_end(folder, ended, [number])))


def processes_in(folder: Path) -> list[int]:
    """Processes whose working folder is this one; on Linux."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").resolve() == folder.resolve() and b"resource_tracker" not in (
                entry / "cmdline"
            ).read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def launched_case(server: Forks, rng: random.Random, folder: Path, known: dict[str, Whole]) -> Case:
    """A sweep whose jobs run in processes of their own, which must end with it."""
    launcher = rng.choice(["joblib", "submitit_local"])
    words = (*AXES, *SMALL, "task=train", "theory=off", "train.steps=3000")
    if "launched" not in known:
        known["launched"] = run_whole(server, Command(words, {}), folder / "whole")
    command = Command((*words, f"hydra/launcher={launcher}"), {})
    number = rng.choice(SIGNALS)
    running = server.start(folder, where(command.words, "x"))
    wanted = rng.randint(1, 3)
    while len(list((folder / "x").glob("*/run.json"))) < wanted:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 1.0))
    os.kill(running.pid, number)
    ended = running.wait()
    faults = [fault for fault in faults_of_end(folder, ended, [number, signal.SIGKILL]) if "is running" not in fault]
    last = time.monotonic() + 30
    while (left := processes_in(folder)) and time.monotonic() < last:
        time.sleep(0.1)
    if left:
        faults.append(f"{len(left)} processes are at work after 30 s")
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    faults += faults_of_rows(folder)
    for path in (folder / "x").rglob("run.json"):
        if read_run_json(path.parent)["status"] == "running":
            faults.append(f"{path.parent.name} is running")
    faults += faults_of_resuming(server, Command(words, {}), folder, known["launched"])
    return Case(f"{launcher}: {number.name} after {wanted} jobs began", "; ".join(faults))


def cases(count: int, seed: int, folder: Path) -> Iterator[Case]:
    rng = random.Random(seed)
    known: dict[str, Whole] = {}
    with forks() as server:
        for k in range(count):
            here = folder / str(k)
            if k % 20 == 7:
                yield importing_case(rng, here)
            elif k % 20 == 13:
                yield launched_case(server, rng, here, known)
            else:
                yield forked_case(server, rng, here, known)
