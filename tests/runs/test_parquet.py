"""Shards come back as they were, whatever of them is repeated from the metadata and whatever drifted."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from initlab.runs import parquet
from initlab.runs.parquet import as_arrow, frame, read, write


def kept(folder: Path, *frames: pd.DataFrame, **constants: object) -> list[parquet.Shard]:
    for k, each in enumerate(frames):
        write(as_arrow(each, constants), folder / f"{k}.parquet")
    return [read(str(folder / f"{k}.parquet")) for k in range(len(frames))]


def test_constants_are_repeated_and_what_varies_is_decoded(tmp_path: Path) -> None:
    given = pd.DataFrame({"a": [1.0, 1.0], "b": [1, 2], "word": pd.Categorical(["x", "x"])})
    (shard,) = kept(tmp_path, given, init="kaiming", depth=3)
    assert shard.constants == {"a": 1.0, "word": "x", "init": "kaiming", "depth": 3}
    assert shard.table.column_names == ["b"]
    found = frame([shard])
    assert list(found) == ["a", "b", "word", "init", "depth"]
    assert found["a"].dtype == float and found["depth"].dtype == int and found["word"].tolist() == ["x", "x"]
    assert pd.read_parquet(tmp_path / "0.parquet")["init"].tolist() == ["kaiming", "kaiming"]  # the file alone says all


@pytest.mark.parametrize(
    ("values", "constant"),
    [
        ([math.nan, math.nan], True),
        ([math.inf, math.inf], True),
        ([0.0, -0.0], False),  # equal, and not the same bits
        ([1.0, math.nextafter(1, 2)], False),
        ([5e-324, 5e-324], True),
    ],
)
def test_a_constant_is_one_bit_for_bit(tmp_path: Path, values: list[float], constant: bool) -> None:
    (shard,) = kept(tmp_path, pd.DataFrame({"x": values, "n": [1, 2]}))
    assert ("x" in shard.constants) == constant
    np.testing.assert_array_equal(frame([shard])["x"].to_numpy().view(np.int64), np.array(values).view(np.int64))


def test_shards_in_which_other_columns_vary_keep_their_order(tmp_path: Path) -> None:
    frames = [pd.DataFrame({"n": [k, k + k % 2], "x": [0.5, 0.5 * (k % 3)], "k": k}) for k in range(7)]
    found = frame(kept(tmp_path, *frames))
    pd.testing.assert_frame_equal(found, pd.concat(frames, ignore_index=True))


def test_a_truth_value_that_some_have_not_is_a_word_and_one_that_all_have_is_none(tmp_path: Path) -> None:
    one, other = kept(tmp_path, *[pd.DataFrame({"x": [1.0, 2.0]})] * 2)
    some = frame([one.also(plots=False), other.also(plots=None)])["plots"]
    assert some[:2].tolist() == ["False"] * 2 and some[2:].isna().all()
    every = frame([one.also(plots=False), other.also(plots=True)])["plots"]
    assert every.tolist() == [False, False, True, True] and every.dtype == bool


def test_words_are_joined_whatever_their_codes(tmp_path: Path) -> None:
    first = pd.Categorical.from_codes([1, 0], ["b", "a"])
    second = pd.Categorical.from_codes([0, 1], ["a", "c"])
    third = pd.Categorical.from_codes([-1, 0], ["b"])
    found = frame(kept(tmp_path, *(pd.DataFrame({"word": each}) for each in (first, second, third))))
    assert found["word"].astype(object).where(found["word"].notna(), None).tolist() == ["a", "b", "a", "c", None, "b"]


def test_schemas_that_drifted_are_joined(tmp_path: Path) -> None:
    """A column that came later, an integer that became a float, strings that became words, a number that did."""
    old = pd.DataFrame({"n": [1, 2], "name": ["x", "y"], "limit": [1, 2]})
    new = pd.DataFrame(
        {"n": [1.5, 2.5], "name": pd.Categorical(["x", "z"]), "limit": pd.Categorical(["a", "b"]), "k": [7, 8]}
    )
    found = frame(kept(tmp_path, old, new))
    assert found["n"].tolist() == [1, 2, 1.5, 2.5]
    assert found["name"].tolist() == ["x", "y", "x", "z"]
    assert found["limit"].tolist() == ["1", "2", "a", "b"]
    np.testing.assert_array_equal(found["k"], [math.nan, math.nan, 7, 8])


def test_files_of_others_are_read_in_full(tmp_path: Path) -> None:
    table = pa.table({"a": [1, 1], "b": [1.0, None], "word": ["x", "x"]})
    pq.write_table(table, tmp_path / "0.parquet")
    shard = read(str(tmp_path / "0.parquet"))
    assert shard.constants == {} and shard.table.column_names == ["a", "b", "word"]
    found = frame([shard])
    np.testing.assert_array_equal(found["b"], [1, math.nan])
    assert found["word"].tolist() == ["x", "x"]


def test_metadata_of_other_rows_is_not_believed(tmp_path: Path) -> None:
    """A program that adds rows and hands the metadata on; pyarrow's own reader and writer drop it."""
    path = tmp_path / "0.parquet"
    write(as_arrow(pd.DataFrame({"x": [1.0, 1.0]}), {}), path)
    said = pq.read_metadata(path).metadata[parquet.SAID]
    assert json.loads(said)["constants"] == {"x": 1.0}
    longer = pa.table({"x": [1.0, 1.0, 2.0]})
    with pq.ParquetWriter(path, longer.schema) as writer:
        writer.write_table(longer)
        writer.add_key_value_metadata({parquet.SAID.decode(): said.decode()})
    assert frame([read(str(path))])["x"].tolist() == [1, 1, 2]


def test_a_table_without_rows_is_one(tmp_path: Path) -> None:
    empty = pd.DataFrame({"n": np.array([], np.int64), "word": pd.Categorical([])})
    found = frame(kept(tmp_path, empty, pd.DataFrame({"n": [3], "word": pd.Categorical(["x"])}), empty))
    assert found["n"].tolist() == [3] and found["word"].tolist() == ["x"]
    assert len(frame(kept(tmp_path, empty))) == 0
