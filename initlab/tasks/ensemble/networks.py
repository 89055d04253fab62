"""The networks of one batched program: which rules they follow, what is drawn for them, how many fit into memory.

Networks may differ in seed, rule and gain; what is drawn for one depends on its own seed and rule alone. Knows nothing
of what is measured. Legend: E ensemble, N batch, I fan_in, O fan_out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from initlab.errors import UsageError, choose
from initlab.nn import lsuv
from initlab.nn.custom_activation import Given, as_activation
from initlab.nn.init import GENERATORS, RULES, Rule, draw, rule
from initlab.tasks.ensemble.memory import free_memory, readable

CACHED = 8  # networks whose tensors stay in a processor's cache
WORKING = 12  # float64 tensors of a layer's shape that its statistics take, at most


class Shape(NamedTuple):
    """A stack: L layers of `width` units on a batch of inputs of `inputs` units."""

    depth: int
    width: int
    inputs: int
    batch: int

    def of(self, layer: int) -> tuple[int, int]:
        """(I, O) of a layer's weights."""
        return (self.inputs if layer == 1 else self.width, self.width)

    def said(self) -> str:
        return f"depth={self.depth} width={self.width} inputs={self.inputs} batch={self.batch}"


class Plan(NamedTuple):
    """How many networks run together, whether their weights are kept or drawn again, and the bytes that are kept."""

    networks: int
    keep_weights: bool
    kept: float


def plan(shape: Shape, networks: int, dtype: torch.dtype, device: torch.device, backward: bool = True) -> Plan:
    """As many networks as half of the free memory holds, the rest is for those that leave; on a CPU what a cache holds.

    A backward pass keeps L N O preactivations of every network; its weights too if they fit, else they are drawn a
    second time, which costs about one more matmul per layer. Without it nothing that is kept grows with depth. Refused:
    a network that does not fit alone.
    """
    depth, width, inputs, batch = shape
    widest = max(width, inputs)
    working = batch * widest * (3 * dtype.itemsize + 8 * WORKING) + 2 * widest * width * (4 + dtype.itemsize)
    preactivations = depth * batch * width * dtype.itemsize if backward else 0
    weights = (inputs + (depth - 1) * width) * width * dtype.itemsize
    free = free_memory(device)
    if preactivations + working > free:
        keeps = f"keeps {readable(preactivations)} for the backward pass; use backward=false, or less depth,"
        needs = keeps if preactivations > working else f"works on {readable(working)}; use less"
        raise UsageError(f"{shape.said()}: {readable(free)} are free and one network {needs} width or batch")
    most = min(networks, CACHED) if device.type == "cpu" else networks
    together = max(1, int(min(most, free / 2 / (preactivations + working))))
    keep_weights = backward and together * (preactivations + working + weights) <= free / 2
    return Plan(together, keep_weights, float(together * (preactivations + weights * keep_weights)))


def kept_as_text(planned: Plan) -> str:
    """What a backward pass keeps, in words."""
    weights = "preactivations and weights" if planned.keep_weights else "preactivations, and draws weights twice"
    return f"the stack's backward pass keeps {readable(planned.kept)}: {weights}, {planned.networks} networks at a time"


def rules_of(init: str | Rule | Sequence[str | Rule], networks: int) -> list[Rule]:
    """A rule for each network."""
    given = [init] * networks if isinstance(init, str | Rule) else list(init)
    if len(given) != networks:
        raise UsageError(f"init: {len(given)} rules for {networks} networks; give one rule, or one for each seed")
    return [rule(one) if isinstance(one, str) else one for one in given]


def name_of(init: str | Rule) -> str:
    """A rule as tables name it: its name, or what it is made of."""
    if isinstance(init, str):
        return init
    own = f"{init.distribution}, {init.mode}"
    return next((name for name, row in RULES.items() if row == init), own)


def repeated(each: pd.Categorical | np.ndarray, rows: int) -> pd.Categorical | np.ndarray:
    """A column of so many rows, through which the networks run fastest, of one value for each network."""
    times = rows // len(each)
    if isinstance(each, pd.Categorical):
        return pd.Categorical.from_codes(np.tile(each.codes, times), each.categories)
    return np.tile(each, times)


class Signal(NamedTuple):
    """What passes through a layer, (E, N, O), and the same memory network by network: views are made once."""

    whole: Tensor
    each: tuple[Tensor, ...]


def signal(x: Tensor) -> Signal:
    return Signal(x, x.unbind())


def multiply(x: Signal, w: Tensor, out: Signal) -> None:
    """out = x w, w (E, I, O); on a CPU one network after another: as fast, and rounded as when alone."""
    if w.device.type != "cpu":
        torch.bmm(x.whole, w, out=out.whole)
        return
    for one, weight, result in zip(x.each, w.unbind(), out.each, strict=True):
        torch.mm(one, weight, out=result)


def affine(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """x w + b for (E, N, I), (E, I, O) and (E, O)."""
    z = x.new_empty(*x.shape[:-1], w.shape[-1])
    multiply(signal(x), w, out=signal(z))
    return z if b is None else z.add_(b.unsqueeze(-2))


class Networks:
    """A chunk of networks: draws what it needs, on its device; what the data rescale is fitted at once."""

    def __init__(
        self,
        rules: Sequence[Rule],
        activation: Given,
        shape: Shape,
        seeds: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        keep_weights: bool = False,
        generator: str = "torch",
    ) -> None:
        self.rules, self.activation, self.shape, self.seeds = rules, as_activation(activation), shape, seeds
        self.dtype, self.device, self.keep_weights = dtype, device, keep_weights
        choose(GENERATORS, generator, "generator")
        self.generator = generator
        self._kept: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.fit = None
        if any(one.attempts for one in rules):  # fitted to the input that the stack will see
            layers = (self._drawn(layer, range(len(self))) for layer in range(1, shape.depth + 1))
            x, phi = self.gaussian(shape.inputs, "input"), as_activation(activation)
            self.fit = lsuv.fit(rules, seeds, layers, x, phi, affine)

    def __len__(self) -> int:
        return len(self.seeds)

    def weights(self, layer: int, who: Sequence[int] | None = None) -> tuple[Tensor, Tensor | None]:
        """w (E, I, O) and b (E, O) of a layer, None where no network has biases; of all networks, or of some."""
        if layer in self._kept:
            w, b = self._kept[layer]
            return (w, b) if who is None else (w[list(who)], None if b is None else b[list(who)])
        found = self._drawn(layer, range(len(self)) if who is None else who)
        if self.fit is not None:
            found = self.fit.scaled(layer, found[0], who), found[1]
        if self.keep_weights and who is None:
            self._kept[layer] = found
        return found

    def _drawn(self, layer: int, who: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        rules, seeds = [self.rules[k] for k in who], [self.seeds[k] for k in who]
        if all(one == rules[0] for one in rules):
            w, b = self._draw(rules[0], seeds, layer)
        elif all(one.distribution == "normal" and not one.bias for one in rules):
            return self._scaled(layer, rules, seeds), None
        else:
            drawn = [self._draw(one, [seed], layer) for one, seed in zip(rules, seeds, strict=True)]
            w, b = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        return w, b if any(one.bias for one in rules) else None

    def _draw(
        self, one: Rule, seeds: Sequence[int], layer: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        shape, number = self.shape.of(layer), dtype or self.dtype
        return draw(one, self.activation, shape, seeds, layer, number, self.device, self.generator)

    def _scaled(self, layer: int, rules: Sequence[Rule], seeds: Sequence[int]) -> Tensor:
        """Networks of one seed share their Gaussian numbers: drawn once, and scaled by each network's own std."""
        unique = list(dict.fromkeys(seeds))
        unit, _ = self._draw(RULES["naive"], unique, layer, torch.float32)
        stds = torch.tensor([one.std_for(self.activation, self.shape.of(layer)) for one in rules], device=self.device)
        return (unit[[unique.index(seed) for seed in seeds]] * stds[:, None, None]).to(self.dtype)

    def gaussian(self, units: int, what: str) -> Tensor:
        """Unit Gaussian numbers (E, N, units); networks of one seed have the same."""
        source = GENERATORS[self.generator]
        drawn = source.gaussian((self.shape.batch, units), self.seeds, what, 0, self.device)
        return drawn.to(self.device, self.dtype)

    def columns(self, frame: pd.DataFrame, inits: pd.Categorical) -> pd.DataFrame:
        """The frame, whose rows run through the networks fastest, with the columns `init` and `gain`."""
        own = self.differing(inits).items()
        return frame.assign(**{name: repeated(each, len(frame)) for name, each in own})

    def differing(self, inits: pd.Categorical) -> dict[str, pd.Categorical | np.ndarray]:
        """The columns in which networks of several rules differ, a value for each network."""
        return {"init": inits, "gain": np.array([one.gain_for(self.activation) for one in self.rules])}
