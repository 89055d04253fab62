"""The backend of a GPU, on Triton's interpreter or on a GPU: the rows and the training of plain PyTorch."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from initlab.engine.fast_network import Engine
from initlab.engine.mlp import Parameters
from initlab.engine.recorders import Recording
from initlab.stats import backend as plain_backend
from initlab.stats.backend import Backend
from initlab.stats.buffer import StatsBuffer
from initlab.stats.histogram import bin_columns
from initlab.stats.kernels import triton_rows
from initlab.stats.kernels.gpu_backend import GpuBackend, works
from initlab.stats.reference import FIELDS
from initlab.stats.statistics import COUNTS, STATISTICS
from initlab.stats.summarize import summarize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.skipif(
        bool(triton_rows.missing(DEVICE)), reason=f"{triton_rows.missing(DEVICE)}; on a CPU set TRITON_INTERPRET=1"
    ),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def plain_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU plain PyTorch has no sums in float32; nor has it here, on the interpreter's CPU."""
    monkeypatch.setattr(plain_backend, "summarize", lambda x, batched, *_: summarize(x, batched))


KEYS = ["step", "layer", "tensor", "direction", "seed"]


def drawn(sizes: tuple[int, ...], count: int) -> Parameters:
    return [
        (torch.randn(count, i, o, device=DEVICE) * (2 / i) ** 0.5, torch.randn(count, o, device=DEVICE) * 0.1)
        for i, o in pairwise(sizes)
    ]


def passes(
    backend: Backend, z: Tensor, g: Tensor, w: Tensor
) -> tuple[list[Tensor], list[Tensor], dict[str, np.ndarray]]:
    """The rows of all passes in place, what became of the tensors, and the histograms."""
    a, masked, updated, bins = z.clone(), g.clone(), w.clone(), backend.bins(len(z))
    sums = torch.empty(len(z), z.shape[-1], dtype=z.dtype, device=z.device)
    rows = [
        backend.relu_rows_(a, bins),
        backend.mask_rows_(masked, a, sums, bins),
        backend.update_rows_(updated, g, 0.5, bins),
    ]
    return rows, [a, masked, updated, sums], bin_columns(bins.take())


@pytest.mark.parametrize("dtype", triton_rows.DTYPES, ids=str)
def test_passes_in_place_are_those_of_plain_pytorch(dtype: torch.dtype) -> None:
    z, g, w = (torch.randn(2, 20, 7, device=DEVICE).to(dtype) for _ in range(3))
    (rows, tensors, bins), (plain_rows, plain, plain_bins) = (passes(b, z, g, w) for b in (GpuBackend(), Backend()))
    for a, b in zip(tensors, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=0)
    for a, b in zip(rows[:2], plain_rows[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, equal_nan=True)
    torch.testing.assert_close(rows[2][:, :2], plain_rows[2][:, :2], rtol=1e-12, atol=1e-13, equal_nan=True)
    for name, column in bins.items():
        for k in range(12):  # z, a, both gradients, w and g; the change of w is rounded differently
            assert np.array_equal(column[k], plain_bins[name][k])


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("shape", [(20, 7), (3, 2, 140, 5), (0, 4)], ids=str)
def test_the_row_of_a_tensor_is_that_of_plain_pytorch(shape: tuple[int, ...], batched: bool) -> None:
    """Also of one that lies otherwise in memory, that requires a gradient, and that is empty."""
    x = torch.randn(*shape[:-2], shape[-1], shape[-2], device=DEVICE, requires_grad=True).mT
    backends, memory = (GpuBackend(), Backend()), torch.zeros(*shape[:-2], len(FIELDS), dtype=torch.float64).to(DEVICE)
    bins = [backend.bins(shape[-3] if len(shape) > 2 else 1) for backend in backends]
    rows, plain = (one.rows(x, batched, collector) for one, collector in zip(backends, bins, strict=True))
    torch.testing.assert_close(rows, plain, rtol=1e-12, atol=1e-13, equal_nan=True)
    assert not rows.requires_grad
    counted, expected = (bin_columns(collector.take()) for collector in bins)
    assert all(list(map(list, counted[name])) == list(map(list, expected[name])) for name in ("positive", "negative"))
    assert backends[0].rows(x, batched, None, memory) is memory
    torch.testing.assert_close(memory.movedim(-1, 0), rows, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("sizes", [(12, 6, 6, 3), (6, 3), (7, 5, 4, 3)], ids=str)
def test_the_recorded_training_is_that_of_plain_pytorch(sizes: tuple[int, ...], count: int) -> None:
    """Both round their products alike; the updates of the two differ by one rounding of float32 at most."""
    parameters = drawn(sizes, count)
    x = torch.randn(count, 10, sizes[0], device=DEVICE)
    y = torch.randint(sizes[-1], (count, 10), device=DEVICE)
    tables = []
    for backend in (GpuBackend(), Backend()):
        rows = StatsBuffer(range(count), backend, histograms=True)
        recording = Recording(Engine(parameters, lr=0.1, batch=10), rows)
        for step in range(2):
            recording.step(x, y, step)
        recording.flush()
        tables.append({name: frame.set_index(KEYS).sort_index() for name, frame in rows.take_tables().items()})
    found, plain = tables
    assert found["stats"].index.equals(plain["stats"].index)
    first = plain["stats"].index.get_level_values("step") == 0
    update = plain["stats"].index.get_level_values("tensor") == "update"
    for name in STATISTICS:
        a, b = (table["stats"][name].to_numpy(dtype=float) for table in tables)
        if name in COUNTS:
            assert np.array_equal(a[first], b[first]), name
        scale = np.maximum(np.abs(b), plain["stats"]["rms"].to_numpy())
        assert np.array_equal(np.isnan(a), np.isnan(b)), name
        compared = first & ~np.isnan(b) & ~update
        assert (np.abs(a - b)[compared] <= 1e-6 * scale[compared]).all(), name
    for name in ("first", "positive", "negative"):
        pairs = zip(found["histograms"][first & ~update][name], plain["histograms"][first & ~update][name], strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs), name


def test_it_is_tried_before_it_is_trusted() -> None:
    works.cache_clear()
    assert works(DEVICE)


def test_a_failure_is_one_line_in_the_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no such instruction\nand more")

    works.cache_clear()
    monkeypatch.setattr(triton_rows, "measure_alone", broken)
    assert not works(DEVICE)
    assert "no such instruction" in caplog.text and "and more" not in caplog.text
    works.cache_clear()
