"""Straight lines through the sizes of layers: octaves a layer, and whether that is much."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from initlab.stats.dtypes import FORMATS
from initlab.verdict.rules import NOISE, RATE, TOTAL


class Trend(NamedTuple):
    """How a size changes from layer to layer.

    rate: octaves (factors of 2) a layer, the median of the slopes between all pairs of layers, which one bad layer does
    not move. error: its standard error. first, last: the layers between which it was taken. start: log2 of the size
    where the signal comes from: at `first`, or at `last` after `reverse`.
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

    def reverse(self) -> "Trend":
        """The same on the way from the last layer to the first, as gradients run."""
        return self._replace(rate=-self.rate, start=self.start + self.total)

    def count_steps(self, name: str) -> int | None:
        """How many layers a size passes until a number format ends; None beyond ten times as many as there are."""
        end = math.log2(FORMATS[name].max if self.rate > 0 else FORMATS[name].least)
        steps = max(0.0, (end - self.start) / self.rate) if self.rate else math.inf
        return int(steps) if steps <= 10 * self.last else None


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
    return abs(trend.rate) > max(RATE, NOISE * trend.error) and abs(trend.total) > TOTAL
