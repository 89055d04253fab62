import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from initlab.stats.statistics import STATISTICS, Differences, Item, Key, Rows, measure, relative_error, saturated_share
from initlab.stats.summarize import summarize

FORMATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def described(x: Tensor, batched: bool = True) -> dict[str, float]:
    return dict(zip(STATISTICS, measure(x, batched).tolist(), strict=True))


def exact(x: Tensor) -> dict[str, float]:
    """Mean, std and rms in rational arithmetic; the square root at the end keeps the exponent apart."""
    values = [Fraction(v) for v in x.double().flatten().tolist() if math.isfinite(v)]
    mean = sum(values, Fraction(0)) / len(values)
    second = sum((v * v for v in values), Fraction(0)) / len(values)
    return {"mean": float(mean), "std": _root(second - mean * mean), "rms": _root(second)}


def _root(square: Fraction) -> float:
    if square == 0:
        return 0.0
    shift = (square.numerator.bit_length() - square.denominator.bit_length()) // 2
    return math.ldexp(math.sqrt(square / Fraction(4) ** shift), shift)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1.0, 1e30, 1e37])
def test_moments_outlive_float32(scale: float) -> None:
    """Where float32's own squares read 0 or inf; relative to exact rational arithmetic."""
    x = (torch.randn(20, 30, dtype=torch.float64) * scale).float()
    own = x.square().mean().sqrt()
    found, true = described(x), exact(x)
    for name in ("std", "rms"):
        assert found[name] == pytest.approx(true[name], rel=1e-12)
    assert abs(found["mean"] - true["mean"]) <= 1e-12 * true["rms"]
    if scale != 1.0:
        assert float(own) in (0.0, math.inf)


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e300])
def test_moments_outlive_float64(scale: float) -> None:
    x = torch.randn(20, 30, dtype=torch.float64) * scale
    found, true = described(x), exact(x)
    assert found["rms"] == pytest.approx(true["rms"], rel=1e-12)
    assert found["std"] == pytest.approx(true["std"], rel=1e-12)
    assert found["max"] == float(x.max()) and found["min"] == float(x.min())


def test_a_mean_a_million_times_the_std() -> None:
    x = 1e6 + torch.randn(50, 40, dtype=torch.float64)
    assert described(x)["std"] == pytest.approx(exact(x)["std"], rel=1e-9)
    naive = (x.square().mean() - x.mean().square()).sqrt()
    assert abs(float(naive) / exact(x)["std"] - 1) > 1e-9  # what the plain formula makes of it


@pytest.mark.parametrize("dtype", FORMATS)
def test_counts_and_moments_with_holes(dtype: torch.dtype) -> None:
    """Half of the entries no numbers: counted, and the moments are those of the rest."""
    x = torch.randn(8, 6).to(dtype)
    x[::2] = torch.nan
    x[1, :2], x[3, 0], x[5] = torch.inf, -torch.inf, 0
    found = described(x)
    rest = x.double()[x.isfinite()].numpy()
    assert (found["count"], found["n_nan"], found["n_inf"]) == (48, 24, 3)
    assert found["frac_zero"] == 6 / 48
    assert found["mean"] == pytest.approx(rest.mean(), rel=1e-12)
    assert found["std"] == pytest.approx(rest.std(), rel=1e-12)
    assert (found["min"], found["max"]) == (rest.min(), rest.max())


@pytest.mark.parametrize("dtype", FORMATS)
def test_subnormal_numbers_are_counted_and_not_lost(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    x = torch.tensor([[info.tiny, info.tiny / 2, -info.tiny / 4, 0.0, 1.0]], dtype=dtype)
    assert described(x)["n_subnormal"] == 2
    assert described(x[:, 1:3])["rms"] == pytest.approx(info.tiny * math.sqrt((1 / 4 + 1 / 16) / 2), rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_with_no_finite_entry_the_moments_are_nan(value: float) -> None:
    found = described(torch.full((4, 3), value))
    assert all(math.isnan(found[name]) for name in ("mean", "std", "rms", "q", "norm", "min", "max", "std_within"))
    assert found["n_nan"] + found["n_inf"] == 12


def test_zeros_are_a_result() -> None:
    found = described(torch.zeros(4, 3))
    assert (found["std"], found["rms"], found["frac_zero"], found["frac_dead"]) == (0, 0, 1, 1)
    assert math.isnan(found["cosine"])  # vectors of length 0 have no direction


@settings(deadline=None, max_examples=50)
@given(st.integers(-120, 120), st.integers(1, 7), st.integers(1, 7), st.integers(0, 10))
def test_scaling_by_a_power_of_two_is_exact(exponent: int, n: int, c: int, seed: int) -> None:
    """Scaling by k scales mean, std and rms by k and leaves every share as it is; permuting changes nothing."""
    x = torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    base, scaled = described(x), described(x * 2.0**exponent)
    for name in ("mean", "std", "rms", "norm", "min", "max", "std_within"):
        assert scaled[name] == pytest.approx(base[name] * 2.0**exponent, rel=1e-14)
    for name in ("frac_zero", "frac_dead", "cosine", "n_nan"):
        assert scaled[name] == pytest.approx(base[name], rel=1e-12, nan_ok=True)
    shuffled = described(x[torch.randperm(n)])
    assert shuffled["rms"] == pytest.approx(base["rms"], rel=1e-14)


def test_std_within_sees_a_signal_die_that_the_pooled_std_does_not() -> None:
    """All inputs mapped to one vector: the pooled std is that vector's, the batch std inside a unit is 0."""
    same = torch.randn(1, 50, dtype=torch.float64).expand(30, 50)
    found = described(same)
    assert found["std"] == pytest.approx(float(same.numpy().std()), rel=1e-12)
    assert found["std_within"] < 1e-15
    assert found["cosine"] == pytest.approx(1, rel=1e-12)
    fresh = described(torch.randn(300, 200, dtype=torch.float64))
    assert fresh["std_within"] == pytest.approx(fresh["std"], rel=0.01)
    assert abs(fresh["cosine"]) < 5 / math.sqrt(200 * 300 * 299 / 2)  # pairs of independent vectors: sd 1/sqrt(C)


def test_cosine_against_all_pairs() -> None:
    x = torch.randn(6, 4, dtype=torch.float64)
    x[2] = 0
    unit = (x / x.norm(dim=1, keepdim=True))[[0, 1, 3, 4, 5]]
    pairs = unit @ unit.T
    expected = (pairs.sum() - pairs.trace()) / (5 * 4)
    assert described(x)["cosine"] == pytest.approx(float(expected), rel=1e-12)


def test_ensemble_members_are_measured_apart() -> None:
    x = torch.randn(3, 2, 5, 4)
    x[1, 0] *= 1e30
    x[2, 1, 0, 0] = torch.nan
    whole = measure(x)
    for i in range(3):
        for j in range(2):
            np.testing.assert_allclose(whole[:, i, j], measure(x[i, j]), rtol=1e-13)


def test_unbatched_tensors_have_no_batch_statistics() -> None:
    found = described(torch.randn(5, 4), batched=False)
    assert all(math.isnan(found[name]) for name in ("frac_dead", "std_within", "cosine"))
    assert found["std"] > 0


def test_saturated_share() -> None:
    slope = torch.tensor([[[1.0, 0.04, -0.04, 0.06]]])
    assert saturated_share(slope, 1.0).tolist() == [0.5]
    assert saturated_share(slope, 0.25).tolist() == [0.0]


@pytest.mark.parametrize("scale", [1e-300, 1e-40, 1.0, 1e300])
def test_relative_error_has_no_absolute_scale(scale: float) -> None:
    b = torch.randn(4, 3, dtype=torch.float64) * scale
    error, n_bad = relative_error(b * (1 + 1e-6), b)
    assert float(error) == pytest.approx(1e-6, rel=1e-3) and n_bad == 0
    assert float(relative_error(torch.zeros_like(b), b)[0]) == pytest.approx(1)  # a gradient of zeros is caught


def test_relative_error_of_zeros_and_of_what_is_not_finite() -> None:
    zeros, ones = torch.zeros(2, 2), torch.ones(2, 2)
    assert relative_error(zeros, zeros)[0] == 0
    assert relative_error(ones, zeros)[0] == math.inf
    bad = torch.tensor([[1.0, torch.nan], [torch.inf, 1.0]])
    error, n_bad = relative_error(bad, ones)
    assert math.isnan(error) and n_bad == 2


def test_rows_are_tidy() -> None:
    rows = Rows([4, 7])
    keys = [Key("stack", "scratch", 0, layer, "activation", "forward") for layer in (1, 2)]
    x = torch.randn(2, 2, 5, 3)
    weight = Key("train", "module", 3, 1, "weight", "backward")
    assert len(rows) == 0
    rows.add([*(Item(key, t) for key, t in zip(keys, x, strict=True)), Item(weight, torch.ones(2, 5, 3))])
    assert len(rows) == 6
    frame = rows.frame()
    assert len(rows) == 0 and len(rows.frame()) == 0
    row = frame[(frame["seed"] == 7) & (frame["layer"] == 2)].iloc[0]
    assert row["std"] == pytest.approx(float(x[1, 1].double().numpy().std()), rel=1e-12)
    assert frame["n_nan"].dtype == np.int64
    assert frame[frame["tensor"] == "weight"]["frac_dead"].isna().all()
    assert list(frame.columns[:7]) == ["stage", "implementation", "seed", "step", "layer", "tensor", "direction"]


def test_only_activations_have_dead_units() -> None:
    keys = [Key("stack", "scratch", 0, 1, *about) for about in (("activation", "forward"), ("activation", "backward"))]
    rows = Rows([0])
    rows.add([Item(key, torch.zeros(1, 4, 3)) for key in keys])
    np.testing.assert_array_equal(rows.frame()["frac_dead"], [1, math.nan])


def test_fields_found_elsewhere_make_the_same_rows() -> None:
    """The statistics are derived when the frame is made, whoever found the fields."""
    keys = [Key("stack", "scratch", 0, layer, "activation", "forward") for layer in (1, 2)]
    x = torch.randn(2, 3, 5, 4)
    ours, theirs = Rows([0, 1, 2]), Rows([0, 1, 2])
    ours.add([Item(key, t) for key, t in zip(keys, x, strict=True)])
    theirs.put(keys, summarize(x))
    pd.testing.assert_frame_equal(ours.frame(), theirs.frame())


def test_histograms_are_rows_of_their_own() -> None:
    rows = Rows([4, 7], histograms=True)
    key = Key("stack", "scratch", 0, 1, "activation", "forward")
    none = key._replace(layer=2)
    bias = key._replace(tensor="bias", layer=3)
    x = torch.tensor([[[1.0, 1.5, -0.3, 0.0], [2.0, torch.nan, -9.0, 1e-45]], [[3.0] * 4, [torch.inf] * 4]])
    rows.add([Item(key, x), Item(none, torch.zeros(2, 2, 4)), Item(bias, torch.ones(2, 1, 4, dtype=torch.float64))])
    frame = rows.histograms()
    assert list(frame.columns) == [*rows.key_names, "first", "positive", "negative"]
    assert frame["seed"].tolist() == [4, 7] * 3 and frame["layer"].tolist() == [1, 1, 2, 2, 3, 3]
    assert frame["first"].tolist() == [-149, 1, 0, 0, 0, 0]
    assert frame["positive"][0].tolist() == [1] + [0] * 148 + [2, 1, 0, 0]
    assert frame["negative"][0].tolist() == [0] * 147 + [1, 0, 0, 0, 0, 1]
    assert [column[1].tolist() for column in (frame["positive"], frame["negative"])] == [[4], [0]]
    assert len(frame["positive"][2]) == len(frame["negative"][2]) == 0
    assert frame["positive"][5].tolist() == [4]
    assert len(rows.frame()) == 6 and len(rows.histograms()) == 0


def test_histograms_are_kept_only_when_asked_for() -> None:
    rows = Rows([0])
    rows.add([Item(Key("stack", "scratch", 0, 1, "activation", "forward"), torch.ones(1, 2, 2))])
    assert len(rows.histograms()) == 0 and len(rows.frame()) == 1


def test_differences_are_per_network() -> None:
    parity = Differences([0, 1])
    key = Key("train", "", 2, 1, "weight", "backward")
    b = torch.ones(2, 3, 3, dtype=torch.float64)
    a = b.clone()
    a[1] *= 1.01
    parity.add([Item(key, a)], [Item(key, b)])
    frame = parity.frame()
    assert frame["relative_error"].tolist() == pytest.approx([0, 0.01])
    assert list(frame.columns) == ["seed", "step", "layer", "tensor", "direction", "relative_error", "n_nonfinite"]
