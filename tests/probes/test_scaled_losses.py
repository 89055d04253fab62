"""Losses that a gradient scaler multiplies beside losses that it does not: every row in the unit of its own loss.

The law: a loop with scalers has the rows of the loop without, number by number. Scales are powers of two, by which
float32 divides exactly.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import initlab
from tests.probes.by_hand import WORDS, X, mlp

Scaler = torch.amp.GradScaler
Loop = Callable[[nn.Module, torch.optim.Optimizer, Scaler], Any]
VALUES = ["rms", "std", "min", "max", "frac_zero"]


def losses(model: nn.Module) -> tuple[Tensor, Tensor]:
    out = model(X)
    return F.cross_entropy(out, torch.arange(12) % 3), out.square().mean()


def run(loop: Loop, enabled: bool, given: bool = True) -> tuple[pd.DataFrame, str]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = Scaler("cpu", init_scale=64.0, enabled=enabled)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with initlab.probe(model, optimizer=optimizer if given else None) as p:
            for _ in range(2):
                optimizer.zero_grad()
                loop(model, optimizer, scaler)
                scaler.step(optimizer)
                scaler.update()
    assert not p.frame().duplicated(WORDS).any()
    return p.frame(), " ".join(str(one.message) for one in caught)


def check_alike(left: pd.DataFrame, right: pd.DataFrame) -> None:
    """Scaled losses have other names in torch's graph, and nothing else."""
    words = [word for word in WORDS if word not in ("op", "part")]
    assert left[words].astype(str).values.tolist() == right[words].astype(str).values.tolist()
    np.testing.assert_allclose(left[VALUES], right[VALUES], rtol=1e-12)
    np.testing.assert_allclose(left["chance_loss"], right["chance_loss"], rtol=1e-6)  # a sum in float32


def one_after_the_other(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Scaler) -> None:
    first, second = losses(model)
    scaler.scale(first).backward(retain_graph=True)
    scaler.unscale_(optimizer)
    second.backward()


def the_other_first(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Scaler) -> None:
    first, second = losses(model)
    second.backward(retain_graph=True)
    optimizer.zero_grad()
    scaler.scale(first).backward()


def a_sum_of_scaled_ones(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Scaler) -> None:
    first, second = losses(model)
    (scaler.scale(first) / 4 + scaler.scale(second)).backward()


def several_at_once(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Scaler) -> None:
    torch.autograd.backward(scaler.scale(losses(model)))


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Scaler) -> None:
    one_after_the_other(model, optimizer, scaler)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Scaler) -> None:
    for _ in range(2):
        scaler.scale(losses(model)[0]).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def asked_for(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Scaler) -> None:
    parameters = list(model.parameters())
    for p, grad in zip(parameters, torch.autograd.grad(scaler.scale(losses(model)[1]), parameters), strict=True):
        p.grad = grad
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(parameters, 1e-3)


@pytest.mark.parametrize(
    "loop",
    [one_after_the_other, the_other_first, a_sum_of_scaled_ones, several_at_once, clipped, accumulated, asked_for],
)
@pytest.mark.parametrize("given", [True, False])
def test_a_loop_with_a_scaler_has_the_rows_of_the_loop_without(loop: Loop, given: bool) -> None:
    (scaled, _), (plain, _) = run(loop, True, given), run(loop, False, given)
    check_alike(scaled, plain)
    assert set(scaled["loss_scale"]) - {1.0} == {64.0} and set(plain["loss_scale"]) == {1.0}
    if loop is one_after_the_other:
        of_losses = scaled[(scaled["tensor"] == "loss") & (scaled["step"] == 0)]
        assert of_losses["loss_scale"].tolist() == [64.0, 1.0]


def test_gradients_that_sum_both_are_what_the_optimizer_gets() -> None:
    """Not divided before the second pass: the scaler divides both, and the gradient as found is shown so too."""

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Scaler) -> None:
        first, second = losses(model)
        scaler.scale(first).backward(retain_graph=True)
        second.backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    rows, _ = run(loop, True)
    model = mlp()
    first, second = losses(model)
    (first + second / 64).backward()
    raw = rows[(rows["op"] == "backward") & (rows["step"] == 0) & (rows["tensor"] == "weight")].set_index("name")
    for name in ("0", "2", "4"):
        grad = model.get_submodule(name).weight.grad
        assert isinstance(grad, Tensor)
        # two sums in float32, added in another order
        assert raw.loc[name, "rms"] == pytest.approx(float(grad.square().mean().sqrt()), rel=1e-5)


def test_a_sum_of_a_scaled_and_an_unscaled_loss_is_named() -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Scaler) -> None:
        first, second = losses(model)
        (scaler.scale(first) + second).backward()

    assert "no scale was divided out" in run(loop, True)[1]
    assert "no scale was divided out" not in run(loop, False)[1]


@pytest.mark.parametrize("watched", ["generator", "discriminator"])
def test_two_networks_with_a_scaler_each(watched: str) -> None:
    """The generator's loss comes through the discriminator: its scale is the generator's."""

    def gan(enabled: bool) -> pd.DataFrame:
        torch.manual_seed(0)
        nets = {"generator": nn.Linear(4, 6), "discriminator": copy.deepcopy(mlp())}
        optimizers = {name: torch.optim.SGD(net.parameters(), lr=0.1) for name, net in nets.items()}
        scales = {"generator": 64.0, "discriminator": 1024.0}
        scalers = {name: Scaler("cpu", init_scale=scale, enabled=enabled) for name, scale in scales.items()}
        z = torch.randn(12, 4)
        with initlab.probe(nets[watched], optimizer=optimizers[watched]) as p:
            for _ in range(2):
                for name in ("generator", "discriminator"):
                    for optimizer in optimizers.values():
                        optimizer.zero_grad()
                    fake = nets["generator"](z)
                    fake = fake.detach() if name == "discriminator" else fake
                    scalers[name].scale(nets["discriminator"](fake).square().mean()).backward()
                    scalers[name].step(optimizers[name])
                    scalers[name].update()
        return p.frame()

    check_alike(gan(True), gan(False))


def test_a_scaler_of_a_class_that_scales_itself() -> None:
    """As torch's scaler of sharded parameters does."""

    class Sharded(Scaler):
        def scale(self, outputs: Any) -> Any:
            return (outputs * super().scale(torch.ones(()))).type(outputs.dtype)

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Scaler) -> None:
        one_after_the_other(model, optimizer, scaler)

    before = Sharded.scale
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = Sharded("cpu", init_scale=64.0)
    with initlab.probe(model, optimizer=optimizer) as p:
        loop(model, optimizer, scaler)
        scaler.step(optimizer)
    plain, _ = run(one_after_the_other, False)
    check_alike(p.frame(), plain[plain["step"] == 0])
    assert Sharded.scale is before
