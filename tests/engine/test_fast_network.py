"""The fast path against the readable one: the same losses, gradients and updates, for one network and for many."""

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

import initlab
from initlab.engine import fast_network as fast
from initlab.engine import mlp
from initlab.engine.fast_network import Engine
from initlab.engine.layer_memory import equal_neighbours
from initlab.engine.mlp import Parameters
from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.loss_table import LOSSES

# Runs of equal shapes at the beginning, in the middle, at the end, and none; no hidden layer at all.
SIZES = [(20, 7, 7, 7, 3), (7, 7, 7, 3), (9, 5, 5, 5), (20, 8, 6, 3), (5, 3), (3, 3, 3, 3)]


def drawn(sizes: tuple[int, ...], count: int, dtype: torch.dtype = torch.float64) -> Parameters:
    return [
        (torch.randn(count, i, o, dtype=dtype) * (2 / i) ** 0.5, 0.1 * torch.randn(count, o, dtype=dtype))
        for i, o in pairwise(sizes)
    ]


def batch_of(sizes: tuple[int, ...], count: int, rows: int = 12, loss: str = "cross_entropy") -> tuple[Tensor, Tensor]:
    x = torch.randn(count, rows, sizes[0], dtype=torch.float64)
    y = torch.randint(sizes[-1], (count, rows)) if loss == "cross_entropy" else torch.randn(count, rows).double()
    return x, y


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal up to the rounding of float64: sums of at most a few hundred terms in another order."""
    assert torch.linalg.vector_norm(ours - theirs) <= 1e-13 * torch.linalg.vector_norm(theirs)


def test_the_engine_is_the_readable_pass() -> None:
    for sizes, count, activation, pieces in product(SIZES, (1, 3), ACTIVATIONS, (256, 5)):
        parameters, (x, y) = drawn(sizes, count), batch_of(sizes, count)
        expected = mlp.forward_and_backward(parameters, x, y, ACTIVATIONS[activation], LOSSES["cross_entropy"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fast, "FEWEST_ROWS", pieces)
            patch.setattr(fast, "CACHE_BYTES", 1)
            losses, gradients = Engine(parameters, activation, lr=0.5, batch=12).gradients(x, y)
        close(losses, expected.loss)
        for ours, theirs in zip(gradients, expected.parameter_grads, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                close(a, b)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_step_is_gradient_descent(
    sizes: tuple[int, ...], activation: str, joint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "JOINT_ENTRIES", 10**9 if joint else 0)
    parameters, (x, y) = drawn(sizes, 3), batch_of(sizes, 3)
    engine = Engine(parameters, activation, lr=0.5, batch=12)
    assert len(engine.networks) == (1 if joint else 3)
    for _ in range(3):
        expected = mlp.forward_and_backward(parameters, x, y, ACTIVATIONS[activation], LOSSES["cross_entropy"])
        close(engine.step(x, y), expected.loss)
        parameters = [
            (w - 0.5 * dw, b - 0.5 * db) for (w, b), (dw, db) in zip(parameters, expected.parameter_grads, strict=True)
        ]
        for ours, theirs in zip(engine.parameters, parameters, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                close(a, b)


def test_a_regression() -> None:
    sizes = (4, 6, 1)
    parameters, (x, y) = drawn(sizes, 2), batch_of(sizes, 2, loss="mse")
    expected = mlp.forward_and_backward(parameters, x, y, ACTIVATIONS["relu"], LOSSES["mse"])
    losses, gradients = Engine(parameters, loss="mse").gradients(x, y)
    close(losses, expected.loss)
    close(gradients[0][0], expected.parameter_grads[0][0])


def test_every_network_may_have_its_learning_rate() -> None:
    sizes, rates = (6, 5, 5, 3), [0.1, 0.5, 0.0]
    parameters, (x, y) = drawn(sizes, 3), batch_of(sizes, 3)
    together = Engine(parameters, lr=rates)
    together.step(x, y)
    for k, rate in enumerate(rates):
        alone = Engine([(w[k : k + 1], b[k : k + 1]) for w, b in parameters], lr=rate)
        alone.step(x[k : k + 1], y[k : k + 1])
        for ours, theirs in zip(together.parameters, alone.parameters, strict=True):
            assert torch.equal(ours[0][k], theirs[0][0])
    assert torch.equal(together.parameters[0][0][2], parameters[0][0][2])


def test_what_it_was_given_stays_as_it_was() -> None:
    parameters, (x, y) = drawn((6, 5, 3), 2), batch_of((6, 5, 3), 2)
    kept = [w.clone() for w, _ in parameters]
    Engine(parameters).step(x, y)
    assert all(torch.equal(w, before) for (w, _), before in zip(parameters, kept, strict=True))


def test_a_dying_signal_is_data() -> None:
    parameters, (x, y) = drawn((6, 5, 5, 3), 1), batch_of((6, 5, 5, 3), 1)
    for w, _ in parameters[:2]:
        w.mul_(1e300)
    engine = Engine(parameters)
    engine.step(x, y)
    assert not engine.step(x, y).isfinite().any()


def test_as_many_learning_rates_as_networks() -> None:
    with pytest.raises(UsageError, match="lr: 2 learning rates for 3 networks"):
        Engine(drawn((6, 3), 3), lr=[0.1, 0.2])


def test_runs_cover_the_list() -> None:
    shapes = [(3, 3), (3, 3), (2, 3), (3, 3)]
    found = equal_neighbours(shapes)
    assert [k for r in found for k in range(r.start, r.stop)] == list(range(4))
    assert all(len({shapes[k] for k in range(r.start, r.stop)}) == 1 for r in found)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_layer_may_have_learning_rates_of_its_own(
    sizes: tuple[int, ...], joint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where neighbours of one shape differ too: each parameter moves by its own factor times the step it would make."""
    monkeypatch.setattr(fast, "JOINT_ENTRIES", 10**9 if joint else 0)
    parameters, (x, y) = drawn(sizes, 3), batch_of(sizes, 3)
    factors = [(0.5 * (k + 1), 1.5 - 0.25 * (k // 2)) for k in range(len(sizes) - 1)]
    engine = Engine(parameters, "tanh", lr=0.5, batch=12, factors=[factors] * 3)
    expected = mlp.forward_and_backward(parameters, x, y, ACTIVATIONS["tanh"], LOSSES["cross_entropy"]).parameter_grads
    engine.step(x, y)
    for after, before, grads, own in zip(engine.parameters, parameters, expected, factors, strict=True):
        for new, old, grad, factor in zip(after, before, grads, own, strict=True):
            close(new, old - 0.5 * factor * grad)
    mixed = Engine(parameters, "tanh", lr=0.5, batch=12, factors=[factors, [(1.0, 1.0)] * len(factors), factors])
    mixed.step(x, y)
    for (ours, _), (theirs, _), (plain, _) in zip(
        mixed.parameters, engine.parameters, stepped(parameters, x, y), strict=True
    ):
        close(ours[[0, 2]], theirs[[0, 2]])
        close(ours[1], plain[1])


def stepped(parameters: Parameters, x: Tensor, y: Tensor) -> Parameters:
    engine = Engine(parameters, "tanh", lr=0.5, batch=12)
    engine.step(x, y)
    return engine.parameters


def test_the_probe_watches_it_without_hooks() -> None:
    """The rows of every second step, and the very weights of an engine that nobody watches."""
    parameters, (x, y) = drawn((6, 5, 5, 3), 2), batch_of((6, 5, 5, 3), 2)
    watched, alone = Engine(parameters, "tanh"), Engine(parameters, "tanh")
    with initlab.probe(watched, seeds=[3, 4], every=2) as p:
        for _ in range(4):
            assert torch.equal(watched.step(x, y), alone.step(x, y))
    watched.step(x, y)
    alone.step(x, y)
    for ours, theirs in zip(watched.parameters, alone.parameters, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    rows = p.frame()
    assert sorted(rows["step"].unique()) == [0, 2] and set(rows["seed"]) == {3, 4}
    first = rows[(rows["step"] == 0) & (rows["tensor"] == "weight") & (rows["direction"] == "forward")]
    for layer, (w, _) in enumerate(parameters, start=1):
        found = first[first["layer"] == layer].set_index("seed")["rms"]
        for member, seed in enumerate((3, 4)):
            assert found[seed] == pytest.approx(float(w[member].square().mean().sqrt()), rel=1e-12)
