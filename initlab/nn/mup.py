"""The maximal update parametrization: what must follow the width so that training does not depend on it.

Table 3 of Yang et al. 2022 (Tensor Programs V), relative to a base width, at which nothing differs from the rule's own
weights and one learning rate. With r_in and r_out the growth of a layer's fan_in and fan_out over the base network's
(1 where they are the data's or the classes'):

                          input weights   hidden weights   output weights   biases
    std of the weights    1               1                1/sqrt(r_in)             on top of the rule's 1/sqrt(fan_in)
    learning rate, SGD    r_out           1                1/r_in           r_out   weights: r_out/r_in in all of them
    learning rate, Adam   1               1/r_in           1/r_in           1       weights: 1/r_in in all of them

The rule `mup` has the base width 50; any rule takes another as `base_width`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from initlab.nn.activations import Activation
from initlab.nn.init import Rule


class RateFactors(NamedTuple):
    """What the learning rates of a layer are multiplied by; 1 changes nothing.

    weight: the factor for its weights. bias: the factor for its biases.
    """

    weight: float
    bias: float


def learning_rates(rule: Rule, sizes: Sequence[int], adaptive: bool) -> list[RateFactors]:
    """What the learning rate of every layer is multiplied by under a rule with a `base_width`; all 1 without.

    rule: whose base width counts. sizes: units of the data, of every hidden layer, and of the outputs. adaptive: the
    optimizer divides gradients by their own size, as Adam does; else it is gradient descent, with momentum or without.
    Source: Yang et al. 2022, table 3, with r_out/r_in for gradient descent and 1/r_in for Adam.

    >>> learning_rates(Rule(base_width=50), [10, 100, 100, 3], adaptive=True)[1:]
    [RateFactors(weight=0.5, bias=1.0), RateFactors(weight=0.5, bias=1.0)]
    """
    grown = [1.0, *(n / rule.base_width if rule.base_width else 1.0 for n in sizes[1:-1]), 1.0]
    return [RateFactors(1 / a, 1.0) if adaptive else RateFactors(b / a, b) for a, b in pairwise(grown)]


def last_layer(rule: Rule, activation: Activation | str, fan_in: int) -> Rule:
    """The rule of the output weights of a network with hidden layers: their std is smaller by sqrt(r_in).

    rule: that of the other layers. activation: which the gain belongs to. fan_in: of the last layer.

    A rule without a base width is returned as it is.

    >>> last_layer(Rule(gain=2.0, base_width=50), "relu", 200).gain
    1.0
    """
    if not rule.base_width:
        return rule
    return replace(rule, gain=rule.gain_for(activation) * math.sqrt(rule.base_width / fan_in))
