"""The batched launcher: the same folders with the same numbers as Hydra's own, whatever happens to single jobs."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from initlab.errors import UsageError
from initlab.job.options import as_usage_error
from initlab.job.settings import CONF, Config
from initlab.runs.recorder import Recorder
from initlab.runs.schema import TABLES
from initlab.sweep import batch
from initlab.sweep.batch import pack_jobs
from initlab.sweep.batched_launcher import read_composed
from initlab.tasks import stack as stacking
from initlab.tasks import train as training
from initlab.tasks.ensemble.networks import Ensemble
from initlab.tasks.train import run_training
from tests.conftest import TINY
from tests.long import long_except

Lab = Callable[..., tuple[int, str, str]]
BATCHED = "hydra/launcher=batched"
# Of a quantity that both launchers measured: the ensemble contract, 4 eps of float32 per layer, over up to 4 layers.
NEAR = 16 * torch.finfo(torch.float32).eps


def sweep(lab: Lab, name: str, *words: str) -> tuple[int, str, str]:
    return lab("-m", *TINY, f"hydra.sweep.dir={name}", *words)


def differences(a: Path, b: Path) -> list[str]:
    """What tells two run folders apart, but for time and the launcher's name."""
    found = []
    files = [sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()) for folder in (a, b)]
    if files[0] != files[1]:
        return [f"files: {set(files[0]) ^ set(files[1])}"]
    for name in TABLES:
        if (a / f"{name}.parquet").is_file():
            found += [f"{name}: {said}" for said in table_differences(a / f"{name}.parquet", b / f"{name}.parquet")]
    about = [json.loads((folder / "run.json").read_text()) for folder in (a, b)]
    if list(about[0]) != list(about[1]):
        found.append(f"run.json: {list(about[0])} {list(about[1])}")
    timed = ("started", "wall_seconds", "cpu_seconds", "command")
    found += [f"run.json: {key}" for key in about[0] if key not in timed and about[0][key] != about[1].get(key)]
    for name in ("config", "overrides"):
        if (a / f".hydra/{name}.yaml").read_text() != (b / f".hydra/{name}.yaml").read_text():
            found.append(f"{name}.yaml")
    whole = [yaml.safe_load((folder / ".hydra/hydra.yaml").read_text())["hydra"] for folder in (a, b)]
    for one in whole:
        for name in ("launcher", "sweep"):
            del one[name]
        del one["runtime"]["output_dir"], one["runtime"]["choices"]["hydra/launcher"]
        one["overrides"]["hydra"] = [
            said for said in one["overrides"]["hydra"] if "launcher" not in said and "dir" not in said
        ]
    return found + [f"hydra.yaml: {key}" for key in whole[0] if whole[0][key] != whole[1][key]]


def table_differences(a: Path, b: Path) -> list[str]:
    one, other = pq.read_table(a), pq.read_table(b)
    if one.schema.names != other.schema.names or len(one) != len(other):
        return [f"shape: {set(one.schema.names) ^ set(other.schema.names)}, {len(one)} and {len(other)} rows"]
    if [str(t) for t in one.schema.types] != [str(t) for t in other.schema.types]:
        return ["types"]
    x, y = one.to_pandas(), other.to_pandas()
    found = []
    for name in x:
        if x[name].dtype.kind != "f":
            same = list(map(str, x[name])) == list(map(str, y[name]))
        else:
            p, q = x[name].to_numpy(), y[name].to_numpy()
            finite = np.isfinite(p) & np.isfinite(q)
            # an error that is relative already is rounding itself
            scale = 1.0 if name == "relative_error" else float(np.abs(q[finite]).max(initial=0.0))
            same = np.array_equal(p[~finite], q[~finite], equal_nan=True)
            # a z is a difference over a spread: what is left of rounding there is many times that of the numbers
            same &= bool((np.abs(p[finite] - q[finite]) <= (1e3 if name == "z" else 1.0) * NEAR * scale).all())
        if not same:
            found.append(str(name))
    return found


def test_a_mixed_sweep_leaves_the_folders_of_hydras_own_launcher(lab: Lab) -> None:
    axes = ("init=kaiming,torch_default", "activation=relu,tanh", "train.lr=0.5", "seed=2", "seeds=2")
    for name, how in (("basic", ()), ("batched", (BATCHED,))):
        code, _, errors = sweep(lab, name, *how, *axes)
        assert (code, errors) == (0, "")
    folders = sorted(Path("basic").glob("*/run.json"))
    assert len(folders) == 4
    for path in folders:
        assert differences(path.parent, Path("batched") / path.parent.name) == []
    assert differences(Path("basic/0"), Path("batched/1")) != []
    assert table_differences(Path("basic/0/stats.parquet"), Path("batched/2/stats.parquet")) != []


KINDS = [
    ["seed=4", "train.lr=0.5"],
    ["train.lr=1", "theory=off", "inputs=null"],
    ["init=naive", "init.gain=2"],
    ["init.gain=2", "init=lsuv", "activation=tanh", "seed=2"],
    ["train.loss=cross_entropy", "data=teacher"],
    ["data=mnist", "seed=1"],
    ["++model.a=3", "seed=1"],
    ["+init.gian=3"],
    ["init={name: naive}", "seed=2"],
    ["expect=[]", "sweep.gain=[1,2]", "seed=1"],
    ["sweep.gain=null"],
    ["init.name='small'", "seed='3'"],
    ["seed=1", "width=20", "depth=${width}"],
    ["dtype='" + "many words that a line of YAML folds " * 4 + "'"],
    ["seed=5", "seed=6"],
]


@pytest.fixture(scope="module")
def loaded() -> Any:
    """Hydra's loader and the configuration of a sweep; Hydra itself is free for the tests of the command line."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        words = ["hydra.mode=MULTIRUN", "hydra.sweep.dir=/somewhere"]
        return loader, loader.load_configuration("config", words, RunMode.MULTIRUN)


@pytest.mark.parametrize("given", KINDS, ids=" ".join)
def test_a_job_is_written_as_hydra_writes_it_and_typed_by_the_schema(loaded: Any, given: list[str]) -> None:
    loader, master = loaded
    whole = loader.load_sweep_config(master, list(given))
    found = read_composed(copy.deepcopy(whole), given, 7)
    with open_dict(whole):
        whole.hydra.job.id = whole.hydra.job.num = 7
        whole.hydra.runtime.output_dir = "/somewhere/7"
    task = OmegaConf.masked_copy(whole, [name for name in whole if name != "hydra"])
    assert found.files == {
        "config.yaml": OmegaConf.to_yaml(task),
        "hydra.yaml": OmegaConf.to_yaml(OmegaConf.masked_copy(whole, "hydra")),
        "overrides.yaml": OmegaConf.to_yaml(whole.hydra.overrides.task),
    }
    assert found.choices == dict(whole.hydra.runtime.choices) and found.folder == Path("/somewhere/7")
    assert found.job_logging == OmegaConf.to_container(whole.hydra.job_logging, resolve=True)
    try:
        by_schema: Any = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.to_container(task, resolve=True))
        assert found.config == OmegaConf.to_object(by_schema)
    except OmegaConfBaseException as error:
        assert str(found.config) == str(as_usage_error(error))


def statuses(folder: str) -> dict[int, str]:
    return {int(path.parent.name): json.loads(path.read_text())["status"] for path in Path(folder).glob("*/run.json")}


def test_a_mistake_in_one_job_leaves_the_others(lab: Lab) -> None:
    code, _, errors = sweep(lab, "there", BATCHED, "train.batch=8,100000", "seed=0,1", "seeds=1")
    assert code == 2 and statuses("there") == {0: "done", 1: "done"}
    assert errors == "initlab: train.batch=100000: data=digits has 1797 training rows; use at most as many\n"
    assert not [path for path in Path("there/2").rglob("*") if path.is_file()]


@pytest.mark.parametrize("given", ["init=kaiming,kaming", "seed=0,x", "sede=0,1"])
def test_a_mistake_that_composing_finds_stops_the_sweep_before_its_first_job(lab: Lab, given: str) -> None:
    here, there = (sweep(lab, name, *how, given) for name, how in (("there", (BATCHED,)), ("here", ())))
    assert here[0] == 2 and here[2].count("\n") == 1
    assert here[2] == there[2] and not statuses("there")


def _breaking(own: Any, breaks: Callable[[Ensemble], BaseException | None]) -> Any:
    def broken(*what: Any, **how: Any) -> Any:
        fault = breaks(next(one for one in what if isinstance(one, Ensemble)))
        if fault is not None:
            raise fault
        return own(*what, **how)

    return broken


GAINS = "init.gain=1,1.25,1.5,1.75,2"


@pytest.mark.parametrize("stage", long_except(["stack", "train"], "stack"))
def test_a_fault_is_found_and_the_others_are_what_they_would_have_been(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    sweep(lab, "whole", BATCHED, GAINS, "seeds=1")
    module, name = {"stack": (stacking, "run_stack"), "train": (training, "run_training")}[stage]

    def breaks(ensemble: Ensemble) -> BaseException | None:
        return RuntimeError("broken") if 1.25 in [one.gain for one in ensemble.rules] else None

    monkeypatch.setattr(module, name, _breaking(getattr(module, name), breaks))
    code, _, errors = sweep(lab, "part", BATCHED, GAINS, "seeds=1")
    assert code == 1 and "Error executing job" in errors
    assert statuses("part") == {0: "done", 1: "failed", 2: "done", 3: "done", 4: "done"}
    assert "RuntimeError: broken" in Path("part/1/initlab.log").read_text()
    assert Path("part/1/stats.parquet").is_file() == (stage == "train")  # what was measured before stays
    for k in (0, 2, 3, 4):
        assert differences(Path("whole") / str(k), Path("part") / str(k)) == []


@pytest.mark.long
def test_short_memory_halves_a_program_and_changes_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep(lab, "whole", BATCHED, GAINS, "seeds=1")
    ran: list[int] = []

    def short(ensemble: Ensemble) -> BaseException | None:
        ran.append(len(ensemble))
        return torch.OutOfMemoryError("out of memory") if ran[-1] > 2 else None

    monkeypatch.setattr(training, "run_training", _breaking(run_training, short))
    assert sweep(lab, "halved", BATCHED, GAINS, "seeds=1")[0] == 0
    assert ran == [5, 2, 3, 1, 2]
    for k in range(5):
        assert differences(Path("whole") / str(k), Path("halved") / str(k)) == []
    always = _breaking(run_training, lambda _: torch.OutOfMemoryError("out of memory"))
    monkeypatch.setattr(training, "run_training", always)
    code, _, errors = sweep(lab, "none", BATCHED, "init.gain=1,2", "seeds=1")
    assert code == 2 and "initlab: out of memory; make seeds, width, depth or batch smaller" in errors


@pytest.mark.long
def test_networks_of_a_program_are_halved_inside_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    own, ran = stacking.Networks, []

    def short(*what: Any) -> Any:
        ran.append(len(what[1]))
        if ran[-1] > 2:
            raise torch.OutOfMemoryError("out of memory")
        return own(*what)

    sweep(lab, "whole", BATCHED, GAINS, "seeds=1", "task=stack")
    monkeypatch.setattr(stacking, "Networks", short)
    assert sweep(lab, "halved", BATCHED, GAINS, "seeds=1", "task=stack")[0] == 0
    assert max(ran) == 5 and sum(n for n in ran if n <= 2) == 5
    for k in range(5):
        assert differences(Path("whole") / str(k), Path("halved") / str(k)) == []


@pytest.mark.parametrize(
    ("stop", "code"), long_except([(KeyboardInterrupt, 130), (SystemExit, 143)], (KeyboardInterrupt, 130))
)
def test_a_stop_leaves_what_was_measured(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException], code: int
) -> None:
    broken = _breaking(run_training, lambda ensemble: stop(code) if 3 in ensemble.seeds else None)
    monkeypatch.setattr(training, "run_training", broken)
    monkeypatch.setattr(batch, "CACHED", 2)
    assert sweep(lab, "there", BATCHED, "seed=range(0,5)", "seeds=1")[0] == code
    assert statuses("there") == {k: "done" if k < 2 else "interrupted" for k in range(4)}
    assert Path("there/3/stats.parquet").is_file() and not Path("there/3/losses.parquet").exists()


@pytest.mark.long
def test_a_sweep_that_was_stopped_is_finished(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (BATCHED, "seed=range(0,5)", "seeds=1")
    monkeypatch.setattr(batch, "CACHED", 3)
    sweep(lab, "whole", *words)
    with monkeypatch.context() as broken:
        fault = KeyboardInterrupt()
        stops = _breaking(run_training, lambda ensemble: fault if 4 in ensemble.seeds else None)
        broken.setattr(training, "run_training", stops)
        assert sweep(lab, "there", *words)[0] == 130
    kept = Path("there/2/stats.parquet").stat().st_mtime_ns
    assert lab("-m", *TINY, *words, "resume=there")[0] == 0
    assert statuses("there") == dict.fromkeys(range(5), "done")
    assert Path("there/2/stats.parquet").stat().st_mtime_ns == kept
    for k in (2, 3, 4):
        one, other = Path("whole") / str(k), Path("there") / str(k)
        for name in ("stats", "losses", "theory"):
            assert table_differences(one / f"{name}.parquet", other / f"{name}.parquet") == []


@pytest.mark.long
def test_what_cannot_share_a_program_runs_in_its_turn(lab: Lab) -> None:
    words = ("task=gains,stack", "init=lsuv,kaiming", "seeds=1")
    assert [sweep(lab, name, *how, *words)[0] for name, how in (("basic", ()), ("batched", (BATCHED,)))] == [0, 0]
    for k in range(4):
        assert differences(Path("basic") / str(k), Path("batched") / str(k)) == []


def test_a_folder_in_use_and_one_that_cannot_be_made(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("there/1").mkdir(parents=True)
    Path("there/1/run.json").write_text("{}")
    Path("there/2").write_text("a file where a folder should be")
    code, _, errors = sweep(lab, "there", BATCHED, "seed=range(0,4)", "seeds=1", "task=stack")
    assert code == 2 and "holds a run already" in errors
    assert "there/2/.lock: cannot be written (File exists)" in errors
    assert json.loads(Path("there/1/run.json").read_text()) == {}
    assert all(json.loads(Path(f"there/{k}/run.json").read_text())["status"] == "done" for k in (0, 3))


def test_rows_that_cannot_be_written_end_their_own_job(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Recorder.add

    def full(self: Recorder, frames: Any) -> None:
        if self.folder.name == "1":
            raise OSError(28, "No space left on device")
        own(self, frames)

    monkeypatch.setattr(Recorder, "add", full)
    code, out, errors = sweep(lab, "there", BATCHED, "seed=range(0,3)", "seeds=1", "task=stack")
    assert code == 2 and statuses("there") == {0: "done", 1: "failed", 2: "done"}
    assert "there/1: cannot be written (No space left on device); free some space" in errors
    assert "Traceback" not in out + errors


@pytest.mark.parametrize("method, where", [("write_text", ".hydra"), ("touch", "initlab.log"), ("unlink", "parts")])
def test_a_refusal_without_a_name_is_one_line_of_its_own_job(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, method: str, where: str
) -> None:
    """While a job is taken up, and while rows of a shared program that failed are taken back."""
    own, together = getattr(Path, method), batch.run_together

    def refuse(path: Path, *given: Any, **options: Any) -> Any:
        if path.is_relative_to(Path("there/1").absolute() / where):
            raise PermissionError(13, "Permission denied")
        return own(path, *given, **options)

    def fail_together(stages: Any, running: Any) -> None:
        together(stages, running)
        for one in running:
            one.recorder.flush()
        if len(running) == 3:
            raise ValueError("of one of them")

    monkeypatch.setattr(Path, method, refuse)
    monkeypatch.setattr(batch, "run_together", fail_together)
    code, out, errors = sweep(lab, "there", BATCHED, "seed=range(0,3)", "seeds=1", "task=stack")
    assert code == 2 and "there/1: cannot be written (Permission denied); choose a folder" in errors
    assert "Traceback" not in out + errors and "Error executing" not in out + errors
    assert {k: status for k, status in statuses("there").items() if k != 1} == {0: "done", 2: "done"}


@pytest.mark.long
def test_figures_are_drawn_for_each_job(lab: Lab) -> None:
    assert sweep(lab, "there", BATCHED, "seed=0,1", "seeds=1", "task=stack", "plots=true")[0] == 0
    assert [len(list(Path(f"there/{k}").glob("*.png"))) for k in (0, 1)] == [2, 2]


def test_packs_keep_jobs_whole_and_in_order() -> None:
    sizes = [3, 3, 3, 8, 1, 20, 2]
    found = list(pack_jobs(range(7), sizes, 8))
    assert found == [[0, 1], [2], [3], [4], [5], [6]] and [k for pack in found for k in pack] == list(range(7))
    assert list(pack_jobs([], [], 8)) == []


def test_jobs_that_may_share_a_program(loaded: Any) -> None:
    loader, master = loaded

    def key(*given: str) -> str | None:
        found = read_composed(loader.load_sweep_config(master, list(given)), given, 0).config
        assert not isinstance(found, UsageError)
        return batch.program_key(found)

    own = key("seed=0")
    assert own is not None
    for alike in (["seed=5", "seeds=2"], ["init=naive"], ["init.gain=3"], ["train.lr=0.7"], ["init=torch_default"]):
        assert key(*alike) == own
    for other in (["depth=3"], ["activation=tanh"], ["dtype=float64"], ["train.steps=5"], ["train.optimizer=adam"]):
        assert key(*other) not in (own, None)
    assert key("init=lsuv") is None and key("task=gains") is None
    assert key("train.optimizer=adam", "train.lr=0.1") != key("train.optimizer=adam", "train.lr=0.2")


def test_a_record_waits_and_goes_back(tmp_path: Path) -> None:
    import pandas as pd

    one, other = pd.DataFrame({"a": [1.0]}), pd.DataFrame({"a": [2.0, 3.0]})
    for patience, parts in ((0.0, 2), (1e9, 0)):
        folder = tmp_path / str(parts)
        with Recorder(folder, {"width": 3}, "cpu") as record:
            record.patience = patience
            record.add({"stats": one})
            mark = record.mark()
            record.add({"stats": one})
            assert len(list((folder / "parts").glob("*"))) == parts
            record.rewind(mark)
            record.add({"stats": other})
        kept = pq.read_table(folder / "stats.parquet").to_pandas()
        assert kept["a"].tolist() == [1.0, 2.0, 3.0] and set(kept["width"]) == {3}
