"""What is asked of theory, checked: a rule, an activation and the shapes become layers with their variances.

Every mistake of the user's is found here, before anything is computed.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch

from initlab.errors import UsageError, check
from initlab.meanfield.maps import moment
from initlab.nn.activations import Activation
from initlab.nn.custom_activation import Given, as_activation
from initlab.nn.init import MODES, Rule, rule
from initlab.nn.mup import last_layer
from initlab.theory.forward_law import Data, Fitted, Layer


class Case(NamedTuple):
    """What is asked, checked."""

    rule: Rule
    row: Activation
    layers: tuple[Layer, ...]
    batch: int
    q0: float
    c0: float
    fixed_input: bool
    data: Data

    @property
    def widths(self) -> list[int]:
        return [self.layers[0].fan_in, *(layer.fan_out for layer in self.layers)]


def case_of(
    init: str | Rule,
    activation: Given,
    depth: int,
    width: int,
    widths: Sequence[int] | None,
    inputs: int | None,
    batch: int,
    q0: float,
    c0: float,
    fixed_input: bool,
    sb2: float,
    rule_fields: Mapping[str, Any],
    outputs: bool = False,
    data: Data = Data(),  # noqa: B008 - a tuple
) -> Case:
    row = as_activation(activation)
    scaling = _rule(init, rule_fields)
    units = _units(depth, width, widths, inputs, batch)
    for name, value in (("q0", q0), ("sb2", sb2), ("c0", c0)):
        if not isinstance(value, Real):
            raise UsageError(f"{name}={value!r}: must be a number")
    for name, value in (("q0", q0), ("sb2", sb2)):
        if not 0 <= value < math.inf:
            raise UsageError(f"{name}={value:g}: a second moment must be a finite number, at least 0")
    if q0 == 0:
        raise UsageError("q0=0: an input of zeros has nothing to say; it must be positive")
    if not 0 <= c0 < 1:
        raise UsageError(f"c0={c0:g}: the inputs' mean cosine must be at least 0 and below 1")
    layers = _layers(scaling, row, units, q0, sb2, outputs)
    return Case(scaling, row, layers, int(batch), float(q0), float(c0), fixed_input, data)


def _units(depth: int, width: int, widths: Sequence[int] | None, inputs: int | None, batch: int) -> list[int]:
    """Units of the input and of every layer: whole numbers, none of them 0."""
    if widths is not None and not isinstance(widths, Sequence | np.ndarray | torch.Tensor):
        raise UsageError(f"widths={widths!r}: must be a list with the units of every layer")
    if widths is None:
        _whole(depth=depth, width=width, batch=batch)
    own = [width] * depth if widths is None else list(widths)
    for n in own:
        _whole(width=n)
    _whole(depth=len(own), batch=batch)
    if inputs is not None:
        _whole(inputs=inputs)
    return [int(n) for n in (own[0] if inputs is None else inputs, *own)]


def _whole(**options: object) -> None:
    for name, value in options.items():
        if not isinstance(value, Real) or value != value // 1:
            raise UsageError(f"{name}={value!r}: must be a whole number")
        check(**{name: float(value)})


def _rule(init: str | Rule, fields: Mapping[str, Any]) -> Rule:
    allowed = ("gain", "mode", "distribution", "bias", "gain_kind", "attempts", "tolerance", "base_width")
    for name in fields:
        if name not in allowed:
            raise UsageError(f"{name}: no such option of a prediction; a rule has {', '.join(allowed)}")
    if isinstance(init, str):
        return rule(init, **fields)
    given = {name: getattr(init, name) for name in allowed}
    return Rule(**{**given, **{name: value for name, value in fields.items() if value is not None}})


def _layers(
    given: Rule, row: Activation, widths: Sequence[int], q0: float, sb2: float, outputs: bool
) -> tuple[Layer, ...]:
    """Where a rule is fitted to data, what that makes of the weights hangs on what enters: layer by layer.

    `outputs`: the last layer is a network's, which some rules draw smaller.
    """
    found: list[Layer] = []
    entering, known = q0, {}
    for k, (fan_in, fan_out) in enumerate(pairwise(widths)):
        scaling = last_layer(given, row, fan_in) if outputs and 0 < k == len(widths) - 2 else given
        orthogonal, uniform = scaling.distribution == "orthogonal", scaling.bias**2 / (3 * fan_in)
        weight = scaling.gain_for(row) ** 2 / MODES[scaling.mode](fan_in, fan_out)
        if orthogonal:  # an isometry's rows are as long as its columns are many
            weight *= fan_in / max(fan_in, fan_out)
        fitted = None
        if scaling.attempts:
            fitted = Fitted(weight, scaling.tolerance, scaling.attempts)
            weight = fitted.weight(fan_in, entering, sb2 + uniform)
            q = weight * fan_in * entering + sb2 + uniform
            if q not in known:
                known[q] = float(moment(row, q))
            entering = known[q]
        found.append(Layer(fan_in, fan_out, weight, sb2, uniform, orthogonal, fitted))
    return tuple(found)
