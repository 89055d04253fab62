"""Planted situations: a network, a loop and one question whose answer is known, computed by hand in float64.

A place in a network is a module by its dotted name, or the n-th call of a function of torch inside of the network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.utils.checkpoint import checkpoint

Optimizers = Callable[[nn.Module], list[Optimizer]]


def one_optimizer(model: nn.Module) -> list[Optimizer]:
    return [SGD(model.parameters(), 0.001)]


class Place(NamedTuple):
    """Where to look."""

    module: str = ""
    function: str = ""
    nth: int = 0


@dataclass(frozen=True)
class Situation:
    """What is planted: `question` is a kind of answer, `place` where it is asked, `truth` the answer."""

    name: str
    question: str
    place: Place
    build: Callable[[], nn.Module]
    truth: Callable[[nn.Module, Tensor], float | str]
    optimizers: Optimizers = one_optimizer
    scale: float = 1.0

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()

    def answer(self) -> float | str:
        return self.truth(self.model(), batch())


def batch() -> Tensor:
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


def loss_of(out: Tensor) -> Tensor:
    return out.square().sum()


def train_step(
    model: nn.Module, optimizers: Sequence[Optimizer], scale: float, call: Callable[[Tensor], Tensor] | None = None
) -> None:
    """One step; `call` stands for the model where a tool wants to call it itself."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
    for optimizer in optimizers:
        optimizer.zero_grad()
    torch.autograd.backward(scaler.scale(loss_of((call or model)(batch()))))
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def std(x: Tensor) -> float:
    return float(x.detach().double().std(correction=0))


class Around(nn.Module):
    """Two layers and whatever stands between them."""

    def __init__(self, function: Callable[[Tensor], Tensor], bias: float = 0.0) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(8, 8), nn.Linear(8, 2), function
        with torch.no_grad():
            self.first.bias[:2] = bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.function(self.first(x)))
        return out


class HandConvolution(nn.Module):
    """Its weight is its own; two of eight channels are dead."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(8, 1, 3) / 2), nn.Linear(8, 2)
        self.bias = nn.Parameter(torch.tensor([-99.0, -99, 0, 0, 0, 0, 0, 0]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(F.conv1d(x[:, None], self.weight, self.bias, padding=1)).mean(-1))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.body(self.norm(x)))


class Residual(nn.Module):
    """Six pre-norm blocks, whose sums nobody normalizes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block() for _ in range(6)]), nn.Linear(8, 2)

    def stream(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.stream(x))
        return out


class Attention(nn.Module):
    """Softmax over logits that are far too large."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def logits(self, x: Tensor) -> Tensor:
        found: Tensor = 30 * self.q(x) @ self.k(x).mT
        return found

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.logits(x).softmax(-1) @ self.v(x)
        return out


class Root(nn.Module):
    """The third layer takes the root of what may be negative."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.third(self.second(self.first(x)).sqrt()))
        return out


class Checked(nn.Module):
    """A reentrant checkpoint in the middle; made in another order than run."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.body, self.first = nn.Linear(8, 2), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(checkpoint(self.body, self.first(x), use_reentrant=True))
        return out


class Idle(Around):
    def __init__(self) -> None:
        super().__init__(F.relu)
        self.unused = nn.Linear(8, 8)


def two_optimizers(model: nn.Module) -> list[Optimizer]:
    first, last = model.get_submodule("first"), model.get_submodule("last")
    return [SGD(first.parameters(), 0.001), SGD(last.parameters(), 0.0001)]


def only_last(model: nn.Module) -> list[Optimizer]:
    return [SGD(model.get_submodule("last").parameters(), 0.001)]


def chain(activation: nn.Module, bias: float = 0.0) -> Callable[[], nn.Module]:
    return lambda: Around(activation, bias)


def dead_share(model: nn.Module, x: Tensor) -> float:
    first, function = model.get_submodule("first"), getattr(model, "function", F.relu)
    return float((function(first(x)) == 0).all(0).double().mean())


def output_gradient(model: nn.Module, x: Tensor) -> float:
    """rms of d loss / d (output of the layer `first`), of the loss without its scale."""
    z = model.get_submodule("first")(x).detach().requires_grad_()
    loss = loss_of(model.get_submodule("last")(F.relu(z)))
    return rms(torch.autograd.grad(loss, z)[0])


def update_ratio(model: nn.Module, x: Tensor) -> float:
    weight = model.get_parameter("last.weight")
    (gradient,) = torch.autograd.grad(loss_of(model(x)), weight)
    return rms(0.0001 * gradient) / rms(weight)


def saturated_tanh() -> nn.Module:
    """Half of the units at +-9, where tanh is flat; the others so small that it is not."""
    model = Around(nn.Tanh())
    with torch.no_grad():
        model.first.weight.mul_(0.01)
        model.first.bias.copy_(torch.tensor([9.0, -9, 9, -9, 0, 0, 0, 0]))
    return model


RELU = Place("", "relu")
SITUATIONS: tuple[Situation, ...] = (
    Situation(
        "std behind a Linear", "std", Place("first"), chain(nn.ReLU()),
        lambda m, x: std(m.get_submodule("first")(x)),
    ),
    Situation("gradient behind a Linear", "gradient", Place("first"), chain(nn.ReLU()), output_gradient),
    Situation("dead units, nn.ReLU", "dead", Place("function"), chain(nn.ReLU(), -99.0), dead_share),
    Situation("dead units, F.relu", "dead", RELU, lambda: Around(F.relu, -99.0), dead_share),
    Situation("dead units, convolution by hand", "dead", RELU, HandConvolution, lambda m, x: 0.25),
    Situation(
        "std of a residual stream", "std", Place("", "add", 5), Residual,
        lambda m, x: std(m.stream(x)) if isinstance(m, Residual) else float("nan"),
    ),
    Situation(
        "std of logits of a softmax", "logits", Place("", "softmax"), Attention,
        lambda m, x: std(m.logits(x)) if isinstance(m, Attention) else float("nan"),
    ),
    Situation("saturated share, nn.Tanh", "saturated", Place("function"), saturated_tanh, lambda m, x: 0.5),
    Situation(
        "saturated share, F.leaky_relu 0.2", "saturated", Place("", "leaky_relu"),
        lambda: Around(lambda z: F.leaky_relu(z, 0.2)), lambda m, x: 0.0,
    ),
    Situation("gradient, loss times 1024", "gradient", Place("first"), chain(nn.ReLU()), output_gradient, scale=1024.0),
    Situation(
        "update over weight, 2nd optimizer", "ratio", Place("last"), lambda: Around(F.relu), update_ratio,
        two_optimizers,
    ),
    Situation(
        "layer that no optimizer holds", "not updated", Place(), lambda: Around(F.relu), lambda m, x: "first", only_last
    ),
    Situation("layer where nan is born", "nan", Place(), Root, lambda m, x: "output of sqrt"),
    Situation("layers in order, checkpointed", "order", Place(), Checked, lambda m, x: "first body last"),
    Situation("module never called", "uncalled", Place(), Idle, lambda m, x: "unused"),
)  # fmt: skip
