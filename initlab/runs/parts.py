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

GROUP = 2**13  # rows of a part that are read together, fewer where other networks' parts are read beside it
FEWEST = 2**10  # that are worth a group
AT_ONCE = 2**16  # rows that are put in order and written together
SHOWN = 2**16  # rows of a table that are drawn and summed up at the end of a run

NETWORKS = b"networks"  # key of the metadata of a part
Place = tuple[Any, ...]
Waiting = tuple[list[np.ndarray], pa.Table]  # the place of each row, a column for each of its words; the rows


@dataclass(eq=False)
class Part:
    """Some rows of a table, in memory, on the disk, or both.

    table: the rows in memory, without the constants: columns of one value each, which its file has as well. networks:
    the number of each row's network in its run, repeated as often as there are rows; empty where rows keep the order in
    which they came. groups: the first place, and from where to where, of rows that are read together. own: the columns
    of `table`.
    """

    number: int
    name: str
    table: pa.Table | None
    constants: Mapping[str, Any]
    networks: np.ndarray
    groups: list[tuple[Place, int, int]]
    steps: np.ndarray
    rows: int
    nbytes: int
    own: pa.Schema

    @classmethod
    def make(cls, number: int, name: str, frame: pd.DataFrame, constants: Mapping[str, Any]) -> "Part":
        """From a frame; of tables that have an order its column `network` says whose the rows are."""
        who = np.empty(0, np.int64)
        if NETWORK in frame and TABLES[name].order:
            rows = np.lexsort(place_columns(frame, TABLES[name].order)[::-1])
            if (np.diff(rows) != 1).any():  # as a rule they come in order
                frame = frame.iloc[rows]
            who = frame[NETWORK].to_numpy()
        again = np.flatnonzero(who == who[0]) if len(who) else who
        once = who[: again[1]] if len(again) > 1 else who
        if len(who) and (who == np.resize(once, len(who))).all():  # what is repeated is kept once
            who = once.copy()
        table = parquet.as_arrow(frame.drop(columns=NETWORK, errors="ignore"))
        constants = {key: value for key, value in constants.items() if key not in table.column_names}
        beside = int(who[0]) // len(np.unique(who)) if len(who) else 0  # parts of the networks before these
        starts = range(0, max(len(frame), 1), max(GROUP // (1 + beside), min(FEWEST, GROUP)))
        return cls._group_rows(number, name, table, frame, constants, who, starts)

    @classmethod
    def load(cls, path: Path) -> "Part":
        """What a killed run left. Errors: an OSError, or pyarrow's, for a file that is none."""
        name, _, number = path.stem.rpartition("-")
        table = pq.read_table(path)
        who = json.loads((table.schema.metadata or {}).get(NETWORKS, b"[]"))
        about = pq.read_metadata(path)
        starts = np.cumsum([0, *(about.row_group(k).num_rows for k in range(about.num_row_groups - 1))]).tolist()
        table = table.replace_schema_metadata()
        part = cls._group_rows(int(number), name, table, key_columns(table, name), {}, np.array(who, np.int64), starts)
        part.table = None
        return part

    @classmethod
    def _group_rows(
        cls, number: int, name: str, table: pa.Table, keys: pd.DataFrame, constants: Mapping[str, Any], who: np.ndarray,
        starts: Sequence[int],
    ) -> "Part":  # fmt: skip
        order = [column for column in TABLES[name].order if column in keys] if len(who) else []
        words = [*(keys[word].to_numpy() for word in order[:-1]), *place_columns(keys, order[-1:])]
        groups = [
            (tuple(word[start] for word in words if len(keys)), start, stop)
            for start, stop in zip(starts, [*starts[1:], len(keys)], strict=True)
        ]
        met = np.sort(pd.unique(keys["step"])) if "step" in keys else np.empty(0, np.int64)
        return cls(number, name, table, constants, who, groups, met, len(keys), table.nbytes, table.schema)

    @property
    def schema(self) -> pa.Schema:
        """Of its file."""
        return parquet.add_constants(self.own.empty_table(), self.constants).schema

    def path(self, folder: Path) -> Path:
        """Its file, while the run goes on."""
        return folder / "parts" / f"{self.name}-{self.number:05d}.parquet"

    def write(self, folder: Path) -> None:
        """It bears its name when it is whole."""
        said = {NETWORKS: json.dumps(self.networks.tolist())}
        assert self.table is not None
        with parquet.open_writer(self.path(folder), self.schema.with_metadata(said)) as write_rows:
            for _, start, stop in self.groups:
                write_rows(parquet.add_constants(self.table.slice(start, stop - start), self.constants))

    def read(self, folder: Path, k: int) -> pa.Table:
        """The rows of a group, without the constants."""
        _, start, stop = self.groups[k]
        if self.table is not None or not self.rows:
            return (self.own.empty_table() if self.table is None else self.table).slice(start, stop - start)
        with pq.ParquetFile(self.path(folder)) as file:
            return file.read_row_group(k, columns=self.own.names)


def key_columns(table: pa.Table, name: str) -> pd.DataFrame:
    """What the order of a table hangs on."""
    names = {*TABLES[name].order, *TABLES[name].keys, "layer", "tensor", "direction", "step"}
    return table.select([key for key in table.column_names if key in names]).to_pandas()


def merge(folder: Path, parts: Sequence[Part]) -> Iterator[pa.Table]:
    """The rows of the parts of one table in its order, some at a time, without the constants that all parts have.

    Groups are read by their first places: rows that lie before the next group's place have found theirs. The others
    wait as they were read, so that memory holds a group of each part that is not at its end, and what is written.
    """
    name, own = parts[0].name, {column for part in parts for column in part.own.names}
    parts = [part for part in parts if part.rows] or parts[:1]  # one without rows says nothing about their order
    ordered, several = all(len(part.networks) for part in parts), sum(part.rows for part in parts) > AT_ONCE
    groups = [
        (place if ordered else (part.number,), part.number, k, part)
        for part in parts
        for k, (place, *_) in enumerate(part.groups)
    ]
    groups.sort(key=lambda group: group[:3])
    pool: list[Waiting] = []
    rows, enough = 0, AT_ONCE
    for place, _, k, part in groups:
        if rows >= enough:
            found, pool = _split(pool, place)
            yield from _sort_rows(found, name)
            rows = sum(len(table) for _, table in pool)
            enough = rows + AT_ONCE
        kept = {key: value for key, value in part.constants.items() if key in own}
        table = parquet.add_constants(part.read(folder, k), kept)
        rows += len(table)
        words = [np.full(len(table), -1)]  # before all
        if ordered:
            if several:
                keys = key_columns(table, name)
                order = [column for column in TABLES[name].order if column in keys]
                words = [*(keys[word].to_numpy() for word in order[:-1]), *place_columns(keys, order[-1:])]
            _, start, stop = part.groups[k]
            who = part.networks[np.arange(start, stop) % len(part.networks)]
            table = table.append_column(NETWORK, pa.array(who))
        pool.append((words, table))
    found = [table for _, table in pool]
    pool.clear()
    yield from _sort_rows(found, name)


def _split(pool: Sequence[Waiting], before: Place) -> tuple[list[pa.Table], list[Waiting]]:
    """The rows whose stage, implementation and step lie before a place, and the others."""
    found, others = [], []
    for words, table in pool:
        chosen, equal = np.zeros(len(table), bool), np.ones(len(table), bool)
        for word, limit in zip(words, before, strict=True):
            chosen |= equal & (word < limit)
            equal &= word == limit
        count = int(chosen.sum())
        if not chosen[:count].all():  # in parts that were written in another order
            rows = np.argsort(~chosen, kind="stable")
            words, table = [word[rows] for word in words], table.take(pa.array(rows))
        if count:
            found.append(table.slice(0, count))
        if count < len(table):
            others.append(([word[count:] for word in words], table.slice(count)))
    return found, others


def _sort_rows(tables: list[pa.Table], name: str) -> Iterator[pa.Table]:
    """All rows in their order, some at a time; the list is emptied, so that its memory can be used."""
    if not tables:
        return
    table = parquet.join(tables).combine_chunks()
    tables.clear()
    rows = np.arange(len(table))
    if NETWORK in table.column_names:
        keys = key_columns(table, name)
        rows = row_order(keys, table[NETWORK].to_numpy(), [column for column in TABLES[name].order if column in keys])
        table = table.drop_columns([NETWORK])
    for start in range(0, max(len(table), 1), AT_ONCE):
        some = rows[start : start + AT_ONCE]
        in_order = (np.diff(some) == 1).all()
        yield table.slice(int(some[0]) if len(some) else 0, len(some)) if in_order else table.take(pa.array(some))


def choose_steps(parts: Sequence[Part]) -> np.ndarray:
    """Of a long table every so many steps and the last one; of others none, as all are shown."""
    total = sum(part.rows for part in parts)
    steps = np.sort(pd.unique(np.concatenate([part.steps for part in parts])))
    return np.append(steps[:: -(-total // SHOWN)], steps[-1:]) if total > SHOWN else steps[:0]


def thin_out(rows: pa.Table, steps: np.ndarray) -> pa.Table:
    """The rows of these steps, and those of the largest error; all rows if there are no steps."""
    if not len(steps):
        return rows
    chosen = np.isin(rows["step"].to_numpy(), steps)
    if "relative_error" in rows.column_names:
        errors = rows["relative_error"].to_numpy()
        chosen[np.argsort(errors)[np.isfinite(errors).sum() - 1 :][:1]] = True
    return rows.filter(pa.array(chosen))


def compact(folder: Path, parts: Sequence[Part]) -> dict[str, pa.Table]:
    """Each table as one file in its order, and its parts are removed; what can be shown of each, without constants.

    What the disk refuses stays in parts, and they read as well.
    """
    shown: dict[str, pa.Table] = {}
    for name in dict.fromkeys(part.name for part in parts):
        mine = [part for part in parts if part.name == name]
        schema = pa.unify_schemas([part.schema for part in mine], promote_options="permissive")
        whole, steps = folder / f"{name}.parquet", choose_steps(mine)
        pieces = []
        try:
            with parquet.open_writer(whole, schema) as write_rows:
                for rows in merge(folder, mine):
                    full = parquet.add_constants(rows, mine[0].constants)
                    write_rows(parquet.join([schema.empty_table(), full]).select(schema.names).cast(schema))
                    pieces.append(thin_out(rows, steps))
        except OSError as error:
            log.warning("%s; its rows are in parts", disk_error(error, whole))
            with suppress(OSError):  # what is in memory is shown all the same
                shown[name] = parquet.join([thin_out(rows, steps) for rows in merge(folder, mine)])
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
