"""All versions of the backward pass say the same, agree with finite differences, and refuse the same mistakes."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import draw, gaussian, rule
from initlab.nn.loss_table import LOSSES
from initlab.scratch.agreement import compare_gradients as compare
from initlab.scratch.agreement import unit_in_last_place
from initlab.scratch.backward import plain_loss
from initlab.stats.dtypes import DTYPES, resolve_dtype
from initlab.stats.summarize import relative_error
from initlab.tasks.course import engine_versions
from initlab.tasks.course.engine_versions import BACKWARDS as VERSIONS
from tests.conftest import ROWS
from tests.long import long_except

EAGER = [name for name in VERSIONS if name not in ("compiled", "book")]  # the book knows one network
Parameters = list[tuple[Tensor, Tensor]]


def problem(
    sizes: list[int], batch: int, activation: str = "relu", loss: str = "mse", seed: int = 0, dtype=torch.float64
) -> tuple[Parameters, Tensor, Tensor]:
    """Kaiming weights and non-zero biases, so that gradients stay normal numbers at every depth."""
    scaling = rule("kaiming", bias=0.5)
    shapes = itertools.pairwise(sizes)
    drawn = [draw(scaling, activation, shape, [seed], layer, dtype) for layer, shape in enumerate(shapes, start=1)]
    xb = gaussian((batch, sizes[0]), seed, "input").to(dtype)
    if LOSSES[loss].classes:
        yb = torch.randint(sizes[-1], (batch,), generator=torch.Generator().manual_seed(seed))
    else:
        yb = gaussian((batch,), seed, "target").to(dtype) + 1  # off centre: a mean residual of 0 has no relative error
    return [(w[0], b[0]) for w, b in drawn], xb, yb


def results(names: list[str], *given: object) -> dict[str, tuple[Tensor, Parameters]]:
    return {name: VERSIONS[name](*given) for name in names}  # type: ignore[arg-type]


shapes = st.fixed_dictionaries(
    {
        "inputs": st.integers(1, 40),
        "hidden": st.lists(st.integers(16, 48), max_size=19),
        "outputs": st.integers(2, 12),
        "batch": st.one_of(st.sampled_from([1, 2]), st.integers(1, 1000)),
        "seed": st.integers(0, 10**6),
    }
)
DEEPEST = {"inputs": 10, "hidden": [16] * 19, "outputs": 10, "batch": 1000, "seed": 1}
SMALLEST = {"inputs": 1, "hidden": [], "outputs": 2, "batch": 1, "seed": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", long_except(ROWS, "gelu"))
def test_all_versions_agree_pairwise(activation: str, loss: str, dtype: torch.dtype) -> None:
    """Relative error of every tensor at most 1e-5 and 1e-12. Over 800 such problems the worst were 2.4e-6 and 4e-14.

    All rows take the same forward steps, so no ReLU mask flips between them. The shapes are drawn, but always the same.
    """

    @settings(derandomize=True, database=None, deadline=None, max_examples=5)
    @example(DEEPEST)
    @example(SMALLEST)
    @given(shapes)
    def holds(shape: dict) -> None:
        sizes = [shape["inputs"], *shape["hidden"], shape["outputs"] if LOSSES[loss].classes else 1]
        given_problem = problem(sizes, shape["batch"], activation, loss, shape["seed"], dtype)
        found = results(EAGER, *given_problem, activation, loss)
        limit = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        for name in EAGER:
            agreement = compare(found["matmul"], found[name])
            assert {row.limit for row in agreement.rows} == {limit}
            assert agreement.equal, f"matmul and {name}: {agreement}"
        for several in zip(*(list(itertools.chain.from_iterable(found[name][1])) for name in EAGER), strict=True):
            flat = torch.stack([one.reshape(1, -1) for one in several])  # a tensor of every version; all their pairs
            errors, _ = relative_error(*torch.broadcast_tensors(flat[:, None], flat[None]))
            assert errors.max() <= limit
        assert all(g.count_nonzero() for pair in found["matmul"][1] for g in pair), "a claim about zeros is none"

    holds()


@settings(derandomize=True, database=None, deadline=None, max_examples=20)
@given(inputs=st.integers(1, 40), width=st.integers(16, 48), batch=st.integers(1, 1000), seed=st.integers(0, 10**6))
def test_the_books_lines_give_the_same_for_the_books_network(inputs: int, width: int, batch: int, seed: int) -> None:
    for dtype in (torch.float32, torch.float64):
        given_problem = problem([inputs, width, 1], batch, seed=seed, dtype=dtype)
        found = results(["book", "classes", "matmul", "module"], *given_problem)
        assert all(compare(found["book"], other).equal for other in found.values())


@pytest.mark.parametrize(
    ("sizes", "activation", "loss", "dtype"),
    [
        ([4, 5, 1], "tanh", "mse", torch.float32),
        ([4, 5, 3], "relu", "cross_entropy", torch.float32),
        ([4, 5, 5, 1], "relu", "mse", torch.float32),
        ([4, 1], "relu", "mse", torch.float32),
        ([4, 5, 1], "relu", "mse", torch.float16),
    ],
)
def test_the_books_lines_say_which_network_they_know(
    sizes: list[int], activation: str, loss: str, dtype: torch.dtype
) -> None:
    """The other versions take all of these; float16 where the book's mask is float32."""
    given_problem = problem(sizes, 6, activation, loss, dtype=dtype)
    with pytest.raises(UsageError, match=f"version=book: .* not for {activation}, {loss}"):
        VERSIONS["book"](*given_problem, activation, loss)
    for name in ("matmul", "classes", "layer_function"):
        assert VERSIONS[name](*given_problem, activation, loss)[0].dtype == dtype


def finite_differences(parameters: Parameters, xb: Tensor, yb: Tensor, activation: str, loss: str) -> Parameters:
    """Every element by the five-point rule, (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h, error h^4."""
    row, objective, h = ACTIVATIONS[activation], LOSSES[loss], 1e-3
    copies = [(w.clone(), b.clone()) for w, b in parameters]
    found = [(torch.empty_like(w), torch.empty_like(b)) for w, b in parameters]
    for value, g in zip(itertools.chain(*copies), itertools.chain(*found), strict=True):
        flat, out = value.view(-1), g.view(-1)
        for k, kept in enumerate(flat.tolist()):
            f = []
            for shift in (h, -h, 2 * h, -2 * h):
                flat[k] = kept + shift
                f.append(plain_loss(copies, xb, yb, row, objective))
            flat[k] = kept
            out[k] = (8 * (f[0] - f[1]) - (f[2] - f[3])) / (12 * h)
    return found


def far_from_kinks(parameters: Parameters, xb: Tensor, activation: str) -> bool:
    """No preactivation within 0.02 of a kink: twice a step of 1e-3 moves none of them across."""
    row, z = ACTIVATIONS[activation], xb
    for w, b in parameters[:-1]:
        z = z @ w + b
        if any(bool(((z - kink).abs() < 0.02).any()) for kink in row.kinks):
            return False
        z = row.phi(z)
    return True


def small_problem(activation: str, loss: str, sizes: tuple[int, ...], batch: int) -> tuple[Parameters, Tensor, Tensor]:
    """The first seed that is far from kinks and has a unit alive in every layer."""
    full = [*sizes, 3 if LOSSES[loss].classes else 1]
    for seed in range(1000):
        parameters, xb, yb = problem(full, batch, activation, loss, seed)
        gradients = VERSIONS["autograd"](parameters, xb, yb, activation, loss)[1]
        if far_from_kinks(parameters, xb, activation) and all(w.count_nonzero() for w, _ in gradients):
            return parameters, xb, yb
    raise AssertionError("no seed is far from kinks")


def off(found: Parameters, differences: Parameters) -> float:
    """Largest |g - fd| of any element over the largest |fd| of its tensor."""
    pairs = zip(itertools.chain(*found), itertools.chain(*differences), strict=True)
    return max(float((g - fd).abs().max() / fd.abs().max()) for g, fd in pairs)


FD_LIMIT = 1e-8  # the rule's own error here is below 1e-9 (measured); a gradient of zeros is off by 1


@pytest.mark.parametrize(("sizes", "batch"), [((3,), 2), ((2, 4), 3), ((3, 4, 2), 1), ((2, 3, 3, 3), 2)])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", long_except(ROWS, "relu", "tanh", "gelu", "selu"))
def test_every_element_agrees_with_finite_differences(
    activation: str, loss: str, sizes: tuple[int, ...], batch: int
) -> None:
    given_problem = small_problem(activation, loss, sizes, batch)
    differences = finite_differences(*given_problem, activation, loss)
    for name, (_, gradients) in results(EAGER, *given_problem, activation, loss).items():
        assert off(gradients, differences) < FD_LIMIT, name


def test_wrong_gradients_are_caught_by_both_checks() -> None:
    """Zeros, 1 % off everywhere, and 1 % off in one element: an absolute tolerance of 0.01 would pass them all."""
    given_problem = small_problem("relu", "mse", (2, 4), 3)
    differences = finite_differences(*given_problem, "relu", "mse")
    loss, right = VERSIONS["matmul"](*given_problem)
    one_off = [(w.clone(), b) for w, b in right]
    one_off[0][0].view(-1)[right[0][0].abs().argmax()] *= 1.01
    for wrong, error in (
        ([(0 * w, 0 * b) for w, b in right], 1.0),
        ([(1.01 * w, 1.01 * b) for w, b in right], 0.01),
        (one_off, 0.001),
    ):
        assert off(wrong, differences) > 1e5 * FD_LIMIT
        agreement = compare((loss, wrong), (loss, right))
        assert not agreement.equal and agreement.relative_error >= error
        assert str(agreement).startswith("different: ")


@pytest.mark.parametrize("name", ["book", *EAGER])
def test_arguments_come_back_as_they_were(name: str) -> None:
    parameters, xb, yb = problem([4, 5, 1], 6)
    given_tensors = [*itertools.chain(*parameters), xb, yb]
    given_tensors[0].requires_grad_()
    xb.requires_grad_()
    before = [t.detach().clone() for t in given_tensors]
    with torch.no_grad():  # the mode of the caller is no excuse
        loss, gradients = VERSIONS[name](parameters, xb, yb)
    for t, copy in zip(given_tensors, before, strict=True):
        assert torch.equal(t, copy) and t.grad is None and not hasattr(t, "g")
    assert [t.requires_grad for t in given_tensors] == [True, False, False, False, True, False]
    assert not any(t.requires_grad for t in (loss, *itertools.chain(*gradients)))
    assert loss.shape == ()
    shapes = [(tuple(w.shape), tuple(b.shape)) for w, b in gradients]
    assert shapes == [(tuple(w.shape), tuple(b.shape)) for w, b in parameters]


@pytest.mark.parametrize("name", ["book", *EAGER])
def test_a_bound_step_can_be_repeated_and_sees_updates(name: str) -> None:
    """Nothing accumulates from step to step, and an in-place update of the parameters is seen."""
    parameters, xb, yb = problem([4, 5, 1], 6)
    step = VERSIONS[name].bind(parameters)
    first, second = step(xb, yb), step(xb, yb)
    assert compare(second, first).relative_error == 0
    parameters[0][0].mul_(2)
    assert compare(step(xb, yb), VERSIONS[name](parameters, xb, yb)).relative_error == 0
    assert not compare(step(xb, yb), first).equal


@pytest.mark.parametrize("name", EAGER)
def test_laws(name: str) -> None:
    """The batch's order changes nothing; a batch repeated has the same mean; a batch is the mean of its rows."""
    parameters, xb, yb = problem([4, 5, 5, 3], 6, "tanh", "cross_entropy")
    f = VERSIONS[name]
    loss, gradients = f(parameters, xb, yb, "tanh", "cross_entropy")
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert compare(f(parameters, xb[order], yb[order], "tanh", "cross_entropy"), (loss, gradients)).equal
    assert compare(f(parameters, xb.repeat(3, 1), yb.repeat(3), "tanh", "cross_entropy"), (loss, gradients)).equal
    rows = [f(parameters, xb[k : k + 1], yb[k : k + 1], "tanh", "cross_entropy") for k in range(6)]
    mean = [
        tuple(torch.stack([grads[layer][part] for _, grads in rows]).mean(0) for part in (0, 1)) for layer in range(3)
    ]
    assert compare((torch.stack([row[0] for row in rows]).mean(), mean), (loss, gradients)).equal  # type: ignore[arg-type]


@pytest.mark.parametrize("name", EAGER)
def test_column_targets_are_the_same_targets(name: str) -> None:
    parameters, xb, yb = problem([4, 5, 1], 6)
    assert compare(VERSIONS[name](parameters, xb, yb[:, None]), VERSIONS[name](parameters, xb, yb)).relative_error == 0


def test_overflow_is_data_and_nan_in_the_data_is_not() -> None:
    parameters, xb, yb = problem([4, 5, 1], 6, dtype=torch.float32)
    huge = [(w * 1e30, b) for w, b in parameters]
    for name in EAGER:
        loss, _ = VERSIONS[name](huge, xb, yb)
        assert not loss.isfinite()


P, X, Y = problem([4, 5, 1], 6)
PC, XC, YC = problem([4, 5, 3], 6, loss="cross_entropy")
NAN = torch.where(torch.arange(24).view(6, 4) == 3, torch.nan, X)
MISTAKES = {
    "no layers": (([], X, Y), "at least one layer"),
    "not a tensor": ((P, X.numpy(), Y), "ndarray"),
    "inputs do not fit": ((P, X[:, :3], Y), r"\(6, 3\).*\(N, 4\)"),
    "one row without batch": ((P, X[0], Y), r"\(4,\).*\(N, 4\)"),
    "layers do not fit": (([P[0], (P[1][0][:3], P[1][1])], X, Y), "5 units of layer 1"),
    "bias does not fit": (([(P[0][0], P[0][1][:4]), P[1]], X, Y), "layer 1: w"),
    "empty batch": ((P, X[:0], Y[:0]), "empty"),
    "integer inputs": ((P, X.long(), Y), "int64 where floats"),
    "integer weights": (([(w.long(), b) for w, b in P], X, Y), "int64 where floats"),
    "integer targets for mse": ((P, X, Y.long()), "int64 where floats"),
    "mixed dtypes": ((P, X.float(), Y), "float32"),
    "nan inputs": ((P, NAN, Y), "1 of 24 entries are nan"),
    "nan targets": ((P, X, NAN[:, 3]), "1 of 6 entries are nan"),
    "targets that broadcast": ((P, X, Y[None]), r"\(1, 6\).*\(6,\) or \(6, 1\)"),
    "a scalar target": ((P, X, Y[0]), r"shape \(\)"),
    "too few targets": ((P, X, Y[:5]), r"\(5,\)"),
    "several outputs for mse": ((PC, XC, Y), "must be 1"),
    "class too high": ((PC, XC, YC + 1, "relu", "cross_entropy"), "must be 0 to 2"),
    "class below zero": ((PC, XC, YC - 1, "relu", "cross_entropy"), "must be 0 to 2"),
    "classes as floats": ((PC, XC, YC.double(), "relu", "cross_entropy"), "must be int64"),
    "classes as a column": ((PC, XC, YC[:, None], "relu", "cross_entropy"), r"must be \(6,\)$"),
    "unknown activation": ((P, X, Y, "rleu"), "did you mean relu"),
    "unknown loss": ((P, X, Y, "relu", "mes"), "did you mean mse"),
}


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line(mistake: str, name: str) -> None:
    given_arguments, said = MISTAKES[mistake]
    with pytest.raises(UsageError, match=said) as caught:
        VERSIONS[name](*given_arguments)
    assert "\n" not in str(caught.value)


def test_agreement_says_what_it_found() -> None:
    parameters, xb, yb = problem([4, 5, 1], 6, dtype=torch.float32)
    loss, right = VERSIONS["matmul"](parameters, xb, yb)
    assert str(compare((loss, right), (loss, right))) == "equal bit for bit"
    nearly = [(w * (1 + 2e-7), b) for w, b in right]
    agreement = compare((loss, nearly), (loss, right))
    assert agreement.equal and 0 < agreement.ulp <= 4  # 2e-7 is 1.7 eps, and a unit is between half an eps and one
    assert str(agreement).startswith("equal up to rounding: relative error at most ")
    broken = [(w * torch.nan, b) for w, b in right]
    agreement = compare((loss, broken), (loss, right))
    assert not agreement.equal and str(agreement).startswith("different: 2 of 5 tensors\n  weight of layer 1")
    assert "20 entries of yours are not finite" in str(agreement)
    with pytest.raises(UsageError, match="yours has no weight of layer 2, bias of layer 2"):
        compare((loss, right[:1]), (loss, right))
    assert compare((loss.double(), right), (loss, right)).equal


@pytest.mark.parametrize("dtype", [resolve_dtype(name) for name in DTYPES])
def test_units_in_the_last_place(dtype: torch.dtype) -> None:
    """The unit is the gap to the next larger number, at powers of two and next to them, at 0 too."""
    numbers = torch.tensor([1.0, 1.5, 0.75, 2.0, 1024.0, 3e-3, 0.0], dtype=dtype)
    raw = numbers.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.element_size()])
    gaps = (raw + 1).view(dtype).double() - numbers.double()
    assert torch.equal(unit_in_last_place(numbers), gaps)
    assert torch.equal(unit_in_last_place(-numbers), gaps)


def test_the_outer_products_need_the_memory_that_they_say() -> None:
    """N I O numbers: at the book's 50,000 rows 7.8 GB, which a caller can know before it is too late."""
    sizes = [784, 50, 1]
    outer, matmul = (VERSIONS[name].memory(sizes, 50_000, 4) for name in ("outer", "matmul"))
    assert outer - matmul == 50_000 * 784 * 50 * 4
    assert matmul < 50_000 * 784 * 4


def test_unavailable_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(VERSIONS[name].unavailable() is None for name in EAGER)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("\nno compiler here\nand much more")

    engine_versions.why_not_compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    try:
        assert VERSIONS["compiled"].unavailable() == "no compiler here"
        with pytest.raises(UsageError, match="version=compiled: unavailable here: no compiler here"):
            VERSIONS["compiled"](*problem([4, 5, 1], 6))
    finally:
        engine_versions.why_not_compiled.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ROWS)
def test_compiled_agrees(activation: str, loss: str, dtype: torch.dtype) -> None:
    """Fused kernels round the forward differently: shallow here, where a difference cannot grow or flip a mask."""
    if reason := VERSIONS["compiled"].unavailable():
        pytest.skip(reason)
    for sizes, batch in (([6, 1], 1), ([7, 20, 1], 33), ([5, 16, 17, 18, 1], 64)):
        full = [*sizes[:-1], 4] if LOSSES[loss].classes else sizes
        given_problem = problem(full, batch, activation, loss, 5, dtype)
        agreement = compare(*(VERSIONS[name](*given_problem, activation, loss) for name in ("compiled", "autograd")))
        assert agreement.equal, str(agreement)
    step = VERSIONS["compiled"].bind(given_problem[0], activation, loss)
    assert compare(step(*given_problem[1:]), step(*given_problem[1:])).relative_error == 0


def test_memory_grows_with_batch_layers_and_the_size_of_a_number() -> None:
    """Values forward and backward, twice, grow with the batch; the gradients of 10 x 20 + 20 and 20 x 3 + 3 do not."""
    sizes = [10, 20, 3]
    for version in VERSIONS.values():
        one, two, none = (version.memory(sizes, batch) for batch in (5, 10, 0))
        assert two - one == one - none and none == 4 * (10 * 20 + 20 + 20 * 3 + 3)
        assert one - none == 4 * 5 * (4 * (20 + 3) + (200 if version.outer else 0))
        assert version.memory(sizes, 5, itemsize=8) == 2 * one
