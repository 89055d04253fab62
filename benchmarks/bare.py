"""The same work unwatched, in the ordinary and fastest form: what everything else is divided by."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from benchmarks.nets import LR, Net, batch, parameters
from benchmarks.race import Contestant
from initlab.engine import mlp
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import rule
from initlab.tasks import phase
from initlab.tasks.data import load
from initlab.tasks.ensemble.batches import batches, find_first_step
from initlab.tasks.ensemble.device import Where
from initlab.tasks.ensemble.training import Training


def module(net: Net, seed: int = 0, device: str = "cpu") -> nn.Sequential:
    """nn.Linear, nn.ReLU, ..., nn.Linear with the network's weights, a copy of its own."""
    return mlp.twin(parameters(net, [seed], device), 0, ACTIVATIONS["relu"])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR)


def module_step(net: Net, seed: int = 0, device: str = "cpu") -> Contestant:
    """A step as everybody writes it; gives the loss."""
    model = module(net, seed, device)
    return Contestant(step_of(model, sgd(model), *_own(net, seed, device)))


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, xb: Tensor, yb: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(model(xb), yb)
        torch.autograd.backward(loss)
        optimizer.step()
        return loss.detach()

    return step


def loop_over_modules(net: Net, seeds: Sequence[int], device: str = "cpu") -> Contestant:
    """An ensemble as everybody trains it: a step of one, then of the next; gives the losses."""
    steps = [module_step(net, seed, device).call for seed in seeds]
    return Contestant(lambda: [step() for step in steps])


def two_trainings(depth: int, width: int, batch: int, steps: int, seeds: Sequence[int] = (0,)) -> Contestant:
    """The same modules trained twice on the batches of `task=train`, as everybody writes it; gives the losses."""
    digits, training = load("digits"), Training(depth, width, batch, steps)

    def both() -> list[Tensor]:
        losses = []
        for _ in range(2):
            starts = [find_first_step(digits, training, rule("kaiming"), "relu", seed, Where()) for seed in seeds]
            models = [
                mlp.twin([(w[None], b[None]) for w, b in one.parameters], 0, ACTIVATIONS["relu"]) for one in starts
            ]
            optimizers = list(map(sgd, models))
            for xb, yb in batches(digits, training, seeds, Where()):
                losses += [step_of(*one)() for one in zip(models, optimizers, xb, yb, strict=True)]
        return losses

    return Contestant(both, steps * len(seeds))


def module_backward(net: Net) -> Contestant:
    """Loss (mse) and the gradients of the parameters, none of the input's."""
    model = module(net)
    xb, yb = _own(net, 0, "cpu")

    def one_pass() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(mse_loss(model(xb).squeeze(-1), yb))
        return [p.grad for p in model.parameters() if p.grad is not None]

    return Contestant(one_pass)


def stack_pass(weights: Sequence[Tensor], x: Tensor) -> Contestant:
    """Matmul and in-place ReLU alone, 2-d as a single network is; gives the last activation (N, O)."""
    matrices, first = [w[0] for w in weights], x[0]

    def forward() -> Tensor:
        out = first
        for w in matrices:
            out = (out @ w).relu_()
        return out

    return Contestant(forward)


def mean_and_std(rows: int, units: int, device: str) -> Contestant:
    """What the chapter logs of a tensor, on its device; gives both."""
    x = torch.randn(rows, units, device=device)
    return Contestant(lambda: torch.stack([x.mean(), x.std()]))


def networks_one_by_one(count: int, depth: int, width: int, batch: int, fresh: bool = False) -> Contestant:
    """Tanh networks of a plane, each alone, looked at in the plane's layers; q and mean cosine of the last."""
    scale = width**-0.5
    layers, slopes = (frozenset(some) for some in phase.measured_layers("sigma", depth))

    def drawn() -> list[tuple[Tensor, Tensor]]:
        return [(torch.randn(width, width).mul_(scale), torch.randn(width)) for _ in range(depth)]

    shared, first = drawn(), torch.randn(batch, width)

    def network(sw: float, sb: float) -> tuple[Tensor, Tensor]:
        out, scaled = first, torch.tensor(sw)
        for layer, (w, b) in enumerate(drawn() if fresh else shared, start=1):
            z = torch.addcmul(b * sb, out @ w, scaled)
            out = torch.tanh(z)
            if layer in layers:
                unit = z / z.norm(dim=-1, keepdim=True)
                found = z.square().mean(), ((unit @ unit.T).sum() - batch) / (batch * (batch - 1))
            if layer in slopes:
                torch.stack([z.mean(), (1 - out * out).square().mean()])
        return found

    def one_after_the_other() -> list[tuple[Tensor, Tensor]]:
        with torch.inference_mode():
            return [network(0.5 + 2.5 * k / count, k / count) for k in range(count)]

    return Contestant(one_after_the_other, count)


def _own(net: Net, seed: int, device: str) -> tuple[Tensor, Tensor]:
    xb, yb = batch(net, [seed], device)
    return xb[0], yb[0]
