"""Where a number format ends a stack: the layer at which it overflows, becomes subnormal, holds a zero, is all zero.

A preactivation is exp(ln q / 2) times the length of its input times a normal number. The law of q, that of the lengths
and the extreme of B n normal numbers together give the share of networks in which an event has happened by a layer.
Formats count as they are stored, not as a device accumulates; bfloat16 on a CPU flushes subnormals to 0.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from initlab.errors import UsageError, library_call, show
from initlab.nn.custom_activation import Given
from initlab.nn.init import Rule
from initlab.stats.dtypes import FORMATS, NumberFormat, resolve_formats
from initlab.theory.batch_law import Array, Law
from initlab.theory.request import parse_request
from initlab.theory.stack_laws import finite_laws
from initlab.theory.unit_moments import normal_cdf

QUANTILES = {"layer_02": 0.023, "layer_16": 0.16, "layer": 0.5, "layer_84": 0.84, "layer_98": 0.977}
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(24)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


@library_call
def limits(
    init: str | Rule = "kaiming",
    activation: Given = "relu",
    depth: int = 50,
    width: int = 100,
    formats: Sequence[str] = tuple(FORMATS),
    **options: Any,
) -> pd.DataFrame:
    """Predict the layer at which a number format ends a stack's preactivations, as a distribution over networks.

    init, activation, depth, width and further options: as in `predict`. formats: names of number formats, of float64,
    float32, bfloat16, float16, float8_e4m3 and float8_e5m2. Returns a row per format and event: `overflow`,
    `subnormal`, `zero` (the first entry of each) and `all_zero`; `layer_02`, `layer_16`, `layer`, `layer_84`,
    `layer_98` are the layers by which it has happened in 2.3, 16, 50, 84 and 97.7 % of the networks, nan where fewer
    get so far; `share` is the share of networks in which it happens at all. Raises UsageError for an unknown format, or
    what `predict` cannot be asked.

    >>> ends = limits("naive", "linear", depth=50, width=100, formats=["float32"])
    >>> int(ends.set_index("event").loc["overflow", "layer"])
    38
    """
    formats = resolve_formats(formats)
    if options.get("method", "closed") not in ("auto", "closed"):
        raise UsageError(f"method={show(options['method'])}: the ends of number formats are found from closed laws")
    options.pop("method", None)
    request = parse_request(init, activation, depth, width, **options)
    laws, widths, batch = finite_laws(request).preactivations, request.widths[1:], request.batch
    rows, each = [], laws.split()
    for name in formats:
        for event, happened in EVENTS.items():
            by_layer = [happened(FORMATS[name], law, batch, n) for law, n in zip(each, widths, strict=True)]
            share = np.maximum.accumulate(by_layer)
            layers = {
                key: float((share >= q).argmax() + 1) if share[-1] >= q else math.nan for key, q in QUANTILES.items()
            }
            rows.append({"format": name, "event": event, **layers, "share": float(share[-1])})
    return pd.DataFrame(rows)


def _ln_rms(law: Law) -> Array:
    """Nodes of ln rms over networks."""
    mean, sd = law.ln_second_moment()[0].tolist()
    return np.asarray(mean / 2 + (0 if math.isnan(sd) else sd / 2) * _NODES)


def _ln_lengths(law: Law) -> Array:
    """Nodes of the ln of one input's length over the pooled one."""
    var = math.log1p(float(law.single[0])) / 4
    return np.asarray(-var + math.sqrt(var) * _NODES)


def _p_some_above(ln_limit: float, law: Law, batch: int, n: int) -> float:
    """P(some |z| > limit); inputs of the same direction count once, since their units are the same numbers."""
    apart = 1 + (batch - 1) * float(law.within_share[0])
    ln_x = np.clip(ln_limit - _ln_rms(law)[:, None] - _ln_lengths(law), -700, 700)
    tail = 2 * normal_cdf(-np.exp(np.minimum(ln_x, 5.0)))  # of one entry, by network and length
    none = np.log(np.maximum(np.exp(n * np.log1p(-np.minimum(tail, 1 - 1e-16))) @ _WEIGHTS, 1e-300))
    return float(1 - _WEIGHTS @ np.exp(apart * none))


def _p_some_below(ln_limit: float, law: Law, batch: int, n: int) -> float:
    """P(some |z| < limit), the density of z being flat there."""
    ln_x = np.clip(ln_limit - _ln_rms(law)[:, None] - _ln_lengths(law), -700, 700)
    inside = (2 * normal_cdf(np.exp(np.minimum(ln_x, 5.0))) - 1) @ _WEIGHTS
    small = np.sqrt(2 / np.pi) * np.exp(np.minimum(ln_x, 0.0)) @ _WEIGHTS
    entry = np.where(small < 1e-3, small, inside)
    return float(1 - _WEIGHTS @ np.exp(batch * n * np.log1p(-np.minimum(entry, 1 - 1e-16))))


def _ln_zero(f: NumberFormat) -> float:
    """ln of half the smallest number: what is smaller is rounded to 0."""
    return math.log(f.tiny) + math.log(f.eps) - math.log(2)


EVENTS: dict[str, Callable[[NumberFormat, Law, int, int], float]] = {
    "overflow": lambda f, law, batch, n: _p_some_above(math.log(f.max), law, batch, n),
    "subnormal": lambda f, law, batch, n: _p_some_below(math.log(f.tiny), law, batch, n),
    "zero": lambda f, law, batch, n: _p_some_below(_ln_zero(f), law, batch, n),
    "all_zero": lambda f, law, batch, n: 1 - _p_some_above(_ln_zero(f), law, batch, n),
}
