"""The compiled passes: the rows and histograms of plain PyTorch, and what they were fused with."""

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from initlab.stats.kernels import cpu
from initlab.stats.kernels.cpu import JOB, expanded, library
from initlab.stats.summarize import FIELDS, InPlace, histogram, summarize, summarize_and_count

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
def test_what_a_relu_will_make_is_foreseen(kind: str, page: tuple[np.ndarray, ...]) -> None:
    """Both rows, and the tensor is left alone."""
    rows, runs, starts, arena = page
    z = spoilt(kind, (2, 50, 21))
    before = z.clone()
    library().foresee_job(job(z, places=(0, 2, 0)), rows.ctypes.data, arena.ctypes.data)  # type: ignore[union-attr]
    assert torch.equal(z.view(torch.int32), before.view(torch.int32))
    for place, x in ((0, z), (1, z.relu())):
        agree(torch.from_numpy(rows[place].T), summarize(x, accelerated=False))
        assert torch.equal(counts_of(runs, starts[place], x), histogram(x))


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counted", [True, False])
def test_entries_are_kept_and_what_becomes_of_them_is_told(
    kind: str, counted: bool, page: tuple[np.ndarray, ...]
) -> None:
    rows, runs, starts, arena = page
    at = arena.ctypes.data if counted else None
    x, other = spoilt(kind, (1, 1, 211)), torch.randn(1, 1, 70)
    kept = [torch.zeros_like(x), torch.zeros_like(other)]
    before = [x.clone(), other.clone()]

    def work() -> int:
        found = [[a.data_ptr(), b.data_ptr(), 0, 1, 1, a.numel(), 2 * k, 0, 0] for k, (a, b) in enumerate(tensors)]
        _kept.append(np.array(found, dtype=np.int64))
        return int(_kept[-1].ctypes.data)

    tensors = list(zip((x, other), kept, strict=True))
    library().entries_jobs(work(), 2, rows.ctypes.data, at)  # type: ignore[union-attr]
    for place, (old, copy) in enumerate(zip(before, kept, strict=True)):
        assert torch.equal(old.view(torch.int32), copy.view(torch.int32))
        agree(torch.from_numpy(rows[place, :1].T), summarize(old, batched=False, accelerated=False))
    other += 0.5
    x[..., ::2] += 1e-3
    library().change_jobs(work(), 2, rows.ctypes.data, at)  # type: ignore[union-attr]
    for place, (new, old) in enumerate(zip((x, other), before, strict=True)):
        agree(torch.from_numpy(rows[place, :1].T), summarize(new - old, batched=False, accelerated=False))
        if counted:
            assert torch.equal(counts_of(runs, starts[place, :1], new), histogram(new - old).view(1, 2, -1))


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


@needs_compiler
def test_in_place_leaves_the_rows_of_what_was_and_what_became() -> None:
    """Two tensors take turns; what is taken are the rows of the calls since the last time, in their order."""
    zs, gs = (spoilt(kind, (3, 2, 17, 13)) for kind in ("plain", "nan"))
    pair = torch.empty(2, 2, 17, 13)
    in_place = InPlace(pair, 3)
    for step, z in enumerate(zs):
        pair[step % 2] = z
        in_place.relu(step % 2)
        assert torch.equal(pair[step % 2], z.clamp_min(0))
    rows = in_place.take()
    for step, z in enumerate(zs):
        before = summarize(z)
        before[list(FIELDS).index("saturated")] = (z <= 0).double().mean((-2, -1))
        agree(rows[:, 2 * step], before)
        agree(rows[:, 2 * step + 1], summarize(z.clamp_min(0)))
    pair[1] = gs[0]
    in_place.mask(1, zs[0])
    expected = torch.where(zs[0] > 0, gs[0], 0)
    torch.testing.assert_close(pair[1], expected, rtol=0, atol=0, equal_nan=True)
    (before, after) = in_place.take().unbind(1)
    agree(before, summarize(gs[0]))
    agree(after, summarize(expected))
    assert in_place.take().shape == (len(FIELDS), 0, 2)


@needs_compiler
def test_in_place_never_overwrites_rows_that_were_not_taken() -> None:
    in_place = InPlace(torch.ones(1, 1, 2, 2), 1)
    in_place.relu(0)
    with pytest.raises(RuntimeError, match="take their rows first"):
        in_place.relu(0)


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Iterator[pytest.MonkeyPatch]:
    """An empty cache of compiled passes, and the loaded one back afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu._found.cache_clear()
    yield monkeypatch
    cpu._found.cache_clear()


def test_without_a_compiler_it_is_said_once(afresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    afresh.setattr(cpu.shutil, "which", lambda name: None)
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
    assert len(caplog.records) == 1 and "set CXX to another C++ compiler" in caplog.text


@needs_compiler
def test_plain_takes_the_plain_road() -> None:
    with cpu.plain():
        assert library() is None
    assert library() is not None


def test_the_switch(afresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    afresh.setenv(cpu.SWITCH, "0")
    assert library() is None and not caplog.records


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 10**6), (50_000, 1), (50_000, 10), (3000, 7)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 3.0, 10.0, 30.0])
def test_many_terms_and_a_mean_above_the_std(shape: tuple[int, int], mean: float) -> None:
    """Whole numbers: their sums and squares are exact in float64, so is the reference."""
    x = torch.randn(*shape).mul(1000).add(1000 * mean).round()
    wide, n = x.double(), x.numel()
    exact = (wide.square().sum() - wide.sum().square() / n) / n
    for batched in (True, False):
        row = dict(zip(FIELDS, summarize(x, batched), strict=True))
        assert abs(row["m2"] / n - exact) <= 1e-12 * exact
        if batched:
            inside = (wide - wide.mean(-2, keepdim=True)).square().mean()
            assert abs(row["within"] - inside) <= 1e-12 * inside


@needs_compiler
def test_a_broken_or_foreign_library_is_built_again(afresh: pytest.MonkeyPatch) -> None:
    assert library() is not None
    folder = cpu._cache()
    (built,) = folder.glob("*.so")
    half = built.read_bytes()[:1000]
    built.unlink()  # the one that is loaded stays what it is
    built.write_bytes(half)
    cpu._found.cache_clear()
    assert library() is not None and built.stat().st_size > 1000
    folder.chmod(0o777)
    assert cpu._cache() != folder
    folder.chmod(0o700)


def test_a_compiler_that_is_not_there_is_named(afresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    afresh.setenv("CXX", "no-such-compiler -O1")
    assert library() is None
    assert "CXX=no-such-compiler -O1: no such program" in caplog.text
