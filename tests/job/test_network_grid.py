"""Axes inside one job: the networks of a grid are those of single runs, and their columns say which is which."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import initlab
from initlab.runs.labels import labels
from tests.conftest import TINY

Lab = Callable[..., tuple[int, str, str]]
# The ensemble contract, 4 eps of float32 per layer over 4 layers; bit for bit where one kernel computed both.
NEAR = 2e-6
KEYS = ("stage", "implementation", "step", "layer", "tensor", "direction", "statistic")


def rows(name: str, table: str = "stats") -> pd.DataFrame:
    return initlab.read(name, table)


def test_a_grid_is_the_product_of_its_axes_and_its_networks_are_single_runs(lab: Lab) -> None:
    axes = ("sweep.init=[lecun,torch_default]", "sweep.gain=[1,1.5]", "sweep.lr=[0.1,0.5]", "sweep.seed=[3,7]")
    assert lab(*TINY, *axes, "hydra.run.dir=grid")[::2] == (0, "")
    single = ("init=torch_default", "init.gain=1.5", "train.lr=0.5", "seed=7", "seeds=1")
    assert lab(*TINY, *single, "hydra.run.dir=one")[0] == 0
    for table, values in (("stats", ["std", "mean"]), ("losses", ["loss"]), ("theory", ["predicted"])):
        whole, one = rows("grid", table), rows("one", table)
        points = whole[whole["seed"] >= 0].groupby(["init", "gain", "lr", "seed"], observed=True).ngroups
        assert points == 16
        chosen = (whole["init"] == "torch_default") & (whole["gain"] == 1.5) & (whole["lr"] == 0.5)
        mine = whole[chosen & (whole["seed"] == 7)].reset_index(drop=True)
        one = one[one["seed"] == 7].reset_index(drop=True)
        away = (whole["init"] == "torch_default") & (whole["gain"] == 1) & (whole["lr"] == 0.1)
        other = whole[away & (whole["seed"] == 7)]
        keys = [name for name in KEYS if name in one]
        words = dict.fromkeys(set(keys) - {"step", "layer"}, str)
        mine, one, other = (frame.astype(words).sort_values(keys) for frame in (mine, one, other))
        for name in values:
            np.testing.assert_allclose(mine[name], one[name], rtol=NEAR, atol=NEAR)
            assert not np.allclose(other[name], one[name], rtol=1e-3, equal_nan=True)
    stats = rows("grid")
    assert set(stats.loc[stats["init"] == "torch_default", "bias"]) == {1.0}
    assert set(stats.loc[stats["init"] == "lecun", "distribution"]) == {"normal"}
    assert len(set(labels(stats))) == 8


def test_every_point_is_an_ensemble_with_a_prediction_of_its_own(lab: Lab) -> None:
    lab(*TINY, "task=stack", "sweep.gain=[1,2]", "seeds=3", "hydra.run.dir=grid")
    lab(*TINY, "task=stack", "init.gain=2", "seeds=3", "hydra.run.dir=one")
    whole, one = rows("grid", "theory"), rows("one", "theory")
    assert set(whole.groupby("gain")["seed"].nunique()) == {4}  # three networks and their mean
    for name in ("predicted", "measured", "band_low", "z"):
        mine = whole.loc[(whole["gain"] == 2) & (whole["seed"] == -1), name].to_numpy()
        np.testing.assert_allclose(mine, one.loc[one["seed"] == -1, name], rtol=1e-4, atol=1e-4)
        assert len(mine) > 20


def test_a_rule_without_a_prediction_leaves_the_others_theirs(lab: Lab) -> None:
    code, said, _ = lab(*TINY, "task=stack", "sweep.init=[lsuv,kaiming]", "seeds=2", "hydra.run.dir=grid", "batch=1")
    assert code == 0
    known = set(rows("grid", "theory")["init"])
    assert "kaiming" in known and (known == {"kaiming", "lsuv"} or "no prediction for some networks" in said)
    assert set(rows("grid", "lsuv")["init"]) == {"lsuv"}


def test_figures_compare_the_points(lab: Lab) -> None:
    lab(*TINY, "sweep.gain=[1,2]", "seeds=2", "hydra.run.dir=grid", "plots=true")
    assert {path.stem for path in Path("grid").glob("*.png")} == {"activation_std", "gradient_std", "loss"}


MISTAKES = {
    "sweep.gain=[]": "sweep.gain=[]: must name at least one value",
    "sweep.gain=[1,1]": "sweep.gain=[1.0,1.0]: 1.0 stands there more than once",
    "sweep.gain=[a]": "sweep.gain[0]=a: must be a number",
    "sweep.gain=[-1]": "sweep.gain=[-1.0]: -1.0 must be a finite number, at least 0",
    "sweep.gain=[nan]": "sweep.gain=[nan]: nan must be a finite number, at least 0",
    "sweep.seed=[-1]": "seed=-1: must be at least 0",
    "sweep.lr=[-1]": "train.lr=-1: must be at least 0",
    "sweep.init=[kaming]": "did you mean kaiming?",
    "sweep.gian=[1]": "sweep.gian: no such option - did you mean sweep.gain?",
    "sweep.gain=[1] task=gains": "sweep.gain=[1.0]: task=gains has no axes; use task=lab|stack|train",
    "sweep.lr=[0.1,0.2] train.optimizer=adam": "sweep.lr: train.optimizer=adam has one learning rate for all; use sgd",
}


@pytest.mark.parametrize("given", MISTAKES)
def test_mistakes_are_one_line(lab: Lab, given: str) -> None:
    code, _, errors = lab(*TINY, *given.split(), "hydra.run.dir=none")
    assert code == 2 and MISTAKES[given] in errors and errors.count("\n") == 1
    assert not Path("none/run.json").exists()
