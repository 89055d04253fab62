"""Straight lines through the sizes of layers: octaves a layer, and whether that is much."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RATE, TOTAL = 0.15, math.log2(10)  # octaves a layer, and in all layers, that sizes may change


class Trend(NamedTuple):
    """How a size changes from layer to layer.

    rate: octaves (factors of 2) a layer, the median of the slopes between all pairs of layers, which one bad layer does
    not move. error: its standard error. first, last: the layers between which it was taken. start: log2 at `first`.
    """

    rate: float
    error: float
    first: int
    last: int
    start: float

    @property
    def total(self) -> float:
        """Octaves from the first layer to the last."""
        return self.rate * (self.last - self.first)


NO_TREND = Trend(0.0, math.inf, 0, 0, math.nan)


def fit_trend(layers: Sequence[float], octaves: Sequence[float]) -> Trend:
    """The trend through points (layer, log2 of a size), those that are not finite left out; Theil 1950, Sen 1968.

    >>> fit_trend([1, 2, 3, 4], [0.0, -1.0, 9.0, -3.0]).rate
    -1.0
    """
    x, y = np.asarray(layers, dtype=float), np.asarray(octaves, dtype=float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(np.unique(x)) < 3:
        return NO_TREND
    a, b = np.triu_indices(len(x), 1)
    apart = x[b] != x[a]
    rate = float(np.median((y[b] - y[a])[apart] / (x[b] - x[a])[apart]))
    offset = float(np.median(y - rate * x))
    noise = 1.4826 * float(np.median(np.abs(y - rate * x - offset)))
    error = 1.2533 * noise / (float(np.std(x)) * math.sqrt(len(x)))
    return Trend(rate, error, int(x.min()), int(x.max()), offset + rate * float(x.min()))


def is_significant(trend: Trend) -> bool:
    """Whether a trend is more than noise, and more in all than training bears."""
    return abs(trend.rate) > max(RATE, 3 * trend.error) and abs(trend.total) > TOTAL
