"""Parquet files: how a table is written, and how the files of thousands of runs become one frame.

nan is a value here and never becomes null: a dead layer must not drop out of an average. Files are written with
pyarrow, and read with polars, which takes a third of the time that pyarrow needs for many small files.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

# Key of a file's metadata: {"collected": whether its rows are those of many runs}.
METADATA = b"initlab"
FILE = "file of this row"  # a column while files are read


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
    """Under a temporary name, then renamed: a file is whole or not there. `collected`: the rows are of many runs."""
    texts = [f.name for f in table.schema if pa.types.is_dictionary(f.type)]
    floats = [f.name for f in table.schema if pa.types.is_floating(f.type)]
    partial = path.with_suffix(".part")
    # Of these tables LZ4 makes files as small as Zstandard does, and takes a third of its time to read many small ones.
    with pq.ParquetWriter(
        partial, table.schema, compression="lz4", use_dictionary=texts, use_byte_stream_split=floats
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({METADATA.decode(): json.dumps({"collected": collected})})
    partial.replace(path)


def join(tables: Sequence[pa.Table]) -> pa.Table:
    """The rows of all tables in their order."""
    return pa.concat_tables(tables, promote_options="permissive").unify_dictionaries()


def is_collected(path: str) -> bool:
    """Is a file what was collected from others?"""
    try:
        metadata = json.loads((pq.read_metadata(path).metadata or {}).get(METADATA, b"{}"))
    except (OSError, ValueError, pa.ArrowException):
        return False
    return bool(metadata.get("collected"))


@dataclass
class Files:
    """Many files as one frame: their rows in the order of the files, how many each has, why some cannot be read."""

    frame: pd.DataFrame
    rows: dict[str, int]
    unreadable: dict[str, str]


def read_files(paths: Sequence[str]) -> Files:
    """All rows in the order of the files, all columns in the order in which they are first met.

    A column that a file has not is nan there, or no text; integers beside floating numbers become these; numbers
    beside text become text. Text is categorical, its categories in the order in which they are met.
    """
    import polars as pl  # a single run is drawn from memory and needs none

    if not paths:
        return Files(pd.DataFrame(), {}, {})
    unreadable: dict[str, str] = {}
    try:  # files of one kind at once
        scan = pl.scan_parquet(list(paths), glob=False, hive_partitioning=False, include_file_paths=FILE)
        table = scan.collect()
        runs = table[FILE].rle().struct.unnest()
        rows = dict.fromkeys(paths, 0) | dict(zip(runs["value"], runs["len"], strict=True))
        table = table.drop(FILE)
    except (OSError, pl.exceptions.PolarsError):  # columns differ, or one of them is broken
        frames = {}
        for path in paths:
            try:
                frames[path] = pl.read_parquet(path, glob=False, hive_partitioning=False)
            except (OSError, pl.exceptions.PolarsError) as error:
                unreadable[path] = (str(error) or type(error).__name__).splitlines()[0]
        rows = {path: frame.height for path, frame in frames.items()}
        kinds = [pair for frame in frames.values() for pair in frame.schema.items()]
        text = {name for name, kind in kinds if kind in (pl.Categorical, pl.String)}  # in one file at least
        alike = [one.cast({name: pl.String for name in one.columns if name in text}) for one in frames.values()]
        table = pl.concat(alike, how="diagonal_relaxed") if alike else pl.DataFrame()
    return Files(pd.DataFrame({s.name: _as_column(s) for s in table.iter_columns()}, copy=False), rows, unreadable)


def _as_column(series: Any) -> Any:
    """A polars column as pandas wants it; text as categories."""
    import polars as pl

    if series.dtype in (pl.Categorical, pl.String):
        names = series.drop_nulls().unique(maintain_order=True)
        codes = pd.factorize(series.to_physical().to_numpy())[0] if series.dtype == pl.Categorical else None
        if codes is None or series.null_count():
            return pd.Categorical(series.cast(pl.String).to_list(), names.to_list())
        return pd.Categorical.from_codes(codes, names.cast(pl.String).to_list(), validate=False)
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
    return np.repeat(np.array([np.nan if value is None else value for value in values]), counts)
