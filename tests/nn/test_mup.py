"""The maximal update parametrization: its table, and that training does not see the width under it, but does else."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from initlab.engine import mlp
from initlab.engine.fast_network import Engine
from initlab.engine.mlp import Parameters
from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import Rule, draw, rule
from initlab.nn.loss_table import LOSSES
from initlab.nn.mup import learning_rates
from initlab.tasks.ensemble.networks import draw_trained
from initlab.tasks.twins import parameter_groups

WIDTHS = (64, 1024)
STEPS = 3


def test_the_table_of_the_paper() -> None:
    """Table 3 at four times the base width: input, hidden, output; (weights, biases)."""
    sizes, four = [7, 200, 200, 3], rule("mup", base_width=50)
    assert learning_rates(four, sizes, adaptive=False) == [(4, 4), (1, 4), (1 / 4, 1)]
    assert learning_rates(four, sizes, adaptive=True) == [(1, 1), (1 / 4, 1), (1 / 4, 1)]
    for standard in (rule("kaiming"), rule("mup", base_width=200)):
        assert {*learning_rates(standard, sizes, True), *learning_rates(standard, sizes, False)} == {(1, 1)}
    assert learning_rates(four, [7, 3], adaptive=True) == [(1, 1)]  # nothing is hidden, nothing grows


def test_the_output_weights_shrink_with_the_width() -> None:
    x = torch.zeros(2, 5, 7)
    wide = {
        name: draw_trained([rule(name)] * 2, "relu", [7, 200, 200, 3], [0, 1], x).parameters
        for name in ("mup", "kaiming")
    }
    for k, factor in enumerate((1.0, 1.0, math.sqrt(50 / 200))):
        torch.testing.assert_close(wide["mup"][k][0], factor * wide["kaiming"][k][0], rtol=1e-6, atol=0)
    base = [draw_trained([rule(name)], "relu", [7, 50, 3], [0], x[:1]).parameters[1][0] for name in ("mup", "kaiming")]
    assert torch.equal(*base)
    alone = draw_trained([rule("mup")], "relu", [7, 3], [0], x[:1]).parameters[0][0]
    assert torch.equal(alone, draw(rule("kaiming"), "relu", (7, 3), [0], 1)[0])


def test_a_mistake_is_one_line() -> None:
    with pytest.raises(UsageError, match="must be at least 0"):
        rule("mup", base_width=-1)


# --- the coordinate check of Yang et al. 2022 -------------------------------------------------------------------------


def rule_of(init: str) -> Rule:
    return rule(init, base_width=WIDTHS[0] if init == "mup" else 0)


def started(width: int, init: str, networks: int = 4) -> tuple[Parameters, Tensor, Tensor, list[int]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 32, 10, generator=generator, dtype=torch.float64).expand(networks, -1, -1)
    y = torch.randint(5, (1, 32), generator=generator).expand(networks, -1)
    sizes = [10, width, width, 5]
    return draw_trained([rule_of(init)] * networks, "tanh", sizes, range(networks), x).parameters, x, y, sizes


def by_sgd(width: int, init: str) -> list[float]:
    before, x, y, sizes = started(width, init)
    factors = [learning_rates(rule_of(init), sizes, adaptive=False)] * len(x)
    engine = Engine(before, "tanh", lr=0.2, batch=32, factors=factors)
    for _ in range(STEPS):
        engine.step(x, y)
    return moved(before, engine.parameters, x)


def by_adam(width: int, init: str) -> list[float]:
    before, x, y, sizes = started(width, init)
    after = [(w.clone(), b.clone()) for w, b in before]
    groups = parameter_groups(
        [p for pair in after for p in pair], 0.01, learning_rates(rule_of(init), sizes, adaptive=True)
    )
    optimizer = torch.optim.Adam(groups)
    for _ in range(STEPS):
        seen = mlp.forward_and_backward(after, x, y, ACTIVATIONS["tanh"], LOSSES["cross_entropy"])
        for pair, grads in zip(after, seen.parameter_grads, strict=True):
            for p, g in zip(pair, grads, strict=True):
                p.grad = g
        optimizer.step()
    return moved(before, after, x)


def moved(before: Parameters, after: Parameters, x: Tensor) -> list[float]:
    """rms change of every layer's preactivations, the outputs last."""
    old, new = (mlp.forward(parameters, x, ACTIVATIONS["tanh"])[0] for parameters in (before, after))
    return [float((a - b).square().mean().sqrt()) for a, b in zip(new, old, strict=True)]


def exponents(train: Callable[[int, str], list[float]], init: str) -> list[float]:
    """Power of the width with which the change of every layer grows, from the narrowest to the widest."""
    narrow, wide = (train(width, init) for width in (WIDTHS[0], WIDTHS[-1]))
    return [math.log(b / a) / math.log(WIDTHS[-1] / WIDTHS[0]) for a, b in zip(narrow, wide, strict=True)]


@pytest.mark.parametrize(("train", "hidden"), [(by_sgd, 0.0), (by_adam, 0.5)])
def test_coordinates_move_alike_at_every_width_under_mup_and_not_else(
    train: Callable[[int, str], list[float]], hidden: float
) -> None:
    """Exponents measured over four networks: mup within 0.1 of 0; else the outputs of SGD 0.6, of Adam 0.8.

    In the limit they are 0; and 1/2 or 1 for what grows at the start, before the loss bounds it.
    """
    assert max(abs(p) for p in exponents(train, "mup")) < 0.15
    standard = exponents(train, "kaiming")
    assert standard[-1] > 0.4 and standard[1] > hidden
