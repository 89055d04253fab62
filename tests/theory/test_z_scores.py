import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from initlab.nn.custom_activation import Given
from initlab.nn.init import Rule, rule
from initlab.tasks.data import load
from initlab.tasks.stack import stack
from initlab.tasks.train import train
from initlab.theory.quantiles import WIDE
from initlab.theory.z_scores import ENSEMBLE, compare_stack, compare_training, measure_input

SHAPE = {"depth": 10, "width": 200, "inputs": 100, "batch": 50}
XAVIER = rule("xavier", gain=1.3)


def theory_with(threads: int, folder: Path) -> pd.DataFrame:
    """The predictions for a training, where numpy is told to multiply with so many threads."""
    words = ["task=train", "seeds=1", "train.width=8", "train.batch=16", "train.steps=1", "plots=false", "report=false"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "initlab", *words, f"hydra.run.dir={folder}"]
    subprocess.run(command, check=True, capture_output=True, cwd=folder.parent, env=environment)
    return pd.read_parquet(folder / "theory.parquet")


@pytest.mark.long
def test_predictions_hang_on_no_number_of_threads(tmp_path: Path) -> None:
    pd.testing.assert_frame_equal(*(theory_with(n, tmp_path / str(n)) for n in (1, 8)), check_exact=True)


def beside(stats: pd.DataFrame, init: str | Rule = XAVIER, activation: Given = "tanh", **shape: int) -> pd.DataFrame:
    return compare_stack(stats, init, activation, **{**SHAPE, **shape}, method="closed")


def measured(init: str | Rule, activation: str = "tanh", networks: int = 32, **shape: int) -> pd.DataFrame:
    return stack(init, activation, seeds=range(networks), dtype="float64", **{**SHAPE, **shape})


def largest(table: pd.DataFrame, direction: str = "forward", statistic: str = "rms") -> float:
    """|z| of the mean over the networks, its largest among all layers."""
    at = (table["seed"] == ENSEMBLE) & (table["direction"] == direction) & (table["statistic"] == statistic)
    return float(table[at]["z"].abs().max())


@pytest.fixture(scope="module")
def right() -> pd.DataFrame:
    return measured(XAVIER)


def test_a_right_rule_is_not_flagged_and_wrong_ones_are(right: pd.DataFrame) -> None:
    """32 networks. The right rule: no layer beyond 4.5, whatever the statistic; each fault: beyond 5 somewhere."""
    table = beside(right)
    for statistic in ("rms", "std", "std_within", "cosine", "mean"):
        assert largest(table, statistic=statistic) < 4.5, statistic
    assert largest(table, "backward") < 4.5
    off = beside(measured(rule("xavier", gain=1.3 * 1.03)))
    assert largest(off) > 5
    swapped = beside(measured(rule("kaiming", gain=1.3, mode="fan_out")), rule("kaiming", gain=1.3))
    assert largest(swapped) > 5
    scaled = right.assign(rms=np.where(right["direction"] == "backward", right["rms"] * 1.1, right["rms"]))
    assert largest(beside(scaled), "backward") > 5 > largest(beside(scaled))
    assert largest(beside(measured(rule("xavier", gain=1.3, bias=3.0)))) > 5


def test_z_and_band_say_the_same(right: pd.DataFrame) -> None:
    """|z| < 1.995 is to be inside, for laws of ln and for skewed ones; over ensembles the band is that of a mean."""
    table = beside(right)
    table = table[np.isfinite(table["z"]) & (table["band_high"] > table["band_low"])]
    one = table[(table["seed"] >= 0) & (table["z"].abs() - WIDE).abs().gt(1e-6)]
    inside = one["measured"].between(one["band_low"], one["band_high"])
    assert ((one["z"].abs() < WIDE) == inside).mean() > 0.999  # a share's law has no quantiles below 0
    assert inside.mean() == pytest.approx(0.95, abs=0.03)
    key = ["layer", "tensor", "direction", "statistic"]
    ln = table[table["statistic"] == "rms"]
    whole = ln[ln["seed"] == ENSEMBLE].set_index(key)
    single = ln[ln["seed"] == 0].set_index(key)
    ratio = np.log(single["band_high"] / single["band_low"]) / np.log(whole["band_high"] / whole["band_low"])
    assert ratio.to_numpy() == pytest.approx(math.sqrt(32))
    mean = np.log(ln[ln["seed"] >= 0].set_index([*key, "seed"])["measured"]).groupby(level=key, observed=True).mean()
    assert np.log(whole["measured"]).sort_index().to_numpy() == pytest.approx(mean.sort_index().to_numpy(), rel=1e-9)


def test_what_is_not_finite_has_no_z_and_keeps_its_row() -> None:
    shape = {"depth": 60, "width": 100, "inputs": 100, "batch": 20}
    stats = stack("naive", "linear", seeds=range(2), **shape)
    table = beside(stats, "naive", "linear", **shape)
    std = table[(table["statistic"] == "std") & (table["tensor"] == "activation") & (table["direction"] == "forward")]
    assert len(std) == 3 * 61 and set(std["layer"]) == set(range(61))  # two networks and their mean
    dead = std[std["layer"] > 45]
    assert dead["measured"].isna().all() and dead["z"].isna().all() and (dead["predicted"] > 1e45).all()
    assert np.isfinite(std[std["layer"] < 35]["z"]).all()
    broken = stats["n_inf"] + stats["n_nan"] > 0
    partly = stats[broken & stats["std"].notna()]  # a std of the entries that are left
    assert len(partly)
    found = table.merge(partly[["seed", "layer", "tensor", "direction"]])
    assert found["z"].isna().all()


def test_gradients_through_values_that_are_not_finite_have_no_z() -> None:
    """relu' of inf is 1 for every unit: such gradients are finite and 30 standard deviations off. Others keep z."""
    shape = {"depth": 50, "width": 100, "inputs": 100, "batch": 20}
    naive = beside(stack("naive", "relu", seeds=range(2), **shape), "naive", "relu", **shape)
    gradients = naive[naive["direction"] == "backward"]
    assert gradients["z"].isna().all() and np.isfinite(gradients["measured"]).any()
    finite = stack("naive", "relu", seeds=range(2), **{**shape, "depth": 20})
    kept = beside(finite, "naive", "relu", **{**shape, "depth": 20})
    assert np.isfinite(kept.query("direction == 'backward' and statistic == 'std'")["z"]).all()


def test_a_signal_that_vanished_is_far_from_its_prediction() -> None:
    shape = {"depth": 50, "width": 100, "inputs": 100, "batch": 20}
    table = beside(stack("small", "relu", seeds=range(2), **shape), "small", "relu", **shape)
    std = table[(table["statistic"] == "std") & (table["tensor"] == "activation") & (table["direction"] == "forward")]
    assert (std[std["layer"] == 50]["z"] == -np.inf).all() and (std[std["layer"] == 50]["predicted"] > 0).all()
    assert np.isfinite(std[std["layer"].between(1, 30)]["z"]).all()


def test_where_nothing_may_vary_any_difference_counts() -> None:
    """A linear stack has no zeros: none measured is z = 0, some are z = inf."""
    shape = {"depth": 2, "width": 20, "inputs": 20, "batch": 5}
    stats = stack("lecun", "linear", seeds=[0], **shape)
    for share, z in ((0.0, 0.0), (0.5, np.inf)):
        table = beside(stats.assign(frac_zero=share), "lecun", "linear", **shape)
        assert (table[table["statistic"] == "frac_zero"]["z"] == z).all()


@pytest.mark.parametrize("cosine", [0.0, 0.4])
def test_moments_of_data(cosine: float) -> None:
    """x = sqrt(c) m + sqrt(1 - c) e in 30 of 40 units has this cosine and differs in 30 directions."""
    g = torch.Generator().manual_seed(1)
    common, own = torch.randn(1, 30, generator=g), torch.randn(20000, 30, generator=g)
    common *= math.sqrt(30) / common.norm()
    x = torch.zeros(20000, 40)
    x[:, :30] = 2 * (math.sqrt(cosine) * common + math.sqrt(1 - cosine) * own)
    found = measure_input(x.numpy())
    assert found.units == 40
    assert found.q == pytest.approx(4 * 30 / 40, rel=0.02)  # sd of 4,096 rows of 30: 0.4 %
    assert found.cosine == pytest.approx(cosine, abs=0.02)
    assert found.directions == pytest.approx(30, rel=0.05)


def started(init: str, networks: int = 60) -> pd.DataFrame:
    """Step 0 of so many networks of three hidden layers, beside what `kaiming` predicts."""
    data = load("digits")
    stats = train(data, init, "relu", 3, 60, 64, steps=2, seeds=range(networks))["stats"]
    return compare_training(stats, [60, 60, 60, 10], measure_input(data.x.numpy()), 64, "kaiming", "relu", "closed")


def test_step_0_of_a_training_is_predicted_from_the_moments_of_its_data() -> None:
    """60 networks: 95 % bands hold 81 % at least, five standard errors; and not everything."""
    table = started("kaiming")
    assert set(table["step"]) == {0} and set(table["implementation"]) == {"scratch", "module"}
    ours = table[(table["implementation"] == "scratch") & (table["seed"] >= 0)]
    some = ours[ours["statistic"].isin(["std", "std_within", "cosine"])]
    inside = some["measured"].between(some["band_low"], some["band_high"])
    share = inside.groupby([some[name].astype(str) for name in ("layer", "tensor", "direction", "statistic")]).mean()
    assert len(share) == 31 and share.min() > 0.81, share.sort_values().head()
    assert share.mean() < 0.99
    backward = ours[ours["direction"] == "backward"]
    assert set(backward["tensor"]) == {"preactivation", "activation"} and backward["layer"].max() == 3
    assert backward["method"].str.startswith("from the loss down").all()
    assert ours["measured"].notna().all()  # nothing is predicted that such a network has not
    mean = table[(table["seed"] == ENSEMBLE) & (table["statistic"] == "std")]
    assert mean["z"].abs().median() < 2


@pytest.mark.parametrize(("init", "activation"), [("mup", "relu"), ("lsuv", "relu"), ("orthogonal", "relu")])
def test_rules_that_treat_the_last_layer_or_the_data_apart_are_known_at_step_0(init: str, activation: str) -> None:
    """40 networks twice as wide as mup's base: no z of a mean beyond 5 in sizes and cosines, weights included.

    The opposite: kaiming's law knows neither mup's last layer nor the fit.
    """
    data, widths = load("digits"), [100, 100, 10]
    stats = train(data, init, activation, 2, 100, 64, steps=1, seeds=range(40))["stats"]

    def worst(told: str) -> pd.Series:
        table = compare_training(stats, widths, measure_input(data.x.numpy(), 64), 64, told, activation, "closed")
        mean = table[(table["seed"] == ENSEMBLE) & (table["implementation"] == "scratch")]
        mean = mean[mean["statistic"].isin(["rms", "std", "cosine"])]
        return mean["z"].abs().groupby(mean["tensor"].astype(str)).max()

    assert worst(init).max() < 5, worst(init)
    assert worst("kaiming")["weight"] > 5 and worst("kaiming")["preactivation"] > 5


def test_batches_of_data_wander_as_told() -> None:
    """ln of mean square and of variance of Gaussian batches: variances 2/n and 2/(n (B - 1)), 5 standard errors."""
    x = torch.randn(20000, 40, generator=torch.Generator().manual_seed(2)).numpy()
    t, both, w = measure_input(x, 10).wander
    assert t == pytest.approx(2 / 40, rel=5 * math.sqrt(2 / 200)) and w == pytest.approx(2 / 360, rel=0.5)
    assert abs(both) < 5 * math.sqrt(t * w / 200)
    assert measure_input(x).wander == (0.0, 0.0, 0.0) == measure_input(x, 1).wander


def test_a_training_that_starts_with_another_rule_is_flagged() -> None:
    table = started("lecun", 32)
    rows = table[(table["seed"] == ENSEMBLE) & (table["statistic"] == "std") & (table["tensor"] == "preactivation")]
    for direction in ("forward", "backward"):
        assert rows[rows["direction"] == direction]["z"].abs().max() > 5, direction


def test_the_method_is_the_one_asked_for() -> None:
    """Deep and narrow, formulas say that they do not hold; a simulation does."""
    shape = {"depth": 12, "width": 8, "inputs": 8, "batch": 5}
    stats = stack("kaiming", "relu", seeds=range(2), **shape)
    said = {
        method: compare_stack(stats, "kaiming", "relu", **shape, method=method) for method in ("closed", "simulation")
    }
    for method, words in (("closed", "log-delta, outside its range"), ("simulation", "simulation")):
        rows = said[method].query("statistic == 'rms' and layer > 0 and direction == 'forward'")
        assert set(rows[rows["tensor"] == "activation"]["method"].astype(str)) == {words}
