"""Loops of plain torch with more than one optimizer, model or batch a step: every row against hooks by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.probes.by_hand import X, mlp, once, snapshot, square, watch


@pytest.mark.parametrize("words", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_optimizers_of_every_implementation(kind: type[Optimizer], words: dict[str, bool]) -> None:
    watch(mlp(), lambda m, o: once(m, o, square), lambda m: [kind(m.parameters(), lr=0.01, **words)], steps=3).check()


def test_a_moving_average_of_the_weights() -> None:
    """The average is a model of its own that never steps; the watched one is not changed by being averaged."""
    averages: list[nn.Module] = []

    def step(model: nn.Module, optimizers: list[Optimizer]) -> Tensor:
        loss = once(model, optimizers, square)
        if len(averages) == 0:
            averages.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)))
        averages[0].update_parameters(model)
        with torch.no_grad():
            averages[0](X)
        return loss

    seen = watch(mlp(), step, steps=3)
    seen.check()
    averaged = snapshot(AveragedModel(mlp()), X, None, lambda out: out.square().mean())
    averaged.check()


@pytest.mark.parametrize("functional", [False, True])
def test_twins_that_share_their_weights(functional: bool) -> None:
    """Called twice before one backward pass: two calls, one gradient of the weights."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 8), nn.Identity() if functional else nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            return F.relu(out) if functional else out

    torch.manual_seed(0)
    seen = watch(Net(), lambda m, o: once(m, o, lambda net: (net(X) - net(X.flip(0))).square().mean()))
    seen.check()
    first = seen.rows[(seen.rows["name"] == "body.0") & (seen.rows["tensor"] == "preactivation")]
    assert set(first["call"]) == {0, 1}


def test_accumulated_gradients_belong_to_one_step() -> None:
    def step(model: nn.Module, optimizers: list[Optimizer]) -> Tensor:
        optimizers[0].zero_grad()
        losses = []
        for part in X.chunk(3):
            losses.append(model(part).square().mean() / 3)
            losses[-1].backward()
        optimizers[0].step()
        return torch.stack(losses)

    seen = watch(mlp(), step)
    seen.check()
    assert set(seen.rows.loc[seen.rows["name"] == "4", "call"]) == {0, 1, 2}


class Teaching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = mlp().requires_grad_(False), mlp()


@pytest.mark.parametrize("frozen", ["no_grad", "requires_grad"])
def test_a_frozen_teacher(frozen: str) -> None:
    """Under `no_grad` its passes are none of a training step's, which is said; else its outputs have rows."""

    def loss(model: nn.Module) -> Tensor:
        with torch.set_grad_enabled(frozen != "no_grad"):
            wanted = model.teacher(X)
        return F.kl_div(model.student(X).log_softmax(-1), wanted.softmax(-1), reduction="batchmean")

    seen = watch(Teaching(), lambda m, o: once(m, o, loss))
    seen.check()
    weights = seen.rows[seen.rows["tensor"].isin(["weight", "bias"]) & seen.rows["name"].str.startswith("teacher")]
    assert set(weights["direction"]) == {"forward"}
    assert "never called" not in seen.said


def test_an_adversarial_pair_with_a_gradient_penalty() -> None:
    """Two phases, two optimizers, a gradient of a gradient: each phase is a step."""
    torch.manual_seed(0)
    pair = nn.ModuleDict({"maker": mlp(), "judge": nn.Sequential(nn.Linear(3, 8), nn.Softplus(), nn.Linear(8, 1))})

    def make(model: nn.Module) -> list[Optimizer]:
        return [SGD(model[name].parameters(), 0.05) for name in ("judge", "maker")]

    def step(model: nn.Module, optimizers: list[Optimizer]) -> Tensor:
        turn[0] += 1
        if turn[0] % 2:
            model.zero_grad()
            fake = model["maker"](X).detach().requires_grad_()
            out = model["judge"](fake)
            (slope,) = torch.autograd.grad(out.sum(), fake, create_graph=True)
            loss = out.mean() + (slope.norm(dim=1) - 1).square().mean()
            loss.backward()
            optimizers[0].step()
        else:
            model.zero_grad()
            loss = -model["judge"](model["maker"](X)).mean()
            loss.backward()
            optimizers[1].step()
        return loss

    turn = [0]
    watch(pair, step, make, steps=4).check()


def test_updates_by_hand_need_no_optimizer() -> None:
    def step(model: nn.Module, optimizers: list[Optimizer]) -> Tensor:
        loss = square(model)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= 0.1 * g
        return loss

    watch(mlp(), step, given=False).check()


def test_a_model_that_shares_its_optimizer_with_another() -> None:
    torch.manual_seed(0)
    other = nn.Linear(3, 2)

    def make(model: nn.Module) -> list[Optimizer]:
        return [SGD([*model.parameters(), *other.parameters()], 0.1)]

    watch(mlp(), lambda m, o: once(m, o, square), make).check()


def test_one_optimizer_steps_more_often_than_the_other() -> None:
    """The head with each batch, the body with every second, whose gradients add up meanwhile."""
    turn = [0]

    def make(model: nn.Module) -> list[Optimizer]:
        turn[0] = 0
        return [SGD(model[4].parameters(), 0.1), SGD(model[:4].parameters(), 0.1)]

    def step(model: nn.Module, optimizers: list[Optimizer]) -> Tensor:
        turn[0] += 1
        optimizers[0].zero_grad()
        loss = square(model)
        loss.backward()
        optimizers[0].step()
        if turn[0] % 2 == 0:
            optimizers[1].step()
            optimizers[1].zero_grad()
        return loss

    watch(mlp(), step, make, steps=4).check()
