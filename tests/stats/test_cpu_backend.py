"""The compiled passes: the rows and histograms of plain PyTorch, and what they were fused with."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from initlab.nn.activations import ACTIVATIONS
from initlab.nn.philox import gaussian
from initlab.stats.backend import SATURATED, Backend
from initlab.stats.histogram import Bins, bin_columns, histogram, join_bins
from initlab.stats.kernels import cpu
from initlab.stats.kernels.cpu import library
from initlab.stats.measure import backend_for
from initlab.stats.reference import FIELDS
from initlab.stats.summarize import derive, saturated_share, summarize
from tests.stats.exact import EXACT, tolerance

needs_compiler = pytest.mark.skipif(library() is None, reason="no working C++ compiler")
COUNTED = ("count", "n_nan", "n_inf", "n_subnormal", "n_zero", "exponent", "min", "max", "dead", "alive")


def agree(ours: Tensor, plain: Tensor, near: float = EXACT) -> None:
    """Counts are equal; the rest to 1e-12, both being float64 sums of at most 1e5 terms; a mean relative to the rms."""
    row = dict(zip(FIELDS, plain, strict=True))
    rms = (row["m2"] / (row["count"] - row["n_nan"] - row["n_inf"]) + row["mean"].square()).sqrt()
    for name, a, b in zip(FIELDS, ours, plain, strict=True):
        if name in COUNTED:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
            continue
        scale = rms if name == "mean" else b.abs()
        close = ((a - b).abs() <= near * scale) | (a.isnan() & b.isnan())
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


def passes() -> Backend:
    return backend_for("cpu")


def whole(bins: Bins, like: Tensor) -> Tensor:
    """The histograms (K, E, 2, B) that were counted, with all octaves of float32."""
    ((counts, lowest),) = bins.take()
    found = torch.zeros((*counts.shape[:3], histogram(like).shape[-1]), dtype=torch.int32)
    found[..., lowest + 149 : lowest + 149 + counts.shape[-1]] = counts
    return found


@needs_compiler
@pytest.mark.parametrize("shape", [(128, 100), (3, 17, 13), (1, 5), (7, 1), (600, 9), (2, 64, 784)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batched", [True, False])
def test_the_row_of_plain_pytorch(kind: str, shape: tuple[int, ...], batched: bool) -> None:
    x = spoilt(kind, shape)
    networks = x.shape[:-2].numel()
    bins, out = passes().bins(networks), torch.empty(*shape[:-2], len(FIELDS), dtype=torch.float64)
    agree(passes().rows(x, batched, bins), summarize(x, batched))
    assert torch.equal(whole(bins, x)[0].reshape(histogram(x).shape), histogram(x))
    assert passes().rows(x, batched, out=out) is out
    agree(out.movedim(-1, 0), summarize(x, batched))


@needs_compiler
@pytest.mark.parametrize("apart", [False, True], ids=["one mean", "a mean of each unit"])
@pytest.mark.parametrize("mean", [1.0, 10.0, 15.5, 17.0, 1e4])
@pytest.mark.parametrize("shape", [(70_000, 5), (20_000, 24), (300, 100), (64, 1000), (900, 9)], ids=str)
def test_many_inputs_that_are_nearly_alike(shape: tuple[int, int], mean: float, apart: bool) -> None:
    """Against long double, on both sides of where plain sums are no longer trusted: an M2 of 2^-8 of the squares.

    To 1e-12: sums of 256 terms lose 2^-45 of the squares at worst, which is 7e-12 of such an M2; their signs differ.
    """
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator) + mean * (torch.randn(shape[1], generator=generator) if apart else 1)
    exact = x.numpy().astype(np.longdouble)
    centre, heading = exact.mean(0), exact / np.sqrt(np.square(exact).sum(1, keepdims=True))
    own = {
        "mean": centre.mean(),
        "m2": np.square(exact - centre.mean()).sum(),
        "within": np.square(exact - centre).mean(),
        "resultant": np.square(heading.sum(0)).sum(),
    }
    for rows in (passes().rows(x), passes().relu_rows_(x.clone())[:, 0], summarize(x)):
        found = dict(zip(FIELDS, rows.tolist(), strict=True))
        for name, value in own.items():
            scale = abs(value) if name != "mean" else np.sqrt(np.square(exact).mean())
            assert abs(found[name] - value) <= EXACT * scale, name


@needs_compiler
def test_statistics_are_those_of_the_formulas() -> None:
    """To two roundings, of rows of every kind, and of float64 ones that carry a power of two."""
    found = [summarize(spoilt(kind, (2, 30, 21))) for kind in KINDS]
    found += [summarize(torch.randn(2, 30, 21, dtype=torch.float64) * scale) for scale in (1e-200, 1e200)]
    rows = torch.stack(found, 1)
    torch.testing.assert_close(passes().derive(rows), derive(rows), rtol=5e-16, atol=0, equal_nan=True)


@needs_compiler
def test_what_is_not_contiguous() -> None:
    x = torch.randn(40, 30).mT
    agree(passes().rows(x), summarize(x.contiguous()))


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_relu_leaves_both_rows(kind: str) -> None:
    z = spoilt(kind, (2, 50, 21))
    a, bins = z.clone(), passes().bins(2)
    rows = passes().relu_rows_(a, bins)
    assert torch.equal(torch.nan_to_num(a, nan=7.0), torch.nan_to_num(z.relu(), nan=7.0))
    before, after = summarize(z), summarize(z.relu())
    before[SATURATED] = (z > 0).logical_not().double().mean((-2, -1))
    agree(rows[:, 0], before)
    agree(rows[:, 1], after)
    assert torch.equal(whole(bins, z), torch.stack([histogram(z), histogram(z.relu())]))


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_leaves_both_rows_and_the_gradient_of_the_bias(kind: str) -> None:
    g, a, sums = spoilt(kind, (2, 50, 21)), torch.randn(2, 50, 21).relu(), torch.zeros(2, 21)
    masked, expected, bins = g.clone(), torch.where(a > 0, g, 0), passes().bins(2)
    rows = passes().mask_rows_(masked, a, sums, bins)
    torch.testing.assert_close(masked, expected, rtol=0, atol=0, equal_nan=True)
    agree(rows[:, 0], summarize(g))
    agree(rows[:, 1], summarize(expected))
    assert torch.equal(whole(bins, g), torch.stack([histogram(g), histogram(expected)]))
    exact = expected.double().sum(-2)  # of float64 sums, rounded once
    close = (sums - exact).abs() <= 2**-23 * (exact.abs() + 1e-9 * expected.double().abs().sum(-2))
    assert (close | (exact.float() == sums) | (sums.isnan() & exact.isnan())).all()


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lr", [0.1, 1e-9])
def test_the_update_leaves_three_rows(kind: str, lr: float) -> None:
    g, before = spoilt(kind, (2, 13, 11)), torch.randn(2, 13, 11)
    w, bins = before.clone(), passes().bins(2)
    rows = passes().update_rows_(w, g, lr, bins)
    torch.testing.assert_close(w, before - lr * g, rtol=1e-6, atol=1e-7, equal_nan=True)  # with and without an fma
    tensors = (before, g, w - before)
    for k, x in enumerate(tensors):
        agree(rows[:, k], summarize(x, batched=False))
    assert torch.equal(whole(bins, w), torch.stack([histogram(x) for x in tensors]))


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_any_shape_have_their_rows_in_one_call(kind: str) -> None:
    tensors, bins = [spoilt(kind, (1, 211)), torch.randn(5, 14), spoilt(kind, (3, 4))], passes().bins(1)
    rows = passes().rows_of_each(tensors, bins)
    for k, x in enumerate(tensors):
        agree(rows[:, k], summarize(x, batched=False))
    batched = passes().rows_of_each(tensors, None, batched=True)
    for k, x in enumerate(tensors):
        agree(batched[:, k], summarize(x))
    assert torch.equal(whole(bins, tensors[0])[:, 0], torch.stack([histogram(x) for x in tensors]))
    before = [torch.randn(x.shape) for x in tensors]
    for backend in (passes(), Backend()):
        changes = [old.clone() for old in before]
        rows = backend.change_rows_(changes, tensors)
        for k, (old, x) in enumerate(zip(before, tensors, strict=True)):
            torch.testing.assert_close(changes[k], x - old, rtol=0, atol=0, equal_nan=True)
            agree(rows[:, k], summarize(x - old, batched=False), tolerance(x, not backend.fuses(x)))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["relu", "linear", "tanh"])
def test_every_backend_makes_the_same_passes(name: str, dtype: torch.dtype) -> None:
    """With memory for the rows and without, and with all networks' entries spread in memory."""
    row, plain = ACTIVATIONS[name], Backend()
    z, g, w = (torch.randn(2, 9, 7).to(dtype) for _ in range(3))
    for backend in (plain, passes()):
        near = tolerance(z, plain=not backend.fuses(z))
        for given in (z, z.mT.contiguous().mT):
            a, dz = torch.empty_like(given), torch.empty_like(g)
            rows, both = torch.empty(2, 2, 2, len(FIELDS), dtype=torch.float64)
            backend.activation_rows(given, row, a, rows)
            backend.gradient_rows(g, given, row, dz, both)
            torch.testing.assert_close(a, row.phi(z))
            torch.testing.assert_close(dz, row.pull_back(g, z))
            agree(rows[1].T, summarize(a), near)
            agree(both.movedim(-1, 0), torch.stack([summarize(g), summarize(dz)], 1), near)
            share = saturated_share(row.slope(z), row.largest_slope)
            torch.testing.assert_close(rows[0, :, SATURATED], share, rtol=0, atol=0)
        updated, out = w.clone(), torch.empty(3, 2, len(FIELDS), dtype=torch.float64)
        backend.update_rows_(updated, g, 0.5, out=out)
        agree(out[2].T, summarize(updated - w, batched=False), near)


@needs_compiler
def test_histograms_are_kept_in_the_order_of_the_rows() -> None:
    """More rows than wait together, other formats between them, and what was rewound is gone."""
    bins, expected = passes().bins(2), []
    for k in range(40):
        x = torch.randn(2, 3, 4) * 2.0**k
        x = x.double() if k % 7 == 3 else x
        passes().rows(x, True, bins)
        expected.append(x)
    assert len(bins) == 40
    passes().rows(torch.ones(5, 2, 3, 4), True, bins)
    bins.rewind(40)
    assert len(bins) == 40
    columns = bin_columns(bins.take())
    for k, x in enumerate(expected):
        for network in range(2):
            at = 2 * k + network
            octave = torch.frexp(x[network].abs().min()).exponent - 1
            assert columns["first"][at] == octave
            assert sum(columns["positive"][at]) + sum(columns["negative"][at]) == 12
    assert len(bins) == 0 and bins.take() == []


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Iterator[pytest.MonkeyPatch]:
    """An empty cache of compiled passes, and the loaded one back afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu._library.cache_clear()
    yield monkeypatch
    cpu._library.cache_clear()


@pytest.mark.long
@pytest.mark.parametrize(
    ("compiler", "processor"),
    [("g++", "native"), ("clang++", "native"), ("g++", "x86-64-v3"), ("clang++", "x86-64-v3"), ("g++", "x86-64-v2")],
)
def test_either_compiler_builds_all_of_them(
    afresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiler: str, processor: str
) -> None:
    """Both have vectors, of 16, of 8 (AVX2) or of 4 floats; each has a word of its own for the lanes of two."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    if processor != "native" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs a processor with AVX2")
    afresh.setenv("CXX", compiler)
    afresh.setattr(cpu, "FLAGS", tuple(flag.replace("native", processor) for flag in cpu.FLAGS))
    assert library() is not None and caplog.records == []
    for kind in KINDS:
        for shape in ((2, 64, 100), (3, 17, 13), (600, 9), (7, 2), (1, 5)):
            for batched in (True, False):
                test_the_row_of_plain_pytorch(kind, shape, batched)
        test_relu_leaves_both_rows(kind)
        test_the_mask_leaves_both_rows_and_the_gradient_of_the_bias(kind)
        test_the_update_leaves_three_rows(kind, 0.1)
        test_tensors_of_any_shape_have_their_rows_in_one_call(kind)
    for mean in (1.0, 17.0):
        test_many_inputs_that_are_nearly_alike((300, 100), mean, apart=True)
    found = gaussian((64, 80), [0, 3], "weight")
    with cpu.plain():
        torch.testing.assert_close(found, gaussian((64, 80), [0, 3], "weight"), rtol=2**-23, atol=1e-15)


def test_without_a_compiler_it_is_said_once(afresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    afresh.setattr(cpu.shutil, "which", lambda name: None)
    afresh.delenv("CXX", raising=False)
    x = torch.randn(20, 10)
    with caplog.at_level(logging.WARNING):
        found = [passes().rows(x) for _ in range(3)]
    assert [record.message for record in caplog.records] == [
        "statistics in plain PyTorch, slower: no C++ compiler found (c++, g++, clang++ or $CXX)"
    ]
    assert torch.equal(found[0].nan_to_num(), summarize(x, single=True).nan_to_num())


@needs_compiler
@pytest.mark.long
def test_the_library_of_a_wheel_serves_where_there_is_no_compiler(
    afresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """It says nothing then; on a processor that is too old, and where the file is none, plain PyTorch serves."""
    portable = tmp_path / "portable.so"
    cpu.build_portable(portable)
    afresh.setattr(cpu, "PORTABLE", portable)
    afresh.setattr(cpu.shutil, "which", lambda name: None)
    afresh.delenv("CXX", raising=False)
    if cpu._find_features() >= cpu.NEEDED:
        assert library() is not None and caplog.records == []
        for kind in KINDS:
            test_relu_leaves_both_rows(kind)
    broken = tmp_path / "broken.so"
    broken.write_text("no library", encoding="utf-8")
    for found, features in ((portable, cpu.NEEDED - {"avx2"}), (broken, cpu.NEEDED)):
        cpu._library.cache_clear()
        caplog.clear()
        afresh.setattr(cpu, "PORTABLE", found)
        afresh.setattr(cpu, "_find_features", lambda features=features: features)
        assert library() is None
        assert "no C++ compiler found" in caplog.text


def test_a_compiler_that_fails(afresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    afresh.setenv("CXX", "false")
    with caplog.at_level(logging.WARNING):
        assert library() is None
    assert len(caplog.records) == 1 and "set CXX to another C++ compiler" in caplog.text


@needs_compiler
def test_plain_makes_rows_without_the_compiled_passes() -> None:
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
        row = dict(zip(FIELDS, passes().rows(x, batched), strict=True))
        assert abs(row["m2"] / n - exact) <= 1e-12 * exact
        if batched:
            inside = (wide - wide.mean(-2, keepdim=True)).square().mean()
            assert abs(row["within"] - inside) <= 1e-12 * inside


@needs_compiler
def test_a_broken_or_foreign_library_is_built_again(afresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiled in earnest once; then a compiler that gives the same, and counts its calls."""
    afresh.setattr(cpu.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    assert library() is not None
    folder = cpu._cache_folder()
    assert folder is not None
    (built,) = folder.glob("*.so")
    whole = built.read_bytes()
    (tmp_path / "whole.so").write_bytes(whole)
    own, calls = cpu._compile, []

    def compile_again(command: Sequence[str], target: Path) -> Path:
        calls.append(target)
        return own(["sh", "-c", f"cp '{tmp_path}/whole.so' '{target}'"], target)

    afresh.setattr(cpu, "_compile", compile_again)
    for damage in (
        lambda: built.write_bytes(whole[:1000]),
        lambda: cpu._digest_path(built).write_bytes(b"\xff\x00 no text"),
        lambda: built.chmod(0o775),  # another user of the group may have written it
    ):
        built.unlink()  # the one that is loaded stays what it is
        built.write_bytes(whole)
        built.chmod(0o700)
        damage()
        cpu._library.cache_clear()
        assert library() is not None
        assert cpu._is_whole(built) and built.stat().st_size == len(whole)
    assert len(calls) == 3
    folder.chmod(0o777)
    assert cpu._cache_folder() == tmp_path / "tmp" / f"initlab-{os.getuid()}"
    folder.chmod(0o700)


BUILDS = """#!/bin/sh
echo $$ >> "{folder}/calls"
{before}
exec c++ "$@"
"""


def counting_compiler(folder: Path, before: str = "") -> Path:
    """A compiler that writes a line for each call."""
    script = folder / "compiler"
    script.write_text(BUILDS.format(folder=folder, before=before))
    script.chmod(0o700)
    return script


def start_loading(folder: Path, umask: int = 0o022, **environment: str) -> "subprocess.Popen[str]":
    code = f"import os; os.umask({umask}); from initlab.stats.kernels.cpu import library; print(library() is not None)"
    paths = os.pathsep.join(sys.path)
    given = os.environ | {"PYTHONPATH": paths, "CXX": str(counting_compiler(folder)), "TMPDIR": str(folder)}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=given | environment)


def ended(processes: Sequence["subprocess.Popen[str]"]) -> list[str]:
    return [process.communicate()[0].strip() for process in processes]


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs users and groups")
@pytest.mark.long
@pytest.mark.parametrize("cache", ["cache", "/proc/no cache"])
def test_processes_that_start_together_compile_once(tmp_path: Path, cache: str) -> None:
    """Also where a group may write what is not told otherwise, and where there is no folder for a cache."""
    where = {"XDG_CACHE_HOME": str(tmp_path / cache) if cache == "cache" else cache}
    assert ended([start_loading(tmp_path, 0o002, **where) for _ in range(3)]) == ["True"] * 3
    assert ended([start_loading(tmp_path, 0o002, **where)]) == ["True"]
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("initlab-")]) == (cache != "cache")


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs process groups")
def test_a_compiler_that_hangs_is_asked_once(
    afresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The process that it waits for holds its pipes: both are ended."""
    afresh.setenv("CXX", str(counting_compiler(tmp_path, before="sleep 1000")))
    afresh.setattr(cpu, "PATIENCE", 0.5)
    for _ in range(2):
        cpu._library.cache_clear()
        with caplog.at_level(logging.WARNING):
            assert library() is None
    assert "timed out" in caplog.records[0].message and "hung the last time; remove" in caplog.records[1].message


def test_a_compiler_that_no_shell_would_read(afresh: pytest.MonkeyPatch) -> None:
    afresh.setenv("CXX", '"g++')
    assert library() is None


def test_a_compiler_that_is_not_there_is_named(afresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    afresh.setenv("CXX", "no-such-compiler -O1")
    assert library() is None
    assert "CXX=no-such-compiler -O1: no such program" in caplog.text


@needs_compiler
@pytest.mark.parametrize("histograms", [False, True])
def test_a_prepared_pass_is_the_pass_called_now(histograms: bool) -> None:
    """On what stands in the same memory then; with histograms these follow each other in the order of the calls."""
    fast, generator = passes(), torch.Generator().manual_seed(3)
    z, g, w, grad = (torch.randn(*shape, generator=generator) for shape in ((9, 6), (9, 6), (6, 5), (6, 5)))
    sums, outs = torch.empty(6), [torch.empty(k, len(FIELDS), dtype=torch.float64) for k in (2, 2, 3)]
    bins = fast.bins(1) if histograms else None
    given = [("relu_rows_", (z,)), ("mask_rows_", (g, z, sums)), ("update_rows_", (w, grad, 0.1))]
    before = [x.clone() for x in (z, g, w, grad)]
    prepared = [fast.prepare(name, *args, bins=bins, out=out) for (name, args), out in zip(given, outs, strict=True)]
    assert all(map(torch.equal, (z, g, w, grad), before))  # nothing has run
    for scale in (1.0, 3.0):
        for x, kept in zip((z, g, w, grad), before, strict=True):
            x.copy_(scale * kept)
        for one in prepared:
            one()
        now = [scale * kept for kept in before]
        again, wanted_sums = None if bins is None else fast.bins(1), torch.empty(6)
        wanted = [
            fast.relu_rows_(now[0], again),
            fast.mask_rows_(now[1], now[0], wanted_sums, again),
            fast.update_rows_(now[2], now[3], 0.1, again),
        ]
        assert all(map(torch.equal, (z, g, w, sums), (*now[:3], wanted_sums)))
        for out, rows in zip(outs, wanted, strict=True):
            assert torch.equal(out.nan_to_num(7), rows.movedim(0, -1).nan_to_num(7))
        if bins is not None and again is not None:
            ours, theirs = (join_bins(one.take(), 0) for one in (bins, again))
            assert ours[1] == theirs[1] and torch.equal(ours[0], theirs[0]) and len(ours[0]) == 7
