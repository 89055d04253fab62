"""All tensors of a step of the readable pass, each with the words of its row, for whoever wants to measure them."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from initlab.nn.activations import Activation
from initlab.scratch.mlp import Parameters, Pass
from initlab.stats.statistics import Item, Key, saturated_share


def items_of(implementation: str, step: int, seen: Pass, parameters: Parameters, activation: Activation) -> list[Item]:
    """All tensors of a pass, to be measured."""
    key = partial(Key, "train", implementation, step)
    hidden = seen.preactivations[:-1]
    saturated = [saturated_share(activation.slope(z), activation.largest_slope) for z in hidden]
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
        items += parameter_items(key, direction, pairs)
    return items


def parameter_items(key: Callable[[int, str, str], Key], direction: str, pairs: Parameters) -> list[Item]:
    items = []
    for layer, (w, b) in enumerate(pairs, start=1):
        items += [Item(key(layer, "weight", direction), w), Item(key(layer, "bias", direction), b.unsqueeze(-2))]
    return items


def updates_of(implementation: str, step: int, before: Parameters, after: Parameters) -> list[Item]:
    return [
        Item(Key("train", implementation, step, layer, "update", "forward"), new - old)
        for layer, ((old, _), (new, _)) in enumerate(zip(before, after, strict=True), start=1)
    ]


def drifts_of(implementation: str, step: int, start: Sequence[Tensor], now: Sequence[Tensor]) -> list[Item]:
    """Preactivations less those of the same inputs before the first update, layer by layer."""
    return [
        Item(Key("train", implementation, step, layer, "drift", "forward"), new - old)
        for layer, (old, new) in enumerate(zip(start, now, strict=True), start=1)
    ]
