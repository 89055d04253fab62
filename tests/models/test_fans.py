"""Fans against the variance that a layer really gives: Var[output] = fan_in Var[w] for inputs of second moment 1."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from initlab.models.fans import list_tensors
from initlab.models.symbolic_flow import find_flow

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[float, float]]] = {
    "linear": (lambda: nn.Linear(30, 20, bias=False), (64, 30), (30, 20)),
    "conv": (lambda: nn.Conv2d(8, 16, 3, bias=False), (16, 8, 9, 9), (72, 144)),
    "strided": (lambda: nn.Conv2d(8, 16, 3, stride=2, bias=False), (16, 8, 9, 9), (72, 144)),
    "grouped": (lambda: nn.Conv2d(8, 16, 3, groups=4, bias=False), (16, 8, 9, 9), (18, 36)),
    "depthwise": (lambda: nn.Conv1d(16, 16, 5, groups=16, bias=False), (32, 16, 40), (5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 16, 3, padding=2, bias=False), (16, 8, 9, 9), (72, 144)),
    "transposed, strided": (lambda: nn.ConvTranspose1d(8, 6, 4, 2, 3, bias=False), (64, 8, 30), (16, 24)),
    "transposed, grouped": (lambda: nn.ConvTranspose1d(8, 16, 3, 1, 2, groups=4, bias=False), (64, 8, 30), (6, 12)),
    "bilinear": (lambda: nn.Bilinear(5, 6, 7, bias=False), (400, 5), (30, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_fan_in_is_what_variances_follow_from(name: str) -> None:
    """200 draws of all weights: the mean square of outputs has a standard error below 2 %, 5 of them below 10 %."""
    make, shape, fans = LAYERS[name]
    generator, squares = torch.Generator().manual_seed(0), []
    layer = make().double()
    (tensor,) = list_tensors(layer)
    (one,) = tensor.slices
    assert (one.fan_in, one.fan_out) == fans
    for _ in range(200):
        with torch.no_grad():
            tensor.sources[0].normal_(generator=generator)
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            y = layer(x, torch.randn(400, 6, generator=generator, dtype=torch.float64)) if "bi" in name else layer(x)
            squares.append(float(y.square().mean()))
    assert sum(squares) / 200 == pytest.approx(one.fan_in, rel=0.1)


def test_stacked_projections_and_gates_are_parts() -> None:
    attention = list_tensors(nn.MultiheadAttention(12, 3))[0]
    assert [one[:5] for one in attention.slices] == [
        ("query", 0, 12, 12, 12),
        ("key", 12, 24, 12, 12),
        ("value", 24, 36, 12, 12),
    ]
    named = {t.name: t for t in list_tensors(nn.LSTM(5, 7))}
    assert [one.label for one in named["weight_ih_l0"].slices] == ["input gate", "forget gate", "cell", "output gate"]
    assert {(one.fan_in, one.fan_out) for one in named["weight_ih_l0"].slices} == {(5, 7)}
    assert {(one.fan_in, one.fan_out) for one in named["weight_hh_l0"].slices} == {(7, 7)}
    assert len(list_tensors(nn.GRU(5, 7))[0].slices) == 3 and len(list_tensors(nn.RNNCell(5, 7))[0].slices) == 1
    fused = nn.ModuleDict({"qkv": nn.Linear(8, 24), "head": nn.Linear(8, 24)})
    assert [len(t.slices) for t in list_tensors(fused)] == [3, 3, 1, 1]


def test_every_parameter_once_under_what_is_used() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, shared, nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    tensors = list_tensors(model)
    assert [t.name for t in tensors] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(tensors[2].values, model[2].weight) and len(tensors[2].sources) == 2
    assert {id(p) for t in tensors for p in t.sources} == {id(p) for p in model.parameters()}


class Raw(nn.Module):
    """Weights in functions, kept each way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (
            nn.Parameter(torch.randn(*n)) for n in ((8, 6), (5, 6), (4, 7, 5), (3, 3), (2, 3, 9))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(x @ self.a) @ self.b.t()
        h = F.silu(torch.einsum("bi,kji->bjk", h, self.c)).sum(-1)[:, :3] @ self.d.mT
        return torch.bmm(h.expand(2, -1, -1), self.e)


def test_functions_say_which_way_a_weight_stands() -> None:
    model, x = Raw(), torch.randn(10, 8)
    for flow in (find_flow(model), find_flow(model, x)):
        fans = {t.name: (t.slices[0].fan_in, t.slices[0].fan_out) for t in list_tensors(model, flow.equations())}
        assert fans == {"a": (8, 6), "b": (6, 5), "c": (5, 28), "d": (3, 3), "e": (3, 9)}


def test_kinds_of_parameters() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_embed, self.gamma = nn.Parameter(torch.zeros(1, 9, 4)), nn.Parameter(torch.ones(4))
            self.norm, self.table, self.act = nn.LayerNorm(4), nn.Embedding(7, 4), nn.PReLU()
            self.b1 = nn.Parameter(torch.zeros(4))

    kinds = {t.name: t.kind for t in list_tensors(Own())}
    assert kinds["pos_embed"] == kinds["table.weight"] == "embedding" and kinds["gamma"] == "scale"
    assert kinds["norm.weight"] == "norm" and kinds["norm.bias"] == "bias" and kinds["act.weight"] == "slope"
    assert math.isnan(list_tensors(nn.LayerNorm(4))[0].slices[0].fan_in)
    assert list_tensors(nn.Embedding(7, 4))[0].slices[0].fan_in == 1
