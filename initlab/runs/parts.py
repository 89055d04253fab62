"""The parts of a table, as they were measured, and how they become one table in the order of its rows.

Putting them in order takes the memory of a few groups of rows, not of the table.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from initlab.errors import disk_error
from initlab.runs import parquet
from initlab.runs.schema import TABLES
from initlab.stats.row_order import NETWORK, place_columns, row_order

log = logging.getLogger("initlab")

GROUP = 2**14  # rows of a part that are read together
AT_ONCE = 2**15  # rows that are put in order and written together
SHOWN = 2**16  # rows of a table that are drawn and summed up at the end of a run

NETWORKS = b"networks"  # key of the metadata of a part
Place = tuple[Any, ...]


@dataclass(eq=False)
class Part:
    """Some rows of a table, in memory, on the disk, or both.

    networks: the number of each row's network in its run, repeated as often as there are rows; empty where rows keep
    the order in which they came. groups: the first place, and from where to where, of rows that are read together.
    """

    number: int
    name: str
    table: pa.Table | None
    networks: np.ndarray
    groups: list[tuple[Place, int, int]]
    steps: np.ndarray
    rows: int
    nbytes: int
    schema: pa.Schema

    @classmethod
    def make(cls, number: int, name: str, frame: pd.DataFrame, constants: Mapping[str, Any]) -> "Part":
        """From a frame; of tables that have an order its column `network` says whose the rows are."""
        who = frame[NETWORK].to_numpy() if NETWORK in frame and TABLES[name].order else np.empty(0, np.int64)
        frame = frame.drop(columns=NETWORK, errors="ignore")
        return cls._from_table(number, name, parquet.as_arrow(frame, constants), _cut_repeats(who))

    @classmethod
    def load(cls, path: Path) -> "Part":
        """What a killed run left. Errors: an OSError, or pyarrow's, for a file that is none."""
        name, _, number = path.stem.rpartition("-")
        table = pq.read_table(path)
        who = json.loads((table.schema.metadata or {}).get(NETWORKS, b"[]"))
        part = cls._from_table(int(number), name, table, np.array(who, np.int64))
        part.table = None
        return part

    @classmethod
    def _from_table(cls, number: int, name: str, table: pa.Table, who: np.ndarray) -> "Part":
        frame = key_columns(table, name)
        order = [column for column in TABLES[name].order if column in frame] if len(who) else []
        cuts = {0, *range(0, len(frame), GROUP)}
        places = place_columns(frame, order)
        for column in places[:-1]:  # in the last one, a step or a layer, rows follow each other
            cuts |= set((np.flatnonzero(np.diff(column)) + 1).tolist())
        groups: list[tuple[Place, int, int]] = []
        starts = sorted(cuts)
        for start, stop in zip(starts, [*starts[1:], len(frame)], strict=True):
            words = [frame[word].iloc[start] for word in order[:-1]] if len(frame) else []
            groups.append(((*words, *(int(last[start:stop].min(initial=2**62)) for last in places[-1:])), start, stop))
        steps = np.unique(frame["step"].to_numpy()) if "step" in frame else np.empty(0, np.int64)
        return cls(number, name, table, who, groups, steps, len(frame), table.nbytes, table.schema)

    def path(self, folder: Path) -> Path:
        """Its file, while the run goes on."""
        return folder / "parts" / f"{self.name}-{self.number:05d}.parquet"

    def write(self, folder: Path) -> None:
        """It bears its name when it is whole."""
        said = {**(self.schema.metadata or {}), NETWORKS: json.dumps(self.networks.tolist())}
        assert self.table is not None
        with parquet.open_writer(self.path(folder), self.schema.with_metadata(said)) as write_rows:
            for _, start, stop in self.groups:
                write_rows(self.table.slice(start, stop - start))

    def read(self, folder: Path, k: int) -> pa.Table:
        """The rows of a group, with the column `network` where they have an order."""
        _, start, stop = self.groups[k]
        if self.table is not None or not self.rows:
            rows = (self.schema.empty_table() if self.table is None else self.table).slice(start, stop - start)
        else:
            with pq.ParquetFile(self.path(folder)) as file:
                rows = file.read_row_group(k)
        if not len(self.networks):
            return rows
        return rows.append_column(NETWORK, pa.array(self.networks[np.arange(start, stop) % len(self.networks)]))


def key_columns(table: pa.Table, name: str) -> pd.DataFrame:
    """What the order of a table hangs on."""
    names = {*TABLES[name].order, *TABLES[name].keys, "layer", "tensor", "direction", "step"}
    return table.select([key for key in table.column_names if key in names]).to_pandas()


def _cut_repeats(values: np.ndarray) -> np.ndarray:
    """What is repeated, once."""
    again = np.flatnonzero(values == values[0]) if len(values) else values
    once = values[: again[1]] if len(again) > 1 else values
    return once.copy() if len(values) and (values == np.resize(once, len(values))).all() else values


def common_schema(parts: Sequence[Part]) -> pa.Schema:
    """The columns of all parts, each of a kind that holds what every part has."""
    return pa.unify_schemas([part.schema.remove_metadata() for part in parts], promote_options="permissive")


def merge(folder: Path, parts: Sequence[Part]) -> Iterator[pa.Table]:
    """The rows of the parts of one table in its order, some at a time.

    Groups are read by their first places: rows that lie before the next group's place have found theirs.
    """
    schema, name = common_schema(parts), parts[0].name
    ordered = all(len(part.networks) for part in parts)
    groups = [
        (place if ordered else (part.number,), part.number, k, part)
        for part in parts
        for k, (place, *_) in enumerate(part.groups)
    ]
    groups.sort(key=lambda group: group[:3])
    pool: list[pa.Table] = []
    rows, enough = 0, AT_ONCE
    for place, _, k, part in groups:
        if rows >= enough:
            found, rest = _settle(pool, name, place if ordered else None)
            if len(found):
                yield _with_columns(found, schema)
            pool, rows = [rest], len(rest)
            enough = max(AT_ONCE, 2 * rows)
        pool.append(part.read(folder, k))
        rows += len(pool[-1])
    found, _ = _settle(pool, name, None)
    yield _with_columns(found, schema)


def _settle(pool: Sequence[pa.Table], name: str, before: Place | None) -> tuple[pa.Table, pa.Table]:
    """The rows in order: those whose stage, implementation and step lie before a place (None: all), and the others."""
    table = parquet.join(pool).combine_chunks()
    if NETWORK not in table.column_names:
        return table, table.slice(len(table))
    frame = key_columns(table, name)
    order = [column for column in TABLES[name].order if column in frame]
    rows = row_order(frame, table[NETWORK].to_numpy(), order)
    if not (rows == np.arange(len(rows))).all():
        table, frame = table.take(pa.array(rows)), frame.iloc[rows]
    end = len(table)
    if before is not None:
        columns = [*(frame[key].astype(str).to_numpy() for key in order[:-1]), place_columns(frame, order)[-1]]
        alike, less = np.ones(len(frame), bool), np.zeros(len(frame), bool)
        for column, value in zip(columns, before, strict=True):
            less |= alike & (column < value)
            alike &= column == value
        end = int(less.sum())  # they stand first
    return table.slice(0, end), table.slice(end)


def _with_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    table = table.drop_columns([NETWORK]) if NETWORK in table.column_names else table
    return parquet.join([schema.empty_table(), table]).select(schema.names).cast(schema)


def thin_out(rows: pa.Table, parts: Sequence[Part]) -> pa.Table:
    """Of a long table the rows of every so many steps, of the last one, and those of the largest error."""
    total = sum(part.rows for part in parts)
    if total <= SHOWN or "step" not in rows.column_names:
        return rows
    steps = np.unique(np.concatenate([part.steps for part in parts]))
    shown = np.append(steps[:: -(-total // SHOWN)], steps[-1])
    chosen = np.isin(rows["step"].to_numpy(), shown)
    if "relative_error" in rows.column_names:
        errors = rows["relative_error"].to_numpy()
        chosen[np.argsort(errors)[np.isfinite(errors).sum() - 1 :][:1]] = True
    return rows.filter(pa.array(chosen))


def compact(folder: Path, parts: Sequence[Part]) -> dict[str, pa.Table]:
    """Each table as one file in its order, and its parts are removed; what can be shown of each.

    What the disk refuses stays in parts, and they read as well.
    """
    shown: dict[str, pa.Table] = {}
    for name in dict.fromkeys(part.name for part in parts):
        mine = [part for part in parts if part.name == name]
        whole = folder / f"{name}.parquet"
        pieces = []
        try:
            with parquet.open_writer(whole, common_schema(mine)) as write_rows:
                for rows in merge(folder, mine):
                    write_rows(rows)
                    pieces.append(thin_out(rows, mine))
        except OSError as error:
            log.warning("%s; its rows are in parts", disk_error(error, whole))
            with suppress(OSError):  # what is in memory is shown all the same
                shown[name] = parquet.join([thin_out(rows, mine) for rows in merge(folder, mine)])
            continue
        shown[name] = parquet.join(pieces)
        for part in mine:
            with suppress(OSError):
                part.path(folder).unlink(missing_ok=True)
    with suppress(OSError):
        (folder / "parts").rmdir()
    return shown


def compact_left(folder: Path) -> None:
    """Do for a run that is done what a kill has kept it from: its parts become tables."""
    left = sorted((folder / "parts").glob("*.parquet"))
    there = [path for path in left if not (folder / f"{path.stem.rpartition('-')[0]}.parquet").exists()]
    compact(folder, [Part.load(path) for path in there])
    clear_parts(folder)


def clear_parts(folder: Path) -> None:
    """Remove all parts, and what is half written."""
    shutil.rmtree(folder / "parts", ignore_errors=True)
    for path in folder.glob("*.part"):
        with suppress(OSError):
            path.unlink(missing_ok=True)
