"""Many runs -> one file, or a short account of them."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow as pa
from pyarrow import csv, feather

from initlab.errors import UsageError, nearest
from initlab.runs import folders, parquet, summary
from initlab.runs.labels import is_constant
from initlab.runs.read import Run, code_notes, find_runs, read_runs
from initlab.runs.schema import LOSSES, PARITY, STATS, TABLES, THEORY

LONGEST = 40  # rows of the short table; more say nothing to a reader
FEW = 6  # values that are listed; of more their range is


def collect(paths: Sequence[str], table: str = STATS) -> tuple[list[Run], pd.DataFrame | None]:
    """The runs at or below the paths with their rows of a table in one frame, None where no run has it.

    paths: run folders, sweep folders or globs; one of them without a run is a mistake of the user.
    table: a name of `initlab.runs.schema.TABLES`.

    >>> collect(["nowhere"])
    Traceback (most recent call last):
    initlab.errors.UsageError: nowhere: no such folder, and no glob of any
    """
    for path in paths:
        if not folders.find_folders(path):
            there = os.path.exists(path)  # noqa: PTH110 (a Path raises where a name is too long)
            raise UsageError(f"{path}: {'holds no run of initlab' if there else 'no such folder, and no glob of any'}")
    runs = find_runs(paths)
    if not runs:
        raise UsageError(f"{', '.join(paths)}: holds no run of initlab")
    return read_runs(runs, table)


def describe(runs: Sequence[Run], frame: pd.DataFrame, table: str) -> list[str]:
    """How many runs ended how, those that are not done by name, what was read, what differs."""
    ends = Counter(run.status for run in runs)
    lines = [f"{len(runs):,} runs: " + ", ".join(f"{count:,} {status}" for status, count in ends.most_common())]
    paths = {end: [run.name for run in runs if run.status == end] for end in ends if end != "done"}
    lines += [f"  {end}: {folders.list_folders(some)}" for end, some in paths.items()]
    lines += code_notes(runs)
    lines.append(f"{len(frame):,} rows of `{table}`, {frame.shape[1]} columns")
    differing = [f"{name} ({_format_values(frame[name])})" for name in differing_columns(runs, frame)]
    return [*lines, f"what differs: {'; '.join(differing) or 'nothing'}"]


def differing_columns(runs: Sequence[Run], frame: pd.DataFrame) -> list[str]:
    """The configuration columns, `seed` among them, in which the rows differ."""
    names = dict.fromkeys(name for run in runs for name in run.columns)
    names |= dict.fromkeys([*(key for run in runs for key in run.settings), "seed"])
    return [name for name in names if name in frame and not is_constant(frame[name])]


def _format_values(column: pd.Series) -> str:
    values = column.drop_duplicates().dropna()
    unset = ", or not set" if column.isna().any() else ""
    if len(values) > FEW:
        ends = f"{values.min():g} to {values.max():g}, " if pd.api.types.is_numeric_dtype(values) else ""
        return f"{ends}{len(values)} values{unset}"
    numbers = pd.api.types.is_float_dtype(values)
    return ", ".join(f"{value:g}" if numbers else str(value) for value in values) + unset


def short_table(runs: Sequence[Run], stats: pd.DataFrame) -> str:
    """The table that a sweep ends in."""
    tables = {name: read_runs(runs, name)[1] for name in (LOSSES, PARITY, THEORY)}
    try:
        table = summary.summarize(stats, **tables)
    except UsageError as error:
        return f"no short table: {error}"
    text = summary.as_text(table.head(LONGEST))
    more = len(table) - LONGEST
    return text + (f"\n... and {more:,} more; --to FILE keeps all rows" if more > 0 else "")


# --- one file ---------------------------------------------------------------------------------------------------------


def write_csv(table: pa.Table, path: Path) -> None:
    """Every number to the last bit; nan is `nan`, what a run has not is empty."""
    lists = [field.name for field in table.schema if pa.types.is_list(field.type)]
    if lists:
        raise UsageError(f"{path.name}: .csv has no room for the lists in {', '.join(lists)}; use .parquet or .feather")
    for k, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(k, field.name, table[k].cast(pa.string()))
    csv.write_csv(table, str(path))


FORMATS: dict[str, Callable[[pa.Table, Path], None]] = {
    ".parquet": partial(parquet.write, collected=True),
    ".csv": write_csv,
    ".feather": lambda table, path: feather.write_feather(table, str(path), compression="lz4"),
}


def refuse(file: Path) -> None:
    """A file that cannot be meant, before anything is read."""
    if file.suffix not in FORMATS:
        raise UsageError(
            f"--to {file}: the name must end in {', '.join(sorted(FORMATS))}{nearest(file.suffix, FORMATS)}"
        )
    if file.is_dir() or not file.parent.is_dir():
        raise UsageError(f"{file}: {'is a folder' if file.is_dir() else f'there is no folder {file.parent}'}")
    if (file.parent / "run.json").exists() and file.stem in TABLES:
        raise UsageError(f"{file}: is a run's own table; choose another name")


def save(frame: pd.DataFrame, file: Path) -> None:
    """Write under a temporary name, then rename: what was there stays until the new file is whole."""
    refuse(file)
    temporary = file.with_name(f".{file.name}.part{file.suffix}")
    try:
        FORMATS[file.suffix](parquet.as_arrow(frame), temporary)
        temporary.replace(file)
    except (OSError, pa.ArrowException) as error:
        why = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        stays = "; what was there stays" if file.exists() else ""
        raise UsageError(f"{file}: cannot be written ({why}){stays}") from error
    finally:
        for left in (temporary, temporary.with_suffix(".part")):
            with suppress(OSError):
                left.unlink(missing_ok=True)
