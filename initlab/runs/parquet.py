"""Parquet files: how one is written, and how thousands of them become one frame.

Most columns of a file, its configuration, say the same in every row. They are written like all others, so that any tool
understands the file alone; what they say also stands once in the file's metadata, and a reader of thousands of files
decodes the columns that vary and repeats the rest. nan is a value here and never becomes null. Knows nothing of runs.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

# Key of the metadata: {"rows": count, "columns": names in order, "constants": {column: its only value},
# "collected": whether the rows are those of many files}.
SAID = b"initlab"


def as_arrow(frame: pd.DataFrame, constants: Mapping[str, Any]) -> pa.Table:
    """Columns of the frame, then the constant ones that it has not; strings as dictionaries, nan kept as nan."""
    columns: dict[str, pa.Array] = {}
    for name, column in frame.items():
        if isinstance(column.dtype, pd.CategoricalDtype):
            names = pa.array([str(c) for c in column.cat.categories], pa.string())
            codes = column.cat.codes.to_numpy(np.int32)
            columns[str(name)] = pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), names)
        elif isinstance(column.dtype, pd.StringDtype):
            columns[str(name)] = pa.array(column, pa.string())
        else:
            columns[str(name)] = pa.array(column.to_numpy(), from_pandas=False)
    for name in [name for name in constants if name not in columns]:
        value = constants[name]
        if isinstance(value, str):
            codes = pa.array(np.zeros(len(frame), np.int32))
            columns[name] = pa.DictionaryArray.from_arrays(codes, pa.array([value]))
        else:
            columns[name] = pa.array(np.full(len(frame), value))
    return pa.table(columns)


def write(table: pa.Table, path: Path, collected: bool = False) -> None:
    """Under a temporary name, then renamed: a file is whole or not there. `collected`: no shard but many in one."""
    words = [f.name for f in table.schema if pa.types.is_dictionary(f.type)]
    floats = [f.name for f in table.schema if pa.types.is_floating(f.type)]
    partial = path.with_suffix(".part")
    # Of these tables LZ4 makes files as small as Zstandard does, and takes a third of its time to read many small ones.
    with pq.ParquetWriter(
        partial, table.schema, compression="lz4", use_dictionary=words, use_byte_stream_split=floats
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({SAID.decode(): json.dumps(_said(table) | {"collected": collected})})
    partial.replace(path)


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables, promote_options="permissive").unify_dictionaries()


def _said(table: pa.Table) -> dict[str, Any]:
    found = {name: _only_value(table[name]) for name in table.column_names} if len(table) else {}
    constants = {name: value for name, value in found.items() if value is not None}
    return {"rows": len(table), "columns": table.column_names, "constants": constants}


def _only_value(column: pa.ChunkedArray) -> str | int | float | None:
    """What every row says, bit for bit; None where they differ or the type is none of words, int64 and float64."""
    words = pa.types.is_dictionary(column.type)
    if column.null_count or not (words or column.type in (pa.int64(), pa.float64())):
        return None
    chunks = [chunk.indices if words else chunk for chunk in column.chunks if len(chunk)]
    bits = [chunk.to_numpy(zero_copy_only=False).view(np.uint32 if words else np.uint64) for chunk in chunks]
    if any((each != bits[0][0]).any() for each in bits):
        return None
    value: str | int | float = next(chunk for chunk in column.chunks if len(chunk))[0].as_py()
    return value


class Shard(NamedTuple):
    """One file: the columns that vary as a table, the others as their value; `columns` has all names in order."""

    rows: int
    columns: tuple[str, ...]
    constants: dict[str, Any]
    table: pa.Table

    def also(self, **constants: Any) -> "Shard":
        """With more columns that say the same in every row."""
        return self._replace(columns=(*self.columns, *constants), constants={**self.constants, **constants})


class _Flat(pq.ParquetFile):  # type: ignore[misc]
    """A file whose columns have no columns of their own: the walk over all names, a sixth of the time, is left out."""

    def _build_nested_paths(self) -> dict[str, list[int]]:
        return {}


def read(path: str) -> Shard:
    """One file; OSError or pa.ArrowException where it cannot be read."""
    with open(path, "rb") as file:  # noqa: PTH123 (a third of a Path's cost, thousands of times)
        source = pa.BufferReader(file.read())  # read whole: a file that is cut off meanwhile is an error, not a crash
    parquet = _Flat(source, pre_buffer=False)
    rows = parquet.metadata.num_rows
    said = json.loads((parquet.metadata.metadata or {}).get(SAID, b"{}"))
    if said.get("rows") != rows:
        table = parquet.read(use_threads=False)
        return Shard(rows, tuple(table.column_names), {}, table)
    constants, columns = said["constants"], said["columns"]
    varying = [k for k, name in enumerate(columns) if name not in constants]
    table = parquet.reader.read_all(column_indices=varying, use_threads=False)
    return Shard(rows, tuple(columns), constants, table)


def is_collected(path: str) -> bool:
    """Is a file what was collected from others?"""
    try:
        said = json.loads((pq.read_metadata(path).metadata or {}).get(SAID, b"{}"))
    except (OSError, ValueError, pa.ArrowException):
        return False
    return bool(said.get("collected"))


class Words(NamedTuple):
    """A column of words: codes into `names`, -1 where there is none."""

    codes: np.ndarray
    names: list[str]


# What shards have of one column: an array, Words, a Series where they hold neither numbers nor words, None for nothing.
Piece: TypeAlias = Any


def frame(shards: Sequence[Shard]) -> pd.DataFrame:
    """All rows in the order of the shards, all columns in the order in which they are first met.

    A column that a shard has not is nan there, or no word; integers beside floating numbers become these; numbers
    beside words become words.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for k, shard in enumerate(shards):
        groups.setdefault((tuple(shard.table.column_names), *shard.table.schema.types), []).append(k)
    names = dict.fromkeys(name for columns in dict.fromkeys(shard.columns for shard in shards) for name in columns)
    pieces = [_Group([shards[k] for k in members]) for members in groups.values()]
    order = _order(shards, list(groups.values())) if len(groups) > 1 else None
    columns = {name: _column([group.take(name) for group in pieces], pieces, order) for name in names}
    return pd.DataFrame(columns, copy=False)


class _Group:
    """Shards in which the same columns vary."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.begins = [0, *accumulate(shard.rows for shard in shards)]
        self.rows = self.begins[-1]
        self.shards = shards
        self.table = pa.concat_tables([shard.table for shard in shards]).unify_dictionaries()
        self._has = set(self.table.column_names)

    def take(self, name: str) -> Piece:
        if name not in self._has:
            return self._repeated([shard.constants.get(name) for shard in self.shards])
        column = self.table[name]
        if pa.types.is_dictionary(column.type):
            whole = column.combine_chunks()
            whole = whole if isinstance(whole, pa.DictionaryArray) else pa.concat_arrays(whole.chunks)
            return Words(whole.indices.fill_null(-1).to_numpy(), whole.dictionary.to_pylist())
        if pa.types.is_null(column.type):
            return None
        if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            return column.to_numpy()
        return column.to_pandas()

    def _repeated(self, values: list[Any]) -> Piece:
        """A value for each shard, in all of its rows."""
        value = values[0]
        if values.count(value) == len(values) and len({type(each) for each in values}) == 1:  # of most columns
            if value is None:
                return None
            if isinstance(value, str):
                return Words(np.zeros(self.rows, np.int8), [value])
            if value != 0:  # which may be -0.0 in some shards
                return np.full(self.rows, value)
        kinds = {type(value) for value in values}
        if str in kinds or {bool, type(None)} <= kinds:  # there is no truth value that says that it was not set
            texts = [None if value is None else str(value) for value in values]
            names = list(dict.fromkeys(text for text in texts if text is not None))
            at = {None: -1} | {name: k for k, name in enumerate(names)}
            codes = np.array([at[text] for text in texts], np.min_scalar_type(-len(names) - 1))
            return Words(self._filled(codes), names)
        if any(value is None for value in values):
            values = [np.nan if value is None else float(value) for value in values]
        return self._filled(np.array(values))

    def _filled(self, values: np.ndarray) -> np.ndarray:
        """np.repeat(values, counts), which copies row by row; filling a slice at a time takes a fifth of its time."""
        out = np.empty(self.rows, values.dtype)
        for value, begin, end in zip(values, self.begins[:-1], self.begins[1:], strict=True):
            out[begin:end] = value
        return out


def _order(shards: Sequence[Shard], groups: Sequence[Sequence[int]]) -> list[tuple[int, slice]]:
    """For every shard its group and its rows there."""
    found: list[tuple[int, slice]] = [(0, slice(0))] * len(shards)
    for g, members in enumerate(groups):
        begin = 0
        for k in members:
            found[k] = g, slice(begin, begin + shards[k].rows)
            begin += shards[k].rows
    return found


def _column(pieces: Sequence[Piece], groups: Sequence[_Group], order: list[tuple[int, slice]] | None) -> Any:
    """What the groups have of a column, as one array in the order of the shards."""
    if any(isinstance(piece, Words) for piece in pieces):
        words = [_words(piece, group.rows) for piece, group in zip(pieces, groups, strict=True)]
        names = list(dict.fromkeys(name for each in words for name in each.names))
        at = {name: k for k, name in enumerate(names)}
        small = np.min_scalar_type(-len(names) - 1)
        codes = [np.array([*(at[n] for n in each.names), -1], small)[each.codes] for each in words]
        return pd.Categorical.from_codes(_ordered(codes, order), names, validate=False)
    if any(isinstance(piece, pd.Series) for piece in pieces):
        whole = [pd.Series([None] * g.rows) if p is None else pd.Series(p) for p, g in zip(pieces, groups, strict=True)]
        if order is not None:
            whole = [whole[g].iloc[rows] for g, rows in order]
        return pd.concat(whole, ignore_index=True) if len(whole) > 1 else whole[0]
    arrays = [np.full(g.rows, np.nan) if p is None else np.asarray(p) for p, g in zip(pieces, groups, strict=True)]
    return _ordered(arrays, order)


def _ordered(arrays: Sequence[np.ndarray], order: Iterable[tuple[int, slice]] | None) -> np.ndarray:
    return arrays[0] if order is None else np.concatenate([arrays[g][rows] for g, rows in order])


def _words(piece: Piece, rows: int) -> Words:
    if isinstance(piece, Words):
        return piece
    if piece is None:
        return Words(np.full(rows, -1, np.int8), [])
    codes, names = pd.factorize(np.asarray(piece))
    return Words(codes, [str(name) for name in names])
