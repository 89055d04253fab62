"""The tensors of a training step under the keys of their rows.

Legend: E ensemble, N batch, I fan_in, O fan_out.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

from torch import Tensor

from initlab.engine.mlp import Parameters, Pass
from initlab.nn.activations import Activation
from initlab.stats.buffer import Item
from initlab.stats.keys import TensorKey

STAGE = "train"


def key_of(implementation: str) -> Callable[[int, str, str], TensorKey]:
    """Makes the key of (layer, tensor, direction) in a training by `implementation`."""
    return partial(TensorKey, STAGE, implementation)


def network_keys(implementation: str, layers: int) -> list[TensorKey]:
    """The tensors of a recorded step in the order of the table; the last layer has a preactivation alone."""
    key, every = key_of(implementation), range(1, layers + 1)
    both = ("forward", "backward")
    keys = [key(*one) for one in product(every, ("preactivation",), both)]
    keys += [key(*one) for one in product(range(1, layers), ("activation",), both)]
    keys += [key(*one) for one in product(every, ("weight", "bias"), both)]
    return keys + [key(layer, "update", "forward") for layer in every]


def module_keys(sizes: Sequence[int]) -> list[TensorKey]:
    """The tensors of a recorded step of a module in the order in which they are measured; `sizes`: units, inputs first.

    What counts inputs, then parameters and their gradients, then updates.
    """
    key, layers, both = key_of("module"), range(1, len(sizes)), ("forward", "backward")
    keys = [
        key(layer, tensor, direction)
        for direction in both
        for tensor, count in (("preactivation", len(sizes)), ("activation", len(sizes) - 1))
        for layer in range(1, count)
    ]
    keys += [key(layer, tensor, direction) for direction, layer, tensor in product(both, layers, ("weight", "bias"))]
    return keys + [key(layer, "update", "forward") for layer in layers]


def sort_by_shape(keys: Sequence[TensorKey], sizes: Sequence[int]) -> list[int]:
    """Places of the keys in the order of the table: tensors of one shape together, shapes as they first occur."""

    def kind(key: TensorKey) -> tuple[object, ...]:
        inputs = {"preactivation": -1, "activation": -1, "bias": 1}.get(key.tensor, sizes[key.layer - 1])
        return key.tensor == "update", inputs, sizes[key.layer]

    kinds = [kind(key) for key in keys]
    return sorted(range(len(keys)), key=lambda k: kinds.index(kinds[k]))


def items_of(implementation: str, seen: Pass, parameters: Parameters, activation: Activation) -> list[Item]:
    """All tensors of a forward and backward pass at these parameters, to be measured."""
    key = key_of(implementation)
    hidden = seen.preactivations[:-1]
    saturated = [activation.saturated_share(z) for z in hidden]
    items = []
    for direction, z, a, pairs in (
        ("forward", seen.preactivations, seen.activations, parameters),
        ("backward", seen.preactivation_grads, seen.activation_grads, seen.parameter_grads),
    ):
        shares = [*saturated, None] if direction == "forward" else [None] * len(z)
        items += [
            Item(key(layer, "preactivation", direction), t, share)
            for layer, (t, share) in enumerate(zip(z, shares, strict=True), start=1)
        ]
        items += [Item(key(layer, "activation", direction), t) for layer, t in enumerate(a, start=1)]
        items += parameter_items(implementation, direction, pairs)
    return items


def parameter_items(implementation: str, direction: str, pairs: Parameters) -> list[Item]:
    """Weights (E, I, O) and biases (E, O), or their gradients."""
    key, items = key_of(implementation), []
    for layer, (w, b) in enumerate(pairs, start=1):
        items += [Item(key(layer, "weight", direction), w), Item(key(layer, "bias", direction), b.unsqueeze(-2))]
    return items


def update_items(implementation: str, before: Parameters, after: Parameters) -> list[Item]:
    """What a step has changed in the weights."""
    return change_items(implementation, "update", [w for w, _ in before], [w for w, _ in after])


def change_items(implementation: str, tensor: str, before: Sequence[Tensor], after: Sequence[Tensor]) -> list[Item]:
    """after - before, layer by layer: updates, or how far preactivations have moved (`drift`)."""
    return [
        Item(TensorKey(STAGE, implementation, layer, tensor, "forward"), new - old)
        for layer, (old, new) in enumerate(zip(before, after, strict=True), start=1)
    ]
