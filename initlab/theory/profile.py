"""One p-value for a whole profile of layers: how often a correct ensemble is as far from its prediction somewhere.

Neighbouring layers are not independent: what one layer did to the signal all later ones inherit. So the number of
layers inside a band is no test; the largest |z| is, under the joint law of all layers.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DRAWS = 20_000  # the standard error of a p of 0.05 is 0.0015


def p_value(z: Array, rho: Array) -> float:
    """P(the largest |z| of a correct ensemble is at least the one found), 0 to 1; nan without a layer.

    z: (L,) standard errors between measured and predicted in consecutive layers, in the direction of travel; an inf
    gives 0. rho: (L,) correlation of each layer with the one before, the first not used; nan counts as 0, which makes
    p too large. The layers are taken as a Gaussian Markov chain. p is counted over DRAWS chains of fixed seed; below
    50 of these it is at most what the layers' own tails add up to.

    >>> z = np.array([0.5, 1.0, 2.5])
    >>> round(p_value(z, np.zeros(3)), 2), round(p_value(z, np.ones(3)), 2)  # three layers that are independent, or one
    (0.04, 0.01)
    """
    if not len(z):
        return math.nan
    largest = float(np.abs(z).max())
    if not math.isfinite(largest):
        return 0.0
    kept = np.nan_to_num(np.clip(rho, -1, 1))
    noise = _draws(len(z))
    chain, exceeded = noise[0], np.abs(noise[0]) >= largest
    for step, by in zip(noise[1:], kept[1:], strict=True):
        chain = by * chain + math.sqrt(1 - by * by) * step
        exceeded = exceeded | (np.abs(chain) >= largest)
    counted = int(exceeded.sum())
    tails = len(z) * math.erfc(largest / math.sqrt(2))
    return counted / DRAWS if counted >= 50 else min(tails, 50 / DRAWS)


@lru_cache(maxsize=4)
def _draws(layers: int) -> Array:
    """Standard normal numbers, (layers, DRAWS)."""
    found: Array = np.random.default_rng(0).standard_normal((layers, DRAWS))
    return found
