"""The figure of the histograms: shares that add up, and every kind of table drawn."""

import numpy as np
import pandas as pd
import pytest
import torch

from initlab.figures.histogram_figure import draw_octaves, shares
from initlab.stats.buffer import Item, StatsBuffer
from initlab.stats.histogram import histogram
from initlab.stats.keys import TensorKey
from initlab.stats.measure import backend_for


def table(scale: float = 1.0, steps: int = 3) -> pd.DataFrame:
    rows = StatsBuffer([0, 1], backend_for(), histograms=True)
    for step in range(steps):
        for layer in (1, 2, 3):
            for tensor, direction in (("preactivation", "forward"), ("weight", "backward")):
                x = torch.randn(2, 20, 10) * scale
                rows.add([Item(TensorKey("train", "scratch", layer, tensor, direction), x)], step)
    return rows.take_tables()["histograms"]


def test_shares_are_those_of_all_networks_together() -> None:
    frame = table()
    chosen = frame[(frame["layer"] == 2) & (frame["tensor"] == "weight")]
    steps, octaves, share = shares(chosen)
    assert list(steps) == [0, 1, 2] and share.shape == (len(octaves), 3)
    assert np.allclose(share.sum(0), 1, rtol=1e-12)
    assert octaves[np.argmax(share[:, 0])] in (-2, -1, 0)  # a standard normal's most frequent octave is [1/2, 1)


def test_a_scale_of_eight_moves_everything_three_octaves() -> None:
    x = torch.randn(2, 30, 10)
    found = []
    for scale in (1.0, 8.0):
        rows = StatsBuffer([0, 1], backend_for(), histograms=True)
        rows.add([Item(TensorKey("train", "scratch", 1, "weight", "backward"), x * scale)], 0)
        found.append(shares(rows.take_tables()["histograms"]))
    assert np.array_equal(found[0][1] + 3, found[1][1]) and np.array_equal(found[0][2], found[1][2])
    assert int(histogram(x).sum()) == x.numel()


@pytest.mark.parametrize("scale", [1.0, 0.0, float("nan"), float("inf"), 1e-42])
def test_a_dying_signal_is_drawn(scale: float) -> None:
    figure = draw_octaves(table(scale))
    assert figure is not None
    title = figure.get_suptitle()
    assert ("no entry but 0, nan and inf" in title) == (scale not in (1.0, 1e-42))
    figure.canvas.draw()


def test_no_training_no_figure() -> None:
    assert draw_octaves(table().assign(stage="stack")) is None
