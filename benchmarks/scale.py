"""What a sweep of many runs costs its disk and its readers: `python -m benchmarks.scale 1000 10000`.

Run folders are written by initlab's own recorder from the frames of one small stack, with what Hydra writes beside
them; then they are walked, read, looked through for what is left to do, and made one file. Experiments/SCALE.md says
what follows from the numbers for a million runs. Times are CPU seconds of one process, user and system.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from initlab import read
from initlab.runs import folders
from initlab.runs import recorder as records
from initlab.sweep import resume
from initlab.tasks.stack import stack

BLOCK = 512  # bytes, what st_blocks counts
GROUP = 1000  # folders in a folder of the grouped layout
HYDRA = {"config.yaml": 700, "hydra.yaml": 3700}  # characters, as the basic launcher's jobs have them
COLUMNS = {"task": "stack", "init": "kaiming", "activation": "relu", "depth": 2, "width": 10, "batch": 10, "lr": 0.1}


def frames(depth: int, width: int, seeds: int) -> dict[str, pd.DataFrame]:
    """The tables of one stack."""
    found: dict[str, list[pd.DataFrame]] = {}

    def emit(tables: Mapping[str, pd.DataFrame]) -> None:
        for name, frame in tables.items():
            found.setdefault(name, []).append(frame)

    where = {"depth": depth, "width": width, "inputs": width, "batch": 10}
    stack(init="kaiming", activation="relu", seeds=range(seeds), emit=emit, **where)  # type: ignore[arg-type]
    return {name: pd.concat(parts) for name, parts in found.items()}


def write(root: Path, count: int, tables: dict[str, pd.DataFrame], place: Callable[[int], str]) -> None:
    """Folders as the basic launcher leaves them."""
    for k in range(count):
        folder = root / place(k)
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra" / "config.yaml").write_text("#" * HYDRA["config.yaml"])
        (folder / ".hydra" / "hydra.yaml").write_text(f"hydra:\n  job:\n    num: {k}\n" + "#" * HYDRA["hydra.yaml"])
        (folder / ".hydra" / "overrides.yaml").write_text(f"- seed={k}\n- task=stack\n")
        (folder / "initlab.log").write_text(f"[2026-01-01 00:00:00,000] INFO done: {folder}\n")
        with records.Recorder(folder, COLUMNS | {"seed_of_run": k}, "cpu, 1 thread(s)") as recorder:
            recorder.add({name: _other(frame, k) for name, frame in tables.items()})


def _other(frame: pd.DataFrame, k: int) -> pd.DataFrame:
    """The same table of another network: numbers that no compression finds again."""
    changed = frame.select_dtypes("float64") * np.random.default_rng(k).normal(size=(len(frame), 1))
    return frame.assign(**{str(name): changed[name] for name in changed})


def flat(k: int) -> str:
    return str(k)


def grouped(k: int) -> str:
    return f"{k // GROUP:03d}/{k}"


def cpu(act: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = act()
    return time.process_time() - start, found


def footprint(root: Path) -> dict[str, float]:
    """Files, folders, bytes as counted and as taken from the disk, and entries of the fullest folder."""
    files = below_all = said = taken = fullest = 0
    for here, below, names in os.walk(root):
        fullest = max(fullest, len(below) + len(names))
        below_all += len(below)
        files += len(names)
        for name in names:
            state = Path(here, name).stat()
            said, taken = said + state.st_size, taken + state.st_blocks * BLOCK
        taken += Path(here).stat().st_blocks * BLOCK
    return {"files": files, "folders": below_all, "bytes": said, "on disk": taken, "fullest folder": fullest}


def measure(count: int, tables: dict[str, pd.DataFrame], place: Callable[[int], str], within: str | None) -> pd.Series:
    """One row: everything per run but for the fullest folder."""
    with tempfile.TemporaryDirectory(dir=within) as name:
        root = Path(name)
        times = {"write ms": cpu(lambda: write(root, count, tables, place))[0]}
        size = footprint(root)
        times["walk ms"] = cpu(lambda: [folders.read_run_json(folder.path) for folder in folders.find_folders(root)])[0]
        times["left ms"] = cpu(lambda: sum(run.done for run in resume.find_jobs(root)))[0]
        times["read ms"], frame = cpu(lambda: read(root))
        assert len(frame) == count * len(tables["stats"])
        one = root / "all.parquet"
        times["compact ms"] = cpu(lambda: frame.to_parquet(one, compression="zstd"))[0]
        compact = one.stat().st_size
        times["read compact ms"] = cpu(lambda: pd.read_parquet(one))[0]
        times["remove ms"] = cpu(lambda: shutil.rmtree(root, ignore_errors=True))[0]
        root.mkdir()
    per_run = {key: value / count for key, value in size.items() if key != "fullest folder"}
    row = {"runs": count, "rows": len(tables["stats"]), **per_run, "compact bytes": compact / count}
    return pd.Series(row | {"fullest folder": size["fullest folder"]} | {k: 1000 * v / count for k, v in times.items()})


def fan(count: int, place: Callable[[int], str], within: str | None) -> pd.Series:
    """Making, listing and finding empty folders, in one folder or in groups."""
    with tempfile.TemporaryDirectory(dir=within) as name:
        root = Path(name)

        def make() -> None:
            for k in range(count):
                (root / place(k)).mkdir(parents=True)

        made = cpu(make)[0]
        listed = cpu(lambda: sum(len(below) for _, below, _ in os.walk(root)))[0]
        found = cpu(lambda: [(root / place(k * 7919 % count)).stat() for k in range(count)])[0]
        size = root.stat().st_size
    times = {"make us": made, "list us": listed, "find us": found}
    row = {"folders": count, "layout": place.__name__, "bytes of the upper folder": size}
    return pd.Series(row | {key: 1e6 * value / count for key, value in times.items()})


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.scale", description="What many runs cost.")
    parser.add_argument("counts", nargs="*", type=int, default=[], help="runs, such as 1000 10000")
    parser.add_argument("--depth", type=int, default=2, help="layers of the stack that each run holds")
    parser.add_argument("--width", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1, help="networks of each run")
    parser.add_argument("--layout", choices=["flat", "grouped"], default="flat")
    parser.add_argument("--fan", nargs="*", type=int, default=[], help="so many empty folders too, in both layouts")
    parser.add_argument("--within", help="where to write; the default is the system's folder for temporary files")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    place = {"flat": flat, "grouped": grouped}[given.layout]
    tables = frames(given.depth, given.width, given.seeds)
    with tempfile.TemporaryDirectory(dir=given.within) as name:
        write(Path(name), 3, tables, place)  # the first calls import what they need
        read(name)
    measured = [measure(count, tables, place, given.within) for count in given.counts]
    if measured:
        print(pd.DataFrame(measured).T.to_string(header=False, float_format="%.4g"))
    wide = [fan(count, layout, given.within) for count in given.fan for layout in (flat, grouped)]
    if wide:
        print(pd.DataFrame(wide).to_string(index=False, float_format="%.4g"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
