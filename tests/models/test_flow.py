"""What follows a layer, read from the code and from a pass: both say the same wherever the code can be read."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from initlab.models.dataflow import Flow
from initlab.models.fans import list_tensors
from initlab.models.symbolic_flow import find_flow


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.tanh(self.stem(x))).mean((2, 3)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act_fn, self.gate, self.up, self.down = nn.SiLU(), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act_fn(self.gate(x)) * self.up(x))


class Choosing(nn.Module):
    """Code that asks a value, which cannot be read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.inner = nn.Linear(6, 6), nn.Linear(6, 6), Gated()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x)) if float(x.sum()) > -1e9 else x
        return self.inner(self.b(h))


def names(flow: Flow) -> dict[str, str]:
    return {node.name: str(flow.follower(k)) for k, node in flow.layers()}


def ends(flow: Flow) -> list[str]:
    return [flow.nodes[k].name for _, layers in flow.branches for k in layers]


SEEN: dict[str, tuple[nn.Module, Any, dict[str, str], list[str]]] = {
    "residual": (
        Residual(),
        torch.randn(2, 3, 6, 6),
        {"stem": "tanh", "blocks.0.conv1": "a norm, then relu", "blocks.1.conv2": "BatchNorm2d", "head": "the output"},
        ["blocks.0.conv2", "blocks.1.conv2"],
    ),
    "gated": (Gated(), torch.randn(3, 6), {"gate": "SiLU", "up": "a product", "down": "a sum"}, ["down"]),
    "chain": (
        nn.Sequential(
            nn.Linear(4, 4), nn.Dropout(), nn.Identity(), nn.LeakyReLU(0.3), nn.Linear(4, 4), nn.Linear(4, 1)
        ),
        torch.randn(3, 4),
        {"0": "LeakyReLU", "4": "Linear", "5": "the output"},
        [],
    ),
    "transformer": (
        nn.TransformerEncoderLayer(8, 2, 16, activation="gelu"),
        torch.randn(4, 2, 8),
        {"self_attn": "a sum", "linear1": "gelu", "linear2": "a sum"},
        ["self_attn", "linear2"],
    ),
    "recurrent": (nn.GRU(4, 4), torch.randn(3, 2, 4), {"": "the output"}, []),
}


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("by_pass", [False, True], ids=["code", "pass"])
def test_what_follows_a_layer(name: str, by_pass: bool) -> None:
    model, x, followers, branches = SEEN[name]
    flow = find_flow(model, x if by_pass else None)
    assert names(flow).items() >= followers.items() and ends(flow) == branches


def test_what_cannot_be_read_is_not_guessed() -> None:
    model = Choosing()
    read, seen = find_flow(model), find_flow(model, torch.randn(3, 6))
    assert not read.complete and seen.complete
    assert names(read)["a"] == "what its code does with it" and names(seen)["a"] == "relu"
    assert names(read)["inner.gate"] == names(seen)["inner.gate"] == "SiLU"  # what lies inside can be read


def test_neither_leaves_a_trace() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.seen, self.last = nn.Linear(3, 3), nn.BatchNorm1d(3), [], None

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.layer(x)
            self.seen.append(self.last)
            return self.norm(self.last)

    model = Keeping()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    find_flow(model)
    assert model.seen == [] and model.last is None
    find_flow(model, torch.randn(4, 3))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_activation_of_ones_own_is_known_by_its_numbers() -> None:
    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) ** 2

    class Centre(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(-1, keepdim=True)

    flow = find_flow(nn.Sequential(nn.Linear(3, 3), Squared(), nn.Linear(3, 3), Centre()))
    first, second = (flow.follower(k) for k, _ in flow.layers())
    assert first.activation is not None and first.op == "Squared"
    assert float(first.activation.phi(torch.tensor([2.0]))) == 4 and second.activation is None


def test_buffers_and_all_random_numbers_are_left_alone() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(3, 3), nn.Parameter(torch.tensor(2.0))
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.n += 1
            return self.layer(x) * self.scale + random.random() + float(np.random.rand())  # noqa: NPY002

    model, states = Counting(), (random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
    for x in (None, torch.randn(4, 3)):
        find_flow(model, x)
        assert float(model.n) == 0 and random.getstate() == states[0]
        assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert [t.name for t in list_tensors(model)] == ["scale", "layer.weight", "layer.bias"]
    assert [t.cut(t.slices[0]).numel() for t in list_tensors(model)] == [1, 9, 3]


def test_a_table_that_no_product_uses_is_no_weight() -> None:
    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rates = nn.Parameter(torch.arange(1.0, 9.0).log().repeat(4, 1))
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * torch.exp(-self.rates).sum(-1)

    model = Decay()
    for x in (None, torch.randn(5, 8)):
        kinds = {t.name: t.kind for t in list_tensors(model, find_flow(model, x).equations())}
        assert kinds == {"rates": "unknown", "layer.weight": "linear", "layer.bias": "bias"}
