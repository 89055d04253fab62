"""Seeded tables that a rebuilding of the code must leave identical.

`tests/golden/` holds the tables, and `environment.json` the processor and torch that made them. On the same ones every
number must be equal bit for bit; elsewhere another order of summation rounds differently, and float32 tensors agree to
1e-4 of the largest number in their column. `python -m tests.test_golden` writes the tables anew: only a change of
numbers that the CHANGELOG explains may do that.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import initlab
from initlab.__main__ import main
from initlab.stats.kernels.cpu import library
from initlab.tasks.data import load
from initlab.tasks.phase import Axis, phase
from initlab.tasks.stack import stack
from initlab.tasks.train import train

FOLDER = Path(__file__).with_name("golden")
STACK = {"depth": 3, "width": 12, "batch": 8, "seeds": range(2)}
TRAIN = {"depth": 2, "width": 6, "batch": 8, "steps": 3, "seeds": range(2)}
SWEEP = ("task=lab", "depth=2", "width=8", "batch=8", "seeds=1", "train.width=4", "train.batch=8", "train.steps=2")


def _probe() -> pd.DataFrame:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    x, y = torch.randn(7, 6), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    return initlab.measure(net, x, y, torch.nn.functional.cross_entropy)


def _train(table: str, **options: object) -> pd.DataFrame:
    return train(load("digits"), **TRAIN, **options)[table]  # type: ignore[arg-type]


@cache
def _sweep(launcher: str) -> dict[str, pd.DataFrame]:
    """The tables of a sweep from the command line, without what hangs on the clock or the folder."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        words = ["-m", *SWEEP, "plots=false", "report=false", f"hydra.sweep.dir={folder}/sweep"]
        words += ["init=naive,kaiming", "activation=relu,tanh", f"hydra/launcher={launcher}"]
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["initlab", *words])
        assert main() == 0
        tables = {name: initlab.read(f"{folder}/**", table=name) for name in ("stats", "losses", "theory")}
    return {name: frame.drop(columns="run") for name, frame in tables.items()}


FRAMES: dict[str, Callable[[], pd.DataFrame]] = {
    "stack": lambda: stack(**STACK),  # type: ignore[arg-type]
    "stack_naive_deep": lambda: stack("naive", depth=40, width=8, batch=4, seeds=[3]),
    "stack_mixed": lambda: stack(["kaiming", "torch_default"], "gelu", **STACK),  # type: ignore[arg-type]
    "stack_half": lambda: stack("orthogonal", "tanh", dtype="bfloat16", **STACK),  # type: ignore[arg-type]
    "stack_lsuv": lambda: stack("lsuv", "leaky_relu", **STACK),  # type: ignore[arg-type]
    "train": lambda: _train("stats"),
    "train_losses": lambda: _train("losses", activation="tanh", lr=[0.01, 0.1]),
    "train_adam": lambda: _train("losses", optimizer="adam", loss="mse", lr=0.1),
    "train_parity": lambda: _train("parity", loss="mse", drift=True, lr=0.1),
    "train_histograms": lambda: _train("histograms", histograms=True),
    "probe": _probe,
    "predict": lambda: initlab.predict("kaiming", "relu", depth=3, width=12),
    "predict_tanh": lambda: initlab.predict("xavier", "tanh", depth=3, width=50, sigma_b=0.3),
    "phase": lambda: pd.concat(
        phase("sigma", Axis(1.0, 2.0, 2), Axis(0.0, 0.5, 2), depth=3, width=10, seeds=range(2)), ignore_index=True
    ),
    "sweep_stats": lambda: _sweep("basic")["stats"],
    "sweep_losses": lambda: _sweep("basic")["losses"],
    "sweep_theory": lambda: _sweep("basic")["theory"],
    "batched_stats": lambda: _sweep("batched")["stats"],
    "batched_losses": lambda: _sweep("batched")["losses"],
    "batched_theory": lambda: _sweep("batched")["theory"],
}


def environment() -> dict[str, object]:
    """What the last digits of a float32 sum hang on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    capability = torch.backends.cpu.get_cpu_capability()
    compiled = library() is not None and not os.environ.get("CXX")  # by the compiler that is named c++
    return {"torch": torch.__version__, "capability": capability, "processor": sorted(processor), "compiled": compiled}


def same_environment() -> bool:
    known: dict[str, object] = json.loads((FOLDER / "environment.json").read_text(encoding="utf-8"))
    return known == environment()


def _as_text(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(**{name: frame[name].map(str) for name in frame if frame[name].dtype.kind not in "iufb"})


def read_golden(name: str) -> pd.DataFrame:
    return pd.read_parquet(FOLDER / f"{name}.parquet")


@pytest.mark.parametrize("name", FRAMES)
def test_a_seeded_table_is_what_it_was(name: str) -> None:
    now, kept = _as_text(FRAMES[name]()), read_golden(name)
    assert list(now.columns) == list(kept.columns)
    assert len(now) == len(kept)
    exact = same_environment()
    for column in kept:
        a, b = now[column], kept[column]
        if a.dtype.kind not in "iufb":
            assert list(a) == list(b.map(str)), column
        elif exact or a.dtype.kind in "iub":
            np.testing.assert_array_equal(a.to_numpy(), b.to_numpy(), err_msg=str(column))
        else:
            if column.startswith("ln_"):  # the logarithm of what is 0 but for rounding
                a, b = a.clip(lower=-30), b.clip(lower=-30)
            largest = float(np.abs(b[np.isfinite(b)]).max()) if np.isfinite(b).any() else 0.0
            slack = 1e-5 if column == "relative_error" else 1e-4 * largest  # errors of float32 are roundings
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=slack, err_msg=str(column))


def test_another_last_bit_is_seen() -> None:
    kept = read_golden("stack")
    other = kept["std"].to_numpy().copy()
    other[3] = np.nextafter(other[3], np.inf)
    assert not np.array_equal(other, kept["std"].to_numpy())


if __name__ == "__main__":
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name, make in FRAMES.items():
        _as_text(make()).to_parquet(FOLDER / f"{name}.parquet", index=False, compression="zstd", compression_level=19)
    (FOLDER / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
