"""Trainings of many rows: how much memory their end takes beside what came before, and how soon a signal ends them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

import initlab
from tests.reliability.attack import Case
from tests.reliability.kills import faults_of_rows

LARGE = 6
MOST_MEMORY = 1.2  # of what the training took
MOST_CPU = 2.0  # seconds, from a signal to the end
ROWS = {1: (150_000,), LARGE: (1_000_000, 1_000_000, 10_000_000)}  # by how many cases there are at least


def resident(pid: int) -> int:
    """Bytes of memory that a process has; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


def status(folder: Path) -> str:
    try:
        return str(json.loads((folder / "x" / "run.json").read_text())["status"])
    except (OSError, ValueError):
        return "not begun"


def long_case(rng: random.Random, folder: Path, rows: int, stopped: bool) -> Case:
    depth, seeds = rng.choice([(1, 1), (1, 8), (2, 8), (1, 24), (1, 64), (6, 8)])
    steps = rows // (seeds * (16 + 16 * depth))
    if stopped:
        steps *= 3
    words = [f"train.depth={depth}", f"seeds={seeds}", f"train.steps={steps}", "task=train", "train.width=8"]
    words += ["train.batch=8", "theory=off", "plots=false", "report=false", "device=cpu", "hydra.run.dir=x"]
    folder.mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "initlab", *words], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(initlab.__file__).parents[1]), "TQDM_DISABLE": "1"}, text=True,
    )  # fmt: skip
    peaks, asked_at, last, looked = {"training": 0, "end": 0}, -1.0, 0.0, 0.0
    while process.poll() is None:
        ended = status(folder) not in ("not begun", "running")
        name = "end" if ended or asked_at >= 0 else "training"
        peaks[name] = max(peaks[name], resident(process.pid))
        if stopped and asked_at < 0 and time.monotonic() - looked > 0.5:
            looked = time.monotonic()
            parts = list(folder.glob("x/parts/stats-*.parquet"))
            written = sum(pq.read_metadata(part).num_rows for part in parts)
            if written >= rows:
                asked_at = cpu_seconds(process.pid)
                process.send_signal(signal.SIGTERM)
        last = max(last, cpu_seconds(process.pid))
        time.sleep(0.01)
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    faults = faults_of_rows(folder) if rows < 2_000_000 else []
    if process.returncode != (143 if stopped else 0) or "Traceback" in err:
        faults.append(f"exit code {process.returncode}: {err[-300:]}")
    ratio = peaks["end"] / max(peaks["training"], 1)
    if ratio > MOST_MEMORY:
        faults.append(f"the end took {ratio:.2f} of the memory of the training, {peaks['training'] / 2**20:.0f} MiB")
    if stopped and last - asked_at > MOST_CPU:
        faults.append(f"the end took {last - asked_at:.1f} s of CPU")
    said = f"{' '.join(words)} {'stopped' if stopped else 'ended'} at {rows:,} rows: memory {ratio:.2f}"
    return Case(said + (f", {last - asked_at:.1f} s" if stopped else ""), "; ".join(faults))


def cases(count: int, seed: int, folder: Path) -> Iterator[Case]:
    rng = random.Random(seed)
    sizes = ROWS[max(least for least in ROWS if least <= count)]
    for k in range(count):
        yield long_case(rng, folder / str(k), sizes[k // 2 % len(sizes)], stopped=k % 2 == 0)
