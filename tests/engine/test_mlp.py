import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from initlab.engine import mlp
from initlab.engine.mlp import Parameters, Pass
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import RULES, draw, rule
from initlab.nn.loss_table import LOSSES
from tests.conftest import ROWS

CASES = [(activation, loss) for activation in ROWS for loss in LOSSES]


def network(
    activation: str, sizes: tuple[int, ...] = (5, 4, 3), seeds: tuple[int, ...] = (0, 1), init: str = "torch_default"
) -> Parameters:
    pairs = pairwise(sizes)
    return [
        draw(rule(init), activation, shape, seeds, layer, torch.float64) for layer, shape in enumerate(pairs, start=1)
    ]


def batch(loss: str, out: int, members: int = 2, n: int = 6, fan_in: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(members, n, fan_in, dtype=torch.float64, generator=generator)
    if LOSSES[loss].classes:
        return x, torch.randint(out, (members, n), generator=generator)
    return x, torch.randn(members, n, dtype=torch.float64, generator=generator)


def by_hand(parameters: Parameters, activation: str, loss: str, xb: Tensor, yb: Tensor) -> Pass:
    return mlp.forward_and_backward(parameters, xb, yb, ACTIVATIONS[activation], LOSSES[loss])


def sizes_for(loss: str, hidden: tuple[int, ...] = (4,)) -> tuple[int, ...]:
    return (5, *hidden, 3 if LOSSES[loss].classes else 1)


@pytest.mark.parametrize(("activation", "loss"), CASES)
def test_gradients_against_finite_differences(activation: str, loss: str) -> None:
    """Every element, in float64: central differences of step h err by h^2, here 1e-10 of the gradient's size."""
    parameters = network(activation, sizes_for(loss), seeds=(3,))
    xb, yb = batch(loss, 3, members=1)
    seen = by_hand(parameters, activation, loss, xb, yb)
    h = 1e-5
    for pair, grads in zip(parameters, seen.parameter_grads, strict=True):
        for p, g in zip(pair, grads, strict=True):
            numeric = torch.empty_like(g).flatten()
            for k in range(p.numel()):
                flat, kept = p.view(-1), p.view(-1)[k].item()
                losses = []
                for step in (h, -h):
                    flat[k] = kept + step
                    losses.append(float(by_hand(parameters, activation, loss, xb, yb).loss))
                flat[k] = kept
                numeric[k] = (losses[0] - losses[1]) / (2 * h)
            assert (numeric - g.flatten()).norm() <= 1e-7 * g.norm()
            assert (numeric - 1.01 * g.flatten()).norm() > 1e-3 * g.norm()  # off by 1 % is seen


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize(("activation", "loss"), CASES)
def test_pass_equals_the_twin(activation: str, loss: str, depth: int) -> None:
    """Values and gradients of every layer against torch's own module and autograd."""
    parameters = network(activation, sizes_for(loss, (8,) * depth))  # wide enough that no layer is dead
    xb, yb = batch(loss, 3)
    hand = by_hand(parameters, activation, loss, xb, yb)
    twins = [mlp.twin(parameters, member, ACTIVATIONS[activation]) for member in range(2)]
    losses, out = mlp.run_twins(twins, xb, yb, LOSSES[loss])
    for k, model in enumerate(twins):
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        module = mlp.twin_pass(model, list(model.parameters()), xb[k], yb[k], LOSSES[loss])
        assert torch.equal(out[k], module.out) and torch.equal(losses[k], module.loss)
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True) if p.grad is not None)
        compared = [
            (hand.loss, module.loss),
            *zip(hand.preactivations, module.preactivations, strict=True),
            *zip(hand.activations, module.activations, strict=True),
            *zip(hand.preactivation_grads, module.preactivation_grads, strict=True),
            *zip(hand.activation_grads, module.activation_grads, strict=True),
            *((a, b) for ours, theirs in zip(hand.parameter_grads, module.parameter_grads, strict=True)
              for a, b in zip(ours, theirs, strict=True)),
        ]  # fmt: skip
        for ours, theirs in compared:
            assert (ours[k] - theirs).norm() <= 1e-13 * theirs.norm()
            assert theirs.norm() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_ensemble_equals_its_members(loss: str) -> None:
    parameters = network("tanh", sizes_for(loss), seeds=(0, 1, 2))
    xb, yb = batch(loss, 3, members=3)
    whole = by_hand(parameters, "tanh", loss, xb, yb)
    for k in range(3):
        alone = by_hand([(w[k], b[k]) for w, b in parameters], "tanh", loss, xb[k], yb[k])
        torch.testing.assert_close(whole.loss[k], alone.loss, rtol=1e-14, atol=0)
        for (w, b), (w_alone, b_alone) in zip(whole.parameter_grads, alone.parameter_grads, strict=True):
            torch.testing.assert_close(w[k], w_alone, rtol=1e-12, atol=1e-17)
            torch.testing.assert_close(b[k], b_alone, rtol=1e-12, atol=1e-17)


def test_no_autograd_by_hand() -> None:
    """Nothing records a graph even where autograd is on, and inference mode changes nothing."""
    parameters = network("relu")
    xb, yb = batch("cross_entropy", 3)
    seen = by_hand(parameters, "relu", "cross_entropy", xb, yb)
    tensors = [seen.loss, *seen.preactivations, *(g for pair in seen.parameter_grads for g in pair)]
    assert all(t.grad_fn is None and not t.requires_grad for t in tensors)
    with torch.inference_mode():
        again = by_hand(parameters, "relu", "cross_entropy", xb, yb)
    assert torch.equal(seen.parameter_grads[0][0], again.parameter_grads[0][0])


def test_batch_of_one_keeps_its_shape() -> None:
    parameters = network("relu", (5, 4, 1), seeds=(0,))
    xb, yb = batch("mse", 1, members=1, n=1)
    seen = by_hand(parameters, "relu", "mse", xb, yb)
    assert seen.loss.shape == (1,) and seen.parameter_grads[0][0].shape == (1, 5, 4)


def test_permuting_the_batch_changes_nothing() -> None:
    parameters = network("silu")
    xb, yb = batch("cross_entropy", 3)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    a = by_hand(parameters, "silu", "cross_entropy", xb, yb)
    b = by_hand(parameters, "silu", "cross_entropy", xb[:, order], yb[:, order])
    torch.testing.assert_close(a.parameter_grads[0][0], b.parameter_grads[0][0], rtol=1e-12, atol=1e-16)


def test_cross_entropy_of_equal_logits_is_log_of_the_classes() -> None:
    parameters = [(torch.zeros(1, 5, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64))]
    xb, yb = batch("cross_entropy", 3, members=1)
    assert float(by_hand(parameters, "relu", "cross_entropy", xb, yb).loss) == pytest.approx(math.log(3), rel=1e-15)


@pytest.mark.parametrize("init", RULES)
def test_twins_hold_the_same_weights(init: str) -> None:
    parameters = network("relu", init=init)
    twins = [mlp.twin(parameters, member, ACTIVATIONS["relu"]) for member in range(2)]
    for (w, b), (w_twin, b_twin) in zip(parameters, mlp.twin_parameters(twins), strict=True):
        assert torch.equal(w, w_twin) and torch.equal(b, b_twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ROWS)
def test_at_the_twins_own_memory_both_forward_passes_are_one(activation: str, dtype: torch.dtype) -> None:
    """Bit for bit, in shapes where another layout of the weights rounds otherwise: no ReLU mask can differ."""
    generator = torch.Generator().manual_seed(1)
    xb = torch.randn(2, 33, 50, generator=generator, dtype=dtype)
    yb = torch.randint(10, (2, 33), generator=generator)
    parameters = [
        draw(rule("kaiming"), activation, shape, (0, 1), layer, dtype)
        for layer, shape in enumerate(pairwise((50, 37, 41, 10)), start=1)
    ]
    model, loss = mlp.twin(parameters, 1, ACTIVATIONS[activation]), LOSSES["cross_entropy"]
    pairs = mlp.arrange_pairs([p.detach() for p in model.parameters()])
    hand = mlp.forward_and_backward(pairs, xb[1], yb[1], ACTIVATIONS[activation], loss)
    module = mlp.twin_pass(model, list(model.parameters()), xb[1], yb[1], loss)
    for ours, theirs in zip(
        [*hand.preactivations, *hand.activations], [*module.preactivations, *module.activations], strict=True
    ):
        assert torch.equal(ours, theirs)
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    for pair, other in zip(hand.parameter_grads, module.parameter_grads, strict=True):
        for ours, theirs in zip(pair, other, strict=True):
            assert (ours - theirs).norm() <= limit * theirs.norm()
