"""Many run folders as one frame of a table: how their runs ended, and what should be known about them.

frame = initlab.read("outputs/**", table="stats")
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from initlab.errors import UsageError, choose, library_call, printable, show
from initlab.runs import folders, parquet
from initlab.runs.folders import Folder, Paths
from initlab.runs.schema import SEALED, STATS, TABLES, TASKS_WITH_STATS, column_kinds


@dataclass(frozen=True)
class Run:
    """A run folder: what its run.json says and what was set for it; of a table that was read, its rows there."""

    folder: Folder
    json: Mapping[str, Any]
    settings: Mapping[str, Any]
    has_table: bool = False
    rows: int = 0
    unreadable: list[str] = field(default_factory=list)  # a line for each of its files that cannot be read

    @property
    def name(self) -> str:
        """Its folder, as it is shown."""
        return printable(self.folder.path)

    @property
    def status(self) -> str:
        """done, running, ...; `broken` where a file cannot be read."""
        return "broken" if self.unreadable else str(self.json["status"])

    @property
    def columns(self) -> Mapping[str, Any]:
        """The configuration columns of its tables, as run.json has them."""
        columns = self.json.get("columns")
        return columns if isinstance(columns, Mapping) else {}


def find_runs(paths: Paths) -> list[Run]:
    """Every run at or below `paths`, no table opened; a file that was collected from other runs is no run."""
    runs = []
    for folder in folders.find_folders(paths):
        files = [f"{folder.path}/{name}" for name in folder.files if name.endswith(".parquet")]
        if "run.json" in folder.files or folder.parts or not all(map(parquet.is_collected, files)):
            run_json = folders.read_run_json(folder.path)
            runs.append(Run(folder, run_json, folders.read_settings(folder.path, run_json)))
    return runs


def read_runs(runs: Sequence[Run], table: str) -> tuple[list[Run], pd.DataFrame | None]:
    """The runs with what each has of a table, and its rows in all of them; None where no run has the table.

    What was swept and is no column becomes one under the option's name; the folder is the column `run`. What is broken
    raises nothing: the run says so.
    """
    shards = [run.folder.shards(table) for run in runs]
    paired = list(zip(runs, shards, strict=True))
    sealed = {path for run, paths in paired if run.json.get("schema_version", 0) >= SEALED for path in paths}
    files = parquet.read_files([path for paths in shards for path in paths], column_kinds(table), sealed)
    found, counts = [], []
    for run, paths in paired:
        broken = [files.unreadable[path] for path in paths if path in files.unreadable]
        counts.append(sum(files.rows.get(path, 0) for path in paths))
        found.append(replace(run, has_table=len(paths) > len(broken), rows=counts[-1], unreadable=broken))
    having = [run for run in found if run.has_table]
    if not having:
        return found, None
    columns = set(files.frame)
    swept = [k for k in folders.differing_keys([run.settings for run in having]) if not columns_of_option(k) & columns]
    more = {key: parquet.repeat([run.settings.get(key) for run in found], counts) for key in swept}
    more["run"] = parquet.repeat([run.name for run in found], counts)
    return found, pd.DataFrame({**dict(files.frame.items()), **more}, copy=False)


def columns_of_option(key: str) -> set[str]:
    """The names that an option may have as a column: `train.lr` is `train_lr` or `lr`, `init.name` is `init`."""
    last = key.rpartition(".")[2]
    return {key, key.replace(".", "_"), last, key.removesuffix(".name")}


@library_call
def read(paths: Paths = "outputs/**", table: str = STATS) -> pd.DataFrame:
    """One frame of a table of all runs at or below `paths`.

    paths: a folder, a glob (`outputs/**` is everything below outputs), or several of them.
    table: `stats`, `losses`, `theory`, ...: the names of `initlab.runs.schema.TABLES`.

    The configuration and the run folder (`run`) are columns. What was swept and is no column of the table becomes one
    under the option's own name (`data.root`), empty where a run did not set it. A column that some runs have not is nan
    there. Runs that are not done and files that cannot be read are named in a warning for each kind, and what they have
    is read. Raises `UsageError`, a ValueError, where nothing is found.

    >>> import initlab
    >>> initlab.read("nowhere/**")
    Traceback (most recent call last):
    initlab.errors.UsageError: no run with a table `stats` at or below nowhere/**
    """
    choose(TABLES, table, "table")
    runs, frame = read_runs(find_runs(paths), table)
    for note in notes(runs, table):
        warnings.warn(note, stacklevel=2)
    if frame is None:
        raise UsageError(
            f"no run with a table `{table}` at or below {paths if isinstance(paths, str | Path) else show(paths)}"
        )
    return frame


def notes(runs: Sequence[Run], table: str) -> list[str]:
    """A line for each kind of run that is not whole, naming all of them; a line for each file that cannot be read."""
    lines = [line for run in runs for line in run.unreadable]
    unfinished: dict[str, list[Run]] = {}
    for run in runs:
        if run.json["status"] != "done":
            unfinished.setdefault(str(run.json["status"]), []).append(run)
    for status, some in unfinished.items():
        rows = sum(run.rows for run in some)
        if len(some) == 1:
            lines.append(f"{some[0].name}: this run is {status}, not done; reading the {rows} rows it has")
        else:
            which = folders.list_folders([run.name for run in some])
            lines.append(f"{len(some)} runs are {status}, not done; reading the {rows} rows they have: {which}")
    lost = [
        run.name
        for run in runs
        if table == STATS and run.status == "done" and not run.has_table and run.columns.get("task") in TASKS_WITH_STATS
    ]
    if len(lost) == 1:
        lines.append(f"{lost[0]}: this run is done, but its table {table} is missing")
    elif lost:
        lines.append(f"{len(lost)} runs are done, but their table {table} is missing: {folders.list_folders(lost)}")
    return [*lines, *code_notes(runs)]


def code_notes(runs: Sequence[Run]) -> list[str]:
    """A line for each sweep whose runs were not made by one and the same code."""
    by_sweep: dict[str, dict[str, int]] = {}
    for run in runs:
        if "versions" in run.json:
            packages = run.json["versions"]
            initlab = packages.get("initlab", "unknown") if isinstance(packages, Mapping) else "unknown"
            revision = str(run.json.get("git_revision") or "unknown")
            short = revision[:10] + "+" * revision.endswith("+")  # + where files differ from the revision
            code = f"initlab {initlab}, revision {short}, schema {run.json.get('schema_version')}"
            count = by_sweep.setdefault(str(Path(run.folder.path).parent), {})
            count[code] = count.get(code, 0) + 1
    return [
        f"{sweep}: runs of different code: " + "; ".join(f"{count} of {code}" for code, count in made.items())
        for sweep, made in by_sweep.items()
        if len(made) > 1
    ]
