"""Runs and sweeps on disks that are full, forbidden, gone or sick: for good or for a moment, from any write on."""

import errno
import random
from collections.abc import Iterator
from pathlib import Path

from initlab.runs.folders import read_run_json
from tests.reliability.attack import Case
from tests.reliability.commands import Ended, Forks, forks
from tests.reliability.kills import (
    Whole,
    draw_command,
    faults_of_resuming,
    faults_of_rows,
    run_whole,
    where,
)

LARGE = 200
ERRORS = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO", "EFBIG", "ENOENT", "ESTALE", "EMFILE")
FOR_A_MOMENT = 3  # writes


def faults_of_end(folder: Path, ended: Ended) -> list[str]:
    """No traceback, no word but initlab's own, a path and a cure; and nobody is running."""
    faults = []
    if ended.code not in (0, 2):
        faults.append(f"exit code {ended.code}")
    if "Traceback" in ended.out + ended.err or "Logging error" in ended.err:
        faults.append(f"a traceback: {' | '.join((ended.out + ended.err).splitlines()[-4:])}")
    lines = [line for line in ended.err.splitlines() if line and "runs the jobs that are not done" not in line]
    if [line for line in lines if not line.startswith("initlab: ")]:
        faults.append(f"on standard error: {' | '.join(lines)[:300]}")
    if ended.code == 2 and not [line for line in lines if "x" in line and ("cannot be written" in line)]:
        faults.append(f"no path and no cure: {' | '.join(lines)[:300]}")
    for path in (folder / "x").rglob("run.json"):
        status = read_run_json(path.parent)["status"]
        if status not in ("done", "failed", "killed", "interrupted"):
            faults.append(f"{path.parent.name} is {status}")
        if ended.code == 0 and status != "done":
            faults.append(f"{path.parent.name} is {status} and the exit code 0")
    return faults


def refused_case(server: Forks, rng: random.Random, folder: Path, known: dict[str, Whole]) -> Case:
    """Some event of a file fails, and those after it for a moment or for good."""
    command = draw_command(rng)
    key = repr(command)
    if key not in known:
        known[key] = run_whole(server, command, folder / "whole")
    name, first = rng.choice(ERRORS), rng.randint(1, known[key].events)
    count = rng.choice([1, FOR_A_MOMENT, 10**9])
    refuse = {"errno": getattr(errno, name), "first": first, "count": count}
    ended = server.run(folder, where(command.words, "x"), refuse=refuse, **command.patches)
    faults = faults_of_end(folder, ended) + faults_of_rows(folder)
    if "-m" in command.words:
        faults += faults_of_resuming(server, command, folder, known[key])
    return Case(f"{command} {name} for {count} of {known[key].events} events from {first} on", "; ".join(faults))


def small_case(server: Forks, rng: random.Random, folder: Path, known: dict[str, Whole]) -> Case:
    """No file may be larger than so many bytes: what the system itself refuses."""
    command = draw_command(rng)
    most = int(2 ** rng.uniform(7, 16))
    ended = server.run(folder, where(command.words, "x"), largest=most, **command.patches)
    return Case(f"{command} files of at most {most} bytes", "; ".join(faults_of_end(folder, ended)))


def gone_case(server: Forks, rng: random.Random, folder: Path, known: dict[str, Whole]) -> Case:
    """The folder, or its parts, are removed or moved away while the run goes on, or are forbidden from the start."""
    command = draw_command(rng)
    key = repr(command)
    if key not in known:
        known[key] = run_whole(server, command, folder / "whole")
    how, event = rng.choice(["remove", "move", "remove parts", "file"]), rng.randint(1, known[key].events)
    if how == "file":
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "x").write_text("a file where a folder should be")
    gone = {} if how == "file" else {"how": how, "event": event}
    ended = server.run(folder, where(command.words, "x"), gone=gone, **command.patches)
    return Case(f"{command} {how} at event {event}", "; ".join(faults_of_end(folder, ended)))


def cases(count: int, seed: int, folder: Path) -> Iterator[Case]:
    rng = random.Random(seed)
    known: dict[str, Whole] = {}
    with forks() as server:
        for k in range(count):
            kind = rng.choices([refused_case, small_case, gone_case], [6, 2, 2])[0]
            yield kind(server, rng, folder / str(k), known)
