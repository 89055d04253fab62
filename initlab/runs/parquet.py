"""Parquet files: how a table is written, and how the files of thousands of runs become one frame.

nan is a value here and never becomes null: a dead layer must not drop out of an average. Files are written with
pyarrow, and sealed: a sum over every byte, so that one that was damaged anywhere never reads as other numbers. Sealed
files are read with polars, which takes a third of the time that pyarrow needs for many small ones; those of others with
pyarrow, which is built for files that nobody vouches for.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from initlab.errors import UsageError, printable
from initlab.files import SMALL, check_file

# Key of a file's metadata: {"collected": whether its rows are those of many runs, "numbers": how many its rows hold, 8
# bytes each, "crc32": its seal}.
METADATA = b"initlab"
FILE = "file of this row"  # a column while files are read
SEAL = re.compile(rb'"numbers": (\d{1,18}), "crc32": "([0-9a-f]{8})"')
LONG_TEXT = 64  # numbers that a row of long text counts as
UNSEALED = "0" * 8  # in the place of the sum before it is known
TAIL = 8  # bytes behind the footer: its length, and PAR1
BLOCK = 2**20
# Bytes that the rows of a file may take: of a small file, and for each byte of a larger one. A table in which every
# number is nan takes 300 times its file.
MOST_IN_SMALL, MOST_PER_BYTE = 400 * 2**20, 1000
MOST_COLUMNS = 2000
_CODECS = {
    "PLAIN",
    "RLE",
    "RLE_DICTIONARY",
    "PLAIN_DICTIONARY",
    "BYTE_STREAM_SPLIT",
    "BIT_PACKED",
    "DELTA_BINARY_PACKED",
}


def as_arrow(frame: pd.DataFrame) -> pa.Table:
    """The columns of a frame; categories as dictionaries, nan kept as nan."""
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
    return pa.table(columns)


def add_constants(table: pa.Table, constants: Mapping[str, Any]) -> pa.Table:
    """With a column for each value whose name no column has; text as dictionaries."""
    more = {name: value for name, value in constants.items() if name not in table.column_names}
    if not more:
        return table
    codes = pa.array(np.zeros(len(table), np.int32))
    columns = [
        pa.DictionaryArray.from_arrays(codes, [value])
        if isinstance(value, str)
        else pa.array(np.full(len(table), value))
        for value in more.values()
    ]
    return pa.Table.from_arrays([*table.columns, *columns], names=[*table.column_names, *more])


@contextmanager
def open_writer(path: Path, schema: pa.Schema, collected: bool = False) -> Iterator[Callable[[pa.Table], None]]:
    """What takes the rows of a file, under a temporary name: it is whole and sealed, or not there.

    collected: the rows are of many runs. Errors: an OSError of the disk; nothing is then left of the file.
    """
    texts = [f.name for f in schema if pa.types.is_dictionary(f.type)]
    floats = [f.name for f in schema if pa.types.is_floating(f.type)]
    partial = path.with_suffix(".part")
    numbers = 0
    try:
        # Of these tables LZ4 makes files as small as Zstandard does, and takes a third of its time to read many.
        with pq.ParquetWriter(
            partial, schema, compression="lz4", use_dictionary=texts, use_byte_stream_split=floats,
            write_page_checksum=True,
        ) as writer:  # fmt: skip

            def write_rows(table: pa.Table) -> None:
                nonlocal numbers
                writer.write_table(table)
                numbers += max(table.num_rows * table.num_columns, table.nbytes // 8)  # lists hold several
                columns = [column for column in table.itercolumns() if pa.types.is_dictionary(column.type)]
                words = [part.dictionary for column in columns for part in column.chunks]
                longest = max((pc.max(pc.binary_length(some)).as_py() or 0 for some in words), default=0)
                numbers += table.num_rows * (longest // 64)  # a reader may spell each of them out

            yield write_rows
            about = {"collected": collected, "numbers": numbers, "crc32": UNSEALED}
            writer.add_key_value_metadata({METADATA.decode(): json.dumps(about)})
        with partial.open("r+b") as file:
            place, _ = _find_seal(file)
            total = _sum_bytes(file, place)
            file.seek(place)
            file.write(total)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write(table: pa.Table, path: Path, collected: bool = False) -> None:
    """A table as a file. `collected`: the rows are of many runs."""
    with open_writer(path, table.schema, collected) as write_rows:
        write_rows(table)


def _find_seal(file: BinaryIO) -> tuple[int, int]:
    """Where in a file its seal stands, and how many numbers it says that the file holds; -1 and 0 for no seal."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - TAIL))
    footer = int.from_bytes(file.read(4), "little")
    start = file.seek(max(0, end - TAIL - footer))
    tail = file.read()
    found = SEAL.match(tail, max(0, tail.rfind(b'"numbers": ')))
    return (start + found.start(2), int(found[1])) if found else (-1, 0)


def _sum_bytes(file: BinaryIO, place: int) -> bytes:
    """CRC-32 of all bytes of a file but those of its seal, which stands at `place`."""
    total = 0
    for start, count in ((0, float(place)), (place + len(UNSEALED), math.inf)):
        file.seek(start)
        while count > 0 and (block := file.read(int(min(count, BLOCK)))):
            total, count = zlib.crc32(block, total), count - len(block)
    return b"%08x" % total


def check_seal(path: str | Path, needed: bool = False) -> bool:
    """Whether a file is sealed. `UsageError` if it is not as it was written, lost its seal, or promises too much."""
    size = check_file(path)
    try:
        with open(path, "rb") as file:  # noqa: PTH123 (a Path costs ten times as much)
            place, count = _find_seal(file)
            whole = place >= 0 and _sum_bytes(file, place) == (file.seek(place), file.read(len(UNSEALED)))[1]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    if not whole and (needed or place >= 0):
        raise UsageError(f"{path}: cannot be read (damaged: its bytes are not those that were written)")
    if whole:
        _check_promise(path, size, count)
    return whole


def _check_promise(path: str | Path, size: int, numbers: int) -> None:
    """Refuse a file that promises more than its size warrants, before its rows are made."""
    if not 0 <= 8 * numbers <= (MOST_IN_SMALL if size <= SMALL else MOST_PER_BYTE * size):
        raise UsageError(f"{path}: {size:,} bytes that promise {numbers:,} numbers are not read")


def join(tables: Sequence[pa.Table]) -> pa.Table:
    """The rows of all tables in their order."""
    return pa.concat_tables(tables, promote_options="permissive").unify_dictionaries()


def is_collected(path: str) -> bool:
    """Is a file what was collected from others?"""
    try:
        check_file(path)
        metadata = json.loads((pq.read_metadata(path).metadata or {}).get(METADATA, b"{}"))
        return isinstance(metadata, dict) and bool(metadata.get("collected"))
    except Exception:  # whatever it is, it is no file of ours
        return False


@dataclass
class Files:
    """Many files as one frame: their rows in the order of the files, how many each has, what of some is wrong."""

    frame: pd.DataFrame
    rows: dict[str, int]
    unreadable: dict[str, str]  # a line for each of these files


def read_files(
    paths: Sequence[str], kinds: Mapping[str, str] = MappingProxyType({}), sealed: Collection[str] = ()
) -> Files:
    """All rows in the order of the files, all columns in the order in which they are first met.

    A column that a file has not is nan there, or no text; integers beside floating numbers become these; numbers
    beside text become text. Text is categorical, its categories in the order in which they are met.

    kinds: whether a column holds `numbers`, `text` or either, `values`, in a file that has it. sealed: the files that
    were sealed when they were written. A file that cannot be read raises nothing, and is named in the result.
    """
    import polars as pl  # a single run is drawn from memory and needs none

    unreadable: dict[str, str] = {}
    is_sealed: dict[str, bool] = {}
    for path in paths:
        try:
            is_sealed[path] = check_seal(path, path in sealed)
        except UsageError as error:
            unreadable[path] = str(error)
    good = [path for path in is_sealed if path not in unreadable]
    if not good:
        return Files(pd.DataFrame(), {}, unreadable)
    rows = dict.fromkeys(good, 0)
    try:  # files of one kind at once
        if not all(is_sealed[path] for path in good):
            raise UsageError("files of others are read one by one")
        scan = pl.scan_parquet(good, glob=False, hive_partitioning=False, include_file_paths=FILE)
        table = scan.collect()
        _check_kinds(table.schema, kinds)
        runs = table[FILE].rle().struct.unnest()
        rows |= dict(zip(runs["value"], runs["len"], strict=True))
        table = table.drop(FILE)
    except (Exception, pl.exceptions.PanicException):  # columns differ, or one of them is broken
        frames: dict[str, Any] = {}
        lists: dict[str, bool] = {}  # whether a column holds lists
        for path in good:
            try:
                frames[path] = _read_file(path, is_sealed[path])
                _check_kinds(frames[path].schema, kinds)
                lists |= {name: kind.is_nested() for name, kind in frames[path].schema.items() if name not in lists}
                for name, kind in frames[path].schema.items():
                    if kind.is_nested() != lists[name]:
                        raise UsageError(f"its column `{name}` holds {'' if kind.is_nested() else 'no '}lists")
            except (Exception, pl.exceptions.PanicException) as error:  # whatever a reader raises is about the file
                why = str(error) or type(error).__name__
                unreadable[path] = str(UsageError(f"{path}: cannot be read ({why.removeprefix(f'{path}: ')})"))
                frames.pop(path, None)
        rows = {path: frame.height for path, frame in frames.items()}
        kinds_met = [pair for frame in frames.values() for pair in frame.schema.items()]
        text = {name for name, kind in kinds_met if kind in (pl.Categorical, pl.String)}  # in one file at least
        alike = []
        for one in frames.values():  # categories stay such: as text each row would hold all of its signs
            numbers = {name: pl.String for name in one.columns if name in text and one.schema[name] != pl.Categorical}
            alike.append(one.cast(numbers).cast({name: pl.Categorical for name in one.columns if name in text}))
        table = pl.concat(alike, how="diagonal_relaxed") if alike else pl.DataFrame()
    columns = {printable(s.name): _as_column(s) for s in table.iter_columns()}
    return Files(pd.DataFrame(columns, copy=False), rows, unreadable)


def _read_file(path: str, sealed: bool) -> Any:
    """One file as a polars frame. Raises what its reader raises."""
    import polars as pl

    if sealed:
        return pl.read_parquet(path, glob=False, hive_partitioning=False)
    about = pq.read_metadata(path)
    if about.num_columns > MOST_COLUMNS:
        raise UsageError(f"has {about.num_columns:,} columns")
    parts = [about.row_group(k).column(j) for k in range(about.num_row_groups) for j in range(about.num_columns)]
    # A writer leaves out the ends of a text column only where they are long: each row may then stand for much.
    long = [p for p in parts if p.physical_type == "BYTE_ARRAY" and not (p.statistics and p.statistics.has_min_max)]
    numbers = max(about.num_rows * about.num_columns, sum(one.num_values for one in parts))
    _check_promise(path, check_file(path), numbers + sum(LONG_TEXT * one.num_values for one in long))
    packed = {name for part in parts for name in part.encodings} - _CODECS
    if packed:  # some let a few bytes stand for any number of long texts
        raise UsageError(f"its columns are packed as {', '.join(sorted(packed))}")
    text = [field.name for field in pq.read_schema(path) if pa.types.is_string(field.type)]
    table = pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=text).read(use_threads=False)
    for field in table.schema:
        inner = field.type.value_type if pa.types.is_list(field.type) else field.type
        is_number = pa.types.is_integer(inner) or pa.types.is_floating(inner) or pa.types.is_boolean(inner)
        if not (is_number or pa.types.is_null(inner) or pa.types.is_string(inner) or pa.types.is_dictionary(inner)):
            raise UsageError(f"its column {field.name} holds {field.type}")
    return pl.from_arrow(table)


def _check_kinds(schema: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
    import polars as pl

    for name, kind in kinds.items():
        if name not in schema:
            continue
        is_text, is_number = schema[name] in (pl.Categorical, pl.String), schema[name].is_numeric()
        fits = {"text": is_text, "numbers": is_number, "values": is_text or is_number or schema[name] == pl.Boolean}
        if not fits[kind] and schema[name] != pl.Null:
            raise UsageError(f"its column `{name}` holds no {kind}")


def _as_column(series: Any) -> Any:
    """A polars column as pandas wants it; text as categories."""
    import polars as pl

    if series.dtype in (pl.Categorical, pl.String):
        codes = series.cast(pl.Categorical).to_physical()
        if len(codes) and not codes.null_count() and codes.min() == codes.max():  # as most are
            return pd.Categorical.from_codes(np.zeros(len(codes), np.int8), [printable(str(series[0]))], validate=False)
        places, _ = pd.factorize(codes.to_numpy())
        names = [printable(name) for name in series.drop_nulls().unique(maintain_order=True).cast(pl.String)]
        if len(set(names)) < len(names):
            return pd.Categorical([names[place] if place >= 0 else None for place in places])
        return pd.Categorical.from_codes(places, names, validate=False)
    if series.dtype == pl.Null:
        return np.full(len(series), np.nan)
    return series.to_pandas() if series.dtype.is_nested() else series.to_numpy()


def repeat(values: Sequence[Any], counts: Sequence[int]) -> Any:
    """A column in which the k-th value stands `counts[k]` times: numbers with nan for None, or categories.

    A truth value that some have not becomes text too: there is none that says that it was not set.
    """
    kinds = {type(value) for value in values}
    if str in kinds or {bool, type(None)} <= kinds:
        texts = [None if value is None else str(value) for value in values]
        codes, names = pd.factorize(np.array(texts, object))
        return pd.Categorical.from_codes(np.repeat(codes, counts), list(names))
    wide = any(isinstance(value, int) and abs(value) >= 2**63 for value in values)  # than an integer of a table is
    found = [np.nan if value is None else float(value) if wide else value for value in values]
    return np.repeat(np.array(found), counts)
