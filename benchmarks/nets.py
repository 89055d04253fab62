"""The networks that are raced, their weights and their batches: the same numbers for every contestant.

Legend: E ensemble, N batch, I fan_in, O fan_out.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from initlab.engine.mlp import Parameters
from initlab.nn.init import draw, gaussian, rule

LR = 1e-6  # steps as they are anywhere, after which the network is still the same: thousands are taken


class Net(NamedTuple):
    """`depth` hidden layers, ReLU, cross entropy."""

    inputs: int
    depth: int
    width: int
    outputs: int
    batch: int

    @property
    def sizes(self) -> list[int]:
        return [self.inputs, *[self.width] * self.depth, self.outputs]


DEEP = Net(784, 50, 100, 10, 128)
BOOK = Net(784, 1, 50, 10, 64)
NARROW = Net(784, 100, 32, 10, 128)
LARGE = Net(784, 1, 50, 1, 50_000)  # the book's backward pass: mse, one output


def parameters(net: Net, seeds: Sequence[int] = (0,), device: str = "cpu") -> Parameters:
    """Kaiming weights (E, I, O) and biases (E, O), first layer first; new tensors at each call."""
    return [
        draw(rule("kaiming"), "relu", shape, seeds, layer, device=device)
        for layer, shape in enumerate(pairwise(net.sizes), start=1)
    ]


def batch(net: Net, seeds: Sequence[int] = (0,), device: str = "cpu") -> tuple[Tensor, Tensor]:
    """xb (E, N, I), unit Gaussian, and yb (E, N): classes, or numbers where there is one output."""
    xb = torch.stack([gaussian((net.batch, net.inputs), seed, "input") for seed in seeds])
    if net.outputs == 1:
        yb = torch.stack([gaussian((net.batch,), seed, "target") for seed in seeds])
    else:
        yb = torch.arange(net.batch).remainder(net.outputs).repeat(len(seeds), 1)
    return xb.to(device), yb.to(device)


def stack_weights(width: int, depth: int = 50) -> list[Tensor]:
    """Kaiming weights (1, width, width) of a stack."""
    return [draw(rule("kaiming"), "relu", (width, width), [0], layer)[0] for layer in range(1, depth + 1)]


def stack_input(width: int, batch: int = 200) -> Tensor:
    return gaussian((1, batch, width), 0, "input")
