"""The compiled passes: the rows and histograms of plain PyTorch, and what they were fused with."""

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from initlab.signal import accelerate
from initlab.signal.accelerate import JOB, expanded, library
from initlab.signal.moments import FIELDS, histogram, summarize, summarize_and_count

needs_compiler = pytest.mark.skipif(library() is None, reason="no working C++ compiler")
COUNTED = ("count", "n_nan", "n_inf", "n_subnormal", "n_zero", "exponent", "min", "max", "dead", "alive")


def agree(ours: Tensor, plain: Tensor) -> None:
    """Counts are equal; the rest to 1e-12, both being float64 sums of at most 1e5 terms; a mean relative to the rms."""
    row = dict(zip(FIELDS, plain, strict=True))
    rms = (row["m2"] / (row["count"] - row["n_nan"] - row["n_inf"]) + row["mean"].square()).sqrt()
    for name, a, b in zip(FIELDS, ours, plain, strict=True):
        if name in COUNTED:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
            continue
        scale = rms if name == "mean" else b.abs()
        close = ((a - b).abs() <= 1e-12 * scale) | (a.isnan() & b.isnan())
        assert close.all(), (name, a, b)


def spoilt(kind: str, shape: tuple[int, ...]) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(len(kind)))
    x *= {"tiny": 1e-40, "huge": 1e37, "small": 1e-30}.get(kind, 1.0)
    if kind == "relu":
        x.relu_()
    elif kind == "nan":
        x[..., ::2, :] = torch.nan
    elif kind == "inf":
        x[..., 0, 0], x[..., -1, -1] = torch.inf, -torch.inf
    elif kind == "far":
        x = (1e6 + x.double()).float()
    elif kind == "constant":
        x[:] = 3.25
    elif kind == "zero":
        x.zero_()
    elif kind == "all nan":
        x[:] = torch.nan
    elif kind == "wide":
        x *= 10.0 ** torch.linspace(-44, 37, x.numel()).view(x.shape)
    elif kind == "dead":
        x[..., ::3] = 0
    return x


KINDS = ["plain", "tiny", "small", "huge", "relu", "nan", "inf", "far", "constant", "zero", "all nan", "wide", "dead"]


@needs_compiler
@pytest.mark.parametrize("shape", [(128, 100), (3, 17, 13), (1, 5), (7, 1), (600, 9), (2, 64, 784)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batched", [True, False])
def test_the_row_of_plain_pytorch(kind: str, shape: tuple[int, ...], batched: bool) -> None:
    x = spoilt(kind, shape)
    fields, bins = summarize_and_count(x, batched)
    agree(fields, summarize(x, batched, accelerated=False))
    agree(fields, summarize(x, batched))
    assert torch.equal(bins, histogram(x))


@needs_compiler
def test_what_is_not_contiguous() -> None:
    x = torch.randn(40, 30).mT
    agree(summarize(x), summarize(x.contiguous(), accelerated=False))


def job(x: Tensor, other: Tensor | None = None, sums: Tensor | None = None, places: tuple[int, ...] = (0, 0, 0)) -> int:
    """The address of a job on (E, N, C) tensors."""
    addresses = [0 if t is None else t.data_ptr() for t in (x, other, sums)]
    row = np.array([*addresses, *x.shape, *places], dtype=np.int64)
    assert len(row) == len(JOB)
    _kept.append(row)
    return int(row.ctypes.data)


_kept: list[np.ndarray] = []


@pytest.fixture
def page() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Rows, runs, starts and arena for six places of two networks."""
    rows, starts = np.full((6, 2, len(FIELDS)), np.nan), np.zeros((6, 2), dtype=np.int64)
    runs = np.zeros(starts.size * 600, dtype=np.int32)
    arena = np.array([runs.ctypes.data, 0, starts.ctypes.data], dtype=np.int64)
    yield rows, runs, starts, arena
    _kept.clear()


def counts_of(runs: np.ndarray, starts: np.ndarray, like: Tensor) -> Tensor:
    """What was written, with all octaves of float32."""
    counts, lowest = expanded(runs, starts)
    whole = torch.zeros_like(histogram(like))
    whole[..., lowest + 149 : lowest + 149 + counts.shape[-1]] = torch.from_numpy(counts)
    return whole


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_relu_leaves_both_rows(kind: str, page: tuple[np.ndarray, ...]) -> None:
    rows, runs, starts, arena = page
    z = spoilt(kind, (2, 50, 21))
    a = z.clone()
    library().relu_job(job(a, places=(0, 2, 0)), rows.ctypes.data, arena.ctypes.data)  # type: ignore[union-attr]
    assert torch.equal(torch.nan_to_num(a, nan=7.0), torch.nan_to_num(z.relu(), nan=7.0))
    for place, x in ((0, z), (1, z.relu())):
        expected = summarize(x, accelerated=False)
        if place == 0:
            expected[-1] = (z > 0).logical_not().double().mean((-2, -1))
        agree(torch.from_numpy(rows[place].T), expected)
        assert torch.equal(counts_of(runs, starts[place], x), histogram(x))


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_leaves_both_rows_and_the_gradient_of_the_bias(kind: str, page: tuple[np.ndarray, ...]) -> None:
    rows, runs, starts, arena = page
    g, a, sums = spoilt(kind, (2, 50, 21)), torch.randn(2, 50, 21).relu(), torch.zeros(2, 21)
    masked, expected = g.clone(), torch.where(a > 0, g, 0)
    address = job(masked, a, sums, places=(2, 4, 0))
    library().mask_job(address, rows.ctypes.data, arena.ctypes.data)  # type: ignore[union-attr]
    torch.testing.assert_close(masked, expected, rtol=0, atol=0, equal_nan=True)
    for place, x in ((1, g), (2, expected)):
        agree(torch.from_numpy(rows[place].T), summarize(x, accelerated=False))
        assert torch.equal(counts_of(runs, starts[place], x), histogram(x))
    exact = expected.double().sum(-2)  # of float64 sums, rounded once
    close = (sums - exact).abs() <= 2**-23 * (exact.abs() + 1e-9 * expected.double().abs().sum(-2))
    assert (close | (exact.float() == sums) | (sums.isnan() & exact.isnan())).all()


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lr", [0.1, 1e-9])
def test_the_update_leaves_three_rows(kind: str, lr: float, page: tuple[np.ndarray, ...]) -> None:
    rows, runs, starts, arena = page
    g, before = spoilt(kind, (2, 13, 11)), torch.randn(2, 13, 11)
    w = before.clone()
    address = job(w.view(2, 1, -1), g, places=(0, 2, 4))
    library().update_jobs(address, 1, lr, rows.ctypes.data, arena.ctypes.data)  # type: ignore[union-attr]
    torch.testing.assert_close(w, before - lr * g, rtol=1e-6, atol=1e-7, equal_nan=True)  # with and without an fma
    for place, x in enumerate((before, g, w - before)):
        agree(torch.from_numpy(rows[place].T), summarize(x, batched=False, accelerated=False))
        assert torch.equal(counts_of(runs, starts[place], x), histogram(x))


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Iterator[pytest.MonkeyPatch]:
    """An empty cache of compiled passes, and the loaded one back afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    accelerate._found.cache_clear()
    yield monkeypatch
    accelerate._found.cache_clear()


def test_without_a_compiler_it_is_said_once(afresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    afresh.setattr(accelerate.shutil, "which", lambda name: None)
    afresh.delenv("CXX", raising=False)
    x = torch.randn(20, 10)
    with caplog.at_level(logging.WARNING):
        found = [summarize(x) for _ in range(3)]
    assert [record.message for record in caplog.records] == [
        "statistics in plain PyTorch, slower: no C++ compiler found (c++, g++, clang++ or $CXX)"
    ]
    assert torch.equal(found[0].nan_to_num(), summarize(x, accelerated=False).nan_to_num())


def test_a_compiler_that_fails(afresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    afresh.setenv("CXX", "false")
    with caplog.at_level(logging.WARNING):
        assert library() is None
    assert len(caplog.records) == 1 and "slower" in caplog.text


@needs_compiler
def test_plain_takes_the_plain_road() -> None:
    with accelerate.plain():
        assert library() is None
    assert library() is not None


def test_the_switch(afresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    afresh.setenv(accelerate.SWITCH, "0")
    assert library() is None and not caplog.records
