"""Rows against exact arithmetic. 1e-12 leaves some thousand roundings of float64 to sums of some hundred entries;
2e-6 is what sums in float32 promise."""

import math
import random
from collections.abc import Callable
from decimal import localcontext
from functools import reduce
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from initlab.errors import UsageError
from initlab.stats import histogram as octaves_module
from initlab.stats import reference
from initlab.stats import summarize as moments
from initlab.stats.histogram import histogram, octaves
from initlab.stats.kernels.cpu import library
from initlab.stats.measure import backend_for
from initlab.stats.reference import FIELDS, Row, merge, row
from initlab.stats.statistics import STATISTICS
from initlab.stats.summarize import derive, saturated_share, summarize
from tests.stats.exact import EXACT, SINGLE, agree, decimal, exact, named, tolerance

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PRODUCERS: dict[str, Callable[[Tensor], Tensor]] = {
    "backend": lambda x: backend_for().rows(x),
    "plain": summarize,
    "single": lambda x: summarize(x, single=True),
    "row": lambda x: row(x).fields,
}
COUNTED = ("count", "n_nan", "n_inf", "n_subnormal", "n_zero", "min", "max", "dead", "alive", "exponent")


def in_plain(method: str, x: Tensor) -> bool:
    """Whether the row is made of sums in float32."""
    return method == "single" or (method == "backend" and not (library() and x.dtype == F32))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def half_nan() -> Tensor:
    x = drawn(12, 7)
    x.view(-1)[torch.randperm(84, generator=torch.Generator().manual_seed(1))[:42]] = torch.nan
    return x


def with_inf() -> Tensor:
    x = drawn(12, 7)
    x[3, 2], x[5], x[7, 0] = torch.inf, -torch.inf, torch.nan
    return x


# What a plain sum of squares is enough for, and where it would be wrong.
PLAIN: dict[str, Tensor] = {
    **{f"float32 {scale:g}": (drawn(12, 7) * scale).to(F32) for scale in (1e-30, 1.0, 1e30, 1e37)},
    "float32 subnormal": (drawn(12, 7) * 1e-40).to(F32),
    "float16": drawn(12, 7).to(F16),
    "float16 subnormal": (drawn(12, 7) * 1e-6).to(F16),
    "bfloat16 subnormal": (drawn(12, 7) * 1e-39).to(BF16),
    "bfloat16 large": (drawn(12, 7) * 1e38).to(BF16),
    "float64": drawn(12, 7),
    "float64 squares near the edge": drawn(12, 7) * 1e110,
    "relu": drawn(30, 20).relu().to(F32),
    "a unit is dead": drawn(12, 7).to(F32) * torch.tensor([1.0, 0, 1, 1, 0, 1, 1]),
    "a vector is dead": drawn(12, 7).to(F32) * (torch.arange(12) != 4)[:, None],
    "zeros": torch.zeros(4, 3),
    "collapsed": drawn(1, 20).to(F32) + 1e-3 * drawn(30, 20).to(F32),
    "float64 vectors far apart": drawn(12, 7) * 10.0 ** torch.arange(-100, 140, 20, dtype=F64)[:, None],
}
HARD: dict[str, Tensor] = {
    **{f"float64 {scale:g}": drawn(12, 7) * scale for scale in (1e-320, 1e-300, 1e-160, 1e160, 1e300, 1e307)},
    "float64 vectors farther apart": drawn(12, 7) * 10.0 ** torch.arange(-170, 70, 20, dtype=F64)[:, None],
    "float64 units far apart": drawn(12, 7) * 10.0 ** torch.arange(-150, 200, 50, dtype=F64),
    "mean a million stds": 1e6 + drawn(12, 7),
    "mean a million stds in float32": (1e6 + drawn(12, 7)).to(F32),
    "units' means a million stds": 1e6 * drawn(1, 7) + drawn(12, 7),
    "a few ulps": 1 + torch.randint(0, 3, (12, 7), generator=torch.Generator().manual_seed(0)) * 2.0**-52,
    "large and a million stds": (1e6 + drawn(12, 7)) * 1e295,
    "half nan": half_nan().to(F32),
    "half nan and large": half_nan() * 1e305,
    "with inf": with_inf().to(BF16),
    "with inf and a mean": (1e6 + with_inf()),
    "one unit all nan": torch.where(torch.arange(7) == 2, torch.nan, drawn(12, 7)),
    "one entry": torch.tensor([[3.25]]),
    "one vector": drawn(1, 7).to(F32),
    "one unit": drawn(12, 1).to(F32) + 20,
    "constant": torch.full((5, 4), 0.1, dtype=F64),
    "float64 zeros": torch.zeros(4, 3, dtype=F64),
}


@pytest.mark.parametrize("method", PRODUCERS)
@pytest.mark.parametrize("case", PLAIN | HARD)
def test_rows_are_exact(case: str, method: str) -> None:
    x = (PLAIN | HARD)[case]
    agree(named(PRODUCERS[method](x)), exact(x), tolerance(x, in_plain(method, x)))


def test_without_the_check_plain_sums_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    trusting = {"centred": -math.inf, "constant": -math.inf, "pooled": -math.inf}
    for name in ("SINGLE", "DOUBLE"):
        monkeypatch.setattr(moments, name, getattr(moments, name)._replace(**trusting))
    for case in ("mean a million stds", "units' means a million stds", "mean a million stds in float32"):
        with pytest.raises(AssertionError):
            agree(named(summarize(HARD[case], single=True)), exact(HARD[case]), SINGLE)


@pytest.mark.parametrize("case", PLAIN | HARD)
def test_all_methods_count_the_same(case: str) -> None:
    x = (PLAIN | HARD)[case]
    a, b, c = named(summarize(x)), named(row(x).fields), named(summarize(x, single=True))
    assert [a[name] for name in COUNTED] == [b[name] for name in COUNTED] == [c[name] for name in COUNTED]
    flat = x.double().flatten().tolist()
    finite = [v for v in flat if math.isfinite(v)]
    assert a["count"] == len(flat) and a["n_nan"] + a["n_inf"] == len(flat) - len(finite)
    assert a["n_nan"] == sum(map(math.isnan, flat)) and a["n_zero"] == flat.count(0)
    assert a["n_subnormal"] == sum(0 < abs(v) < torch.finfo(x.dtype).tiny for v in finite)
    assert (a["min"], a["max"]) == (min(finite), max(finite))
    assert a["dead"] == (x == 0).all(0).double().mean() and a["alive"] == sum(
        any(v and math.isfinite(v) for v in line) for line in x.tolist()
    )


@pytest.mark.parametrize(
    "case", ["relu", "collapsed", "float64", "half nan", "with inf and a mean", "units' means a million stds"]
)
def test_tensors_larger_than_a_block_are_read_in_parts(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the batch, or of the ensemble; the last part is a shorter one."""
    x = (PLAIN | HARD)[case]
    monkeypatch.setattr(moments, "AT_ONCE", 5 * x.shape[1])
    monkeypatch.setitem(reference.BLOCK, "cpu", 5 * x.shape[1])
    monkeypatch.setattr(reference, "_FEWEST", 1)
    for name, method in PRODUCERS.items():
        agree(named(method(x)), exact(x), tolerance(x, in_plain(name, x)))
    monkeypatch.setattr(moments, "AT_ONCE", 2 * x.numel())
    whole = summarize(torch.stack([x, x, x]))
    for k in range(3):
        agree(named(whole[:, k]), exact(x))


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_with_no_finite_entry_there_is_nothing_to_say(dtype: torch.dtype) -> None:
    for value, where in ((math.nan, "n_nan"), (math.inf, "n_inf"), (-math.inf, "n_inf")):
        x = torch.full((4, 3), value, dtype=dtype)
        found = named(summarize(x))
        assert found[where] == 12 and found["alive"] == 0 and found["exponent"] == 0
        assert all(math.isnan(found[name]) for name in ("mean", "m2", "min", "max", "within", "saturated"))
        assert not histogram(x).any()


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (2, 0, 3), (0, 4, 3)])
def test_an_empty_tensor_has_counts_alone(shape: tuple[int, ...]) -> None:
    fields = summarize(torch.zeros(shape))
    assert fields.shape == (len(FIELDS), *shape[:-2])
    for one in fields.reshape(len(FIELDS), -1).T:
        found = named(one)
        assert [found[name] for name in ("count", "n_nan", "n_zero", "alive")] == [0] * 4
        assert all(math.isnan(found[name]) for name in ("mean", "m2", "min", "max", "within", "dead"))


def test_networks_of_an_ensemble_go_their_own_methods() -> None:
    x = drawn(3, 2, 12, 7).to(F32)
    x[1, 0] += 1e6
    x[2, 1, 0, 0] = torch.nan
    x[0, 1] = 1
    x[2, 0] *= (torch.arange(12) != 4)[:, None] * (torch.arange(7) != 2)  # a vector and a unit of zeros
    for single, near in ((False, EXACT), (True, SINGLE)):
        whole = summarize(x, single=single)
        for i in range(3):
            for j in range(2):
                found, alone = named(whole[:, i, j]), named(summarize(x[i, j]))
                agree(found, exact(x[i, j]), near)
                assert [found[name] for name in COUNTED] == [alone[name] for name in COUNTED]


def test_a_tensor_is_read_as_it_lies() -> None:
    """Transposed, strided, expanded, and part of a graph."""
    x = drawn(12, 7).to(F32).requires_grad_()
    for view in (x.mT, x[::2, 1::3], x[:, :1].expand(12, 9), x[None].expand(3, 12, 7)):
        copied = view.detach().clone(memory_format=torch.contiguous_format)
        torch.testing.assert_close(summarize(view), summarize(copied), rtol=1e-13, atol=0, equal_nan=True)
        assert torch.equal(histogram(view), histogram(copied))
    assert not summarize(x).requires_grad


def test_unbatched_tensors_have_no_inputs_to_compare() -> None:
    x = drawn(12, 7).to(F32)
    inputs, none = named(summarize(x)), named(summarize(x, batched=False))
    for name in FIELDS:
        if name in ("within", "dead", "alive", "resultant", "saturated"):
            assert math.isnan(none[name])
        else:
            assert none[name] == pytest.approx(inputs[name], rel=1e-14, nan_ok=True)  # another order of adding
    alike = named(row(x, batched=False).fields)
    assert [name for name in FIELDS if math.isnan(alike[name])] == [name for name in FIELDS if math.isnan(none[name])]


# -- histograms


def counted(x: Tensor) -> Tensor:
    lowest, highest = octaves(x.dtype)
    found = torch.zeros(2, highest - lowest + 1, dtype=torch.int32)
    for v in x.double().flatten().tolist():
        if v and math.isfinite(v):
            found[int(v < 0), math.frexp(v)[1] - 1 - lowest] += 1
    return found


@pytest.mark.parametrize("case", PLAIN | HARD)
def test_histograms_are_exact(case: str) -> None:
    x = (PLAIN | HARD)[case][..., :64]
    assert torch.equal(histogram(x), counted(x))


def test_histograms_of_tensors_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut through a network, or between networks; the last part is a shorter one."""
    x = torch.stack([PLAIN["relu"], PLAIN["collapsed"].abs(), PLAIN["relu"] * -3e-42])
    true = torch.stack([counted(one) for one in x])
    for size in (7, x[0].numel() + 1, 2 * x[0].numel()):
        monkeypatch.setattr(octaves_module, "AT_ONCE", size)
        assert torch.equal(histogram(x), true)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_every_octave_of_a_format_has_its_bin(dtype: torch.dtype) -> None:
    """Both ends of every octave, the neighbours of its first number, zeros of both signs, nan and inf; two networks."""
    lowest, highest = octaves(dtype)
    first = [math.ldexp(1.0, k) for k in range(lowest, highest + 1)]
    info = torch.finfo(dtype)
    assert (first[0], first[-1]) == (info.smallest_normal * info.eps, 2.0 ** (math.frexp(info.max)[1] - 1))
    powers = torch.tensor(first, dtype=F64).to(dtype)
    below = torch.nextafter(powers, torch.zeros_like(powers)) if dtype in (F32, F64) else powers
    odd = torch.tensor([0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, info.max, -info.max], dtype=dtype)
    x = torch.cat([powers, -powers, below, -below, odd]).view(1, -1)
    assert torch.equal(histogram(x), counted(x))
    assert (histogram(powers.view(1, -1))[0] == 1).all()
    assert torch.equal(histogram(torch.stack([x, x.abs()])), torch.stack([counted(x), counted(x.abs())]))


# -- merging


def scrambled(seed: int, scales: list[float], holes: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 5, generator=generator, dtype=F64)
    x *= torch.tensor(scales, dtype=F64)[torch.randint(len(scales), (16, 1), generator=generator)]
    x[:, 1] = x[:, 1].relu()
    if holes:
        x[torch.rand(16, 5, generator=generator) < 0.3] = torch.nan
        x[torch.rand(16, 5, generator=generator) < 0.1] = -torch.inf
        x[0] = 1  # at least one finite entry
    return x


def same_row(found: Row, x: Tensor) -> None:
    whole = row(x)
    a, b = named(found.fields), named(whole.fields)
    assert [a[name] for name in COUNTED] == [b[name] for name in COUNTED]
    assert torch.equal(found.histogram, whole.histogram)
    agree(a, exact(x))


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 10**6),
    st.sampled_from([[1.0], [1.0, 0.0], [1e-300, 1.0], [1e300, 1e-300, 1.0], [1e160, 1e150], [1e-320], [1e6]]),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(0, 16), max_size=5),
    st.randoms(use_true_random=False),
)
def test_shards_merge_to_the_whole_in_any_order_and_tree(
    seed: int, scales: list[float], holes: bool, far: bool, cuts: list[int], chance: random.Random
) -> None:
    x = scrambled(seed, scales, holes) + (1e6 if far else 0)
    edges = [0, *sorted(cuts), 16]
    rows = [row(x[a:b]) for a, b in pairwise(edges)]
    while len(rows) > 1:
        a, b = (rows.pop(chance.randrange(len(rows))) for _ in range(2))
        rows.append(merge(a, b))
    same_row(rows[0], x)


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_shards_of_small_formats_merge(dtype: torch.dtype) -> None:
    x = (3 + drawn(20, 6)).to(dtype)
    same_row(reduce(merge, [row(part) for part in x.split(3)]), x)


def test_ensembles_merge_member_by_member() -> None:
    x = drawn(3, 16, 5) * torch.tensor([1e-200, 1.0, 1e200], dtype=F64)[:, None, None]
    merged = merge(row(x[:, 9:]), row(x[:, :9]))
    for k in range(3):
        same_row(Row(*(part[:, k] if part is merged.fields else part[k] for part in merged)), x[k])


def test_merging_weighs_saturated_shares_and_leaves_unbatched_rows_so() -> None:
    a, b = (row(drawn(n, 3), batched=False) for n in (1, 3))
    place = list(FIELDS).index("saturated")
    a.fields[place], b.fields[place] = 1.0, 0.2
    found = named(merge(a, b).fields)
    assert found["saturated"] == pytest.approx(0.4, rel=1e-14)
    assert all(math.isnan(found[name]) for name in ("within", "dead", "alive", "resultant"))


def test_a_unit_that_is_silent_in_one_shard_is_not_dead() -> None:
    quiet, loud = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    assert named(row(quiet).fields)["dead"] == pytest.approx(2 / 3)
    assert named(merge(row(quiet), row(loud)).fields)["dead"] == pytest.approx(1 / 3)


# -- what is derived, what is refused, what waits


@pytest.mark.parametrize("case", PLAIN | HARD)
def test_statistics_are_exact_as_far_as_float64_can_say_them(case: str) -> None:
    x = (PLAIN | HARD)[case]
    found, true = dict(zip(STATISTICS, derive(summarize(x)).tolist(), strict=True)), exact(x)
    second = true["m2"] / true["n"] + true["mean"] ** 2
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 60, 10**6, -(10**6)
        for name, square in (
            ("std", true["m2"] / true["n"]),
            ("rms", second),
            ("norm", second * true["n"]),
            ("std_within", true["within"]),
        ):
            root = float(decimal(square).sqrt())
            assert found[name] == pytest.approx(root, rel=1e-12, abs=5e-324)
    assert found["q"] == pytest.approx(float(second) if second < 10**308 else math.inf, rel=1e-12, abs=5e-324)


def test_powers_of_two_are_exact() -> None:
    exponents = range(-1022, 1024)
    found = reference.power_of_two(torch.tensor(exponents, dtype=F64)).tolist()
    assert found == [math.ldexp(1.0, e) for e in exponents]


def test_mistakes_are_said_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"^dtype=int64: must be one of bfloat16, float16, float32, float64"):
        summarize(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(UsageError, match=r"^a tensor of shape \(3,\) has no batch and units"):
        row(torch.zeros(3))
    with pytest.raises(UsageError, match=r"^merge: \(3,\) units and 277 octaves with \(4,\) units"):
        merge(row(torch.zeros(2, 3)), row(torch.zeros(2, 4)))


class Watched(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# What makes the processor wait for a GPU: a value, or a shape that depends on values.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "histc", "is_nonzero", "equal"}


def test_what_a_gpu_is_given_never_waits_for_it() -> None:
    x = HARD["half nan"]
    with Watched() as seen:
        whole = row(x)
        derive(merge(whole, row(x * 2)).fields)
    assert "sum" in seen.names and not seen.names & WAITING
    with Watched() as seen:
        whole.fields[0].item()
    assert seen.names & WAITING


@pytest.mark.gpu
@pytest.mark.parametrize("case", PLAIN | HARD)
def test_a_gpu_makes_the_same_row(case: str) -> None:
    x = (PLAIN | HARD)[case]
    there = x.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fields, counts = summarize(there), histogram(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    agree(named(fields.cpu()), exact(x))
    a, b = named(fields.cpu()), named(summarize(x))
    assert [a[name] for name in COUNTED] == [b[name] for name in COUNTED]
    assert torch.equal(counts.cpu(), histogram(x))


def test_what_varies_inside_units_scales_with_the_tensor_and_is_nothing_in_constant_units() -> None:
    """Powers of two change no digit, so the law holds to the bit, far below a sum of squares of 1 as above it."""
    units = torch.randn(1, 30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    noise = torch.randn(7, 30, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    within, small = (derive(summarize(k * (units + 1e-3 * noise)), ["std_within"]) for k in (1.0, 2.0**-20))
    assert within > 0 and small == within * 2.0**-20
    assert derive(summarize(units.expand(7, 30)), ["std_within"]) == 0


def test_saturation_is_of_each_matrix() -> None:
    slope = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    for lead in ((), (2,), (5, 2)):
        assert torch.equal(
            saturated_share(slope.expand(*lead, 2, 3), 4.0), torch.full(lead, 4 / 6, dtype=torch.float64)
        )


@pytest.mark.parametrize("mean", [0.0, 15.0, 17.0, 1000.0])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_only_what_no_sum_can_tell_takes_the_slowest_road(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, mean: float
) -> None:
    """Inputs that are nearly alike cost a second look at the tensor and no third."""
    slow: list[Tensor] = []

    def careful(x: Tensor, batched: bool) -> Row:
        slow.append(x)
        return reference.safe_row(x, batched)

    monkeypatch.setattr(moments, "safe_row", careful)
    x = drawn(3, 40, 17).to(dtype) + mean
    for batched in (True, False):
        summarize(x, batched)
        summarize(x, batched, single=True)
    assert slow == []
    summarize(x.index_fill(-1, torch.tensor([4]), torch.nan))
    assert len(slow) == 1
