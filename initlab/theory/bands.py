"""From the laws of tensors to bands of their statistics over networks: one row per tensor and statistic.

Statistics that cannot be negative are described by mean and standard deviation of their logarithm, the others by their
own. Legend: K tensors.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from initlab.stats.statistics import IN_LN
from initlab.theory.batch_law import NOTHING, Array, Law
from initlab.theory.quantiles import NARROW, WIDE
from initlab.theory.sample import IN_ORDER
from initlab.theory.unit_moments import normal_cdf

NORMAL = 2.5  # standard errors of moments within which values count as normal
ROUNDING = 1e-12  # of a measured cosine, which is all that is left to vary where all inputs have become one
_STEPS = np.array([0.0, -NARROW, NARROW, -WIDE, WIDE])
QUANTILES = (0.5, 0.16, 0.84, 0.023, 0.977)
EDGES = ("band68_low", "band68_high", "band_low", "band_high")
NUMBERS = ("limit", "ln_limit", "mean", "sd", "predicted", *EDGES)


class Rows(NamedTuple):
    """One statistic of K tensors, in the columns of NUMBERS: (K, 9).

    `limit` is what infinite width gives and `ln_limit` its ln, which does not overflow. `mean` and `sd` are of the
    statistic's ln if it is one of IN_LN; the rest is of the statistic itself: `predicted`, the median of its law at
    this width, and the quantiles around it.
    """

    statistic: str
    numbers: Array


def bands(law: Law, infinite: Law, batch: int, n: NDArray[np.int64], second: Array | None = None) -> list[Rows]:
    """All statistics of tensors (batch, n); laws with leading dimension K, n (K,).

    `second` (K, 2) replaces the law of ln q where a better one is known.
    """
    with np.errstate(all="ignore"):  # a signal that is gone or beyond float64 is data
        own, limit_q = law.ln_second_moment(), infinite.ln_second_moment()[:, 0]
        given = own if second is None else second
        shift = given[:, 0] - own[:, 0]
        found = _lengths(given, limit_q, np.log(batch * n) / 2)
        var = np.stack([law.ln_var[:, 0] + shift, law.ln_var[:, 1]], -1)
        found.append(_in_ln("std", var / 2, infinite.ln_var[:, 0] / 2))
        if not law.single_input:
            measured = law.as_measured(batch)
            inside = np.stack([measured.mean[:, 1] + shift, _root(measured.cov[:, 1, 1])], -1)
            found.append(_in_ln("std_within", inside / 2, infinite.mean[:, 1] / 2))
            found.append(_cosine(law, infinite, batch))
        for name, share in law.shares.items():
            moments, limit = np.stack([share[:, 0], np.nan_to_num(share[:, 1])], -1), infinite.shares[name][:, 0]
            points = np.clip(moments[:, :1] + moments[:, 1:] * _STEPS, 0, 1)
            found.append(Rows(name, np.column_stack([limit, np.log(limit), moments, points])))
        return [*found, _mean(law, infinite, given)]


def size_bands(limit: Array, law: Array, count: Array | int) -> list[Rows]:
    """Rows of tensors of so many entries, symmetric about 0, by the law of their ln q: (K,) and (K, 2)."""
    one = 1 / np.asarray(count, dtype=float)
    pooled = np.stack([law[:, 0] - one, np.sqrt(law[:, 1] ** 2 + 2 * one**2)], -1)  # a squared mean is chi-square
    with np.errstate(all="ignore"):
        return [*_lengths(law, limit, np.log(count) / 2), _in_ln("std", pooled / 2, limit / 2)]


def _lengths(law: Array, limit: Array, size: Array) -> list[Rows]:
    norm = law / 2 + np.stack([size, 0 * size], -1)
    return [
        _in_ln("q", law, limit),
        _in_ln("rms", law / 2, limit / 2),
        _in_ln("norm", norm, limit / 2 + size),
    ]


def _root(x: Array) -> Array:
    return np.sqrt(np.maximum(np.nan_to_num(x), 0))


def _in_ln(name: str, law: Array, limit: Array) -> Rows:
    gone = law[:, 0] < NOTHING / 4
    mean = np.where(gone, -np.inf, law[:, 0])
    sd = np.where(gone, 0.0, np.nan_to_num(law[:, 1]))
    limit = np.where(limit < NOTHING / 4, -np.inf, limit)
    points = np.exp(mean[:, None] + sd[:, None] * _STEPS)
    return Rows(name, np.column_stack([np.exp(limit), limit, mean, sd, points]))


def _cosine(law: Law, infinite: Law, batch: int) -> Rows:
    """Of vectors brought to one length: (B r - 1)/(B - 1), r = T / (T + W), with ln(T / W) normal.

    Inputs that have nothing in common have B r a gamma variable instead, of as many terms as 1/pair (Wilson & Hilferty
    1931 for its quantiles).
    """

    def cosine(ln_ratio: Array) -> Array:
        return (batch / (1 + np.exp(-np.clip(ln_ratio, -700, 700))) - 1) / (batch - 1)

    centre = law.mean[:, :1] - law.mean[:, 1:]
    cov = law.cov
    sd = _root(cov[:, 0, 0] + cov[:, 1, 1] - 2 * cov[:, 0, 1])[:, None]
    ninth = (2 * law.pair / (1 + law.pair) / 9)[:, None]
    roots = np.maximum(1e-9, 1 - ninth + _STEPS * np.sqrt(ninth))
    nothing_common = np.minimum(sd**2, 9 * ninth) / 2 + 3 * np.log(roots)
    logs = centre + np.where(centre < math.log(3 / batch), nothing_common, _STEPS * sd)
    points = cosine(logs) + ROUNDING * _STEPS
    limit = cosine(infinite.mean[:, 0] - infinite.mean[:, 1])
    width = (points[:, 2] - points[:, 1]) / (2 * NARROW)
    return Rows("cosine", np.column_stack([limit, np.log(limit), points[:, 0], width, points]))


# --- the pooled mean, exp(ln q / 2) (centre + lean eta + spread xi) --------------------------------------------------

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(16)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


def _mean(law: Law, infinite: Law, second: Array) -> Rows:
    even = bool((np.abs(law.centre) + np.abs(law.lean) < 1e-6 * law.spread).all())
    own, spread = second, law.spread
    if even:  # of n alike units: T/n is its variance, and T fluctuates more than q does
        shift = second[:, 0] - law.ln_second_moment()[:, 0]
        own = np.stack([law.mean[:, 0] + shift, _root(law.cov[:, 0, 0])], -1)
        spread = spread * np.exp((law.ln_q - law.mean[:, 0]) / 2)
    sd = np.where(np.isfinite(own[:, 1]), own[:, 1] / 2, 0)
    size = np.exp(np.clip(own[:, 0] / 2, -300, 300))
    factor = np.exp(sd[:, None] * _NODES)
    centre = law.centre[:, None] + law.lean[:, None] * _NODES
    mean = (factor * centre) @ _WEIGHTS
    square = (factor**2 * (centre**2 + spread[:, None] ** 2)) @ _WEIGHTS
    if even:
        points = law.centre[:, None] + spread[:, None] * _symmetric_quantiles(factor)
    else:
        points = np.stack([_mixture_quantile(q, factor, centre, spread) for q in QUANTILES], -1)
    limit = infinite.centre * np.exp(infinite.ln_q / 2)
    sd = np.sqrt(np.maximum(square - mean**2, 0))
    return Rows("mean", np.column_stack([limit, np.log(limit), mean * size, sd * size, points * size[:, None]]))


def _symmetric_quantiles(factor: Array) -> Array:
    """Quantiles (K, 5) of factor xi, by Newton's method from 0, where the density is largest: it passes no root."""
    x, wanted = np.zeros((2, len(factor))), np.array([[QUANTILES[2]], [QUANTILES[4]]])
    for _ in range(40):
        z = x[..., None] / factor
        step = (wanted - normal_cdf(z) @ _WEIGHTS) / (np.exp(-z * z / 2) / factor @ _WEIGHTS) * math.sqrt(2 * math.pi)
        x = x + step
        if (step <= 1e-9 * x).all():
            break
    return np.stack([0 * x[0], -x[0], x[0], -x[1], x[1]], -1)


def _mixture_quantile(q: float, factor: Array, centre: Array, spread: Array) -> Array:
    """Quantiles (K,) of factor (centre + spread xi); factors, centres (K, nodes). Halved, then by Newton's method."""
    spread = np.maximum(spread, 1e-9 * np.abs(centre).max(-1) + 1e-300)

    def normal(x: Array) -> Array:
        return np.asarray((x[:, None] / factor - centre) / spread[:, None])

    high = (factor * (np.abs(centre) + 9 * spread[:, None])).max(-1)
    low = -high
    for _ in range(18):
        middle = (low + high) / 2
        below = normal_cdf(normal(middle)) @ _WEIGHTS < q
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    x = (low + high) / 2
    for _ in range(2):
        z = normal(x)
        density = np.exp(-z * z / 2) / factor @ _WEIGHTS / (spread * math.sqrt(2 * math.pi))
        x = np.clip(x + (q - normal_cdf(z) @ _WEIGHTS) / density, low, high)
    return np.asarray(np.where(np.isfinite(x), x, low))


def sample_numbers(statistic: str, values: Array) -> Array:
    """Columns `mean` to `band_high` of NUMBERS, (7,), from the values (E,) of networks.

    Of values, or logarithms, whose third and fourth moments are those of normal ones within NORMAL standard errors the
    quantiles are those of a normal law: their errors are smaller. Others' are ranks, of mean P(x < quantile) as named.
    """
    values = values[np.isfinite(values)]
    points = np.quantile(values, QUANTILES, method="weibull") if len(values) else np.full(len(QUANTILES), np.inf)
    count = len(values)
    if statistic in IN_LN:
        values = np.log(values[values > 0])
    moments = (values.mean(), values.std()) if len(values) else (-math.inf, math.nan)
    mean, sd = moments
    if len(values) == count and sd > 0:
        off = (values - mean) / sd
        third, fourth = abs((off**3).mean()), abs((off**4).mean() - 3)
        if third < NORMAL * math.sqrt(6 / count) and fourth < NORMAL * math.sqrt(24 / count):
            points = mean + sd * _STEPS
            points = np.exp(points) if statistic in IN_LN else points
            points = np.clip(points, values.min(), values.max()) if statistic.startswith("frac") else points
    return np.concatenate([moments, points])


def correlate_sizes(block: torch.Tensor, before: torch.Tensor) -> float:
    """The correlation of ln std of two tensors over networks; blocks (F, E) in the order of IN_ORDER."""
    at = IN_ORDER.index("std")
    with np.errstate(divide="ignore"):
        logs = np.log(np.stack([block[at].numpy(), before[at].numpy()]))
    alive = logs[:, np.isfinite(logs).all(0)]
    return float(np.nan_to_num(np.corrcoef(alive)[0, 1])) if alive.shape[1] > 2 else 0.0


# --- as a table ---------------------------------------------------------------------------------------------------


class TensorBands(NamedTuple):
    """Rows of one tensor and direction with their layers and methods, (K,) each."""

    layers: NDArray[np.int64]
    tensor: str
    direction: str
    rows: Rows
    method: Sequence[str]
    rho: Array  # correlation over networks with the tensor before, nan where it is not known
    trust: NDArray[np.int64]  # a `method.Level`: how far the closed law is trusted


def frame(blocks: Sequence[TensorBands]) -> pd.DataFrame:
    """All rows, layer by layer, labels as categories in the order of their first appearance."""
    sizes = [len(block.layers) for block in blocks]
    layers = np.concatenate([block.layers for block in blocks])
    order = layers.argsort(kind="stable")

    def label(values: Sequence[str | Sequence[str]]) -> pd.Categorical:
        """One label a block, or one a row."""
        parts = [[one] * n if isinstance(one, str) else list(one) for one, n in zip(values, sizes, strict=True)]
        codes, names = pd.factorize(np.array([name for part in parts for name in part], dtype=object))
        return pd.Categorical.from_codes(codes[order], list(names))

    names = [block.rows.statistic for block in blocks]
    numbers = np.concatenate([block.rows.numbers for block in blocks])[order]
    columns = {
        "layer": layers[order],
        "tensor": label([block.tensor for block in blocks]),
        "direction": label([block.direction for block in blocks]),
        "statistic": label(names),
        "scale": label(["ln" if name in IN_LN else "linear" for name in names]),
        **dict(zip(NUMBERS, numbers.T, strict=True)),
        "rho": np.concatenate([block.rho for block in blocks])[order],
        "method": label([block.method for block in blocks]),
    }
    return pd.DataFrame(columns)
