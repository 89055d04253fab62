"""The question that a prediction answers, checked: rule, activation and shapes become layers with their variances.

Every mistake of the user is found here, before anything is computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from initlab.errors import UsageError, check, keep_checked, show
from initlab.meanfield.maps import moment
from initlab.nn.activations import Activation, check_slope
from initlab.nn.custom_activation import Given, as_activation
from initlab.nn.init import LAWS, MODES, Rule, rule
from initlab.nn.mup import last_layer
from initlab.nn.network import DEPTH, WIDTH, resolve_units
from initlab.theory.forward_law import BatchVariation, DenseLayer, Fitted


@dataclass(frozen=True)
class Request:
    """A checked question: a stack of layers, a batch of inputs, and what is known of the inputs.

    batch: number of inputs. q0: their second moment. c0: their mean cosine. fixed_input: the batch has just these
    moments and wanders as `data` says; else it is drawn anew for each network. input_gradient: whether the gradient at
    the input is asked for too.
    """

    distribution: str  # of the weights
    row: Activation
    layers: tuple[DenseLayer, ...]
    batch: int = 200
    q0: float = 1.0
    c0: float = 0.0
    fixed_input: bool = False
    data: BatchVariation = BatchVariation()  # noqa: RUF009 - a tuple
    input_gradient: bool = False

    def __post_init__(self) -> None:
        keep_checked(self, ("q0", "c0", "fixed_input", "input_gradient"))
        if not isinstance(self.data, BatchVariation):
            raise UsageError(f"data={show(self.data)}: must be a forward_law.BatchVariation")

    @property
    def widths(self) -> list[int]:
        """Units of the input and of every layer."""
        return [self.layers[0].fan_in, *(layer.fan_out for layer in self.layers)]


def parse_request(
    init: str | Rule = "kaiming",
    activation: Given = "relu",
    depth: int = DEPTH,
    width: int = WIDTH,
    widths: Sequence[int] | None = None,
    inputs: int | None = None,
    batch: int = 200,
    outputs: bool = False,
    **options: Any,
) -> Request:
    """A question in the words of `predict`, whose docstring names them, as a `Request`."""
    names = ("q0", "c0", "fixed_input", "data", "input_gradient")
    input_fields = {name: options.pop(name) for name in names if name in options}
    if options.pop("residual", False):
        raise UsageError("residual: theory knows stacks without residual connections only")
    row, scaling = as_activation(activation), rule(init, **options)
    check_slope(row)
    if scaling.distribution not in LAWS:
        raise UsageError(f"theory has no law of weights that {scaling.distribution} writes")
    units = resolve_units(depth, width, widths, inputs)
    batch, outputs = check(batch=batch, outputs=outputs)
    request = Request(scaling.distribution, row, (), batch, **input_fields)
    return replace(request, layers=_resolve_layers(scaling, row, units, request.q0, outputs))


def _resolve_layers(
    given: Rule, row: Activation, widths: Sequence[int], q0: float, outputs: bool
) -> tuple[DenseLayer, ...]:
    """The layers one after the other: a rule that is fitted to data needs the second moment that enters a layer.

    `outputs`: the last layer is that of a trained network, which some rules draw smaller.
    """
    found: list[DenseLayer] = []
    entering, known, bias_variance = q0, {}, given.sigma_b**2
    for k, (fan_in, fan_out) in enumerate(pairwise(widths)):
        scaling = last_layer(given, row, fan_in) if outputs and 0 < k == len(widths) - 2 else given
        orthogonal, uniform = scaling.distribution == "orthogonal", scaling.bias**2 / (3 * fan_in)
        weight = float(np.square(scaling.gain_for(row))) / MODES[scaling.mode](fan_in, fan_out)
        if orthogonal:  # an isometry's rows are as long as its columns are many
            weight *= fan_in / max(fan_in, fan_out)
        fitted = None
        if scaling.attempts:
            fitted = Fitted(weight, scaling.tolerance, scaling.attempts)
            weight = fitted.weight(fan_in, entering, bias_variance + uniform)
            q = weight * fan_in * entering + bias_variance + uniform
            if q not in known:
                known[q] = float(moment(row, q))
            entering = known[q]
        found.append(DenseLayer(fan_in, fan_out, weight, bias_variance, uniform, orthogonal, fitted))
    return tuple(found)
