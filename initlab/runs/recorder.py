"""Writing a run folder, part by part while the run goes on, so that a kill loses only what was not flushed.

A table is kept as `parts/TABLE-NNNNN.parquet` until the run ends, then as `TABLE.parquet`; every file is written under
a temporary name and renamed.
"""

import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

import initlab
from initlab.errors import UsageError
from initlab.runs import parquet
from initlab.runs.folders import read_overrides
from initlab.runs.lock import LOCK
from initlab.runs.schema import SCHEMA_VERSION, TABLES

# What Hydra, and who locked the folder, have written there before a job begins.
_HYDRAS = (".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "multirun.yaml")
_BEFORE_A_RUN = (LOCK, *_HYDRAS, "initlab.log")
KEPT = 2**28  # bytes of rows that stay in memory beside their files, for the tables at the end
_STAMP = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d\.\d+")


def write_text(path: Path, text: str) -> None:
    """Under a temporary name, then renamed: what was there stays until the new text is whole."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def refuse_used(folder: Path) -> None:
    """Two runs in one folder would mix their tables."""
    if (folder / "run.json").exists() or any((folder / f"{name}.parquet").exists() for name in TABLES):
        raise UsageError(f"{folder}: holds a run already; choose another hydra.run.dir")


def discard(folder: Path) -> None:
    """Take back what Hydra wrote into a folder in which nothing was measured.

    Folders go only if they are empty then and bear the time stamp of ours; a folder that the user named stays.
    """
    for name in _BEFORE_A_RUN:
        (folder / name).unlink(missing_ok=True)
    here = Path.cwd().resolve()
    stamped = any(_STAMP.fullmatch(path.name) for path in (folder, folder.parent))
    for path in (folder / ".hydra", *([folder, *folder.parents[:3]] if stamped else [])):
        if path.resolve() == here or path.resolve() in here.parents:
            break
        try:
            path.rmdir()
        except OSError:  # not empty, or never made
            if path.name != ".hydra":
                break


def clear(folder: Path) -> None:
    """Remove what an unfinished run left: tables, parts, figures, run.json. Its log and what Hydra wrote stay."""
    shutil.rmtree(folder / "parts", ignore_errors=True)
    for name in (*(f"{table}.parquet" for table in TABLES), "run.json"):
        (folder / name).unlink(missing_ok=True)
    for path in (*folder.glob("*.png"), *folder.glob("*.part")):
        path.unlink()


@dataclass
class Part:
    """Some rows of a table, in memory, on the disk, or both."""

    number: int
    name: str
    table: pa.Table | None
    nbytes: int
    written: bool = False

    def path(self, folder: Path) -> Path:
        """Its file, while the run goes on."""
        return folder / "parts" / f"{self.name}-{self.number:05d}.parquet"


class Recorder:
    """Writes one run folder; as a context manager it says in run.json how the run ended, however it ended.

    `patience`: seconds that rows may wait in memory before they are written; 0 writes them at once.
    """

    patience = 0.0

    def __init__(self, folder: Path, columns: Mapping[str, Any], device: str, **about: Any) -> None:
        self.folder, self.columns = folder, dict(columns)
        self.about = {
            "schema_version": SCHEMA_VERSION,
            "status": "running",
            "started": datetime.now(UTC).isoformat(),
            "columns": self.columns,
            "overrides": read_overrides(folder),
            **about,
            "device": device,
            **machine(),
        }
        self._start, self._count = (time.perf_counter(), time.process_time()), 0
        self._parts: list[Part] = []
        self._tables: dict[str, pa.Table] = {}
        self._written = time.monotonic()

    def __enter__(self) -> "Recorder":
        (self.folder / "parts").mkdir(parents=True, exist_ok=True)
        self._write_status("running")
        return self

    def add(self, frames: Mapping[str, pd.DataFrame]) -> None:
        """Write some rows of some tables; once written they survive whatever comes later."""
        parts = {name: parquet.as_arrow(frame, self.columns) for name, frame in frames.items()}
        self._parts += [Part(self._count, name, table, table.nbytes) for name, table in parts.items()]
        self._count += 1
        if time.monotonic() - self._written >= self.patience:
            in_memory = sum(part.nbytes for part in self._parts if part.table is not None)
            for part in self._parts:
                if not part.written:
                    parquet.write(part.table, part.path(self.folder))
                    part.written = True
                if in_memory > KEPT:
                    part.table = None
            self._written = time.monotonic()

    def mark(self) -> int:
        """Where the record stands: what `rewind` goes back to."""
        return self._count

    def rewind(self, mark: int) -> None:
        """Forget what was added since the mark, to measure it again."""
        for part in self._parts:
            if part.number >= mark and part.written:
                part.path(self.folder).unlink()
        self._parts = [part for part in self._parts if part.number < mark]
        self._count = mark

    def note(self, text: str) -> None:
        """Something to say of the whole run that is in none of its tables: kept in run.json; nothing if empty."""
        if text:
            self.about.setdefault("notes", []).append(text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in TABLES:
            parts = [part for part in self._parts if part.name == name]
            if parts:
                tables = [pq.read_table(p.path(self.folder)) if p.table is None else p.table for p in parts]
                self._tables[name] = parquet.join(tables)
                parquet.write(self._tables[name], self.folder / f"{name}.parquet")
        shutil.rmtree(self.folder / "parts")
        self._parts = []
        if error is None:
            self._write_status("done")
        elif isinstance(error, Exception):
            self._write_status("failed", error=f"{type(error).__name__}: {error}")
        else:
            self._write_status("interrupted")

    def frames(self) -> dict[str, pd.DataFrame]:
        """After the end of the run: its tables, as `initlab.read` reads them, with the folder as column `run`."""
        frames = {name: table.to_pandas() for name, table in self._tables.items()}
        folder = str(self.folder)
        return {name: frame.assign(run=parquet.repeat([folder], [len(frame)])) for name, frame in frames.items()}

    def _write_status(self, status: str, **more: Any) -> None:
        wall, cpu = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        self.about |= {"status": status, "wall_seconds": round(wall, 3), "cpu_seconds": round(cpu, 3), **more}
        write_text(self.folder / "run.json", json.dumps(self.about, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """What a run is made with: versions and revision of the code, platform, and the command."""
    return {**_code(), "platform": platform.platform(), "command": [Path(sys.argv[0]).name, *sys.argv[1:]]}


@cache  # of what was loaded, whatever is committed while it runs
def _code() -> dict[str, Any]:
    """Versions of the packages; revision of initlab's checkout, `+` where files differ, None outside a checkout."""
    packages = ("torch", "hydra-core", "numpy", "pandas", "pyarrow", "seaborn")
    versions = {"initlab": initlab.__version__, "python": platform.python_version()}
    found: dict[str, Any] = {"versions": versions | {name: version(name) for name in packages}, "git_revision": None}
    root = Path(initlab.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return found
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            capture_output=True, text=True, timeout=5, check=True,
        )  # fmt: skip
        found["git_revision"] = answer.stdout.strip()
    return found
