"""A stack of L layers: a unit-Gaussian batch pushed through, a unit-Gaussian gradient pulled back down."""

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from initlab.errors import check, choose
from initlab.scratch.layers import lin, lin_inp_grad
from initlab.signal.activations import ACTIVATIONS, Activation
from initlab.signal.init import GENERATORS, Rule, draw, rule
from initlab.signal.stats import Item, Key, Rows, saturated_share
from initlab.tasks.place import DTYPES, chunks, find_device


def stack(
    init: str | Rule = "kaiming",
    activation: str = "relu",
    depth: int = 50,
    width: int = 100,
    inputs: int | None = None,
    batch: int = 200,
    seeds: Sequence[int] = range(8),
    dtype: str = "float32",
    device: str = "cpu",
    generator: str = "torch",
    progress: bool = False,
) -> pd.DataFrame:
    """The `stats` rows of the stage `stack`: every layer's preactivation and activation, forward and backward.

    One network per seed. The input has `inputs` units, `width` if not said. Layer 0 is the input, forward only. Nothing
    raises when a signal dies: the counts say it.
    """
    inputs = width if inputs is None else inputs
    check(depth=depth, width=width, batch=batch, inputs=inputs)
    scaling = rule(init) if isinstance(init, str) else init
    phi, name, place = choose(ACTIVATIONS, activation, "activation"), activation, find_device(device)
    number = choose(DTYPES, dtype, "dtype")
    groups = list(chunks(seeds, place))
    frames = []
    with tqdm(total=2 * depth * len(groups), desc="stack", unit="layer", disable=None if progress else True) as bar:
        for group in groups:
            layers = _Layers(scaling, name, inputs, width, group, number, place, generator)
            rows = Rows(group)
            passed = _forward(layers, phi, depth, batch, rows, bar)
            _backward(layers, phi, passed, rows, bar)
            frames.append(rows.frame())
    return pd.concat(frames, ignore_index=True)


class _Layers:
    """Draws what a group of networks needs, on its device."""

    def __init__(
        self,
        scaling: Rule,
        activation: str,
        inputs: int,
        width: int,
        seeds: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        generator: str,
    ) -> None:
        self.scaling, self.activation, self.inputs, self.width = scaling, activation, inputs, width
        self.seeds, self.dtype, self.device, self.generator = seeds, dtype, device, generator

    def draw(self, layer: int) -> tuple[Tensor, Tensor]:
        shape = (self.inputs if layer == 1 else self.width, self.width)
        return draw(self.scaling, self.activation, shape, self.seeds, layer, self.dtype, self.device, self.generator)

    def gaussian(self, batch: int, units: int, what: str) -> Tensor:
        source = choose(GENERATORS, self.generator, "generator")
        drawn = source.gaussian((batch, units), self.seeds, what, 0, self.device)
        return drawn.to(self.device, self.dtype)


def _key(layer: int, tensor: str, direction: str) -> Key:
    return Key("stack", "scratch", 0, layer, tensor, direction)


def _forward(
    layers: _Layers, phi: Activation, depth: int, batch: int, rows: Rows, bar: tqdm
) -> list[tuple[Tensor, Tensor]]:
    """Weights and preactivations of every layer, which the backward pass needs."""
    x = layers.gaussian(batch, layers.inputs, "input")
    rows.add([Item(_key(0, "activation", "forward"), x)])
    passed = []
    for layer in range(1, depth + 1):
        w, b = layers.draw(layer)
        z = lin(x, w, b)
        x = phi.phi(z)
        saturated = saturated_share(phi.slope(z), phi.largest_slope)
        rows.add(
            [
                Item(_key(layer, "preactivation", "forward"), z, saturated),
                Item(_key(layer, "activation", "forward"), x),
            ]
        )
        passed.append((w, z))
        bar.update()
    return passed


def _backward(layers: _Layers, phi: Activation, passed: list[tuple[Tensor, Tensor]], rows: Rows, bar: tqdm) -> None:
    g = layers.gaussian(passed[-1][1].shape[-2], layers.width, "gradient")
    for layer in range(len(passed), 0, -1):
        w, z = passed[layer - 1]
        z_grad = phi.pull_back(g, z)
        rows.add(
            [
                Item(_key(layer, "activation", "backward"), g),
                Item(_key(layer, "preactivation", "backward"), z_grad),
            ]
        )
        g = lin_inp_grad(z_grad, w) if layer > 1 else g
        bar.update()
