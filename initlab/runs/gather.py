"""Many run folders -> one frame of a table, how their runs ended, and what should be said about them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from initlab.runs import folders, parquet
from initlab.runs.folders import Folder, Paths
from initlab.runs.parquet import Shard

HAVE_STATS = ("lab", "stack", "train", "seeded")


@dataclass
class Run:
    """A run folder, what its run.json says, what was set for it, and its shards of one table."""

    folder: Folder
    said: dict[str, Any]
    set: dict[str, Any]
    shards: list[Shard] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # files, each with its reason

    @property
    def status(self) -> str:
        """done, running, ...; `broken` where a file cannot be read."""
        return "broken" if self.unreadable else str(self.said["status"])

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)


def gather(paths: Paths, table: str) -> list[Run]:
    """Every run at or below `paths` with what it has of the table. Nothing is raised: what is broken says so."""
    return of(found(paths), table)


def found(paths: Paths) -> list[Run]:
    """Every run at or below `paths`, no table opened."""
    runs = []
    for folder in folders.found(paths):
        if not _only_collected(folder):
            said = folders.about(folder.path)
            runs.append(Run(folder, said, folders.settings(folder.path, said)))
    return runs


def of(runs: Sequence[Run], table: str) -> list[Run]:
    """The same runs with what they have of a table."""
    return [_with(run, table) for run in runs]


def _with(run: Run, table: str) -> Run:
    has = Run(run.folder, run.said, run.set)
    for path in run.folder.shards(table):
        try:
            has.shards.append(parquet.read(path))
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            has.unreadable.append(f"{path}: cannot be read ({_first_line(error)})")
    return has


def _only_collected(folder: Folder) -> bool:
    """Nothing of a run, but what was collected from others."""
    if "run.json" in folder.files or folder.parts:
        return False
    files = [name for name in folder.files if name.endswith(".parquet")]
    return all(parquet.is_collected(f"{folder.path}/{name}") for name in files)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def frame(runs: Sequence[Run]) -> pd.DataFrame:
    """The rows of all runs, with what was swept and is no column yet, and the folder as `run`."""
    have = [run for run in runs if run.shards]
    taken = {name for run in have for shard in run.shards for name in shard.columns}
    swept = [key for key in folders.tell_apart([run.set for run in have]) if not column_of(key) & taken]
    rows = []
    for run in have:
        more = {key: run.set.get(key) for key in swept} | {"run": run.folder.path}
        rows += [shard.also(**more) for shard in run.shards]
    return parquet.frame(rows)


def column_of(key: str) -> set[str]:
    """The names that an option may have as a column: `train.lr` is `train_lr` or `lr`, `init.name` is `init`."""
    last = key.rpartition(".")[2]
    return {key, key.replace(".", "_"), last, key.removesuffix(".name")}


def notes(runs: Sequence[Run], table: str) -> list[str]:
    """A line for each kind of run that is not whole, naming all of them; a line for each file that cannot be read."""
    lines = [line for run in runs for line in run.unreadable]
    unfinished: dict[str, list[Run]] = {}
    for run in runs:
        if run.said["status"] != "done":
            unfinished.setdefault(str(run.said["status"]), []).append(run)
    for status, some in unfinished.items():
        rows = sum(run.rows for run in some)
        if len(some) == 1:
            lines.append(f"{some[0].folder.path}: this run is {status}, not done; reading the {rows} rows it has")
        else:
            which = folders.named([run.folder.path for run in some])
            lines.append(f"{len(some)} runs are {status}, not done; reading the {rows} rows they have: {which}")
    lost = [run.folder.path for run in runs if table == "stats" and _lost(run)]
    if len(lost) == 1:
        lines.append(f"{lost[0]}: this run is done, but its table {table} is missing")
    elif lost:
        lines.append(f"{len(lost)} runs are done, but their table {table} is missing: {folders.named(lost)}")
    return [*lines, *versions(runs)]


def _lost(run: Run) -> bool:
    done = run.said["status"] == "done" and not run.shards and not run.unreadable
    columns = run.said.get("columns")
    return done and isinstance(columns, Mapping) and columns.get("task") in HAVE_STATS


def versions(runs: Sequence[Run]) -> list[str]:
    """A line for each sweep whose runs were not made by one and the same code."""
    by_sweep: dict[str, dict[str, int]] = {}
    for run in runs:
        if "versions" in run.said:
            made = by_sweep.setdefault(str(Path(run.folder.path).parent), {})
            made[_version(run.said)] = made.get(_version(run.said), 0) + 1
    return [
        f"{sweep}: runs of different code: " + "; ".join(f"{count} of {version}" for version, count in made.items())
        for sweep, made in by_sweep.items()
        if len(made) > 1
    ]


def _version(said: Mapping[str, Any]) -> str:
    packages = said["versions"]
    initlab = packages.get("initlab", "unknown") if isinstance(packages, Mapping) else "unknown"
    revision = str(said.get("git_revision") or "unknown")
    short = revision[:10] + "+" * revision.endswith("+")  # + where files differ from the revision
    return f"initlab {initlab}, revision {short}, schema {said.get('schema_version')}"
