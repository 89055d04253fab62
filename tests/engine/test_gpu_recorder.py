"""The recorded step of a GPU, on Triton's interpreter or on a GPU: the rows of the plain pen."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from initlab.engine import recording as recording_module
from initlab.engine.fast_network import Engine
from initlab.engine.gpu_recorder import Launched, works
from initlab.engine.recorders import Apart
from initlab.engine.recording import Recording, pen_for
from initlab.scratch.mlp import Parameters
from initlab.stats.kernels import triton_rows
from initlab.stats.statistics import COUNTS, STATISTICS, Rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    bool(triton_rows.missing(DEVICE)), reason=f"{triton_rows.missing(DEVICE)}; on a CPU set TRITON_INTERPRET=1"
)
KEYS = ["step", "layer", "tensor", "direction", "seed"]


def drawn(sizes: tuple[int, ...], count: int) -> Parameters:
    return [
        (torch.randn(count, i, o, device=DEVICE) * (2 / i) ** 0.5, torch.randn(count, o, device=DEVICE) * 0.1)
        for i, o in pairwise(sizes)
    ]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("sizes", [(12, 6, 6, 3), (6, 3), (7, 5, 4, 3)], ids=str)
def test_the_rows_of_the_plain_pen(sizes: tuple[int, ...], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both round their products alike; the updates of the two differ by one rounding of float32 at most."""
    parameters = drawn(sizes, count)
    x = torch.randn(count, 10, sizes[0], device=DEVICE)
    y = torch.randint(sizes[-1], (count, 10), device=DEVICE)
    tables = []
    for pen in (Launched, Apart):
        monkeypatch.setattr(recording_module, "pen_for", lambda net, pen=pen: pen)
        rows = Rows(range(count), histograms=True)
        recording = Recording(Engine(parameters, lr=0.1, batch=10), rows)
        for step in range(2):
            recording.step(x, y, step)
        recording.flush()
        tables.append((rows.frame().set_index(KEYS).sort_index(), rows.histograms().set_index(KEYS).sort_index()))
    (ours, bins), (plain, plain_bins) = tables
    assert ours.index.equals(plain.index)
    for name in STATISTICS:
        a, b = (frame[name].to_numpy(dtype=float) for frame in (ours, plain))
        first = plain.index.get_level_values("step") == 0
        if name in COUNTS:
            assert np.array_equal(a[first], b[first]), name
        scale = np.maximum(np.abs(b), plain["rms"].to_numpy())
        assert np.array_equal(np.isnan(a), np.isnan(b)), name
        told = first & ~np.isnan(b) & (plain.index.get_level_values("tensor") != "update")
        assert (np.abs(a - b)[told] <= 1e-6 * scale[told]).all(), name
    same = bins.index.get_level_values("tensor") != "update"
    same &= bins.index.get_level_values("step") == 0
    for name in ("first", "positive", "negative"):
        for a, b in zip(bins[same][name], plain_bins[same][name], strict=True):
            assert np.array_equal(a, b), name


def test_it_is_tried_before_it_is_trusted() -> None:
    works.cache_clear()
    assert works(DEVICE)
    assert pen_for(Engine(drawn((6, 3), 1)).networks[0]) is not Launched or DEVICE.type == "cuda"


def test_where_it_fails_the_plain_pen_writes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no such instruction\nand more")

    works.cache_clear()
    monkeypatch.setattr(triton_rows, "measured", broken)
    assert not works(DEVICE)
    assert "no such instruction" in caplog.text and "and more" not in caplog.text
    works.cache_clear()
