"""How runs end: stopped once, twice, at the worst moment; on a disk that is full; by a launcher that is gone.

What happens at random moments is tried by tests/reliability; here each kind has its worst moment.
"""

import errno
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import initlab
from initlab import stops
from initlab.errors import UsageError
from initlab.job import shared_program
from initlab.job.worker_process import LAUNCHER
from initlab.runs import parts
from initlab.runs.folders import read_run_json
from initlab.runs.lock import hold_lock
from initlab.runs.recorder import Recorder
from initlab.sweep import batch
from tests.reliability.commands import Forks, forks
from tests.reliability.kills import SMALL, faults_of_end, faults_of_rows, processes_in

Lab = Callable[..., tuple[int, str, str]]
TRAIN = (*SMALL, "task=train", "theory=off", "train.steps=12", "hydra.run.dir=x")
OFTEN = {"initlab__tasks__twins__FLUSH_ROWS": 200}
HERE = os.environ | {"PYTHONPATH": str(Path(initlab.__file__).parents[1])}


@pytest.fixture(scope="module")
def server() -> Iterator[Forks]:
    with forks() as one:
        yield one


@pytest.fixture(scope="module")
def events(server: Forks, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Of a training that nobody stops: how often it writes, renames or removes a file."""
    folder = tmp_path_factory.mktemp("whole")
    assert server.run(folder, TRAIN, **OFTEN).code == 0
    return int((folder / "events").read_text())


@pytest.mark.long
def test_a_stop_while_files_are_written_doubles_and_loses_no_row(server: Forks, events: int, tmp_path: Path) -> None:
    for k in range(5):
        folder = tmp_path / str(k)
        ended = server.run(folder, TRAIN, signals={4 + k * (events - 5) // 5: signal.SIGTERM}, **OFTEN)
        assert ended.code == 143 and ended.err.startswith("initlab: stopped")
        assert faults_of_rows(folder) == [] and faults_of_end(folder, ended, [signal.SIGTERM]) == []


def test_a_second_stop_ends_at_once_and_says_so(server: Forks, events: int, tmp_path: Path) -> None:
    for k, later in enumerate((1, 2, 7)):
        folder, first = tmp_path / str(k), 6 + k * events // 5
        both = {first: signal.SIGINT, first + later: signal.SIGINT}
        ended = server.run(folder, TRAIN, signals=both, **OFTEN)
        assert faults_of_rows(folder) == [] and faults_of_end(folder, ended, [signal.SIGINT]) == []
        assert ended.code == 130


@pytest.mark.parametrize("count", [1, 4, 10**9])
def test_a_full_disk_is_one_line(server: Forks, events: int, tmp_path: Path, count: int) -> None:
    """For a moment, or for good: nothing that was flushed is lost, and no row stands twice."""
    for first in range(events * 5 // 12, events * 5 // 12 + 4):  # a run does without some
        folder = tmp_path / str(first)
        ended = server.run(folder, TRAIN, refuse={"errno": errno.ENOSPC, "first": first, "count": count}, **OFTEN)
        assert faults_of_rows(folder) == []
        if ended.code:
            break
    assert ended.code == 2 and ended.err.count("\n") == 1 and "Traceback" not in ended.out, ended.err + ended.out
    assert "/x/parts/" in ended.err and "No space left on device); free some space" in ended.err
    assert read_run_json(folder / "x")["status"] in ("failed", "killed" if count > 1 else "failed")


def test_ctrl_c_while_libraries_are_imported_is_no_traceback(tmp_path: Path) -> None:
    tell = "import sys; from initlab.__main__ import main\n"
    tell += "tell = lambda event, given: event == 'import' and given[0] == 'numpy' and print('here', flush=True)\n"
    tell += "sys.addaudithook(tell); sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", tell, *TRAIN], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=HERE
    )
    assert process.stdout is not None and process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, err) == (130, b"initlab: stopped\n")


def test_rows_are_written_while_predictions_are_made(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits in memory does not wait for other rows."""
    own, found = shared_program.add_theory, []

    def predict(*given: object) -> None:
        monkeypatch.setattr(batch, "PATIENCE", 0.01)
        for _ in range(2000):  # a prediction that takes as long as that
            if list(Path().glob("x/0/parts/stats-*.parquet")):
                found.append(True)
                break
            time.sleep(0.01)
        own(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(batch, "PATIENCE", 5.0)  # rows of so few networks wait
    monkeypatch.setattr(shared_program, "add_theory", predict)
    words = ("-m", "hydra/launcher=batched", "seed=0,5", *SMALL, "task=stack", "hydra.sweep.dir=x")
    assert lab(*words)[0] == 0 and found == [True]


@pytest.mark.long
def test_jobs_in_other_processes_end_with_the_sweep(tmp_path: Path) -> None:
    """However it is killed, and their folders say so."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs pip install 'initlab[parallel]'")
    words = ("-m", "seed=0,5", *SMALL, "task=train", "theory=off", "train.steps=10000000", "hydra.sweep.dir=x")
    process = subprocess.Popen(
        [sys.executable, "-m", "initlab", *words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=1"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=HERE, process_group=0,
    )  # fmt: skip
    try:
        while not list(tmp_path.glob("x/*/run.json")):
            assert process.poll() is None
            time.sleep(0.05)
        assert read_run_json(tmp_path / "x" / "0")["status"] == "running"
        process.kill()
        process.wait()
        for _ in range(600):
            if not processes_in(tmp_path):
                break
            time.sleep(0.05)
        assert processes_in(tmp_path) == []
        assert read_run_json(tmp_path / "x" / "0")["status"] in ("killed", "interrupted")
    finally:
        for pid in processes_in(tmp_path):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.long
def test_a_process_that_waits_for_a_job_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    job = f"""if True:
        import os, time
        os.environ["INITLAB_SWEEP"] = {str(tmp_path)!r}
        from initlab.job.worker_process import end_with_launcher
        with end_with_launcher():
            pass
        print("waits", flush=True)
        time.sleep(100)
        print("stays", flush=True)"""
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {job!r}])"
    with hold_lock(tmp_path / LAUNCHER):  # its last job has ended, the sweep has not
        process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, env=HERE)
        assert process.stdout is not None and process.stdout.readline() == b"waits\n"
        process.kill()
        assert process.communicate()[0] == b""


# --- one recorder, in this process ------------------------------------------------------------------------------------


@pytest.fixture
def obeying() -> Iterator[None]:
    """Signals are obeyed as in the program, and as before afterwards."""
    handlers = {number: signal.getsignal(number) for number in stops.NUMBERS}
    stops.install()
    yield
    stops.install()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def frame(*values: float) -> dict[str, pd.DataFrame]:
    return {"stats": pd.DataFrame({"seed": range(len(values)), "std": values})}


def test_a_signal_waits_for_the_end_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obeying: None) -> None:
    own = parts.Part.write

    def write(self: parts.Part, folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        own(self, folder)

    with pytest.raises(stops.Stopped), Recorder(tmp_path, {}, "cpu") as recorder:
        recorder.add(frame(1.0))
        monkeypatch.setattr(parts.Part, "write", write)
        recorder.add(frame(2.0, 3.0))
    assert stops.exit_code() == 143 and read_run_json(tmp_path)["status"] == "interrupted"
    assert pd.read_parquet(tmp_path / "stats.parquet")["std"].tolist() == [1.0, 2.0, 3.0]


def test_what_a_library_swallowed_is_raised_again(tmp_path: Path, obeying: None) -> None:
    with pytest.raises(stops.Stopped), Recorder(tmp_path, {}, "cpu") as recorder:
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGINT)
        recorder.add(frame(1.0))
    assert read_run_json(tmp_path)["status"] == "interrupted"


def test_a_disk_full_for_a_moment_doubles_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what waited some is written when the disk refuses the rest, and once more at the end."""
    own, asked = parts.Part.write, [0]

    def write(self: parts.Part, folder: Path) -> None:
        asked[0] += 1
        if asked[0] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        own(self, folder)

    monkeypatch.setattr(parts.Part, "write", write)
    with pytest.raises(UsageError, match="free some space"), Recorder(tmp_path, {}, "cpu") as recorder:
        recorder.patience = math.inf
        for value in (1.0, 2.0, 3.0):
            recorder.add(frame(value))
        recorder.flush()
    assert pd.read_parquet(tmp_path / "stats.parquet")["std"].tolist() == [1.0, 2.0, 3.0]
    assert read_run_json(tmp_path)["status"] == "failed"


def test_a_large_table_stays_in_parts_after_a_stop_and_reads_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("initlab.runs.recorder.SMALL", 0)
    with pytest.raises(KeyboardInterrupt), Recorder(tmp_path, {}, "cpu") as recorder:
        for k in range(3):
            recorder.add(frame(float(k)))
        raise KeyboardInterrupt
    assert not (tmp_path / "stats.parquet").exists()
    with pytest.warns(UserWarning, match="interrupted"):
        assert initlab.read(tmp_path)["std"].tolist() == [0.0, 1.0, 2.0]


def test_what_is_held_at_the_end_does_not_grow_with_the_run(tmp_path: Path) -> None:
    """A table of 200,000 rows is whole in its file; what is drawn and summed up is less than half of it."""
    with Recorder(tmp_path, {}, "cpu") as recorder:
        for k in range(4):
            steps = np.repeat(np.arange(50 * k, 50 * k + 50), 1000)
            recorder.add({"stats": pd.DataFrame({"seed": np.tile(np.arange(1000), 50), "step": steps, "std": 1.0})})
    assert pq.read_metadata(tmp_path / "stats.parquet").num_rows == 200_000
    assert 0 < len(recorder.frames()["stats"]) < 100_000


def test_long_tables_are_shown_by_some_of_their_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has all rows; the last step and the largest error are shown in any case."""
    monkeypatch.setattr(parts, "SHOWN", 10)
    monkeypatch.setattr(parts, "AT_ONCE", 16)
    with Recorder(tmp_path, {}, "cpu") as recorder:
        for k in range(10):
            steps = range(10 * k, 10 * k + 10)
            errors = [1.0 if step == 57 else 0.1 for step in steps]
            recorder.add({"parity": pd.DataFrame({"seed": 0, "step": steps, "relative_error": errors, "network": 0})})
    shown = recorder.frames()["parity"]
    assert len(pd.read_parquet(tmp_path / "parity.parquet")) == 100 and len(shown) < 40
    assert {57, 99} <= set(shown["step"]) and shown["relative_error"].max() == 1.0
