import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import initlab
from initlab.errors import UsageError
from initlab.output.records import Recorder, discard, read, run_folders

COLUMNS = {"init": "kaiming", "depth": 3, "gain": math.sqrt(2)}


def rows(seed: int, value: float) -> pd.DataFrame:
    return pd.DataFrame({"seed": [seed], "tensor": pd.Categorical(["weight"]), "std": [value], "n_nan": [0]})


def write(folder: Path, *values: float, **columns: object) -> Path:
    with Recorder(folder, COLUMNS | columns, "cpu") as recorder:
        for seed, value in enumerate(values):
            recorder.add({"stats": rows(seed, value)})
    return folder


def test_a_finished_run_holds_whole_tables_and_says_so(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", 1.0, 2.0)
    assert sorted(p.name for p in folder.iterdir()) == ["run.json", "stats.parquet"]
    about = json.loads((folder / "run.json").read_text())
    assert about["status"] == "done" and about["schema_version"] == 1 and about["wall_seconds"] >= 0
    assert {"torch", "hydra-core", "python", "initlab"} <= set(about["versions"])
    frame = read(folder)
    assert frame["std"].tolist() == [1, 2] and frame["seed"].tolist() == [0, 1]
    assert set(frame["init"]) == {"kaiming"} and set(frame["depth"]) == {3} and set(frame["run"]) == {str(folder)}


def test_nan_inf_and_subnormal_numbers_survive_as_values(tmp_path: Path) -> None:
    """nan must not become null, or a dead layer would drop out of every average."""
    folder = write(tmp_path / "a", math.nan, math.inf, 5e-324)
    column = pq.read_table(folder / "stats.parquet")["std"]
    assert column.null_count == 0
    np.testing.assert_array_equal(read(folder)["std"], [math.nan, math.inf, 5e-324])


def test_what_was_measured_outlives_a_fault(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Recorder(tmp_path, COLUMNS, "cpu") as recorder:
        recorder.add({"stats": rows(0, 1.0)})
        raise RuntimeError("boom")
    assert json.loads((tmp_path / "run.json").read_text())["error"] == "RuntimeError: boom"
    with pytest.warns(UserWarning, match="failed"):
        assert len(read(tmp_path)) == 1


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Recorder(tmp_path, COLUMNS, "cpu") as recorder:
        recorder.add({"stats": rows(0, 1.0)})
        raise KeyboardInterrupt
    with pytest.warns(UserWarning, match="interrupted"):
        assert len(read(tmp_path)) == 1


def test_a_killed_run_is_named_and_its_parts_are_read(tmp_path: Path) -> None:
    """As after a kill: no exit ran, the status is still `running`, the parts lie there."""
    recorder = Recorder(tmp_path / "killed", COLUMNS, "cpu")
    recorder.__enter__()
    recorder.add({"stats": rows(0, 1.0)})
    recorder.add({"stats": rows(1, 2.0)})
    write(tmp_path / "whole", 3.0)
    with pytest.warns(UserWarning, match=r"killed: this run is running, not done; reading the 2 rows"):
        frame = read(tmp_path / "**")
    assert sorted(frame["std"]) == [1, 2, 3]


def test_runs_are_joined_whatever_columns_they_have(tmp_path: Path) -> None:
    write(tmp_path / "x" / "0", 1.0, init="naive")
    write(tmp_path / "x" / "1", 2.0, init="small", extra="new")
    frame = read(f"{tmp_path}/**").sort_values("std")
    assert frame["init"].tolist() == ["naive", "small"]
    assert frame["extra"].isna().tolist() == [True, False]
    assert list(run_folders([tmp_path / "x", tmp_path / "x" / "1"])) == [tmp_path / "x" / "0", tmp_path / "x" / "1"]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "good", 1.0)
    (write(tmp_path / "bad", 2.0) / "stats.parquet").write_bytes(b"PAR1 cut short")
    with pytest.warns(UserWarning, match="bad: stats cannot be read"):
        assert read(tmp_path)["std"].tolist() == [1]


def test_nothing_found_is_an_error(tmp_path: Path) -> None:
    for pattern in (tmp_path, tmp_path / "none" / "**"):
        with pytest.raises(ValueError, match="no run with a table `stats`"):
            read(pattern)
    with pytest.raises(UsageError, match="table=stat: must be one of"):
        read(tmp_path, table="stat")
    assert initlab.read is read


def test_discard_takes_only_what_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "config" / "now"
    (empty / ".hydra").mkdir(parents=True)
    discard(empty)
    assert list(tmp_path.iterdir()) == []
    full = write(tmp_path / "config" / "now", 1.0)
    discard(full)
    assert (full / "stats.parquet").exists()
