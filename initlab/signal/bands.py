"""From the law of a tensor to its statistics: centre, spread and bands over seeds, one row a statistic.

Statistics that cannot be negative are described by mean and standard deviation of their ln, the others as they are.
Knows laws and simulated networks, neither rules nor activations.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from initlab.signal.laws import NOTHING, Law, Moments
from initlab.signal.stats import STATISTICS
from initlab.signal.unit_laws import normal_cdf

NARROW, WIDE = 0.9944579, 1.9953933  # standard deviations to 16 and 84 %, 2.3 and 97.7 %
ROUNDING = 1e-12  # of a measured cosine, which is all that is left to vary where all inputs have become one
_STEPS = (0.0, -NARROW, NARROW, -WIDE, WIDE)
QUANTILES = (0.023, 0.16, 0.5, 0.84, 0.977)
IN_LN = ("q", "rms", "std", "std_within", "norm")
IN_ORDER = ("q", "rms", "mean", "std", "std_within", "norm", "cosine", "frac_zero", "frac_dead", "frac_saturated")


class Band(NamedTuple):
    """One statistic. `mean` and `sd` are of its ln where `scale` is ln; the rest is of the statistic itself.

    `predicted` is the limit of infinite width and `ln_predicted` its ln, which does not overflow.
    """

    statistic: str
    scale: str
    predicted: float
    ln_predicted: float
    mean: float
    sd: float
    median: float
    band68_low: float
    band68_high: float
    band_low: float
    band_high: float


def exp(x: float) -> float:
    """e^x, inf beyond float64."""
    return math.exp(x) if x < 709.78 else math.inf


def bands(law: Law, infinite: Law, batch: int, n: int, second: Moments | None = None) -> list[Band]:
    """All statistics of a tensor (batch, n) but the pooled mean, for which see `means`.

    `second` replaces the law of ln q where a better one is known.
    """
    own, limit_q = law.ln_second_moment(), infinite.ln_second_moment()
    given = second or own
    shift = given[0] - own[0]
    measured, limit = law.reported(batch), infinite.reported(batch)
    half = ("rms", given, limit_q), ("std", (law.ln_var[0] + shift, law.ln_var[1]), infinite.ln_var)
    found = [_in_ln("q", given, limit_q[0])]
    found += [_in_ln(name, (m / 2, s / 2), limit_of[0] / 2) for name, (m, s), limit_of in half]
    size = math.log(batch * n) / 2
    found.append(_in_ln("norm", (given[0] / 2 + size, given[1] / 2), limit_q[0] / 2 + size))
    if not law.alone:
        inside = (measured.mean[1] + shift) / 2, _root(measured.cov[1, 1]) / 2
        found.append(_in_ln("std_within", (float(inside[0]), inside[1]), float(limit.mean[1]) / 2))
        found.append(_cosine(law, infinite, batch))
    found += [_share(name, moments, infinite.shares[name][0]) for name, moments in law.shares.items()]
    return found


def _root(x: float) -> float:
    return math.sqrt(max(0.0, float(x))) if math.isfinite(x) else 0.0


def scaled(limit: float, mean: float, sd: float, count: int) -> list[Band]:
    """Rows of a tensor of so many entries, symmetric about 0, by the law of its ln q."""
    half, size = limit / 2, math.log(count) / 2
    found = [_in_ln("q", (mean, sd), limit)]
    found += [_in_ln(name, (mean / 2, sd / 2), half) for name in ("rms", "std")]
    return [*found, _in_ln("norm", (mean / 2 + size, sd / 2), half + size)]


def _in_ln(name: str, law: Moments, limit: float) -> Band:
    mean, sd = law[0], (0.0 if math.isnan(law[1]) else law[1])
    if mean < NOTHING / 4:
        mean, sd = -math.inf, 0.0
    limit = -math.inf if limit < NOTHING / 4 else limit
    quantiles = [exp(mean + k * sd) for k in _STEPS]
    return Band(name, "ln", exp(limit), limit, mean, sd, *quantiles)


def _cosine(law: Law, infinite: Law, batch: int) -> Band:
    """Of vectors brought to one length: (B r - 1)/(B - 1), r = T / (T + W), with ln(T / W) normal.

    Inputs that have nothing in common have B r a gamma variable instead, of as many terms as 1/pair (Wilson & Hilferty
    1931 for its quantiles).
    """

    def cosine(ln_ratio: float) -> float:
        r = 1 / (1 + math.exp(-min(max(ln_ratio, -700.0), 700.0)))
        return (batch * r - 1) / (batch - 1)

    centre = float(law.mean[0] - law.mean[1])
    var = max(0.0, float(np.nan_to_num(law.cov[0, 0] + law.cov[1, 1] - 2 * law.cov[0, 1])))
    logs = [centre + k * math.sqrt(var) for k in _STEPS]
    if centre < math.log(3 / batch):
        ninth = 2 * law.pair / (1 + law.pair) / 9
        roots = [max(1e-9, 1 - ninth + k * math.sqrt(ninth)) for k in _STEPS]
        logs = [centre + min(var, 9 * ninth) / 2 + 3 * math.log(root) for root in roots]
    points = [cosine(x) + k * ROUNDING for x, k in zip(logs, _STEPS, strict=True)]
    limit = cosine(float(infinite.mean[0] - infinite.mean[1]))
    width = (points[2] - points[1]) / (2 * NARROW)
    return Band("cosine", "linear", limit, _ln(limit), points[0], width, *points)


def _ln(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


def means(laws: Sequence[Law], limits: Sequence[Law], seconds: Sequence[Moments]) -> list[Band]:
    """The pooled mean of each tensor: a normal variable times a lognormal one, exp(ln q / 2) (centre + spread xi)."""
    centre, spread = (np.array([getattr(law, name) for law in laws]) for name in ("centre", "spread"))
    ln_rms = np.clip([m / 2 for m, _ in seconds], -300, 300)
    sd = np.array([s / 2 if math.isfinite(s) else 0.0 for _, s in seconds])
    factor = np.exp(sd[:, None] * _NODES)
    mean = factor @ _WEIGHTS * centre
    square = factor**2 @ _WEIGHTS * (centre**2 + spread**2)
    quantiles = np.stack([_mixture_quantile(q, factor, centre, spread) for q in _POINTS], -1) * np.exp(ln_rms)[:, None]
    sds = np.sqrt(np.maximum(square - mean**2, 0))
    found = []
    for k, limit in enumerate(limits):
        at = limit.centre * exp(limit.ln_q / 2)
        size = math.exp(ln_rms[k])
        found.append(Band("mean", "linear", at, _ln(at), mean[k] * size, sds[k] * size, *quantiles[k].tolist()))
    return found


_POINTS = (0.5, 0.16, 0.84, 0.023, 0.977)
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(16)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


def _mixture_quantile(q: float, factor: np.ndarray, centre: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Quantiles of factor (centre + spread xi) by bisection, a tensor each; factors (K, nodes)."""
    spread = np.maximum(spread, 1e-300)
    reach = factor.max(-1) * (np.abs(centre) + 9 * spread)
    low, high = -reach, reach
    for _ in range(32):
        middle = (low + high) / 2
        below = normal_cdf((middle[:, None] / factor - centre[:, None]) / spread[:, None]) @ _WEIGHTS
        low, high = np.where(below < q, middle, low), np.where(below < q, high, middle)
    return np.asarray((low + high) / 2)


def _share(name: str, moments: Moments, limit: float) -> Band:
    mean, sd = moments[0], (0.0 if math.isnan(moments[1]) else moments[1])
    points = [min(1.0, max(0.0, mean + k * sd)) for k in _STEPS]
    return Band(name, "linear", limit, _ln(limit), mean, sd, *points)


def simulated(block: torch.Tensor, limits: dict[str, tuple[float, float]]) -> list[Band]:
    """The same rows from networks, (S, E); `limits` gives predicted and ln_predicted of each statistic wanted."""
    rows = dict(zip(STATISTICS, block.numpy(), strict=True))
    found = []
    for name in IN_ORDER:
        if name not in limits or np.isnan(rows[name]).all():
            continue
        values = rows[name][np.isfinite(rows[name])]
        low, low68, median, high68, high = np.quantile(values, QUANTILES).tolist()
        if name in IN_LN:
            values = np.log(values[values > 0])
        mean, sd = (float(values.mean()), float(values.std())) if len(values) else (-math.inf, math.nan)
        scale = "ln" if name in IN_LN else "linear"
        found.append(Band(name, scale, *limits[name], mean, sd, median, low68, high68, low, high))
    return found
