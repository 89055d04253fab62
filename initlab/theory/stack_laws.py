"""The laws of all tensors of a requested stack, at its own width and at infinite width, computed once for any gain."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from initlab.theory.backward_law import laws
from initlab.theory.batch_law import Array, Law, ln
from initlab.theory.forward_law import DenseLayer
from initlab.theory.infinite_width import infinite_laws
from initlab.theory.request import Request
from initlab.theory.tensor_law import StackLaws, shift_lengths

SECOND_ORDER = 0.65  # growth of the variance of ln q of rectifiers' gradients by the sum of 1/width above, measured


class TensorKind(NamedTuple):
    """One kind of tensor in all its layers: its law at this width, its limit at infinite width, its units per layer."""

    tensor: str
    direction: str
    layers: NDArray[np.int64]
    law: Law
    limit: Law
    units: NDArray[np.int64]


_KINDS = (
    ("activation", "forward", slice(0, 1)),
    ("activation", "forward", slice(1, None)),
    ("preactivation", "forward", slice(1, None)),
    ("activation", "backward", slice(0, None)),
    ("preactivation", "backward", slice(1, None)),
)


def tensor_kinds(request: Request, stack: StackLaws) -> Iterator[TensorKind]:
    """Every kind of tensor of a stack, in the order of the measured table; `stack` are its laws at this width."""
    layers, widths = np.arange(len(request.widths)), np.array(request.widths)
    for law, limit, (tensor, direction, at) in zip(stack, limit_laws(request), _KINDS, strict=True):
        if tensor == "activation" and direction == "backward" and not request.input_gradient:
            law, limit, at = law.skip_first(), limit.skip_first(), slice(1, None)
        yield TensorKind(tensor, direction, layers[at], law, limit, widths[at])


def finite_laws(request: Request) -> StackLaws:
    """The laws at the widths that were asked for."""
    layers, added = _normalize_gain(request)
    own = request.batch, request.q0, request.c0, request.fixed_input, request.data
    found = shift_lengths(_finite(request.row, layers, *own), added)
    if request.batch == 1 or not (request.row.homogeneous and request.row.kinks):
        return found
    above = np.cumsum([1 / n for n in request.widths[::-1]])[::-1]
    grown = 1 + SECOND_ORDER * above
    return found._replace(
        activation_gradients=_scale_spread(found.activation_gradients, grown - SECOND_ORDER * above[-1]),
        preactivation_gradients=_scale_spread(found.preactivation_gradients, grown[1:]),
    )


def _scale_spread(law: Law, factor: Array) -> Law:
    """The law whose ln q has so many times the variance, (K,)."""
    ln_var = np.stack([law.ln_var[:, 0], law.ln_var[:, 1] * np.sqrt(factor)], -1)
    return replace(law, cov=law.cov * factor[:, None, None], ln_var=ln_var)


def limit_laws(request: Request) -> StackLaws:
    """The laws when all widths are infinite."""
    layers, added = _normalize_gain(request)
    return shift_lengths(_infinite(request.row, layers, request.batch, request.q0, request.c0), added)


_finite, _infinite = lru_cache(maxsize=32)(laws), lru_cache(maxsize=32)(infinite_laws)


def _normalize_gain(request: Request) -> tuple[tuple[DenseLayer, ...], Array]:
    """Layers that keep lengths, and what is to be added to ln q of each layer, (L,).

    A homogeneous stack without biases differs from that of another gain in ln q alone: a sweep over the gain costs one
    prediction. Of other stacks the layers themselves, and zeros.
    """
    layers = request.layers
    plain = all(one.weight > 0 and not (one.bias or one.uniform_bias or one.fitted) for one in layers)
    if not (request.row.homogeneous and plain):
        return layers, np.zeros(len(layers))
    same_length = tuple(one._replace(weight=1 / one.fan_in) for one in layers)
    return same_length, np.array([ln(one.weight * one.fan_in) for one in layers])


def enter_layers(start: Array, x: Array) -> Array:
    """Numbers of the tensor that enters each layer, from those of the input and of all activations."""
    return np.concatenate([start, x[:-1]])
