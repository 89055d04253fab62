"""The same jobs through every launcher: the same tables to the last bit, and the traps of each."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

import initlab
from initlab.job import worker_process
from initlab.job.options import EXTRAS, as_usage_error
from initlab.job.settings import CONF
from initlab.sweep import workers

WORDS = (
    "-m",
    "init=kaiming",
    "seed=0,1",
    "task=stack",
    "depth=4",
    "width=20",
    "seeds=2",
    "plots=false",
    "report=false",
)
JOBS = 2
PLUGINS = {"joblib": "hydra_joblib_launcher", "submitit_local": "hydra_submitit_launcher", "ray": "hydra_ray_launcher"}


def sweep(where: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with a home of its own: ray keeps a token there."""
    return subprocess.run(
        [sys.executable, "-m", "initlab", *words], cwd=where, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(initlab.__file__).parents[1]), "HOME": str(where)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def basic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("basic")
    done = sweep(where, *WORDS, "hydra.sweep.dir=x")
    assert done.returncode == 0, done.stderr
    return where / "x"


@pytest.mark.long
@pytest.mark.parametrize("launcher", PLUGINS)
def test_jobs_are_the_same_to_the_last_bit(launcher: str, basic: Path, tmp_path: Path) -> None:
    pytest.importorskip(f"hydra_plugins.{PLUGINS[launcher]}", reason=f"needs pip install 'initlab[{EXTRAS[launcher]}]'")
    done = sweep(tmp_path, *WORDS, "hydra.sweep.dir=x", f"hydra/launcher={launcher}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(" relu " in line for line in done.stdout.splitlines()) == JOBS
    folder = tmp_path / "x"
    for job in range(JOBS):
        one, other = basic / str(job), folder / str(job)
        names = sorted(path.name for path in one.iterdir())
        assert names == sorted(path.name for path in other.iterdir())
        tables = [name for name in names if name.endswith(".parquet")]
        assert tables == ["stats.parquet", "theory.parquet"]
        for name in tables:
            pd.testing.assert_frame_equal(pd.read_parquet(one / name), pd.read_parquet(other / name), check_exact=True)
        said, here = (json.loads((folder / "run.json").read_text()) for folder in (one, other))
        assert {key for key in said if said[key] != here[key]} <= {"started", "wall_seconds", "cpu_seconds", "command"}
        assert here["command"][1:] == [*WORDS, "hydra.sweep.dir=x", f"hydra/launcher={launcher}"]
    seeds = [{int(seed) for seed in pd.read_parquet(basic / str(k) / "stats.parquet")["seed"]} for k in range(2)]
    assert seeds == [{0, 1}, {1, 2}]  # jobs that differ, or equality says nothing


@pytest.mark.long
def test_a_mistake_and_a_fault_of_a_worker_reach_the_exit_code(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs pip install 'initlab[parallel]'")
    (tmp_path / "faulty.py").write_text(
        "import os, torch\n"
        "def sine(z):\n"
        "    if z.numel() == 17 * 20:\n"  # one job's batch and width; what is tried on an activation has other sizes
        "        raise RuntimeError(f'threads: {os.environ[\"OMP_NUM_THREADS\"]} {torch.get_num_threads()}')\n"
        "    return torch.sin(z)\n"
    )
    words = ("-m", "batch=-1,17,18", "threads=1", "activation._target_=faulty.sine", *WORDS[3:], "seeds=1")
    one = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=1")
    done = sweep(tmp_path, *words, "theory=off", "hydra.sweep.dir=x", *one)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "initlab: batch=-1: must be at least 1\n" in done.stderr
    assert "RuntimeError: threads: 1 1" in done.stdout and "not done: x/1 is failed" in done.stdout
    assert sorted(path.parent.name for path in tmp_path.glob("x/*/stats.parquet")) == ["2"]
    assert "the same command with resume=x runs the jobs that are not done" in done.stderr


@pytest.mark.parametrize("launcher", EXTRAS)
def test_a_launcher_that_is_not_there_names_its_extra(launcher: str) -> None:
    missing = MissingConfigException("no such file", f"hydra/launcher/{launcher}", ["basic"])
    line = str(as_usage_error(missing))
    assert line == f"hydra/launcher={launcher}: is not installed; pip install 'initlab[{EXTRAS[launcher]}]'"
    missing = MissingConfigException("no such file", f"hydra/launcher/{launcher}_plugin", ["basic"])
    assert str(as_usage_error(missing)) == line
    assert {path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml")} == set(EXTRAS)


def test_a_misspelt_launcher_is_one_line() -> None:
    line = str(as_usage_error(MissingConfigException("no such file", "hydra/launcher/jobli", ["basic"])))
    assert line == (
        "hydra/launcher=jobli: must be one of basic, joblib, ray, submitit_local, submitit_slurm - did you mean joblib?"
    )


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """`settings("joblib", "device=cpu")`: what the launcher of a sweep is given."""
    workers.install()
    stored = ConfigStore.instance()
    monkeypatch.setattr(stored, "repo", copy.deepcopy(stored.repo))
    if "ray_plugin.yaml" not in stored.list("hydra/launcher"):  # it has sixty packages: here as its plugin stores it
        node = {"_target_": "none", "ray": {"init": {"address": None}, "remote": {}}}
        stored.store(group="hydra/launcher", name="ray_plugin", node=node)
    workers.install()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):

        def one(name: str, *words: str) -> Any:
            config = compose("config", overrides=[f"hydra/launcher={name}", *words], return_hydra_config=True)
            return config.hydra.launcher

        yield one


def test_defaults_that_would_do_harm_are_replaced_and_what_is_said_stays(
    settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    joblib = settings("joblib")
    assert (joblib.n_jobs, joblib.batch_size) == (2, "1")  # a process per GPU
    assert settings("joblib", "device=cpu").n_jobs == -1
    for number in (5, -1):
        assert settings("joblib", f"hydra.launcher.n_jobs={number}").n_jobs == number
    assert settings("submitit_local", "device=cpu").timeout_min == 7 * 24 * 60
    for device, gpus in (("cuda", 1), ("auto", None), ("cpu", None)):  # whether a cluster has GPUs nobody knows here
        slurm = settings("submitit_slurm", f"device={device}", "threads=3")
        assert (slurm.cpus_per_task, slurm.gpus_per_node) == (3, gpus)
    for device, gpus in (("auto", 1), ("cpu", 0)):
        own = settings("ray", f"device={device}", "threads=3")
        assert own.ray.remote == {"num_cpus": 3, "num_gpus": gpus}
        assert own.ray.init == {"address": None, "include_dashboard": False, "logging_level": "warning"}


def with_launcher(launcher: dict[str, object], where: Path) -> workers.DictConfig:
    return OmegaConf.create({"threads": 3, "hydra": {"launcher": launcher, "sweep": {"dir": str(where)}}})


def test_what_the_processes_inherit_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    before = dict(os.environ)
    with workers.environment(with_launcher({"gpus_per_node": None}, tmp_path), "submitit_local"):
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert os.environ["INITLAB_GPUS"] == "3,5"  # submitit would show none, or count from 0
        assert not worker_process.is_worker()  # this process is their parent
        monkeypatch.setattr(os, "getpid", lambda: -1)
        assert worker_process.is_worker()
        monkeypatch.undo()
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        assert os.environ.pop("INITLAB_SWEEP") == str(tmp_path)  # a process would end with the sweep
        monkeypatch.setattr(os, "getpid", lambda: -1)
        monkeypatch.setattr(sys, "argv", [])
        with worker_process.as_worker("cpu"):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"
        monkeypatch.undo()
    assert "INITLAB_PARENT" not in os.environ and "INITLAB_GPUS" not in os.environ
    with workers.environment(with_launcher({"gpus_per_node": 1}, tmp_path), "submitit_local"):
        assert "INITLAB_GPUS" not in os.environ  # as it was asked for
    with workers.environment(with_launcher({}, tmp_path), "basic"):
        assert "INITLAB_PARENT" not in os.environ
    assert before["OMP_NUM_THREADS"] == "7"


def test_not_all_jobs_are_started_at_once() -> None:
    """submitit's local executor would start a thousand processes, and Slurm's arrays have an end."""
    cores = len(os.sched_getaffinity(0))
    assert workers.most_at_once("submitit_local", 1) == cores
    assert workers.most_at_once("submitit_local", 10 * cores) == 1
    assert workers.most_at_once("submitit_slurm", 1) == 1000 and workers.most_at_once("joblib", 1) is None


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("joblib") is None, reason="needs joblib")
def test_jobs_in_processes_use_the_gpu(tmp_path: Path) -> None:
    done = sweep(tmp_path, *WORDS, "hydra.sweep.dir=x", "hydra/launcher=joblib", "device=cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(pd.read_parquet(tmp_path / "x" / "0" / "stats.parquet")["device"]) == {"cuda"}
