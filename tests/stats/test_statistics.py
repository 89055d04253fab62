import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from initlab.stats import buffer as buffer_module
from initlab.stats.buffer import Item, RowBuffer, StatsBuffer
from initlab.stats.keys import KEY_COLUMNS, LOSS_COLUMNS, TensorKey, update_ratio
from initlab.stats.measure import backend_for, measure
from initlab.stats.statistics import COUNTS, IN_LN, STATISTICS
from initlab.stats.summarize import derive, relative_error, saturated_share, summarize

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


def test_a_cosine_needs_two_vectors_and_stays_one() -> None:
    """Also where the resultant is rounded: of one vector, of equal ones, and of ones that cancel."""
    alive = torch.tensor([0.0, 1, 1, 2, 2, 2, 2, 3], dtype=torch.float64)
    resultant = torch.tensor([0.0, 1, 1 + 1e-15, 2, 4 + 1e-12, -1e-12, 3, 9], dtype=torch.float64)
    found = STATISTICS["cosine"].formula({"alive": alive, "resultant": resultant}).tolist()
    assert found == pytest.approx([math.nan] * 3 + [0, 1, -1, 0.5, 1], rel=0, abs=0, nan_ok=True)


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


def test_the_relative_error_of_a_network_does_not_hang_on_the_others() -> None:
    """One has a nan, one is 0, one is huge: each as if it were alone."""
    scale = torch.tensor([1.0, 1.0, 0.0, 1e200, 1e-200], dtype=torch.float64).reshape(5, 1, 1)
    b = torch.randn(5, 4, 3, dtype=torch.float64) * scale
    a = b * (1 + 1e-6)
    a[1, 2, 0] = torch.nan
    errors, n_bad = relative_error(a, b)
    assert n_bad.tolist() == [0, 1, 0, 0, 0] and n_bad.dtype == torch.int64
    assert errors.tolist() == pytest.approx([1e-6, math.nan, 0, 1e-6, 1e-6], rel=1e-3, nan_ok=True)
    clean = [0, 2, 3, 4]
    assert torch.equal(relative_error(a[clean], b[clean])[0], errors[clean])
    assert relative_error(a[clean], b[clean])[1].dtype == torch.int64


def test_the_flags_of_the_table_are_true() -> None:
    x = torch.randn(6, 5)
    found = described(x, batched=False)
    missing = {name for name in STATISTICS if math.isnan(found[name])}
    assert missing == {name for name, row in STATISTICS.items() if row.needs_batch} | {"frac_saturated"}
    assert all(described(-x)[name] >= 0 for name in IN_LN)
    assert {name for name in STATISTICS if name in COUNTS} == {"count", "n_nan", "n_inf", "n_subnormal"}
    shares = {name for name, row in STATISTICS.items() if row.is_share} - missing
    assert shares and all(0 <= described(x.relu())[name] <= 1 for name in shares)


def test_some_statistics_are_derived_by_name() -> None:
    x = torch.randn(3, 6, 5)
    rows = backend_for().rows(x)
    assert derive(rows).shape == (len(STATISTICS), 3)
    names = list(STATISTICS)
    assert torch.equal(derive(rows, ("rms", "min")), derive(rows)[[names.index("rms"), names.index("min")]])


def rows_of(seeds: list[int], histograms: bool = False) -> StatsBuffer:
    return StatsBuffer(seeds, backend_for(), histograms)


ACTIVATION = TensorKey("stack", "scratch", 1, "activation", "forward")


def test_rows_are_tidy() -> None:
    rows = rows_of([4, 7])
    keys = [ACTIVATION._replace(layer=layer) for layer in (1, 2)]
    x = torch.randn(2, 2, 5, 3)
    weight = TensorKey("train", "module", 1, "weight", "backward")
    assert len(rows) == 0
    rows.add([Item(key, t) for key, t in zip(keys, x, strict=True)], step=0)
    rows.add([Item(weight, torch.ones(2, 5, 3))], step=3)
    assert len(rows) == 6
    frame = rows.take()
    assert len(rows) == 0 and len(rows.take()) == 0
    row = frame[(frame["seed"] == 7) & (frame["layer"] == 2)].iloc[0]
    assert row["std"] == pytest.approx(float(x[1, 1].double().numpy().std()), rel=1e-12)
    assert frame["n_nan"].dtype == np.int64 and frame["step"].tolist() == [0] * 4 + [3] * 2
    assert frame[frame["tensor"] == "weight"]["frac_dead"].isna().all()
    assert tuple(frame.columns[:7]) == KEY_COLUMNS


def test_only_activations_have_dead_units() -> None:
    rows = rows_of([0])
    rows.add([Item(ACTIVATION._replace(direction=way), torch.zeros(1, 4, 3)) for way in ("forward", "backward")], 0)
    np.testing.assert_array_equal(rows.frame()["frac_dead"], [1, math.nan])


def test_rows_made_elsewhere_are_the_same_rows() -> None:
    """The statistics are derived when the frame is made, whoever made the rows."""
    keys = [ACTIVATION._replace(layer=layer) for layer in (1, 2)]
    x = torch.randn(2, 3, 5, 4)
    a, b = rows_of([0, 1, 2]), rows_of([0, 1, 2])
    a.add([Item(key, t) for key, t in zip(keys, x, strict=True)], 0)
    b.put(keys, b.backend.rows(x), 0)
    pd.testing.assert_frame_equal(a.frame(), b.frame())


def test_numbers_behind_the_rows_have_columns_of_their_own() -> None:
    rows = StatsBuffer([0, 1], backend_for(), more=["one", "two"])
    x = torch.randn(2, 5, 4)
    rows.put([ACTIVATION], torch.cat([rows.backend.rows(x), torch.tensor([[1.0, 2.0], [3.0, 4.0]])])[:, None])
    frame = rows.frame()
    assert frame.columns[-2:].tolist() == ["one", "two"] and frame["two"].tolist() == [3, 4]


def test_histograms_are_rows_of_their_own() -> None:
    rows = rows_of([4, 7], histograms=True)
    none, bias = ACTIVATION._replace(layer=2), ACTIVATION._replace(tensor="bias", layer=3)
    x = torch.tensor([[[1.0, 1.5, -0.3, 0.0], [2.0, torch.nan, -9.0, 1e-45]], [[3.0] * 4, [torch.inf] * 4]])
    items = [Item(ACTIVATION, x), Item(none, torch.zeros(2, 2, 4)), Item(bias, torch.ones(2, 1, 4).double())]
    rows.add(items, 0)
    tables = rows.take_tables()
    frame = tables["histograms"]
    assert list(frame.columns) == [*KEY_COLUMNS, "first", "positive", "negative"]
    assert frame["seed"].tolist() == [4, 7] * 3 and frame["layer"].tolist() == [1, 1, 2, 2, 3, 3]
    assert frame["first"].tolist() == [-149, 1, 0, 0, 0, 0]
    assert frame["positive"][0].tolist() == [1] + [0] * 148 + [2, 1, 0, 0]
    assert frame["negative"][0].tolist() == [0] * 147 + [1, 0, 0, 0, 0, 1]
    assert [column[1].tolist() for column in (frame["positive"], frame["negative"])] == [[4], [0]]
    assert len(frame["positive"][2]) == len(frame["negative"][2]) == 0
    assert frame["positive"][5].tolist() == [4]
    assert len(tables["stats"]) == 6 and len(rows.take_tables()["histograms"]) == 0
    assert list(rows_of([0]).take_tables()) == ["stats"]


def test_a_buffer_says_when_it_holds_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = RowBuffer([0, 1], LOSS_COLUMNS, ["loss"], flush_rows=4)
    key = TensorKey("train", "scratch", 0, "", "")
    losses.put([key], torch.zeros(1, 1, 2), step=0)
    assert not losses.due()
    losses.put([key], torch.ones(1, 1, 2), step=1)
    assert losses.due() and losses.take()["loss"].tolist() == [0, 0, 1, 1] and not losses.due()
    losses.put([key], torch.zeros(1, 1, 2), step=2)
    monkeypatch.setattr(buffer_module, "FLUSH_SECONDS", -1.0)
    assert losses.due()


def test_updates_are_divided_by_the_weights_of_their_step() -> None:
    """Whatever the order of the rows; a step without its weight has no ratio, of two weights the last one counts."""
    weight = TensorKey("train", "module", 1, "weight", "forward")
    codes = {weight: 0, weight._replace(tensor="update"): 1, weight._replace(tensor="bias"): 2}
    code, steps = np.array([0, 2, 1, 1, 0, 0, 1]), np.array([0, 0, 0, 1, 5, 5, 5])
    rms = np.array([[2.0], [9.0], [1.0], [1.0], [7.0], [8.0], [2.0]])
    ratio = update_ratio(codes, code, steps, rms)[:, 0]
    np.testing.assert_array_equal(ratio, [np.nan, np.nan, 0.5, np.nan, np.nan, np.nan, 0.25])


def test_what_is_compared_by_its_logarithm_is_a_size_and_what_needs_a_batch_has_none_without() -> None:
    """A size grows with the tensor by a power of the factor and does not see its sign; no other statistic does both."""
    x = torch.randn(30, 20, dtype=torch.float64)
    one, four, minus = (described(k * x) for k in (1, 4, -1))
    grows = {name for name in STATISTICS if four[name] in (4 * one[name], 16 * one[name]) and one[name] > 0}
    assert {name for name in grows if minus[name] == one[name]} == set(IN_LN)
    alone = described(x, batched=False)
    lost = {name for name in STATISTICS if math.isnan(alone[name]) and not math.isnan(one[name])}
    assert lost == {name for name, row in STATISTICS.items() if row.needs_batch}


def test_networks_of_an_ensemble_have_the_rows_that_they_have_alone() -> None:
    x = torch.randn(4, 30, 20) * torch.tensor([1.0, 1e-3, 1e5, -2.0])[:, None, None] + 0.5
    x[1] = x[1].relu()
    together = summarize(x)
    torch.testing.assert_close(
        together, torch.stack([summarize(one) for one in x], -1), rtol=1e-13, atol=0, equal_nan=True
    )
    longer = torch.cat([together, torch.ones(2, 4, dtype=torch.float64)])  # a buffer keeps more behind the fields
    assert torch.equal(derive(longer).nan_to_num(7), derive(together).nan_to_num(7))


def test_a_slope_is_saturated_below_the_share_and_not_at_it() -> None:
    slopes = torch.tensor([[0.05, math.nextafter(0.05, 0), -0.04, 0.9]], dtype=torch.float64)
    assert float(saturated_share(slopes, 1.0)) == 0.5 and float(saturated_share(2 * slopes, 2.0)) == 0.5
