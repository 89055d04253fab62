"""Many runs in one frame, in one file, in a few lines."""

import json
import math
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from initlab.errors import UsageError
from initlab.runs import collect, folders
from initlab.runs.read import find_runs, notes, read, read_runs
from initlab.runs.recorder import Recorder


def run(folder: Path, seed: int = 0, rows: int = 3, overrides: str = "", **columns: object) -> Path:
    """A run folder with `rows` layers of a stack."""
    if overrides:
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra" / "overrides.yaml").write_text(overrides)
    frame = pd.DataFrame({"seed": seed, "layer": range(1, rows + 1), "std": [0.5**k for k in range(rows)]})
    told = {"task": "stack", "init": "kaiming", "activation": "relu", "depth": rows} | columns
    with Recorder(folder, told, "cpu") as recorder:
        recorder.add({"stats": frame})
    return folder


def change(folder: Path, **said: object) -> None:
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))


def said(paths: Path | str, table: str = "stats") -> list[str]:
    return notes(read_runs(find_runs(paths), table)[0], table)


def test_swept_keys_that_are_no_columns_become_some(tmp_path: Path) -> None:
    run(tmp_path / "0", overrides="- init=kaiming\n- theory=off\n- +data.root=a\n- train.lr=0.1\n", lr=0.1)
    run(tmp_path / "1", seed=1, overrides="- init=kaiming\n- theory='auto'\n- train.lr=0.2\n", lr=0.2)
    frame = read(tmp_path)
    assert set(frame.loc[frame["seed"] == 0, "theory"]) == {"off"}
    assert set(frame.loc[frame["seed"] == 0, "data.root"]) == {"a"}
    assert frame.loc[frame["seed"] == 1, "data.root"].isna().all()
    assert sorted(frame["lr"].unique()) == [0.1, 0.2]
    assert not {"train.lr", "init.name", "init_name"} & set(frame)  # they are columns already
    assert set(json.loads((tmp_path / "0" / "run.json").read_text())["overrides"]) >= {"theory=off", "+data.root=a"}
    assert "theory" not in read(tmp_path / "0")  # one value tells nothing apart


def test_settings_are_numbers_where_they_are(tmp_path: Path) -> None:
    for k, value in enumerate(("1", "2.5")):
        run(tmp_path / str(k), overrides=f"- base={value}\n- flag={k == 0}\n")
    frame = read(tmp_path)
    assert sorted(frame["base"].unique()) == [1, 2.5] and frame["base"].dtype == float
    assert frame["flag"].dtype == bool


def test_every_run_that_is_not_done_is_named_in_one_line_a_kind(tmp_path: Path) -> None:
    for k in range(12):
        run(tmp_path / "sweep" / str(k))
    for k in (3, 10, 4):
        change(tmp_path / "sweep" / str(k), status="running")
    change(tmp_path / "sweep" / "7", status="failed")
    lines = said(tmp_path)
    assert len(lines) == 2
    assert f"3 runs are killed, not done; reading the 9 rows they have: {tmp_path}/sweep: 3, 4, 10" in lines
    assert f"{tmp_path}/sweep/7: this run is failed, not done; reading the 3 rows it has" in lines
    with pytest.warns(UserWarning, match="3 runs are killed"), pytest.warns(UserWarning, match="failed"):
        assert len(read(tmp_path)) == 36


def test_runs_of_different_code_in_one_sweep_are_said_and_read(tmp_path: Path) -> None:
    for k in range(3):
        change(run(tmp_path / "a" / str(k)), git_revision="1" * 40)
    run(tmp_path / "b" / "0")
    assert said(tmp_path) == []  # sweeps of different code are none of its business
    change(tmp_path / "a" / "2", git_revision="2" * 40 + "+")
    (line,) = said(tmp_path)
    assert "runs of different code: 2 of initlab" in line and "revision 2222222222+" in line
    with pytest.warns(UserWarning, match="different code"):
        assert len(read(tmp_path)) == 12


def test_folders_are_found_once_however_they_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "outputs" / "x" / "0")
    run(tmp_path / "outputs" / "x" / "1")
    monkeypatch.chdir(tmp_path)
    names = ["outputs/x/0", "outputs/x/1"]
    for paths in (
        "outputs",
        "outputs/**",
        "outputs/*/*",
        "outputs/**/*.parquet",
        "**",
        ["outputs", "outputs/x/0"],
        ".",
    ):
        assert [folder.path for folder in folders.find_folders(paths)] == names, paths
    assert [folder.path for folder in folders.find_folders("outputs/x/1/stats.parquet")] == names[1:]
    assert folders.find_folders("elsewhere/**") == []


def test_a_collected_file_is_no_run(tmp_path: Path) -> None:
    """Collecting into the folder that is read must not double the rows of the next time."""
    run(tmp_path / "outputs" / "0")
    frame = read(tmp_path / "outputs")
    collect.save(frame, tmp_path / "outputs" / "stats.parquet")
    assert len(read(tmp_path / "outputs")) == len(frame)
    (tmp_path / "outputs" / "stats.parquet").unlink()
    frame.to_parquet(tmp_path / "outputs" / "stats.parquet")  # of someone else: named and read
    with pytest.warns(UserWarning, match="without a run.json"):
        assert len(read(tmp_path / "outputs")) == 2 * len(frame)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".feather"])
def test_a_file_holds_every_number_to_the_last_bit(tmp_path: Path, suffix: str) -> None:
    folder = run(tmp_path / "0")
    odd = pd.DataFrame({"seed": 1, "layer": [1, 2, 3, 4], "std": [math.nan, math.inf, 5e-324, 1 / 3]})
    with Recorder(tmp_path / "1", {"init": "naive"}, "cpu") as recorder:
        recorder.add({"stats": odd})
    frame = read(tmp_path)
    file = tmp_path / f"all{suffix}"
    collect.save(frame, file)
    back = {".parquet": pd.read_parquet, ".csv": pd.read_csv, ".feather": pd.read_feather}[suffix](file)
    assert list(back) == list(frame)
    np.testing.assert_array_equal(back["std"].to_numpy(), frame["std"].to_numpy())
    assert back["init"].astype(str).tolist() == ["kaiming"] * 3 + ["naive"] * 4
    assert back["run"].astype(str).tolist()[:1] == [str(folder)] and back["depth"].isna().sum() == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", file.name]


def test_lists_do_not_fit_into_csv(tmp_path: Path) -> None:
    counts = pd.Series([np.array([1, 2]), np.array([3])])
    with pytest.raises(UsageError, match="no room for the lists in positive"):
        collect.save(pd.DataFrame({"positive": counts}), tmp_path / "a.csv")
    collect.save(pd.DataFrame({"positive": counts}), tmp_path / "a.parquet")
    assert pd.read_parquet(tmp_path / "a.parquet")["positive"].map(list).tolist() == [[1, 2], [3]]


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
import pandas as pd
from initlab.errors import UsageError
from initlab.runs import collect
frame = pd.DataFrame({"x": np.random.default_rng(0).random(100_000)})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    collect.save(frame, Path(sys.argv[1]))
except UsageError as error:
    print(error)
"""


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".feather"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"all{suffix}"
    file.write_text("years of work")
    code = subprocess.run([sys.executable, "-c", FULL, str(file)], capture_output=True, text=True, check=False)
    assert "cannot be written" in code.stdout and "what was there stays" in code.stdout, code.stderr
    assert code.stdout.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [file.name] and file.read_text() == "years of work"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000


def test_files_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    folder = run(tmp_path / "0")
    for file, words in (
        (tmp_path / "a.xls", "a.xls: the name must end in .csv, .feather, .parquet"),
        (tmp_path / "gone" / "a.csv", "there is no folder"),
        (folder / "stats.parquet", "a run's own table"),
    ):
        with pytest.raises(UsageError, match=words):
            collect.refuse(file)
    collect.refuse(tmp_path / "stats.parquet")
    collect.refuse(folder / "all.parquet")


def test_an_account_says_once_what_was_swept_and_where_it_was_not_set(tmp_path: Path) -> None:
    run(tmp_path / "0", seed=0, overrides="- seed=0\n- theory=off\n")
    run(tmp_path / "1", seed=1, overrides="- seed=1\n")
    runs, frame = collect.collect([str(tmp_path)])
    assert frame is not None
    text = collect.describe(runs, frame, "stats")[-1]
    assert text.count("seed (0, 1)") == text.count("seed") == 1 and "theory (off, or not set)" in text


def test_an_account_names_what_is_not_whole_and_what_differs(tmp_path: Path) -> None:
    for k in range(5):
        run(tmp_path / str(k), seed=k, lr=0.1 * (k % 2))
    change(tmp_path / "1", status="failed")
    (tmp_path / "2" / "stats.parquet").write_bytes(b"PAR1")
    runs, frame = collect.collect([str(tmp_path)])
    assert frame is not None
    text = "\n".join(collect.describe(runs, frame, "stats"))
    assert "5 runs: 3 done, 1 failed, 1 broken" in text
    assert f"failed: {tmp_path}/1" in text and f"broken: {tmp_path}/2" in text
    assert "12 rows of `stats`" in text and "lr (0, 0.1)" in text and "seed (0, 1, 3, 4)" in text
    assert "depth" not in text.split("what differs")[1]


def test_paths_without_a_run_are_one_line(tmp_path: Path) -> None:
    run(tmp_path / "0")
    (tmp_path / "photos").mkdir()
    for path, words in ((tmp_path / "photos", "holds no run of initlab"), (tmp_path / "none" / "**", "no such folder")):
        with pytest.raises(UsageError, match=words) as error:
            collect.collect([str(tmp_path / "0"), str(path)])
        assert "\n" not in str(error.value)


def test_ten_networks_that_agree_say_nothing(tmp_path: Path) -> None:
    run(tmp_path / "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read(tmp_path)) == 3
