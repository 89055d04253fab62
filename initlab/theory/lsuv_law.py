"""The law of weights that LSUV has rescaled: the larger a layer's input, the smaller its weights become.

In some networks the drawn weights give a variance within the tolerance already, and are left as they are.
"""

import math

import numpy as np

from initlab.theory.batch_law import Array, ln
from initlab.theory.forward_law import DenseLayer

SELDOM = 1e-3  # share of networks below which a fit is said to be needed by all


def ln_weight(layer: DenseLayer, nodes: Array) -> Array:
    """ln of the variance of one weight at nodes (G, 2) of the layer's input, (G,).

    In a rescaled layer it makes the pooled variance of z, T + W less its squared mean (T/n on average), equal to 1.
    """
    if not layer.is_rescaled:
        return np.full(len(nodes), ln(layer.weight))
    ln_q = np.logaddexp(nodes[:, 0], nodes[:, 1])
    mean = np.exp(nodes[:, 0] - ln_q) / layer.fan_out
    return np.asarray(-ln_q - np.log1p(-np.minimum(mean, 0.5)) - math.log(layer.fan_in))


def fit_noise(layer: DenseLayer, ln_x: Array, pair: float, batch: int) -> float:
    """Variance of ln of a rescaled layer's weight variance, given ln T and ln W of its input; large for few units."""
    if not layer.is_rescaled:
        return 0.0
    t, w = (float(x) for x in np.exp(ln_x - np.logaddexp(*ln_x)))
    return layer.forward_remain * 2 / layer.fan_out * (t * t + w * w * (1 / max(1, batch - 1) + pair))


def p_not_rescaled(layer: DenseLayer, ln_x: Array, cov: Array, pair: float, batch: int) -> float:
    """Probability that a rescaled layer was within the tolerance as drawn; mean and covariance are of its input."""
    if layer.fitted is None or not (layer.is_rescaled and layer.fitted.drawn > 0):
        return 0.0
    by = np.exp(ln_x - np.logaddexp(*ln_x))
    centre = math.log(layer.fitted.drawn * layer.fan_in) + float(np.logaddexp(*ln_x))
    sd = math.sqrt(max(float(by @ cov @ by), 0.0) + fit_noise(layer, ln_x, pair, batch) + 1e-12)
    ends = [ln(max(0.0, 1 + side * layer.fitted.tolerance)) for side in (-1, 1)]
    low, high = (0.5 * math.erfc((centre - end) / (sd * math.sqrt(2))) for end in ends)
    return high - low if high - low > SELDOM else 0.0
