"""Every producer of rows against rational arithmetic, where the units of one tensor differ in scale by up to 2^200.

Tolerance: 1e-12 leaves some thousand roundings of float64 to sums of at most some hundred entries, each of which may be
2^8 times the result before the plain sums are given up. Plain PyTorch's sums in float32 promise 2e-6.
"""

import math
from collections.abc import Callable
from functools import reduce

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from initlab.stats.backend import Backend
from initlab.stats.kernels import triton_rows
from initlab.stats.measure import backend_for
from initlab.stats.reference import merge, row
from initlab.stats.summarize import derive, summarize
from tests.long import long_except
from tests.stats.exact import EXACT, agree, exact, named, tolerance

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# Exponents of the units' scales. Those of float16 leave it room for normal entries.
SCALES = {F16: (-20, 10), BF16: (-100, 100), F32: (-100, 100), F64: (-100, 100)}
NO_TRITON = triton_rows.missing(torch.device("cpu"))


def spread(generator: torch.Generator, n: int) -> Tensor:
    return torch.randn(n, generator=generator, dtype=F64)


UNITS: dict[str, Callable[[torch.Generator, int], Tensor]] = {
    "normal": spread,
    "constant": lambda generator, n: spread(generator, 1).expand(n),
    "far from 0": lambda generator, n: 1000 + spread(generator, n) / 1000,
    "half zero": lambda generator, n: spread(generator, n).relu(),
    "one entry": lambda generator, n: torch.eye(n, 1, dtype=F64)[:, 0],
    "zero": lambda generator, n: torch.zeros(n, dtype=F64),
}
HOLES = (None, math.nan, math.inf, -math.inf)


def made(
    seed: int, n: int, units: list[tuple[str, int]], hole: float | None, whole: bool, dtype: torch.dtype
) -> Tensor:
    """(n, C): each unit of its kind and scale; one unit, wholly or in its first entry, is not finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.stack([UNITS[kind](generator, n) * 2.0**scale for kind, scale in units], 1)
    if hole is not None and len(units) > 1:
        x[: n if whole else 1, seed % len(units)] = hole
    return x.to(dtype)


def tensors(dtype: torch.dtype) -> st.SearchStrategy[Tensor]:
    unit = st.tuples(st.sampled_from(sorted(UNITS)), st.integers(*SCALES[dtype]))
    sizes = st.integers(1, 40)
    some = st.lists(unit, min_size=1, max_size=19)
    numbers = st.integers(0, 2**32)
    found = st.builds(made, numbers, sizes, some, st.sampled_from(HOLES), st.booleans(), st.just(dtype))
    return found.filter(lambda x: bool(x.isfinite().any()))


def same_numbers(fields: Tensor, x: Tensor, r: float = EXACT) -> None:
    """The row's sums, and the statistics that are derived from them, nan where there are no pairs of vectors."""
    found, true = named(fields), exact(x)
    agree(found, true, r)
    std, within, mean, cosine = derive(fields, ["std", "std_within", "mean", "cosine"]).tolist()
    second = float(true["m2"] / true["n"] + true["mean"] ** 2)
    assert std == pytest.approx(math.sqrt(true["m2"] / true["n"]), rel=r, abs=0)
    assert within == pytest.approx(math.sqrt(true["within"]), rel=r, abs=0)
    assert mean == pytest.approx(float(true["mean"]), rel=0, abs=r * math.sqrt(second))
    k = int(found["alive"])
    if k > 1:  # a resultant of at most k^2 is right to 1e-12 of itself or of k
        assert cosine == pytest.approx(float((true["resultant"] - k) / (k * (k - 1))), rel=0, abs=2 * r * k / (k - 1))
    else:
        assert math.isnan(cosine)


CLOSE = [*[("constant", 0)] * 3, ("far from 0", 0), ("normal", 9), ("far from 0", 2)]
FIRST = [("constant", 100), *[("normal", 0)] * 8]


@pytest.mark.parametrize("dtype", long_except(SCALES, torch.float32), ids=str)
def test_every_producer_is_exact(dtype: torch.dtype) -> None:
    @settings(deadline=None, max_examples=40)
    @given(tensors(dtype))
    @example(made(1, 30, [(kind, min(scale, SCALES[dtype][1])) for kind, scale in FIRST], None, False, dtype))
    @example(made(1, 12, CLOSE, None, False, dtype))
    def check(x: Tensor) -> None:
        cut = len(x) // 2
        same_numbers(summarize(x), x)
        same_numbers(row(x).fields, x)
        same_numbers(reduce(merge, [row(x[:cut]), row(x[cut:])]).fields, x)
        for backend in (backend_for(), Backend()):
            z, r = x.clone(), tolerance(x, plain=not backend.fuses(x))
            same_numbers(backend.rows(x), x, r)
            relu = backend.relu_rows_(z)
            same_numbers(relu[:, 0], x, r)
            if z.isfinite().any():
                same_numbers(relu[:, 1], z, r)
            gate, g = x.flip(0), x.clone()
            masked = backend.mask_rows_(g, gate)
            same_numbers(masked[:, 0], x, r)
            if g.isfinite().any():
                same_numbers(masked[:, 1], g, r)

    check()


@pytest.mark.parametrize("n", long_except([300, 3000], 300))
def test_more_terms_than_a_tile_holds(n: int) -> None:
    """A unit is added up in parts; 4e-12 leaves a rounding for each of 3000 terms."""
    x = made(2, n, [*FIRST, ("far from 0", 50), ("normal", -100)], None, False, F32)
    for fields in (backend_for().rows(x), summarize(x), row(x).fields):
        agree(named(fields), exact(x), 4e-12)
    agree(named(summarize(x, single=True)), exact(x), tolerance(x, plain=True))


@pytest.mark.skipif(bool(NO_TRITON), reason=f"{NO_TRITON}, or TRITON_INTERPRET=1")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
@pytest.mark.parametrize("dtype", triton_rows.DTYPES, ids=str)
def test_tritons_programs_are_exact(dtype: torch.dtype) -> None:
    @settings(deadline=None, max_examples=25)
    @given(tensors(dtype))
    @example(made(1, 30, [(kind, min(scale, SCALES[dtype][1])) for kind, scale in FIRST], None, False, dtype))
    def check(x: Tensor) -> None:
        same_numbers(triton_rows.measure_alone(x)[0], x)

    check()
