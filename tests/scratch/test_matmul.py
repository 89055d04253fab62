"""Laws of the matmul ladder: what every rung must give whatever the shape, and that a wrong rung is caught."""

import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from initlab.errors import UsageError
from initlab.nn.init import gaussian, permutation
from initlab.scratch import matmul, rungs
from initlab.scratch.rungs import LADDER, RUNGS, Rung
from initlab.stats.summarize import relative_error

PLAIN = [name for name in RUNGS if name not in ("compiled", "triton")]  # those that need no compiler

# sqrt(K) eps with room: at K = 784 and float32 the rungs differ by about 4e-7; a wrong product by about 1.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

sizes = st.integers(0, 7)
seeds = st.integers(0, 10_000)
dtypes = st.sampled_from(list(TOLERANCE))
ladder = settings(deadline=None, max_examples=60)


def whole_numbers(shape, seed, what, dtype=torch.float32):
    """From -8 to 8: their products and sums are exact in every order, so that rungs must agree bit for bit."""
    return gaussian(shape, seed, what).mul(3).round().clamp(-8, 8).to(dtype)


def pair(m, k, n, seed, dtype=torch.float32, draw=whole_numbers):
    return draw((m, k), seed, "a", dtype), draw((k, n), seed, "b", dtype)


def positive(shape, seed, what, dtype):
    """Sums of positive terms do not cancel: their relative error is rounding's and nothing else's."""
    return gaussian(shape, seed, what).abs().to(dtype)


def error(out, expected):
    return float(relative_error(out, expected)[0]) if expected.numel() else 0.0


def steps():
    """Each rung with the one before it."""
    return zip(PLAIN[1:], PLAIN, strict=False)


@ladder
@given(sizes, sizes, sizes, seeds, dtypes)
def test_each_rung_equals_the_one_before_exactly_where_arithmetic_is_exact(m, k, n, seed, dtype):
    a, b = pair(m, k, n, seed, dtype)
    for name, before in steps():
        out = RUNGS[name](a, b)
        assert out.shape == (m, n) and out.dtype == dtype
        assert torch.equal(out, RUNGS[before](a, b)), name


@ladder
@given(sizes, sizes, sizes, seeds, dtypes)
def test_each_rung_equals_the_one_before_up_to_rounding(m, k, n, seed, dtype):
    a, b = pair(m, k, n, seed, dtype, positive)
    for name, before in steps():
        assert error(RUNGS[name](a, b), RUNGS[before](a, b)) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_books_shape(dtype):
    a, b = (gaussian(shape, 0, what).to(dtype) for shape, what in (((5, 784), "a"), ((784, 10), "b")))
    for name, before in steps():
        assert error(RUNGS[name](a, b), RUNGS[before](a, b)) <= TOLERANCE[dtype], name


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a, b: torch.zeros(a.shape[0], b.shape[1]),
        lambda a, b: a[:, :-1] @ b[:-1],  # the last term forgotten
        lambda a, b: (a @ b).flip(0),
        lambda a, b: (a @ b) * (1 + 1e-4),
    ],
    ids=["zeros", "short sum", "rows reversed", "scaled"],
)
def test_a_wrong_rung_is_caught(wrong):
    a, b = pair(5, 784, 10, 0, draw=positive)
    assert error(Rung(wrong)(a, b), matmul.matmul(a, b)) > 5 * TOLERANCE[torch.float32]


@ladder
@given(sizes, sizes, sizes, seeds)
def test_transposing_turns_the_product_round(m, k, n, seed):
    a, b = pair(m, k, n, seed)
    for name in PLAIN:
        assert torch.equal(RUNGS[name](a, b).t(), RUNGS[name](b.t(), a.t())), name


@pytest.mark.parametrize("name", PLAIN)
def test_permuted_rows_give_permuted_rows_and_the_identity_changes_nothing(name):
    a, b = pair(6, 4, 3, 1)
    order = permutation(6, 0, "order")
    assert torch.equal(RUNGS[name](a[order], b), RUNGS[name](a, b)[order])
    assert torch.equal(RUNGS[name](a, torch.eye(4)), a)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_runs_through_its_row_and_no_other(name, bad):
    a, b = pair(4, 5, 3, 2, draw=positive)
    a[1, 2] = bad
    broken = ~RUNGS[name](a, b).isfinite()
    assert broken[1].all() and not broken[[0, 2, 3]].any()


@pytest.mark.parametrize("name", PLAIN)
def test_the_inputs_are_left_alone(name):
    a, b = pair(3, 4, 2, 3)
    copies = a.clone(), b.clone()
    RUNGS[name](a, b)
    assert torch.equal(a, copies[0]) and torch.equal(b, copies[1])


def test_tiles_meet_at_their_edges():
    t = rungs.TILE
    for shape in [(t, t, t), (t - 1, t, t + 1), (t + 2, 2 * t + 1, 1), (1, t + 1, t + 1)]:
        a, b = pair(*shape, 4)
        assert torch.equal(rungs.blocked(a, b), a @ b), shape


@pytest.mark.parametrize("name", LADDER)
@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), r"\(2, 3\).*\(4, 5\).*3 columns.*4 rows"),
        (torch.ones(2, 3), torch.ones(1, 5), r"\(2, 3\).*\(1, 5\)"),  # would broadcast
        (torch.ones(2, 1), torch.ones(3, 5), r"\(2, 1\).*\(3, 5\)"),
        (torch.ones(3), torch.ones(3, 2), r"\(3,\).*\(3, 2\).*two dimensions"),
        (torch.ones(1, 2, 3), torch.ones(3, 2), r"\(1, 2, 3\).*\(3, 2\).*two dimensions"),
        (torch.ones(2, 3).int(), torch.ones(3, 2).int(), r"\(2, 3\) int32.*\(3, 2\) int32.*float"),
        (torch.ones(2, 3), torch.ones(3, 2).double(), r"\(2, 3\) float32.*\(3, 2\) float64.*one float dtype"),
        (torch.ones(2, 3), torch.ones(3, 2, device="meta"), r"\(2, 3\).*\(3, 2\).*cpu and meta"),
        ([[1.0]], torch.ones(1, 1), r"list"),
    ],
    ids=["sizes", "one row", "one column", "vector", "batch", "integers", "dtypes", "devices", "no tensor"],
)
def test_what_does_not_fit_is_refused_in_one_line_that_names_the_shapes(name, a, b, says):
    with pytest.raises(UsageError, match=says) as caught:
        LADDER[name](a, b)
    assert "\n" not in str(caught.value)


def test_a_ladder_of_rungs_that_say_what_they_are():
    assert list(LADDER)[:7] == ["loops", "lists", "elementwise", "row", "outer", "einsum", "matmul"]
    assert set(RUNGS) <= set(LADDER)
    assert all(rung.summary.endswith(".") or rung.summary for rung in LADDER.values())
    assert len({rung.f for rung in LADDER.values()}) == len(LADDER)


def test_a_missing_compiler_is_a_reason_and_no_crash(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match=r"compiled.*no-such-compiler"):
        LADDER["compiled"](torch.ones(2, 2), torch.ones(2, 2))


def test_triton_on_a_processor_is_a_reason_and_no_crash(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match="triton"):
        LADDER["triton"](torch.ones(2, 2), torch.ones(2, 2))


@pytest.mark.slow
@pytest.mark.skipif("compiled" not in RUNGS, reason="no compiler here")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_compiled_form_equals_the_form(dtype):
    for shape in [(5, 784, 10), (3, 4, 2), (1, 4, 2), (3, 1, 2), (3, 4, 1), (1, 1, 1), (0, 3, 2), (2, 0, 2), (2, 3, 0)]:
        a, b = pair(*shape, 5, dtype)
        assert torch.equal(rungs.compiled(a, b), matmul.outer(a, b)), shape


INTERPRETED = rungs.TRITON and os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton, and TRITON_INTERPRET=1 on a CPU")
        ),
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not rungs.TRITON, reason="Triton is not installed")]
        ),
    ],
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_triton_kernel_equals_the_operator(dtype, device):
    for shape in [(5, 784, 10), (33, 65, 31), (1, 1, 1), (64, 64, 64), (0, 3, 2), (2, 0, 2), (2, 3, 0)]:
        a, b = (t.to(device) for t in pair(*shape, 6, dtype))
        assert torch.equal(rungs.triton_kernel(a, b), a @ b), shape
        assert torch.equal(rungs.triton_kernel(b.t(), a.t()), (a @ b).t()), shape
    a, b = (t.to(device) for t in pair(40, 100, 20, 7, dtype, positive))
    assert error(rungs.triton_kernel(a, b).cpu(), (a @ b).cpu()) <= TOLERANCE[dtype]
    assert error(rungs.triton_kernel(a, b).cpu(), (a @ b).cpu() * (1 + 1e-4)) > 5 * TOLERANCE[torch.float32]
