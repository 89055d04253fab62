"""Fixed points of the two maps: ordered, critical or chaotic, how deep a signal reaches, and the critical line.

Poole et al. 2016; Schoenholz, Gilmer, Ganguli & Sohl-Dickstein 2017. A fixed point is the one that a signal of second
moment q0 = 1 runs into; GELU and its kin have others. Infinite width: see `finite_width` for how far that carries.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from initlab.errors import UsageError
from initlab.meanfield import maps
from initlab.meanfield.correlation_points import FINE, correlation_fixed_point, in_octaves
from initlab.nn.activations import Activation
from initlab.nn.custom_activation import Given, as_activation, name_of

EDGE = 1e-9  # a slope this near to 1 is taken for 1
TOUCH = 1e-7  # so near may V(q) come to q without a crossing, relative to q, for a half-stable point
STEPS_PER_DECADE = 20


@dataclass(frozen=True)
class Phase:
    """Where a rule's signal goes in an infinitely wide, infinitely deep net. Second moments and dimensionless slopes.

    `slope` is V'(q), `chi_1` the slope of the correlation map at 1, `chi` at c; `xi_q`, `xi_c` are depths in layers.
    `phase` is ordered, critical, chaotic, or unbounded where q grows for ever; what is then undefined is nan.
    """

    activation: str
    sw2: float
    sb2: float
    q: float
    c: float
    slope: float
    chi_1: float
    chi: float
    xi_q: float
    xi_c: float
    phase: str

    @property
    def trainable_depth(self) -> float:
        """6 xi_c, the empirical estimate of Schoenholz et al. 2017, section 5; layers."""
        return 6 * self.xi_c


def phase(activation: Given, sw2: float, sb2: float = 0.0) -> Phase:
    """Fixed points, slopes and depths for weights of variance sw2/fan_in and biases of variance sb2."""
    frame = phase_plane(activation, [sw2], [sb2])
    row = frame.iloc[0]
    numbers = {name: float(row[name]) for name in ("sw2", "sb2", "q", "c", "slope", "chi_1", "chi", "xi_q", "xi_c")}
    return Phase(activation=str(row["activation"]), phase=str(row["phase"]), **numbers)


def phase_plane(
    activation: Given, sw2: Sequence[float], sb2: Sequence[float], first_layer: bool = False
) -> pd.DataFrame:
    """`phase` for every pair of the two lists, a row each, sb2 slowest.

    `first_layer` starts at q = sw2 + sb2, the first preactivation of an input of second moment 1, instead of at q = 1:
    where there are several fixed points, as of GELU, the two may end in different ones.
    """
    row = as_activation(activation)
    weights, biases = _variances("sw2", sw2), _variances("sb2", sb2)
    s = weights.repeat(len(biases))
    b = biases.repeat_interleave(len(weights))
    q = _length_fixed_point(row, s, b, s + b if first_layer else torch.ones_like(s))
    slope, chi_1, named = _named(row, q, s, b)
    c = torch.where(named == _CODES.index("unbounded"), torch.nan, torch.ones_like(q))
    chaotic = named == _CODES.index("chaotic")
    if bool(chaotic.any()):
        c[chaotic] = correlation_fixed_point(row, q[chaotic], s[chaotic], b[chaotic])
    chi = chi_1.clone()
    if bool(chaotic.any()):
        chi[chaotic] = s[chaotic] * in_octaves(partial(maps.slope_overlap, per_panel=FINE), row, q[chaotic], c[chaotic])
    found = {"sw2": s, "sb2": b, "q": q, "c": c, "slope": slope, "chi_1": chi_1, "chi": chi}
    frame = pd.DataFrame({name: values.numpy() for name, values in found.items()})
    frame.insert(0, "activation", name_of(activation))
    frame["xi_q"], frame["xi_c"] = _depth(slope), _depth(chi)
    return frame.assign(phase=[_CODES[k] for k in named.tolist()])


_CODES = ("ordered", "critical", "chaotic", "unbounded")


def _variances(name: str, given: Sequence[float]) -> Tensor:
    values = torch.tensor([float(x) for x in given], dtype=torch.float64)
    for value in values.tolist():
        if not 0 <= value < math.inf:
            raise UsageError(f"{name}={value:g}: a variance must be a finite number, at least 0")
    return values


def _named(row: Activation, q: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V'(q), chi_1 and which phase, as an index of _CODES."""
    slope, chi_1 = maps.length_slope(row, q, s), maps.chi(row, q, s)
    named = torch.ones_like(q, dtype=torch.long)
    named[chi_1 < 1 - EDGE] = 0
    named[chi_1 > 1 + EDGE] = 2
    named[q.isinf()] = 3
    return slope, chi_1, named


def _depth(slope: Tensor) -> np.ndarray:
    """-1 / ln |slope|, infinite from 1 on: over so many layers a deviation shrinks by e."""
    size = slope.abs().numpy()
    with np.errstate(divide="ignore"):
        return np.where(
            size < 1 - EDGE, -1 / np.log(np.minimum(size, 1 - EDGE)), np.where(np.isnan(size), size, np.inf)
        )


# --- lengths ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _table(row: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """q from 1e-12 to 1e12 with 1 among them, E[phi^2] and E[phi'^2] there."""
    q = 10.0 ** (
        torch.arange(-12 * STEPS_PER_DECADE, 12 * STEPS_PER_DECADE + 1, dtype=torch.float64) / STEPS_PER_DECADE
    )
    mean_square = in_octaves(lambda r, x, _: maps.moment(r, x), row, q, q)
    return q, mean_square, in_octaves(lambda r, x, _: maps.slope_moment(r, x), row, q, q)


def _length_fixed_point(row: Activation, s: Tensor, b: Tensor, q0: Tensor) -> Tensor:
    """Where V(q) = q, met first on the way from q0 (to the table's grid) in the direction that V takes; 0 and inf where
    never.
    """
    q, mean_square, _ = _table(row)
    places = torch.arange(len(q))
    start = ((q0.clamp(q[0], q[-1]).log10() + 12) * STEPS_PER_DECADE).round().long()[:, None]
    gap = s[:, None] * mean_square / q + b[:, None] / q - 1  # (P, grid)
    at_start = gap.gather(1, start)[:, 0]
    up = at_start > 0
    ahead = torch.where(up[:, None], places > start, places < start)
    crossed = ahead & ((gap <= 0) == up[:, None])
    order = torch.where(up[:, None], places, len(q) - 1 - places)  # how far ahead
    first = torch.where(crossed, order, len(q)).amin(-1)
    solved = torch.where(up, torch.inf, torch.zeros_like(s))
    found = first < len(q)
    if bool(found.any()):
        index = torch.where(up, first, len(q) - 1 - first)[found]
        other = torch.where(up[found], index - 1, index + 1)
        low, high = q[torch.minimum(index, other)], q[torch.maximum(index, other)]
        solved[found] = _refined(row, low, high, s[found], b[found])
    still = at_start.abs() < 1e-13
    solved[still] = q[start[:, 0]][still]
    valley = _valleys(gap) & ahead & (order <= first[:, None] + 1) & ~still[:, None]
    for k in valley.any(-1).nonzero().flatten().tolist():
        nearest = valley[k].nonzero().flatten()[0 if up[k] else -1]
        solved[k] = _touching(row, float(q[nearest]), float(s[k]), float(b[k]), float(solved[k]))
    return solved


def _valleys(gap: Tensor) -> Tensor:
    """Where V(q)/q - 1 turns on the grid, near 0."""
    turns = torch.zeros_like(gap, dtype=torch.bool)
    left, right = gap[:, 1:-1] - gap[:, :-2], gap[:, 2:] - gap[:, 1:-1]
    turns[:, 1:-1] = (left * right < 0) & (gap[:, 1:-1].abs() < 0.01) & (left.abs() > 1e-12)
    return turns


def _touching(row: Activation, near: float, s: float, b: float, crossing: float) -> float:
    """The half-stable point: V(q)/q turns there and is 1 to within TOUCH. Else the crossing."""
    step = 10 ** (1.5 / STEPS_PER_DECADE)

    def turning(x: float) -> float:
        at = torch.tensor([x], dtype=torch.float64)
        return float(x * maps.length_slope(row, at, s) - maps.length_map(row, at, s, b))

    bottom = _bisected(turning, near / step, near * step)
    at = torch.tensor([bottom], dtype=torch.float64)
    return bottom if abs(float(maps.length_map(row, at, s, b)) / bottom - 1) < TOUCH else crossing


def _refined(row: Activation, low: Tensor, high: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """Newton's method kept inside a bracket at whose ends V(q) - q has opposite signs."""
    rising = maps.length_map(row, high, s, b) > high
    x = (low * high).sqrt()
    for _ in range(60):
        value = s * in_octaves(lambda r, q, _: maps.moment(r, q), row, x, x) + b
        slope = s * in_octaves(lambda r, q, _: maps.growth(r, q), row, x, x)
        above = (value > x) == rising
        high, low = torch.where(above, x, high), torch.where(above, low, x)
        newton = x - (value - x) / (slope - 1)
        inside = (newton >= low) & (newton <= high)
        new = torch.where(inside, newton, (low * high).sqrt())
        done = ((new - x).abs() <= 1e-14 * x) | ((value - x).abs() <= 1e-15 * x)
        x = torch.where(done, x, new)
        if bool(done.all()):
            break
    return x


# --- the critical line -----------------------------------------------------------------------------------------------


def critical(activation: Given, sb2: float = 0.0) -> float:
    """sw2 at which chi_1 = 1 for this bias variance.

    The line is parametric in its fixed point: sw2 = 1 / E[phi'^2], sb2 = q - sw2 E[phi^2]. Where it meets sb2 more than
    once the smallest q counts. Rectifiers have chi_1 = 1 at one sw2 for every q, with biases at an unbounded one.
    Errors: a bias variance that the line never meets.
    """
    row = as_activation(activation)
    (wanted,) = _variances("sb2", [sb2]).tolist()
    q, mean_square, slope_square = _table(row)
    bias = q - mean_square / slope_square
    if wanted == 0 and float(row.phi(torch.zeros(1, dtype=torch.float64))) == 0:
        return 1 / float(maps.slope_moment(row, 0.0))
    if bool((bias.abs() <= 1e-12 * q).all()):  # scale-free: any q does
        return 1 / float(slope_square[0])
    over = (bias >= wanted).int()
    change = over.diff().nonzero().flatten()
    if not len(change):
        raise UsageError(
            f"sb2={sb2:g}: the critical line of activation={name_of(activation)} has bias variances from "
            f"{max(0.0, float(bias.min())):.4g} to {float(bias.max()):.4g} only"
        )
    k = int(change[0])
    root = _bisected(lambda x: _line_bias(row, x) - wanted, float(q[k]), float(q[k + 1]))
    return 1 / float(maps.slope_moment(row, torch.tensor([root], dtype=torch.float64)))


def critical_line(activation: Given) -> pd.DataFrame:
    """The part of the critical line that attracts (V' <= 1): columns q, sw2, sb2, a row for each q of a fine grid.

    Of a rectifier, whose q is arbitrary there, one row; empty of an activation that has no such part.
    """
    row = as_activation(activation)
    q, mean_square, slope_square = _table(row)
    sw2 = 1 / slope_square
    sb2 = q - sw2 * mean_square
    if bool((sb2.abs() <= 1e-12 * q).all()):
        return pd.DataFrame({"q": [1.0], "sw2": [float(sw2[0])], "sb2": [0.0]})
    stable = (sb2 >= 0) & (sw2 * in_octaves(lambda r, x, _: maps.growth(r, x), row, q, q) <= 1)
    return pd.DataFrame({"q": q[stable].numpy(), "sw2": sw2[stable].numpy(), "sb2": sb2[stable].numpy()})


def half_stable(activation: Given) -> tuple[float, float, float]:
    """(sw2, sb2, q) on the critical line where V' = 1 too: q attracts from one side only, as slowly as gradients move.

    GELU: (1.98305826, 0.17292239, (3 + sqrt 17)/2). Errors: an activation without such a point.
    """
    row = as_activation(activation)
    q = _table(row)[0]
    inner = q[(q > 1e-3) & (q < 1e4)]

    def excess(x: float) -> float:
        at = torch.tensor([x], dtype=torch.float64)
        return float(maps.growth(row, at) / maps.slope_moment(row, at)) - 1

    values = [excess(x) for x in inner.tolist()]
    for k, (left, right) in enumerate(pairwise(values)):
        if left * right < 0 and min(abs(left), abs(right)) > 1e-12:
            root = _bisected(excess, float(inner[k]), float(inner[k + 1]))
            at = torch.tensor([root], dtype=torch.float64)
            return 1 / float(maps.slope_moment(row, at)), _line_bias(row, root), root
    raise UsageError(f"activation={name_of(activation)}: V' and chi_1 are 1 together at no second moment")


def _line_bias(row: Activation, q: float) -> float:
    at = torch.tensor([q], dtype=torch.float64)
    return q - float(maps.moment(row, at) / maps.slope_moment(row, at))


def _bisected(f: Callable[[float], float], low: float, high: float) -> float:
    """A root between two places of opposite sign, to the last bit."""
    rising = f(high) > 0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if (f(middle) > 0) == rising else (middle, high)
    return (low + high) / 2
