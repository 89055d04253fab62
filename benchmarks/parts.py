"""The hand-written step and the forward-only stack put together from initlab's functions, with its collector of rows.

The slow road to the same rows, as a reader of `scratch/` and `signal/stats.py` would write it first. It is raced where
initlab offers no faster one.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from initlab.scratch.layers import LOSSES, lin
from initlab.scratch.mlp import Parameters, Pass, forward_and_backward
from initlab.signal.activations import ACTIVATIONS
from initlab.signal.init import Rule, draw, gaussian
from initlab.signal.stats import Item, Key, Rows, saturated_share

FLUSH_ROWS = 4096  # few enough to be no memory to speak of


class Recording:
    """Collects rows and hands them over when there are many; `flushed` counts those that it handed over."""

    def __init__(self, seeds: Sequence[int], **options: bool) -> None:
        self.rows, self.flushed = Rows(seeds, **options), 0

    def add(self, items: list[Item]) -> None:
        self.rows.add(items)
        if len(self.rows) > FLUSH_ROWS:
            self.flushed += len(self.rows.frame())


class Engine:
    """The MLP by hand with plain SGD: a pass, then an update; `step` gives the losses (E,)."""

    def __init__(self, parameters: Parameters, activation: str, loss: str, lr: float) -> None:
        self.parameters, self.lr, self.steps = parameters, lr, 0
        self.activation, self.loss = ACTIVATIONS[activation], LOSSES[loss]

    def step(self, xb: Tensor, yb: Tensor, record: Recording | None = None) -> Tensor:
        done = forward_and_backward(self.parameters, xb, yb, self.activation, self.loss)
        if record is not None:
            record.add(list(self._items(done)))
            before = [w.clone() for w, _ in self.parameters]
        for pair, grads in zip(self.parameters, done.parameter_grads, strict=True):
            for p, g in zip(pair, grads, strict=True):
                p.add_(g, alpha=-self.lr)
        if record is not None:
            record.add(
                [
                    Item(Key("train", "scratch", self.steps, layer, "update", "forward"), w - old)
                    for layer, ((w, _), old) in enumerate(zip(self.parameters, before, strict=True), start=1)
                ]
            )
        self.steps += 1
        return done.loss

    def _items(self, done: Pass) -> Iterator[Item]:
        """Preactivations, activations, weights and biases of every layer, forward and backward."""
        slopes = [saturated_share(self.activation.slope(z), self.activation.largest_slope) for z in done.preactivations]
        for direction, zs, activations, pairs in (
            ("forward", done.preactivations, done.activations, self.parameters),
            ("backward", done.preactivation_grads, done.activation_grads, done.parameter_grads),
        ):
            for layer, (z, (w, b)) in enumerate(zip(zs, pairs, strict=True), start=1):
                hidden = direction == "forward" and layer < len(zs)
                yield Item(self._key(layer, "preactivation", direction), z, slopes[layer - 1] if hidden else None)
                yield Item(self._key(layer, "weight", direction), w)
                yield Item(self._key(layer, "bias", direction), b.unsqueeze(-2))
            for layer, a in enumerate(activations, start=1):
                yield Item(self._key(layer, "activation", direction), a)

    def _key(self, layer: int, tensor: str, direction: str) -> Key:
        return Key("train", "scratch", self.steps, layer, tensor, direction)


def stack_rows(
    x: Tensor, layers: Iterator[tuple[Tensor, Tensor | None]], activation: str, seeds: Sequence[int], **options: bool
) -> Recording:
    """Forward rows of a stack whose weights (E, I, O) and biases (E, O) come one layer at a time; x (E, N, I)."""
    record, phi = Recording(seeds, **options), ACTIVATIONS[activation]
    record.add([Item(_stack_key(0, "activation"), x)])
    for layer, (w, b) in enumerate(layers, start=1):
        z = x @ w if b is None else lin(x, w, b)
        x = phi.phi(z)
        saturated = saturated_share(phi.slope(z), phi.largest_slope)
        record.add([Item(_stack_key(layer, "preactivation"), z, saturated), Item(_stack_key(layer, "activation"), x)])
    return record


def forward_only(
    rule: Rule, activation: str, depth: int, width: int, batch: int, seeds: Sequence[int], emit: Callable[[int], object]
) -> None:
    """Draw, stack and measure, layer by layer; nothing of a layer is kept, `emit` gets the number of rows."""
    x = torch.stack([gaussian((batch, width), seed, "input") for seed in seeds])
    layers = (draw(rule, activation, (width, width), seeds, layer) for layer in range(1, depth + 1))
    record = stack_rows(x, layers, activation, seeds)
    emit(record.flushed + len(record.rows.frame()))


def _stack_key(layer: int, tensor: str) -> Key:
    return Key("stack", "scratch", 0, layer, tensor, "forward")
