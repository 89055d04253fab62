"""The weights of a trained network, all layers of it, for an ensemble: drawn, and where a rule says so fitted to data.

Knows nothing of training. Legend: E ensemble, N batch, I fan_in, O fan_out.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from initlab.nn import lsuv
from initlab.nn.activations import Activation
from initlab.nn.custom_activation import as_activation
from initlab.nn.init import Rule, draw
from initlab.nn.mup import last_layer
from initlab.tasks.ensemble.networks import affine

Parameters = list[tuple[Tensor, Tensor]]


class Drawn(NamedTuple):
    """Where a training starts: [(w (E, I, O), b (E, O)), ...], and how the data rescaled it, if they did."""

    parameters: Parameters
    fit: lsuv.Fit | None


def drawn(
    rules: Sequence[Rule],
    activation: str | Activation,
    sizes: Sequence[int],
    seeds: Sequence[int],
    x: Tensor,
    generator: str = "torch",
) -> Drawn:
    """Layers of `sizes` units, a rule and a seed for each network, with the dtype and the device of x (E, N, I).

    x is what a rule that looks at data is fitted to; no other rule looks at it.
    """
    shapes = list(pairwise(sizes))
    last = len(shapes) if len(shapes) > 1 else 0
    found = []
    for layer, shape in enumerate(shapes, start=1):
        own = [last_layer(one, activation, shape[0]) for one in rules] if layer == last else rules
        found.append(_layer(own, activation, shape, seeds, layer, x.dtype, x.device, generator))
    fit = lsuv.fit(rules, seeds, found, x, as_activation(activation), affine)
    if fit is not None:
        found = [(fit.scaled(layer, w), b) for layer, (w, b) in enumerate(found, start=1)]
    return Drawn(found, fit)


def _layer(
    rules: Sequence[Rule],
    activation: str | Activation,
    shape: tuple[int, int],
    seeds: Sequence[int],
    layer: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: str,
) -> tuple[Tensor, Tensor]:
    """Weights (E, I, O) and biases (E, O) of a layer, each network by its own rule."""
    if all(one == rules[0] for one in rules):
        return draw(rules[0], activation, shape, seeds, layer, dtype, device, generator)
    drawn = [
        draw(one, activation, shape, [seed], layer, dtype, device, generator)
        for one, seed in zip(rules, seeds, strict=True)
    ]
    return torch.cat([w for w, _ in drawn]), torch.cat([b for _, b in drawn])
