"""Writing a run folder, part by part while the run goes on, so that a kill loses only what was not flushed.

A table is kept as `parts/TABLE-NNNNN.parquet` until the run ends, then as `TABLE.parquet`, which counts where both are;
every file is written under a temporary name and renamed.
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any

import pandas as pd
import pyarrow as pa

import initlab
from initlab import stops
from initlab.errors import UsageError, disk_error, report_disk
from initlab.runs import parquet
from initlab.runs.folders import read_overrides
from initlab.runs.lock import LOCK
from initlab.runs.parts import Part, clear_parts, compact
from initlab.runs.schema import COMMAND, SCHEMA_VERSION, TABLES
from initlab.verdict.finding import Verdict

# What Hydra, and who locked the folder, have written there before a job begins.
_HYDRAS = (".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "multirun.yaml")
_BEFORE_A_RUN = (LOCK, *_HYDRAS, "initlab.log")
KEPT = 2**24  # bytes of rows that stay in memory beside their files, for the tables at the end
SMALL = 2**25  # bytes of rows that become tables after a signal, in half a second
_STAMP = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d\.\d+")


def write_text(path: Path, text: str) -> None:
    """Under a temporary name, then renamed: what was there stays until the new text is whole."""
    partial = path.with_name(f"{path.name}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def refuse_used(folder: Path) -> None:
    """Two runs in one folder would mix their tables."""
    if (folder / "run.json").exists() or any((folder / f"{name}.parquet").exists() for name in TABLES):
        raise UsageError(f"{folder}: holds a run already; choose another hydra.run.dir")


def discard(folder: Path) -> None:
    """Take back what Hydra wrote into a folder in which nothing was measured.

    Folders go only if they are empty then and bear the time stamp of ours; a folder that the user named stays.
    """
    logs = [path.name for path in folder.glob("*.log") if not path.stat().st_size]  # of another hydra.job.name
    for name in (*_BEFORE_A_RUN, *logs):
        with suppress(OSError):  # Windows removes no open file, as the log is
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
    """Remove what an unfinished run left: tables, parts, figures, run.json. Its log and what Hydra wrote stay.

    Errors: one line where something cannot be removed.
    """
    with report_disk(folder):
        clear_parts(folder)
        for name in (*(f"{table}.parquet" for table in TABLES), "run.json", "verdict.json", "report.html"):
            (folder / name).unlink(missing_ok=True)
        for path in folder.glob("*.png"):
            path.unlink()


class Recorder:
    """Writes one run folder; as a context manager it says in run.json how the run ended, however it ended.

    A part waits in memory, is written, and lies on the disk: it leaves the waiting list when its file bears its name.
    At the end the status is written first, as soon as all rows are; then the parts become one file for each table. They
    stay parts where that cannot be, or where it would take long after a signal: they read as well.
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
        self._waiting: list[Part] = []
        self._written: list[Part] = []
        self._busy = RLock()  # of the lists and their files
        self._since = time.monotonic()  # the first row waits
        self._shown: dict[str, pa.Table] = {}
        self.ok = True  # whether no verdict found an error
        self._after = ExitStack()

    def __enter__(self) -> "Recorder":
        stops.work()
        self._after.enter_context(stops.first(self._tell_stop))
        try:
            with report_disk(self.folder):
                (self.folder / "parts").mkdir(parents=True, exist_ok=True)
                self._write_status("running")
        except UsageError:
            self._after.close()
            raise
        return self

    def add(self, frames: Mapping[str, pd.DataFrame]) -> None:
        """Take some rows of some tables; once written they survive whatever comes later.

        A column `network` says whose the rows are, where the order of a table hangs on it; it is not written.
        Errors: one line where they cannot be written; they then wait for the next time.
        """
        parts = [Part.make(self._count, name, frame, self.columns) for name, frame in frames.items()]
        with stops.whole(), self._busy:
            self._since = self._since if self._waiting else time.monotonic()
            self._waiting += parts
            self._count += 1
        if time.monotonic() - self._since >= self.patience:
            self.flush()

    def flush(self, waited: float = 0.0) -> None:
        """Write what waits in memory, if its first row has waited so many seconds. Any thread may ask for it."""
        while self._waiting and time.monotonic() - self._since >= waited:
            with stops.whole(), self._busy:
                for part in self._waiting[:1]:  # another thread may have written it
                    with report_disk(part.path(self.folder)):
                        part.write(self.folder)
                    self._written.append(self._waiting.pop(0))
                    if sum(one.nbytes for one in self._written if one.table is not None) > KEPT:
                        part.table = None

    def mark(self) -> int:
        """Where the record stands: what `rewind` goes back to."""
        return self._count

    def rewind(self, mark: int) -> None:
        """Forget what was added since the mark, to measure it again. Errors: one line where files cannot be removed."""
        with stops.whole(), self._busy, report_disk(self.folder):
            self._waiting = [part for part in self._waiting if part.number < mark]
            for part in [part for part in self._written if part.number >= mark]:
                part.path(self.folder).unlink(missing_ok=True)
                self._written.remove(part)
            self._count = mark

    def keep_verdict(self, verdict: Verdict) -> None:
        """What was found, as `verdict.json`; the first line stands in run.json. Errors: one line where it cannot be."""
        self.ok &= verdict.ok
        self.about["verdict"] = str(verdict).splitlines()[0]
        with stops.whole(), report_disk(self.folder):
            write_text(self.folder / "verdict.json", verdict.json + "\n")
        self._write_status(self.about["status"])

    def note(self, text: str) -> None:
        """Something to say of the whole run that is in none of its tables: kept in run.json; nothing if empty."""
        if text:
            self.about.setdefault("notes", []).append(text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = stops.is_stopping() or (error is not None and not isinstance(error, Exception))
        try:
            if stopped:
                self._end("interrupted")
            elif error is not None:
                self._end("failed", error=f"{type(error).__name__}: {error}")
            self.flush()
            self._end("done")
        except (OSError, UsageError) as full:
            if stopped or error is not None:
                return
            line = disk_error(full, self.folder) if isinstance(full, OSError) else full
            with suppress(OSError):
                self._end("failed", error=str(line))
            raise line from full
        finally:
            self._after.close()
        if not stopped or sum(part.nbytes for part in self._written) <= SMALL:
            self._shown = compact(self.folder, self._written)
            self._written = []

    def _tell_stop(self) -> None:
        """What is done first after a signal. A second one may come while another word is being written: then that."""
        self._write_status("interrupted" if self.about["status"] == "running" else self.about["status"])

    def _end(self, status: str, **more: Any) -> None:
        """How the run ended: the first word counts."""
        if self.about["status"] in ("running", status):
            self._write_status(status, **more)

    def frames(self) -> dict[str, pd.DataFrame]:
        """After the end of the run: its tables, as `initlab.read` reads them, with the folder as column `run`.

        Of a long training so many steps as can be drawn and summed up.
        """
        rows = {name: self._shown[name] for name in TABLES if name in self._shown}
        frames = {name: parquet.add_constants(table, self.columns).to_pandas() for name, table in rows.items()}
        folder = str(self.folder)
        return {name: frame.assign(run=parquet.repeat([folder], [len(frame)])) for name, frame in frames.items()}

    def _write_status(self, status: str, **more: Any) -> None:
        wall, cpu = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        with stops.whole():
            self.about |= {"status": status, "wall_seconds": round(wall, 3), "cpu_seconds": round(cpu, 3), **more}
            write_text(self.folder / "run.json", json.dumps(self.about, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """What a run is made with: versions and revision of the code, platform, and the command."""
    program, *words = json.loads(os.environ.get(COMMAND) or "null") or sys.argv
    return {**_code(), "platform": platform.platform(), "command": [Path(program).name, *words]}


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
