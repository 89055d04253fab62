"""Jobs in processes of their own: what a launcher needs before it starts them, and what one of them must do first.

The traps: threads that multiply, GPUs that are hidden or shared, a folder with two runs, an extra that is not
installed. joblib, submitit and ray stay as they are; the processes that they start inherit this one's environment.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf, open_dict

LARGEST_ARRAY = 1000  # Slurm's MaxArraySize is 1001 by default


Filled = Mapping[str, tuple[Any, Any]]  # setting -> the launcher's own default, and what it should be here


def _joblib(gpus: int) -> Filled:
    """A process per GPU; and jobs one by one, since they take seconds to hours."""
    return {"batch_size": ("auto", 1), "n_jobs": (-1, gpus or -1)}


def _submitit_local(gpus: int) -> Filled:
    """Nobody else waits for the machine: a week for a job. Its GPUs are in `INITLAB_GPUS`."""
    return {"timeout_min": (60, 7 * 24 * 60)}


def _submitit_slurm(gpus: int) -> Filled:
    return {"cpus_per_task": (None, "${threads}"), "gpus_per_node": (None, 1 if gpus else None)}


def _ray(gpus: int) -> Filled:
    """Warnings only; a GPU must be asked for, or ray hides it."""
    return {
        "ray.init.include_dashboard": (None, False),
        "ray.init.logging_level": (None, "warning"),
        "ray.remote.num_cpus": (None, "${threads}"),
        "ray.remote.num_gpus": (None, int(gpus > 0)),
    }


class Launcher(NamedTuple):
    """What is to be known of a launcher that starts processes."""

    fill: Callable[[int], Filled]  # what its defaults leave wrong, given how many GPUs the jobs will use
    at_once: Callable[[int], int | None]  # jobs it should be given at once, given their threads; None: all


# The name as it is typed -> what is to be known.
LAUNCHERS = {
    "joblib": Launcher(_joblib, lambda _: None),
    # submitit would start all jobs at the same moment
    "submitit_local": Launcher(_submitit_local, lambda threads: max(1, _processors() // threads)),
    "submitit_slurm": Launcher(_submitit_slurm, lambda _: LARGEST_ARRAY),
    "ray": Launcher(_ray, lambda _: None),
}


def prepare(config: DictConfig) -> Launcher | None:
    """Fill the launcher's configuration, in place, where nothing was said; None where jobs run in this process."""
    name = str(config.hydra.runtime.choices.get("hydra/launcher"))
    launcher = LAUNCHERS.get(name)
    if launcher is None:
        return None
    said = {word.lstrip("+").partition("=")[0] for word in config.hydra.overrides.hydra}
    gpus = _gpus(str(config.device), here=name != "submitit_slurm")
    with open_dict(config):
        OmegaConf.set_readonly(config.hydra, False)
        for key, (default, here) in launcher.fill(gpus).items():
            untouched = OmegaConf.select(config.hydra.launcher, key) == default
            if untouched and f"hydra.launcher.{key}" not in said:
                OmegaConf.update(config.hydra.launcher, key, here, force_add=True)
    return launcher


@contextmanager
def environment(config: DictConfig, launcher: Launcher | None) -> Iterator[None]:
    """What the processes of a launcher inherit, while the block runs."""
    if launcher is None:
        yield
        return
    threads = {name: str(config.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    given = threads | {
        "INITLAB_PARENT": str(os.getpid()),
        "INITLAB_COMMAND": json.dumps(sys.argv),
        "TQDM_DISABLE": "1",  # one bar, the sweep's
        "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    settings = config.hydra.launcher
    if launcher is LAUNCHERS["submitit_local"] and settings.gpus_per_node is None:
        given["INITLAB_GPUS"] = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    with ExitStack() as after:
        if launcher is LAUNCHERS["ray"] and settings.ray.init.get("address") is None:
            after.enter_context(_own_ray(settings))
        before = {name: os.environ.get(name) for name in given}
        os.environ.update(given)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


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


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus(device: str, here: bool) -> int:
    """How many GPUs jobs of this device will use: those of this machine; elsewhere only what was asked for is known."""
    if device == "cpu" or (device == "auto" and not here):
        return 0
    if not here:
        return 1
    import torch

    return torch.cuda.device_count()
