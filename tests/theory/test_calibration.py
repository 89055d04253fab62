"""95 % bands hold 95 % of fresh networks, for every statistic that has a band; what has none is not judged."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from initlab.nn.activations import ACTIVATIONS
from initlab.stats.statistics import IN_LN
from initlab.tasks.stack import stack
from initlab.theory.predict import predict
from tests.long import long_except

BAR = (0.925, 0.975)
RULES = ("naive", "small", "lecun", "xavier", "orthogonal", "torch_default", "lsuv", "mup")
OWN = {
    "own mish": torch.nn.Mish(),
    "own sin": torch.sin,
    "own softplus": torch.nn.Softplus(),
    "own elu": torch.nn.ELU(),
    "own abs": torch.abs,
}


def find_coverage(init: str, name: str, depth: int, width: int, batch: int, networks: int) -> pd.DataFrame:
    """A row per tensor, layer and statistic with a band: the share of networks inside; seeds no prediction has seen.

    Left out: what the networks hardly vary in (a share that few entries decide, rounding).
    """
    activation = OWN.get(name, name)
    seeds = range(5000, 5000 + networks)
    frame = stack(init, activation, depth=depth, width=width, batch=batch, seeds=seeds, dtype="float64")
    bands = predict(init, activation, depth, width, batch=batch)
    bands = bands[bands["layer"].isin([1, 10, 30, 50, 100, depth]) & bands["sd"].notna() & (bands["layer"] > 0)]
    frames = dict(list(frame.groupby(["layer", "tensor", "direction"], observed=True)))
    rows = []
    for band in bands.itertuples():
        if (band.layer, band.tensor, band.direction) not in frames:
            continue  # weights and their gradients, which a stack does not record
        values = frames[band.layer, band.tensor, band.direction][band.statistic].to_numpy()
        scale = np.abs(values).max()
        if band.statistic == "std_within":  # below float64's rounding
            scale = max(scale, 1e-6 * frames[band.layer, band.tensor, band.direction]["rms"].mean())
        if len(np.unique(values)) < 50 or not values.std() > 1e-6 * scale:
            continue
        inside = (values >= band.band_low) & (values <= band.band_high)
        logs = np.log(values[values > 0]) if band.statistic in IN_LN else values
        where = f"{band.layer} {band.tensor} {band.direction} {band.statistic}"
        rows.append((where, inside.mean(), logs.std() / band.sd, band.method))
    return pd.DataFrame(rows, columns=["where", "inside", "spread", "method"])


def check(found: pd.DataFrame, networks: int, errors: float = 3) -> None:
    """Inside the bar within so many standard errors of a share of the networks measured, at either end of the bar."""
    low, high = (p + sign * errors * math.sqrt(p * (1 - p) / networks) for p, sign in zip(BAR, (-1, 1), strict=True))
    worst = found.iloc[(found["inside"] - 0.95).abs().argsort()[::-1]].head(10)
    print(worst.to_string())
    assert found["inside"].between(low, high).all(), worst.to_string()


@pytest.mark.parametrize(
    ("init", "name", "batch"),
    long_except(
        [("kaiming", "gelu", 2), ("orthogonal", "selu", 5), ("torch_default", "sigmoid", 1), ("kaiming", "tanh", 40)],
        ("kaiming", "gelu", 2),
    ),
)
def test_narrow_stacks(init: str, name: str, batch: int) -> None:
    """20 units, 10 layers, 500 networks; at least 40 rows have a band."""
    found = find_coverage(init, name, 10, 20, batch, 500)
    assert len(found) >= 40
    check(found, 500)


SLOW = [
    *(("kaiming", name, 50, 100, 200) for name in ("relu", "linear", "tanh", "selu", "gelu", "silu", "sigmoid")),
    ("kaiming", "hardswish", 50, 100, 200),
    *(("kaiming", name, 50, 100, 5) for name in ("relu", "elu", "gelu", *OWN)),
    *((init, "relu", 30, 100, 200) for init in ("torch_default", "orthogonal", "lsuv", "xavier")),
    *((init, name, 100, 20, batch) for init, name in (("kaiming", "relu"), ("orthogonal", "tanh")) for batch in (1, 2)),
    ("kaiming", "tanh", 30, 400, 5),
    *(("kaiming", name, 10, 20, batch) for name in (*ACTIVATIONS, *OWN) for batch in (1, 2, 5, 200)),
    *((init, name, 10, 20, batch) for init in RULES for name in ("relu", "tanh") for batch in (2, 200)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("init", "name", "depth", "width", "batch"), SLOW)
def test_bands_hold_for_a_thousand_networks(init: str, name: str, depth: int, width: int, batch: int) -> None:
    check(find_coverage(init, name, depth, width, batch, 1000), 1000)
