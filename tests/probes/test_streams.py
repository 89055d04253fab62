"""Which sums are residual: of what a block was given and something else made of it, however they are written."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import initlab
from tests.probes.by_hand import X, differences, numbers


class Angles(nn.Module):
    """Gives what rotates; it has rows of its own."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.linspace(0, 1, x.numel()).view_as(x)
        return angle.cos(), angle.sin()


class Block(nn.Module):
    """Two layers, a scale and a table, used as the test says."""

    def __init__(self, function: Callable[["Block", Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.g, self.table = nn.Linear(6, 6), nn.Linear(6, 6), nn.Embedding(4, 6)
        self.angles = Angles()
        self.scale, self.function = nn.Parameter(torch.full((6,), 0.5)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def highway(b: Block, x: Tensor) -> Tensor:
    gate = torch.sigmoid(b.g(x))
    return gate * F.relu(b.f(x)) + (1 - gate) * x


def quantize(b: Block, x: Tensor) -> Tensor:
    found = b.table(x.detach()[:, 0].long().abs() % 4)
    return x + (found - x).detach()


def noise_without_gradient(b: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        more = 2 * x + 1
    return x + more


def rotate(b: Block, x: Tensor) -> Tensor:
    angle = torch.linspace(0, 1, 6)
    return x * angle.cos() + torch.cat([-x[:, 3:], x[:, :3]], -1) * angle.sin()


RESIDUAL: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "plus": lambda b, x: x + b.f(x),
    "in place": lambda b, x: b.f(x).add_(x),
    "alpha": lambda b, x: torch.add(x, b.f(x), alpha=0.5),
    "minus": lambda b, x: x - b.f(x),
    "minus an activation": lambda b, x: torch.sub(x, F.relu(b.f(x)) * 0.3),
    "minus in place": lambda b, x: x.mul(1.0).sub_(b.f(x)),
    "lerp": lambda b, x: torch.lerp(x, b.f(x), 0.3),
    "lerp by a gate": lambda b, x: x.lerp(F.gelu(b.f(x)), torch.sigmoid(b.g(x))),
    "addcmul by a scale": lambda b, x: torch.addcmul(x, b.scale.expand(12, 6), b.f(x)),
    "addcmul by a gate": lambda b, x: x.addcmul(torch.sigmoid(b.g(x)), b.f(x), value=0.5),
    "stack and sum": lambda b, x: torch.stack([x, b.f(x)]).sum(0),
    "stack and mean": lambda b, x: torch.stack((x, b.f(x), b.g(x)), dim=1).mean(1),
    "stack behind": lambda b, x: torch.stack((x, b.f(x)), -1).sum(dim=-1),
    "highway": highway,
    "both scaled": lambda b, x: 0.7 * x + 0.3 * b.f(x),
    "layer scale": lambda b, x: x + b.scale * b.f(x),
    "dropout": lambda b, x: x + F.dropout(b.f(x), 0.1),
    "two branches": lambda b, x: b.g(x) + b.scale * b.f(x),
    "another shape": lambda b, x: (x.view(3, 4, 6) + b.f(x.view(3, 4, 6))).view(12, 6),
}
FORMULAS: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "straight-through": quantize,
    "straight-through rounding": lambda b, x: x + (torch.round(x) - x).detach(),
    "the same, the other way": lambda b, x: (torch.round(x) - x).detach() + x,
    "noise": lambda b, x: x + 0.1 * torch.randn(12, 6),
    "noise as large": lambda b, x: x + b.f(x).exp() * torch.randn_like(x),
    "no gradient": noise_without_gradient,
    "gelu": lambda b, x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3))),
    "cubic": lambda b, x: x + 0.044715 * torch.pow(x, 3.0),
    "absolute": lambda b, x: (x + x.abs()) / 2,
    "twice": lambda b, x: x + x,
    "tanh": lambda b, x: x + torch.tanh(x),
    "mixup": lambda b, x: 0.3 * x + 0.7 * x.flip(0),
    "softplus": lambda b, x: F.relu(x) + torch.log1p(torch.exp(-x.abs())),
    "centred": lambda b, x: x - x.mean(-1, keepdim=True).expand(12, 6),
    "rotary": rotate,
    "rotary by a module": lambda b, x: x * b.angles(x)[0] + torch.cat([-x[:, 3:], x[:, :3]], -1) * b.angles(x)[1],
    "two towers": lambda b, x: b.f(x) - b.g(x),
    "a constant": lambda b, x: x + torch.zeros(12, 6),
    "lerp to noise": lambda b, x: torch.lerp(x, torch.randn(12, 6), 0.1),
    "a stack of one": lambda b, x: torch.stack([x, 2 * x]).sum(0),
}


def stream_of(function: Callable[[Block, Tensor], Tensor]) -> tuple[list[dict[str, float]], Tensor]:
    """The rows `stream` of functions of the block, and what the block has put out."""
    torch.manual_seed(0)
    model, kept = nn.Sequential(nn.Linear(6, 6), Block(function), nn.Linear(6, 3)), []
    model[1].register_forward_hook(lambda module, args, out: kept.append(out.detach().clone()))
    rows = initlab.measure(model, X, None, lambda out: out.square().mean())
    own = rows[(rows["name"] == "1") & (rows["direction"] == "forward") & (rows["op"] != "Block")]
    return [row for _, row in own[own["tensor"] == "stream"].iterrows()], kept[0]


@pytest.mark.filterwarnings("ignore:probe. never called")
@pytest.mark.parametrize("name", RESIDUAL)
def test_a_residual_sum_is_the_stream_however_it_is_written(name: str) -> None:
    rows, out = stream_of(RESIDUAL[name])
    assert len(rows) == 1 and not differences(rows[0], numbers(out))


@pytest.mark.filterwarnings("ignore:probe. never called")
@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_is_no_stream(name: str) -> None:
    assert stream_of(FORMULAS[name])[0] == []
