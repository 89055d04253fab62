"""Files come back as they were, alone and many at once, whatever of their columns drifted."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from initlab.runs.parquet import add_constants, as_arrow, is_collected, open_writer, read_files, repeat, write


def read_back(folder: Path, *frames: pd.DataFrame, **constants: object) -> pd.DataFrame:
    """The frames, a file each, read in one go."""
    for k, each in enumerate(frames):
        write(add_constants(as_arrow(each), constants), folder / f"{k}.parquet")
    return read_files([str(folder / f"{k}.parquet") for k in range(len(frames))]).frame


def test_constants_are_columns_of_the_file_and_its_types_come_back(tmp_path: Path) -> None:
    given = pd.DataFrame({"a": [1.0, 1.0], "b": [1, 2], "word": pd.Categorical(["x", "x"]), "flag": [True, False]})
    found = read_back(tmp_path, given, init="kaiming", depth=3)
    assert list(found) == ["a", "b", "word", "flag", "init", "depth"]
    assert found["a"].dtype == float and found["depth"].dtype == int and found["flag"].dtype == bool
    assert isinstance(found["word"].dtype, pd.CategoricalDtype) and isinstance(found["init"].dtype, pd.CategoricalDtype)
    assert found["word"].tolist() == ["x", "x"]
    assert pd.read_parquet(tmp_path / "0.parquet")["init"].tolist() == ["kaiming", "kaiming"]  # the file alone says all


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize(
    "values", [[math.nan, math.nan], [math.inf, -math.inf], [0.0, -0.0], [1.0, math.nextafter(1, 2)], [5e-324, 0.0]]
)
def test_numbers_come_back_bit_for_bit(tmp_path: Path, values: list[float], copies: int) -> None:
    found = read_back(tmp_path, *[pd.DataFrame({"x": values, "n": [1, 2]})] * copies)
    np.testing.assert_array_equal(found["x"].to_numpy().view(np.int64), np.array(values * copies).view(np.int64))


def test_nan_is_a_value_and_no_null(tmp_path: Path) -> None:
    write(as_arrow(pd.DataFrame({"x": [math.nan, 1.0]})), tmp_path / "0.parquet")
    assert pq.read_table(tmp_path / "0.parquet")["x"].null_count == 0


def test_rows_stand_in_the_order_of_the_files(tmp_path: Path) -> None:
    frames = [pd.DataFrame({"n": [k, k + k % 2], "x": [0.5, 0.5 * (k % 3)], "k": k}) for k in range(7)]
    pd.testing.assert_frame_equal(read_back(tmp_path, *frames), pd.concat(frames, ignore_index=True))


def test_words_are_joined_whatever_their_codes(tmp_path: Path) -> None:
    first = pd.Categorical.from_codes([1, 0], ["b", "a"])
    second = pd.Categorical.from_codes([0, 1], ["a", "c"])
    third = pd.Categorical.from_codes([-1, 0], ["b"])
    found = read_back(tmp_path, *(pd.DataFrame({"word": each}) for each in (first, second, third)))
    assert found["word"].astype(object).where(found["word"].notna(), None).tolist() == ["a", "b", "a", "c", None, "b"]
    assert list(found["word"].cat.categories) == ["a", "b", "c"]


def test_schemas_that_drifted_are_joined(tmp_path: Path) -> None:
    """A column that came later, an integer that became a float, strings that became words, a number that did."""
    old = pd.DataFrame({"n": [1, 2], "name": ["x", "y"], "limit": [1, 2]})
    new = pd.DataFrame(
        {"n": [1.5, 2.5], "name": pd.Categorical(["x", "z"]), "limit": pd.Categorical(["a", "b"]), "k": [7, 8]}
    )
    found = read_back(tmp_path, old, new)
    assert found["n"].tolist() == [1, 2, 1.5, 2.5]
    assert found["name"].tolist() == ["x", "y", "x", "z"]
    assert found["limit"].tolist() == ["1", "2", "a", "b"]
    np.testing.assert_array_equal(found["k"], [math.nan, math.nan, 7, 8])


def test_files_of_others_are_read_too(tmp_path: Path) -> None:
    table = pa.table({"a": [1, 1], "b": [1.0, None], "word": ["x", "x"], "none": pa.nulls(2)})
    pq.write_table(table, tmp_path / "0.parquet")
    found = read_files([str(tmp_path / "0.parquet")]).frame
    np.testing.assert_array_equal(found["b"], [1, math.nan])
    assert found["word"].tolist() == ["x", "x"] and found["none"].isna().all()
    assert not is_collected(str(tmp_path / "0.parquet"))


def test_lists_come_back(tmp_path: Path) -> None:
    lists = pd.DataFrame({"n": [1, 2], "counts": [np.array([1, 2]), np.array([], np.int64)]})
    found = read_back(tmp_path, lists, lists)
    assert found["counts"].map(list).tolist() == [[1, 2], []] * 2


def test_a_table_without_rows_is_one(tmp_path: Path) -> None:
    empty = pd.DataFrame({"n": np.array([], np.int64), "word": pd.Categorical([])})
    found = read_back(tmp_path, empty, pd.DataFrame({"n": [3], "word": pd.Categorical(["x"])}), empty)
    assert found["n"].tolist() == [3] and found["word"].tolist() == ["x"]
    assert len(read_back(tmp_path, empty)) == 0 and len(read_files([]).frame) == 0


def test_a_broken_file_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    frame = pd.DataFrame({"n": [1, 2, 3]})
    paths = [str(tmp_path / f"{name}.parquet") for name in ("a", "torn", "gone", "text", "b")]
    for path in paths[:2] + paths[-1:]:
        write(as_arrow(frame), Path(path))
    Path(paths[1]).write_bytes(Path(paths[1]).read_bytes()[:-5])
    Path(paths[3]).write_text("years of work")
    found = read_files(paths)
    assert found.frame["n"].tolist() == [1, 2, 3] * 2
    assert found.rows == {paths[0]: 3, paths[-1]: 3}
    assert list(found.unreadable) == paths[1:4] and all(found.unreadable.values())


def test_a_file_that_was_damaged_anywhere_never_reads_as_other_numbers(tmp_path: Path) -> None:
    """Every byte, one after the other: pages, page headers, footer, the seal itself."""
    frame = pd.DataFrame({"x": np.random.default_rng(0).standard_normal(50), "word": pd.Categorical(["a", "b"] * 25)})
    whole = tmp_path / "whole.parquet"
    write(as_arrow(frame), whole)
    raw = whole.read_bytes()
    damaged = [str(tmp_path / f"{k}.parquet") for k in range(0, len(raw), 7)]
    for k, path in zip(range(0, len(raw), 7), damaged, strict=True):
        Path(path).write_bytes(raw[:k] + bytes([raw[k] ^ 1 << k % 8]) + raw[k + 1 :])
    found = read_files([str(whole), *damaged], sealed=[str(whole), *damaged])
    assert len(found.frame) == 50 and sorted(found.unreadable) == sorted(damaged)
    np.testing.assert_array_equal(found.frame["x"], frame["x"])


def test_a_file_that_promises_more_than_it_is_worth_is_not_read(tmp_path: Path) -> None:
    rows = pa.table({"x": np.zeros(10**6), "y": np.zeros(10**6)})
    with open_writer(tmp_path / "ours.parquet", rows.schema) as write_rows:
        for _ in range(40):
            write_rows(rows)
    with pq.ParquetWriter(tmp_path / "theirs.parquet", rows.schema) as writer:
        for _ in range(40):
            writer.write_table(rows)
    pq.write_table(pa.table({"x": pa.array(["a"], pa.binary())}), tmp_path / "kind.parquet")
    found = read_files([str(path) for path in sorted(tmp_path.iterdir())])
    assert len(found.unreadable) == 3 and not len(found.frame)
    assert all(
        "promise 80,000,000 numbers" in found.unreadable[str(tmp_path / f"{n}.parquet")] for n in ("ours", "theirs")
    )


SETTINGS: list[tuple[list[object], list[object]]] = [
    ([1, 2], [1, 1, 2]),
    ([1, 2.5], [1.0, 1.0, 2.5]),
    ([False, True], [False, False, True]),
    (["a", None], ["a", "a", math.nan]),
    (["a", 3], ["a", "a", "3"]),
    ([False, None], ["False", "False", math.nan]),  # no truth value says that it was not set
    ([0.1, None], [0.1, 0.1, math.nan]),
]


@pytest.mark.parametrize(("values", "column"), SETTINGS)
def test_what_was_set_for_a_run_stands_in_each_of_its_rows(values: list[object], column: list[object]) -> None:
    found = pd.Series(repeat(values, [2, 1]))
    pd.testing.assert_series_equal(found.astype(object), pd.Series(column, dtype=object))
