"""Jobs in processes of their own: what the launchers joblib, submitit and ray need before they start them.

Their defaults stand in conf/hydra/launcher/, on top of the plugins' own. The processes inherit this one's environment.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf, open_dict

from initlab import stops
from initlab.job.options import EXTRAS as PROCESS_LAUNCHERS
from initlab.job.options import PLUGIN
from initlab.job.worker_process import GRACE, LAUNCHER, LOOKS
from initlab.runs.lock import LOCK, hold_lock, is_locked
from initlab.runs.schema import COMMAND
from initlab.terminal import ONE_BAR

LARGEST_ARRAY = 1000  # Slurm's MaxArraySize is 1001 by default


def install() -> None:
    """Let conf/hydra/launcher/NAME.yaml extend what the plugin of that name stored, under the name NAME_plugin."""
    Plugins.instance()  # imports the plugins that are installed
    stored = ConfigStore.instance().repo["hydra"]["launcher"]
    for name in PROCESS_LAUNCHERS:
        if f"{name}.yaml" in stored:  # moved, for Hydra warns where a file and a stored node have one name
            node = stored.pop(f"{name}.yaml").node
            ConfigStore.instance().store(group="hydra/launcher", name=f"{name}{PLUGIN}", node=node)


def most_at_once(launcher: str, threads: int) -> int | None:
    """How many jobs of so many threads a launcher should be given at once; None for all."""
    if launcher == "submitit_local":  # which starts all that it is given at the same moment
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, processors // threads)
    return LARGEST_ARRAY if launcher == "submitit_slurm" else None


def _gpus(device: str) -> int:
    """GPUs of this machine that jobs of this device may use."""
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


# What the YAML of the launchers asks about the option `device`.
OmegaConf.register_new_resolver("processes", lambda device: _gpus(device) or -1, replace=True)
OmegaConf.register_new_resolver("job_gpus", lambda device: min(1, _gpus(device)), replace=True)
OmegaConf.register_new_resolver("cluster_gpus", lambda device: 1 if device == "cuda" else None, replace=True)


@contextmanager
def environment(config: DictConfig, launcher: str) -> Iterator[None]:
    """What the processes of a launcher inherit, while the block runs."""
    if launcher not in PROCESS_LAUNCHERS:
        yield
        return
    stops.work()
    given = {
        "OMP_NUM_THREADS": str(config.threads),
        "INITLAB_PARENT": str(os.getpid()),
        COMMAND: os.environ.get(COMMAND) or json.dumps(sys.argv),
        ONE_BAR: "1",  # the sweep's
        "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    settings = config.hydra.launcher
    if launcher == "submitit_local" and settings.gpus_per_node is None:
        given["INITLAB_GPUS"] = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    with ExitStack() as after:
        folder = Path(str(config.hydra.sweep.dir)).absolute()
        own_ray = launcher == "ray" and settings.ray.init.get("address") is None
        if own_ray or launcher in ("joblib", "submitit_local"):  # whose processes run on this machine
            given["INITLAB_SWEEP"] = str(folder)
            after.enter_context(_end_jobs_at_a_stop(folder))
        if own_ray:
            after.enter_context(_own_ray(settings))
        before = {name: os.environ.get(name) for name in given}
        os.environ.update(given)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


@contextmanager
def _end_jobs_at_a_stop(folder: Path) -> Iterator[None]:
    """Within the block the jobs of a sweep's folder may work; after a signal they have two seconds to end."""
    with ExitStack() as alive:
        alive.enter_context(hold_lock(folder / LAUNCHER))

        def end() -> None:
            alive.close()
            last = time.monotonic() + LOOKS + GRACE
            while time.monotonic() < last and any(is_locked(lock.parent) for lock in folder.rglob(f"*/{LOCK}")):
                time.sleep(LOOKS / 10)

        with stops.first(end):
            yield


@contextmanager
def _own_ray(settings: DictConfig) -> Iterator[None]:
    """A cluster that ends with the sweep and leaves nothing behind; its sockets need a short path."""
    folder = None
    if settings.ray.init.get("_temp_dir") is None:
        folder = tempfile.mkdtemp(prefix="initlab-ray-")
        with open_dict(settings):
            settings.ray.init["_temp_dir"] = folder
    try:
        yield
    finally:
        import ray

        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
