"""A sweep that was stopped is finished by the same command: nothing is lost, nothing is computed twice."""

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

import initlab
from initlab.errors import Fault, UsageError
from initlab.job import prepare, worker_process
from initlab.job.life_cycle import outcome
from initlab.job.settings import by_thousand
from initlab.runs.folders import read_run_json
from initlab.runs.lock import LOCK, is_locked, lock_folder
from initlab.sweep import sweeper
from initlab.tasks import stack as stacking
from initlab.tasks.ensemble.networks import Net

Lab = Callable[..., tuple[int, str, str]]
SMALL = ("task=stack", "seeds=2", "theory=off", "plots=false", "report=false")
FOUR = ("-m", "init=naive,kaiming", "depth=2,3", *SMALL)
HERE = os.environ | {"PYTHONPATH": str(Path(initlab.__file__).parents[1])}


def statuses(folder: Path) -> list[str]:
    return [read_run_json(path)["status"] for path in sorted(folder.glob("[0-9]*"))]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_tables(one: Path, two: Path) -> None:
    """Folder by folder, table by table, row by row, to the last bit."""
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*.parquet"))
    assert names and names == sorted(str(path.relative_to(two)) for path in two.rglob("*.parquet"))
    for name in names:
        pd.testing.assert_frame_equal(pd.read_parquet(one / name), pd.read_parquet(two / name), check_exact=True)


# The command line, which stops in the middle of its third job, when it has written some rows, and waits to be killed.
WAITS = """
import signal, sys
from initlab.__main__ import main
from initlab.runs.recorder import Recorder
add = Recorder.add
def wait(self, frames):
    add(self, frames)
    if self.folder.name == "2":
        print("waiting", flush=True)
        signal.pause()
Recorder.add = wait
sys.exit(main())
"""


def test_a_killed_sweep_is_finished_and_equals_one_that_was_not(lab: Lab, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITS, *FOUR, "hydra.sweep.dir=killed"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=HERE,
    ) as process:  # fmt: skip
        assert process.stdout is not None and b"waiting\n" in iter(process.stdout.readline, b"")
        process.kill()
    killed = Path("killed")
    before = statuses(killed)
    assert before == ["done", "done", "killed"] and list(killed.glob("2/parts/stats-*.parquet"))
    kept = {path: path.stat().st_mtime_ns for path in killed.glob("*/*") if before[int(path.parent.name)] == "done"}
    code, out, err = lab(*FOUR, "resume=killed")
    assert code == 0, err
    assert f"{before.count('done')} jobs are done and kept, {4 - before.count('done')} are left" in out
    assert kept and all(path.stat().st_mtime_ns == then for path, then in kept.items())
    assert statuses(killed) == ["done"] * 4 and not list(killed.rglob("parts")) and not list(killed.rglob(LOCK))
    table = [line for line in out.splitlines() if " relu " in line]
    assert len(table) == 4
    code, out, err = lab(*FOUR, "hydra.sweep.dir=whole")
    assert code == 0, err
    assert_same_tables(killed, Path("whole"))
    assert table == [line for line in out.splitlines() if " relu " in line]
    one, two = (initlab.read(folder).drop(columns="run") for folder in ("killed", "whole"))
    pd.testing.assert_frame_equal(one, two, check_exact=True)


def test_only_what_is_left_is_run_and_a_failed_job_runs_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    own, depths = stacking.run_stack, []

    def fails_once(net: Net, *what: Any, **how: Any) -> object:
        depths.append(net.depth)
        if depths == [2, 3]:
            raise RuntimeError("a fault of ours")
        return own(net, *what, **how)

    monkeypatch.setattr(stacking, "run_stack", fails_once)
    code, _, err = lab("-m", "depth=2,3,4", *SMALL, "hydra.sweep.dir=x")
    assert code == 1 and depths == [2, 3, 4] and statuses(Path("x")) == ["done", "failed", "done"]
    assert "resume=x runs the jobs that are not done" in err
    code, _, err = lab("-m", "depth=2,3,4", *SMALL, "resume=x")
    assert (code, err) == (0, "") and depths == [2, 3, 4, 3] and statuses(Path("x")) == ["done"] * 3
    log = Path("x/1/initlab.log").read_text()
    assert "a fault of ours" in log and log.rstrip().endswith("done: x/1")
    code, out, err = lab("-m", "depth=2,3,4", *SMALL, "resume=x")
    assert (code, err) == (0, "") and len(depths) == 4 and "3 jobs are done and kept, 0 are left" in out


@pytest.mark.long
def test_a_table_without_its_end_is_measured_again(lab: Lab) -> None:
    assert lab("-m", "depth=2,3", *SMALL, "hydra.sweep.dir=x")[0] == 0
    whole = pd.read_parquet("x/1/stats.parquet")
    table = Path("x/1/stats.parquet")
    table.write_bytes(table.read_bytes()[:-5])
    code, out, _ = lab("-m", "depth=2,3", *SMALL, "resume=x")
    assert code == 0 and "1 jobs are done and kept, 1 are left" in out
    pd.testing.assert_frame_equal(pd.read_parquet(table), whole, check_exact=True)


@pytest.mark.long
def test_a_sweep_may_grow_and_old_jobs_keep_their_folders(lab: Lab) -> None:
    assert lab("-m", "init=naive,kaiming", "depth=3", *SMALL, "hydra.sweep.dir=x")[0] == 0
    before = contents(Path("x"))
    code, _, err = lab("-m", "init=lecun,naive,kaiming", "depth=3,2", *SMALL, "resume=x")
    assert code == 0, err
    after = contents(Path("x"))
    assert {name: after[name] for name in before if name != "multirun.yaml"} == {
        name: text for name, text in before.items() if name != "multirun.yaml"
    }
    frame = initlab.read("x")
    found = {Path(run).name: (rule, depth) for run, rule, depth in zip(frame.run, frame.init, frame.depth, strict=True)}
    assert found == {
        "0": ("naive", 3), "1": ("kaiming", 3), "2": ("lecun", 3), "3": ("lecun", 2), "4": ("naive", 2),
        "5": ("kaiming", 2),
    }  # fmt: skip


@pytest.mark.long
def test_jobs_in_folders_of_a_thousand_are_found_again(lab: Lab) -> None:
    words = ("-m", "depth=2,3,4", *SMALL, "hydra.sweep.subdir=${by_thousand:hydra.job.num}")
    code, out, _ = lab(*words, "hydra.sweep.dir=x")
    assert code == 0 and sorted(path.name for path in Path("x/000").iterdir()) == ["0", "1", "2"]
    assert "tables: x/*/*/*.parquet" in out
    whole = contents(Path("x/000/1"))
    for job in ("0", "2"):  # with a gap between them
        Path("x/000", job, "stats.parquet").unlink()
    code, out, err = lab(*words, "resume=x")
    assert (code, err) == (0, "") and "1 jobs are done and kept, 2 are left" in out
    assert contents(Path("x/000/1")) == whole and set(initlab.read("x")["depth"]) == {2, 3, 4}
    assert by_thousand("hydra.job.num", _root_=OmegaConf.create({"hydra": {"job": {"num": 123456}}})) == "123/123456"


MISMATCHES = {
    ("init=naive", "depth=3"): "1 of its 2 jobs are not in this sweep, the first is depth=3 init=kaiming",
    ("init=naive,kaiming", "depth=4"): "2 of its 2 jobs are not in this sweep, the first is depth=3 init=naive",
    ("init=naive,kaiming", "depth=3", "width=50"): "2 of its 2 jobs are not in this sweep",
    ("init=naive,kaiming,kaimng", "depth=3"): "did you mean kaiming?",
}


@pytest.fixture
def two(lab: Lab) -> Path:
    assert lab("-m", "init=naive,kaiming", "depth=3", *SMALL, "hydra.sweep.dir=x")[0] == 0
    return Path("x")


def test_another_sweep_is_refused_in_one_line_and_touches_nothing(lab: Lab, two: Path, tmp_path: Path) -> None:
    before = contents(two)
    for words, text in MISMATCHES.items():
        code, _, err = lab("-m", *words, *SMALL, "resume=x")
        assert code == 2 and text in err and err.count("\n") == 1, (words, err)
        assert contents(two) == before
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "config.yaml").write_text("defaults: [/config@_here_]\n")
    (tmp_path / "study" / "other.yaml").write_text("defaults: [config, _self_]\n")
    code, _, err = lab("-cd", "study", "-cn", "other", "-m", "init=naive,kaiming", "depth=3", *SMALL, "resume=x")
    assert code == 2 and "a sweep of `config`, and this is `other`" in err and contents(two) == before


NOT_OURS = {
    ("-m", "resume=nowhere"): "resume=nowhere: no such folder",
    ("-m", "resume=."): "resume=.: not the folder of a sweep",
    ("-m", "resume=x/0"): "resume=x/0: not the folder of a sweep; that is ",
    ("resume=x",): "resume=x: is for a sweep; put -m before the options",
    ("-m", "resume=theirs"): "resume=theirs: not a sweep of initlab's",
    ("-m", "resume=torn"): "torn/multirun.yaml: cannot be read",
    ("-m", "resume=empty"): "resume=empty: not a sweep of initlab's",
    ("-m", "seed=range(0,0)"): "seed=range(0,0): has no values, the sweep is empty",
}


def test_a_folder_that_is_not_ours_is_one_line(lab: Lab, two: Path) -> None:
    for name, said in (("theirs", "lr: 3\n"), ("torn", "hydra: {sweep: [\n"), ("empty", "")):
        Path(name).mkdir()
        Path(name, "multirun.yaml").write_text(said)
    before = contents(Path())
    for words, text in NOT_OURS.items():
        code, _, err = lab(*words, "depth=3", *SMALL)
        assert code == 2 and text in err and err.count("\n") == 1, (words, err)
        assert contents(Path()) == before


@pytest.mark.long
def test_a_default_that_changed_meanwhile_is_named(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    text = "defaults: [config, _self_]\ntrain: {steps: 2}\ndepth: 2\ntask: stack\nplots: false\nseeds: 1\n"
    text += "hydra: {mode: MULTIRUN, sweeper: {params: {init: 'naive,kaiming'}}}\n"
    study = tmp_path / "study" / "mine.yaml"
    study.write_text(text)
    assert lab("-cd", "study", "-cn", "mine", "hydra.sweep.dir=x")[0] == 0
    assert lab("-cd", "study", "-cn", "mine", "resume=x")[0] == 0
    study.write_text(text.replace("steps: 2", "steps: 3").replace("plots: false", "plots: true"))
    code, _, err = lab("-cd", "study", "-cn", "mine", "resume=x")
    assert (code, err) == (2, "initlab: resume=x: train.steps was 2 there and is 3 now\n")
    study.write_text(text.replace("naive,", ""))
    code, _, err = lab("-cd", "study", "-cn", "mine", "resume=x")
    assert code == 2 and "1 of its 2 jobs are not in this sweep, the first is init=naive" in err


@pytest.mark.long
def test_two_versions_of_the_code_in_one_sweep_are_named(lab: Lab, two: Path) -> None:
    path = two / "0" / "run.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"versions": said["versions"] | {"initlab": "0.0.1"}, "git_revision": "f00" * 9}))
    code, _, err = lab("-m", "init=naive,kaiming", "depth=3", *SMALL, "resume=x")
    assert code == 0 and err.count("\n") == 1
    assert "x: 1 of its 2 jobs that are kept were made by initlab 0.0.1 at f00f00f00f00 with torch" in err
    path.write_text(json.dumps(said))
    assert lab("-m", "init=naive,kaiming", "depth=3", *SMALL, "resume=x")[2] == ""


def test_what_is_still_at_work_is_not_begun_again(lab: Lab, two: Path) -> None:
    (two / "1" / "stats.parquet").unlink()
    for folder, text in ((two, "another process is working in it"), (two / "1", "1 of its jobs are at work")):
        with lock_folder(folder):
            before = contents(two)
            code, _, err = lab("-m", "init=naive,kaiming", "depth=3", *SMALL, "resume=x")
            assert code == 2 and text in err and err.count("\n") == 1
            assert contents(two) == before
    assert lab("-m", "init=naive,kaiming", "depth=3", *SMALL, "resume=x")[0] == 0
    with lock_folder(Path("y")):
        code, _, err = lab("depth=3", *SMALL, "hydra.run.dir=y")
    assert code == 2 and "another process is working in it" in err and not list(Path("y").glob("*.parquet"))


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    held = "import sys; from pathlib import Path; from initlab.runs.lock import lock_folder\n"
    held += f"with lock_folder(Path({str(tmp_path)!r})): print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=HERE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    assert is_locked(tmp_path)
    with pytest.raises(UsageError, match="another process"), lock_folder(tmp_path):
        pass
    process.kill()
    process.communicate()
    assert (tmp_path / LOCK).exists() and not is_locked(tmp_path)
    with lock_folder(tmp_path):
        assert is_locked(tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_jobs_that_are_left_keep_their_numbers_with_every_launcher() -> None:
    """Launchers number their k-th job by the first number plus k: only jobs without a gap are launched together."""
    made = sweeper.Sweeper(None)
    made.kind, made.config = "joblib", OmegaConf.create({"threads": 1})
    assert list(made._batches([2, 3, 4, 7, 9, 10])) == [(0, 3), (3, 4), (4, 6)]
    assert list(made._batches([])) == [] and list(made._batches(range(5))) == [(0, 5)]
    made.max_batch_size = 2
    assert list(made._batches([2, 3, 4, 7])) == [(0, 2), (2, 3), (3, 4)]


def test_what_happened_in_another_process_comes_back() -> None:
    """A mistake as a value, a fault as an error that survives the way; both after all jobs have been looked at."""

    def ended(value: object, status: JobStatus = JobStatus.COMPLETED) -> JobReturn:
        made = JobReturn()
        made.return_value, made.status = value, status  # type: ignore[misc]
        return made

    outcome.mistakes = []
    fault = pickle.loads(pickle.dumps(Fault("x/0: RuntimeError: a fault of ours")))
    with pytest.raises(Fault, match="a fault of ours"):
        sweeper._raise_first(iter([ended(fault, JobStatus.FAILED), ended("depth=-1: no"), ended(None)]))
    assert outcome.mistakes == ["depth=-1: no"]
    sweeper._raise_first(iter([ended(None)]))
    outcome.mistakes = []


def test_one_thing_for_each_that_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs are handed out so: never two at a time, and who waits gets what is given back."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    got: list[int] = []
    tried, own = threading.Event(), time.sleep

    def sleep(seconds: float) -> None:
        tried.set()
        own(seconds)

    monkeypatch.setattr(worker_process.time, "sleep", sleep)

    def wait() -> None:
        with worker_process.lock_one_of(["a", "b"], seconds=0.001) as k:
            got.append(k)

    with worker_process.lock_one_of(["a", "b"]) as first:
        assert first == 0
        with worker_process.lock_one_of(["a", "b"]) as second:
            assert second == 1
            third = threading.Thread(target=wait)
            third.start()
            tried.wait()
            assert got == []
        third.join()
    assert got == [1]


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs users and groups")
@pytest.mark.parametrize("foreign", ["a link", "anybody may write", "a file"])
def test_a_folder_of_locks_that_others_may_write_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / f"initlab-{os.getuid()}"
    if foreign == "a link":
        folder.symlink_to(tmp_path / "elsewhere")
    elif foreign == "a file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(UsageError, match=f"^{folder}: "), worker_process.lock_one_of(["a"]):
        pass
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_bar_counts_jobs_of_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, over = tmp_path / ".finished", threading.Event()
    ended.write_bytes(b"..")
    moved: list[int] = []
    monkeypatch.setattr("initlab.sweep.callback.SECONDS", 0.01)

    class Bar:
        def update(self, count: int) -> None:
            moved.append(count)
            if sum(moved) == 3:
                over.set()
            elif sum(moved) == 2:
                with ended.open("ab") as file:
                    file.write(b".")

    from initlab.sweep.callback import watch_others

    watch_others(ended, Bar(), over)
    assert sum(moved) == 3


def test_a_mistake_leaves_an_old_run_as_it_was(lab: Lab, two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old tables go when the new run starts, not before it is known that it can."""
    path = two / "1" / "run.json"
    path.write_text(path.read_text().replace('"done"', '"interrupted"'))
    before = contents(two / "1")

    def refuse(*_: object) -> prepare.Job:
        raise UsageError("the GPU is gone")

    monkeypatch.setattr(prepare, "prepare", refuse)
    code, _, err = lab("-m", "init=naive,kaiming", "depth=3", *SMALL, "resume=x")
    assert code == 2 and "the GPU is gone" in err
    after = contents(two / "1")
    assert {name for name in before if before[name] != after[name]} <= {
        ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "initlab.log",
    }  # fmt: skip


def test_a_folder_that_holds_another_sweep_or_run_keeps_all_it_has(lab: Lab, two: Path, tmp_path: Path) -> None:
    """Neither a sweep nor a run begun in it by mistake, nor one with a mistake of its own, changes a byte."""
    before = contents(tmp_path)
    for words in (("init=naive,kaiming",), ("init=kaiming,kaimig",), ("seed=5,6",)):
        code, out, err = lab("-m", *words, *SMALL, "hydra.sweep.dir=x")
        assert code == 2 and err.count("\n") == 1 and out == "", err
        assert err.startswith("initlab: x: holds a sweep already") or "did you mean kaiming?" in err
        assert contents(tmp_path) == before
    code, out, err = lab("init=small", *SMALL, "hydra.run.dir=x/0")
    assert (code, out, err) == (2, "", "initlab: x/0: holds a run already; choose another hydra.run.dir\n")
    assert contents(tmp_path) == before


def test_a_sweep_that_is_stopped_before_its_first_job_leaves_no_folder(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeper.Sweeper, "validate_batch_is_legal", stop)
    code, out, err = lab("-m", "init=naive,kaiming", *SMALL)
    assert (code, out, err) == (130, "", "") and not list(Path().glob("outputs/config/*"))
