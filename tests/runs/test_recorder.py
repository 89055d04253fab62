import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import initlab
from initlab.errors import UsageError
from initlab.runs import recorder
from initlab.runs.folders import find_folders
from initlab.runs.read import read
from initlab.runs.recorder import Recorder, discard, refuse_used

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
    assert about["status"] == "done" and about["schema_version"] == 2 and about["wall_seconds"] >= 0
    assert {"torch", "hydra-core", "python", "initlab"} <= set(about["versions"])
    frame = read(folder)
    assert frame["std"].tolist() == [1, 2] and frame["seed"].tolist() == [0, 1]
    assert set(frame["init"]) == {"kaiming"} and set(frame["depth"]) == {3} and set(frame["run"]) == {str(folder)}


def test_networks_that_differ_say_so_row_by_row(tmp_path: Path) -> None:
    with Recorder(tmp_path, COLUMNS, "cpu") as recorder:
        recorder.add({"stats": rows(0, 1.0).assign(init=pd.Categorical(["naive"]), gain=1.0)})
        recorder.add({"stats": rows(1, 1.0)})
    frame = read(tmp_path)
    assert frame["init"].tolist() == ["naive", "kaiming"] and frame["gain"].tolist() == [1.0, math.sqrt(2)]
    assert frame["depth"].tolist() == [3, 3]


def test_nan_inf_and_subnormal_numbers_survive_as_values(tmp_path: Path) -> None:
    """nan must not become null, or a dead layer would drop out of every average."""
    folder = write(tmp_path / "a", math.nan, math.inf, 5e-324)
    column = pq.read_table(folder / "stats.parquet")["std"]
    assert column.null_count == 0
    np.testing.assert_array_equal(read(folder)["std"], [math.nan, math.inf, 5e-324])


def test_lists_of_counts_survive(tmp_path: Path) -> None:
    """Of one length and of several, empty ones too; a part without rows does not spoil the others."""
    counts = [[1, 0, 2], [3, 4, 5], []]
    for name in ("a", "b"):
        with Recorder(tmp_path / name, COLUMNS, "cpu") as recorder:
            for part in (counts, counts[2:], counts[:1], []):
                positive = np.empty(len(part), dtype=object)
                for k, values in enumerate(part):
                    positive[k] = np.array(values, dtype=np.int64)
                tensor = pd.Categorical(["weight"] * len(part))
                recorder.add({"histograms": pd.DataFrame({"tensor": tensor, "first": -3, "positive": positive})})
    assert str(pq.read_schema(tmp_path / "a" / "histograms.parquet").field("positive").type) == "list<element: int64>"
    frame = read(tmp_path, "histograms")
    assert [values.tolist() for values in frame["positive"]] == [*counts, [], counts[0]] * 2
    assert set(frame["init"]) == {"kaiming"} and set(frame["tensor"]) == {"weight"}


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
    with pytest.warns(UserWarning, match=r"killed: this run is killed, not done; reading the 2 rows"):
        frame = read(tmp_path / "**")
    assert sorted(frame["std"]) == [1, 2, 3]


def test_runs_are_joined_whatever_columns_they_have(tmp_path: Path) -> None:
    write(tmp_path / "x" / "0", 1.0, init="naive")
    write(tmp_path / "x" / "1", 2.0, init="small", extra="new")
    frame = read(f"{tmp_path}/**").sort_values("std")
    assert frame["init"].tolist() == ["naive", "small"]
    assert frame["extra"].isna().tolist() == [True, False]
    found = find_folders([tmp_path / "x", tmp_path / "x" / "1"])
    assert [Path(folder.path) for folder in found] == [tmp_path / "x" / "0", tmp_path / "x" / "1"]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "good", 1.0)
    (write(tmp_path / "bad", 2.0) / "stats.parquet").write_bytes(b"PAR1 cut short")
    with pytest.warns(UserWarning, match=r"bad.stats.parquet: cannot be read"):
        assert read(tmp_path)["std"].tolist() == [1]


def test_nothing_found_is_an_error(tmp_path: Path) -> None:
    for pattern in (tmp_path, tmp_path / "none" / "**"):
        with pytest.raises(ValueError, match="no run with a table `stats`"):
            read(pattern)
    with pytest.raises(UsageError, match="table=stat: must be one of"):
        read(tmp_path, table="stat")
    assert initlab.read is read


STAMP = "2026-01-02_03-04-05.678901"


def hydras(folder: Path) -> Path:
    """A folder as Hydra leaves it before a job begins."""
    (folder / ".hydra").mkdir(parents=True)
    for name in (".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "initlab.log"):
        (folder / name).write_text("x")
    return folder


def test_discard_takes_back_what_was_made_for_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    discard(hydras(tmp_path / "outputs" / "config" / STAMP))
    assert list(tmp_path.iterdir()) == []
    discard(hydras(tmp_path / "outputs" / "config" / STAMP / "0"))
    assert list(tmp_path.iterdir()) == []


def test_discard_never_takes_what_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of another name stays, the working folder too, and so does every file that is not Hydra's."""
    monkeypatch.chdir(tmp_path)
    discard(hydras(tmp_path / "own"))
    assert [path.name for path in tmp_path.rglob("*")] == ["own"]
    work = tmp_path / STAMP
    work.mkdir()
    monkeypatch.chdir(work)
    (hydras(work / "x") / "thesis.txt").write_text("years of work")
    discard(work / "x")
    assert [path.name for path in work.rglob("*")] == ["x", "thesis.txt"]
    (work / "x" / "thesis.txt").unlink()
    discard(work)
    assert work.is_dir()


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    refuse_used(tmp_path)
    with pytest.raises(UsageError, match="holds a run already"):
        refuse_used(write(tmp_path / "a", 1.0))


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", "\x00\xff"])
def test_one_broken_run_json_does_not_hide_the_others(tmp_path: Path, text: str) -> None:
    write(tmp_path / "good", 1.0)
    (write(tmp_path / "odd", 2.0) / "run.json").write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match="odd: this run is "):
        assert sorted(read(tmp_path)["std"]) == [1, 2]


def test_tables_without_a_run_json_are_read_and_named(tmp_path: Path) -> None:
    (write(tmp_path / "a", 1.0) / "run.json").unlink()
    with pytest.warns(UserWarning, match="without a run.json"):
        assert read(tmp_path)["std"].tolist() == [1]


def test_a_bad_part_does_not_take_the_good_ones_with_it(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, COLUMNS, "cpu")
    recorder.__enter__()
    for seed in range(3):
        recorder.add({"stats": rows(seed, float(seed))})
    (tmp_path / "parts" / "stats-00001.parquet").write_bytes(b"cut")
    with (
        pytest.warns(UserWarning, match="stats-00001.parquet: cannot be read"),
        pytest.warns(UserWarning, match="reading the 2 rows"),
    ):
        assert read(tmp_path)["std"].tolist() == [0, 2]


def test_a_done_run_that_lost_its_table_is_named(tmp_path: Path) -> None:
    write(tmp_path / "whole", 1.0, task="stack")
    (write(tmp_path / "lost", 2.0, task="stack") / "stats.parquet").unlink()
    with pytest.warns(UserWarning, match="lost: this run is done, but its table stats is missing"):
        assert read(tmp_path)["std"].tolist() == [1]


def test_brackets_in_a_path_are_letters(tmp_path: Path) -> None:
    write(tmp_path / "br[1]" / "a*", 1.0)
    assert read(tmp_path / "br[1]")["std"].tolist() == [1]


def test_rows_that_left_the_memory_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether all parts stay in memory, or none, the tables are the same, and `frames` has what `read` reads."""
    frames = []
    for kept in (0, 2**28):
        monkeypatch.setattr(recorder, "KEPT", kept)
        folder = tmp_path / str(kept)
        with Recorder(folder, {"init": "kaiming", "width": 3}, "cpu") as record:
            for k in range(3):
                part = {
                    "seed": [k, k],
                    "name": pd.Categorical(["b", "a"][:: 1 - 2 * (k % 2)]),
                    "x": [math.nan, 0.1 * k],
                }
                record.add({"stats": pd.DataFrame(part)})
        frames.append(read(folder).drop(columns="run"))
        pd.testing.assert_frame_equal(record.frames()["stats"].drop(columns="run"), frames[-1], check_categorical=False)
        assert set(record.frames()["stats"]["run"]) == {str(folder)}
    pd.testing.assert_frame_equal(*frames, check_exact=True)
