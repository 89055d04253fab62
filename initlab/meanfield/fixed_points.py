"""Fixed points of the length and correlation maps: ordered, critical or chaotic, depth scales, and the critical line.

Poole et al. 2016; Schoenholz, Gilmer, Ganguli & Sohl-Dickstein 2017. A fixed point is the one that preactivations of
second moment q0 run into, 1 unless given; GELU and similar functions have others. All widths are infinite.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from initlab.errors import LIMITS, UsageError, check_value, library_call
from initlab.meanfield import maps
from initlab.meanfield.correlation_points import FINE, correlation_fixed_point, map_in_octaves
from initlab.nn.activations import Activation, check_slope
from initlab.nn.custom_activation import Given, as_activation, name_of
from initlab.stats.quadrature import Function, estimate_means

EDGE = 1e-9  # a slope this near to 1 is taken for 1
TOUCH = 1e-7  # V(q) this near to q, relative to q, without a crossing makes a half-stable point
STEPS_PER_DECADE = 20
SECTIONS = 16  # into which a stretch with a root is cut
ROUGH = 2**9  # panels of a mean in the table of lengths


@dataclass(frozen=True)
class Phase:
    """Where a signal goes in an infinitely wide, infinitely deep net.

    sigma_w: standard deviation of a weight times sqrt(fan_in); sigma_b: of a bias. q: second moment of the
    preactivations at the fixed point that those of second moment q0 run into; c: correlation of two inputs there.
    slope: V'(q); chi_1: slope of the correlation map at 1, the factor per layer of a gradient's second moment; chi: its
    slope at c. xi_q, xi_c: depths in layers over which a deviation of q and of c shrinks by e. attracts: the sides from
    which q is drawn to the fixed point: both, above, below, none (a stack that starts on it leaves it at any finite
    width) or all (every q is one). phase: ordered, critical, chaotic, or unbounded where q grows for ever. Numbers that
    are undefined then are nan.
    """

    activation: str
    sigma_w: float
    sigma_b: float
    q: float
    c: float
    slope: float
    chi_1: float
    chi: float
    xi_q: float
    xi_c: float
    q0: float
    attracts: str
    phase: str

    @property
    def trainable_depth(self) -> float:
        """6 xi_c in layers, the empirical estimate of Schoenholz et al. 2017, section 5."""
        return 6 * self.xi_c

    @property
    def path(self) -> str:
        """What preactivations of second moment q0 do, in words."""
        if math.isinf(self.q):
            return f"from q={self.q0:g} the second moment grows for ever"
        drawn = {"both": "attracts", "all": "is one of many: every q stays", "none": "repels: finite width leaves it"}
        words = drawn.get(self.attracts, f"attracts from {self.attracts} alone")
        return f"from q={self.q0:g} the second moment goes to {self.q:.6g}, which {words}"


@library_call
def phase(activation: Given, sigma_w: float, sigma_b: float = 0.0, q0: float = 1.0) -> Phase:
    """Say whether a rule is ordered, critical or chaotic at infinite width, with its fixed point and depth scales.

    activation: a name of the table, or an elementwise function. sigma_w: standard deviation of a weight times
    sqrt(fan_in). sigma_b: standard deviation of a bias. q0: second moment of the first preactivations: where there are
    several fixed points, it decides. Returns a `Phase`, whose `path` says in words what a stack from q0 does.
    Raises UsageError for scales that are not finite numbers, at least 0; for an activation that jumps.
    Source: Poole et al. 2016; Schoenholz et al. 2017.

    >>> phase("relu", sigma_w=2**0.5).phase
    'critical'
    """
    row: dict[str, Any] = phase_plane(activation, [sigma_w], [sigma_b], q0=q0).to_dict("records")[0]
    return Phase(**row)


def phase_plane(
    activation: Given, sigma_w: Sequence[float], sigma_b: Sequence[float], first_layer: bool = False, q0: float = 1.0
) -> pd.DataFrame:
    """`phase` for every pair of the two lists: a row each with the fields of `Phase`, sigma_b slowest.

    `first_layer` starts at q = sigma_w^2 + sigma_b^2, the first preactivation of an input of second moment 1, instead
    of at q0: where there are several fixed points, as of GELU, the two may end in different ones.
    """
    scales = [
        torch.tensor([check_value(name, one) for one in given], dtype=torch.float64)
        for name, given in (("sigma_w", sigma_w), ("sigma_b", sigma_b))
    ]
    q0 = check_value("q0", q0)
    row = as_activation(activation)
    check_slope(row)
    sw = scales[0].repeat(len(scales[1]))
    sb = scales[1].repeat_interleave(len(scales[0]))
    s, b = sw * sw, sb * sb
    start = s + b if first_layer else torch.full_like(s, q0)
    q = _solve_length(row, s, b, start)
    slope, chi_1 = s * maps.growth(row, q), s * maps.slope_moment(row, q)
    names = np.select([q.isinf(), chi_1 > 1 + EDGE, chi_1 < 1 - EDGE], ["unbounded", "chaotic", "ordered"], "critical")
    c = torch.where(q.isinf(), torch.nan, torch.ones_like(q))
    chi = chi_1.clone()
    chaotic = torch.from_numpy(names == "chaotic")
    if bool(chaotic.any()):
        where = q[chaotic], s[chaotic], b[chaotic]
        c[chaotic] = correlation_fixed_point(row, *where)
        overlap = map_in_octaves(partial(maps.slope_overlap, per_panel=FINE), row, q[chaotic], c[chaotic])
        chi[chaotic] = s[chaotic] * overlap
    numbers = {"sigma_w": sw, "sigma_b": sb, "q": q, "c": c, "slope": slope, "chi_1": chi_1, "chi": chi}
    frame = pd.DataFrame({"activation": name_of(activation), **{name: x.numpy() for name, x in numbers.items()}})
    sides = _find_sides(row, s, b, start, q, slope)
    return frame.assign(xi_q=_depth_scale(slope), xi_c=_depth_scale(chi), q0=start.numpy(), attracts=sides, phase=names)


def _find_sides(row: Activation, s: Tensor, b: Tensor, start: Tensor, q: Tensor, slope: Tensor) -> np.ndarray:
    """From which sides q is drawn to its fixed point: as `Phase.attracts`; where V' is 1, the side it came from."""
    touching = (slope - 1).abs() < 1e-6
    every, away = touching.clone(), 1.001 * q[touching]
    if len(away):
        image = s[touching] * maps.moment(row, away.clamp(max=maps.HUGE)) + b[touching]
        every[touching] = (image / away - 1).abs() < 1e-12
    came = np.where(start.numpy() > q.numpy(), "above", "below")
    still = ((start - q).abs() <= 1e-12 * q).numpy()
    near = np.where(every.numpy(), "all", np.where(still, "none", came))
    sides = np.where(touching.numpy(), near, np.where((slope.abs() < 1).numpy(), "both", "none"))
    return np.where((q == 0).numpy() & ~every.numpy(), "above", np.where(q.isinf().numpy(), "none", sides))


def _depth_scale(slope: Tensor) -> np.ndarray:
    """-1 / ln |slope|, infinite from 1 on: a deviation shrinks by e over this many layers."""
    size = slope.abs().numpy()
    with np.errstate(divide="ignore"):
        finite = -1 / np.log(np.minimum(size, 1 - EDGE))
    return np.where(size < 1 - EDGE, finite, np.where(np.isnan(size), size, np.inf))


# --- lengths ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _tabulate(row: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """q from 1e-12 to 1e12 with 1 among them, E[phi^2] and E[phi'^2] there.

    nan where a third of E[phi^2], or a millionth of E[phi'^2] is uncertain: a rough E[phi^2] says on which side of q a
    fixed point lies, which `_refine` then finds, or refuses.
    """
    steps = torch.arange(-12 * STEPS_PER_DECADE, 12 * STEPS_PER_DECADE + 1, dtype=torch.float64)
    q = 10.0 ** (steps / STEPS_PER_DECADE)

    def tabulate(f: Function, share: float) -> Tensor:
        parts = [estimate_means(lambda z, u: f(z).square(), part, row.kinks, ROUGH) for part in torch.split(q, 64)]
        value, error, size = (torch.cat(x) for x in zip(*parts, strict=True))
        return value.where(size.isinf() | (error <= share * size), torch.nan)

    return q, tabulate(row.phi, 0.3), tabulate(row.slope, 1e-6)


def _solve_length(row: Activation, s: Tensor, b: Tensor, q0: Tensor) -> Tensor:
    """First q with V(q) = s E[phi^2] + b = q on the way from q0 in the direction that V takes; 0 or inf where none."""
    q, mean_square, _ = _tabulate(row)
    places = torch.arange(len(q))
    gap = s[:, None] * mean_square / q + b[:, None] / q - 1  # (P, grid)
    starts, which = torch.unique(q0.clamp(q[0], q[-1]), return_inverse=True)
    start = starts[which]
    at_start = (s * map_in_octaves(lambda r, x, _: maps.moment(r, x), row, starts, starts)[which] + b) / start - 1
    up = at_start > 0
    ahead = torch.where(up[:, None], q > start[:, None], q < start[:, None])
    crossed = ahead & ((gap <= 0) == up[:, None])
    order = torch.where(up[:, None], places, len(q) - 1 - places)  # how far ahead
    first = torch.where(crossed, order, len(q)).amin(-1)
    solved = torch.where(up, torch.inf, torch.zeros_like(s))
    found = first < len(q)
    if bool(found.any()):
        index, rises, begin = torch.where(up, first, len(q) - 1 - first)[found], up[found], start[found]
        before = torch.where(
            rises, q[(index - 1).clamp(min=0)].maximum(begin), q[(index + 1).clamp(max=len(q) - 1)].minimum(begin)
        )
        low, high = torch.minimum(q[index], before), torch.maximum(q[index], before)
        solved[found] = _refine(row, low, high, s[found], b[found])
    still = at_start.abs() < 1e-13
    solved[still] = start[still]
    turns = torch.zeros_like(gap, dtype=torch.bool)  # where V(q)/q - 1 turns on the grid, near 0
    left, right = gap[:, 1:-1] - gap[:, :-2], gap[:, 2:] - gap[:, 1:-1]
    turns[:, 1:-1] = (left * right < 0) & (gap[:, 1:-1].abs() < 0.01) & (left.abs() > 1e-12)
    valley = turns & ahead & (order <= first[:, None] + 1) & ~still[:, None]
    for k in valley.any(-1).nonzero().flatten().tolist():
        nearest = valley[k].nonzero().flatten()[0 if up[k] else -1]
        touching = _find_touching(row, float(q[nearest]), float(s[k]), float(b[k]))
        solved[k] = solved[k] if touching is None else touching
    return solved


def _find_touching(row: Activation, near: float, s: float, b: float) -> float | None:
    """The half-stable point near this q: V(q)/q turns there and is 1 to within TOUCH. None if it is not."""
    step = 10 ** (1.5 / STEPS_PER_DECADE)

    def turn(at: Tensor) -> Tensor:
        return at * (s * maps.growth(row, at)) - (s * maps.moment(row, at) + b)

    bottom = _bisect(turn, near / step, near * step)
    at = torch.tensor([bottom], dtype=torch.float64)
    return bottom if abs(float(s * maps.moment(row, at) + b) / bottom - 1) < TOUCH else None


def _refine(row: Activation, low: Tensor, high: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """Newton's method kept inside a bracket at whose ends V(q) - q has opposite signs."""
    rising = s * maps.moment(row, high) + b > high
    x = (low * high).sqrt()
    for _ in range(60):
        value = s * map_in_octaves(lambda r, q, _: maps.moment(r, q), row, x, x) + b
        slope = s * map_in_octaves(lambda r, q, _: maps.growth(r, q), row, x, x)
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


@library_call
def critical(activation: Given, sigma_b: float = 0.0, q0: float = 1.0) -> float:
    """The sigma_w at which gradients neither grow nor vanish with depth (chi_1 = 1), for these biases.

    activation: a name of the table, or an elementwise function. sigma_b: standard deviation of a bias. q0: second
    moment of the first preactivations. Returns sigma_w, the standard deviation of a weight times sqrt(fan_in), at which
    the fixed point that a stack from q0 runs into has chi_1 = 1: `phase` of the three says critical. The line is
    parametric in its fixed point q: sigma_w^2 = 1 / E[phi'^2], sigma_b^2 = q - sigma_w^2 E[phi^2]; where it meets
    sigma_b more than once, the smallest q counts that a stack from q0 reaches. Raises UsageError for a sigma_b that the
    line never meets, or meets only where q leaves for another fixed point or for ever: its text says which.
    Source: Schoenholz et al. 2017.

    >>> round(critical("relu"), 6)
    1.414214
    """
    wanted, q0 = check_value("sigma_b", sigma_b) ** 2, check_value("q0", q0)
    row, name = as_activation(activation), name_of(activation)
    check_slope(row)
    q, mean_square, slope_square = _tabulate(row)
    if not bool((slope_square > 0).any()):
        raise UsageError(f"activation={name}: its slope is 0, no sigma_w keeps gradients")
    bias = q - mean_square / slope_square
    near_0 = maps.slope_moment(row, torch.tensor([maps.TINY, 1e4 * maps.TINY], dtype=torch.float64))
    has_slope = 0.5 < float(near_0[0] / near_0[1]) < 2  # z^2 has none at 0, and no line from there
    at = [(0.0, 0.0)] if has_slope and wanted == 0 and float(row.phi(torch.zeros(1, dtype=torch.float64))) == 0 else []
    if bool((bias.abs() <= 1e-12 * q).all()):  # scale-free: every q is a fixed point, with biases none
        at = [(q0, q0)]
    else:
        over = (bias[:-1] - wanted) * (bias[1:] - wanted)  # nan where a mean is uncertain
        at += [(float(q[k]), float(q[k + 1])) for k in (over < 0).nonzero().flatten().tolist()]
    if not at:
        known = bias[bias.isfinite()]
        if not (known >= 0).any():
            raise UsageError(f"activation={name}: has no critical line, gradients shrink wherever lengths stay")
        least, most = (max(0.0, float(end)) ** 0.5 for end in (known.min(), known.max()))
        gaps = ", less where means have not converged" if least <= sigma_b <= most else ""
        line = f"the critical line of activation={name} has sigma_b from {least:.4g} to {most:.4g}{gaps}"
        raise UsageError(f"sigma_b={sigma_b:g}: {line}")
    paths = []
    for low, high in at:
        x = low if low == high else _bisect(lambda x: _line_bias(row, x) - wanted, low, high)
        here = torch.tensor([x], dtype=torch.float64)
        sigma_w = 1 / math.sqrt(float(maps.slope_moment(row, here)))
        if sigma_w > LIMITS["sigma_w"].highest:
            paths.append(f"q={x:.4g}, sigma_w={sigma_w:.6g}, which is beyond {LIMITS['sigma_w'].highest:.0f}")
            continue
        there = phase(row, sigma_w, sigma_b, q0)
        if there.phase == "critical":
            return sigma_w
        slope = sigma_w**2 * float(maps.growth(row, here))
        paths.append(f"q={x:.4g}, sigma_w={sigma_w:.6g}, where V' is {slope:.4g}, but {there.path}")
    raise UsageError(f"sigma_b={sigma_b:g}: activation={name} has chi_1 = 1 at {'; at '.join(paths)}")


def critical_line(activation: Given) -> pd.DataFrame:
    """The part of the critical line that attracts (V' <= 1): columns q, sigma_w, sigma_b, a row for each q of a grid.

    A rectifier, whose q is arbitrary there, has one row; an activation without such a part has none.
    """
    row = as_activation(activation)
    q, mean_square, slope_square = _tabulate(row)
    weight = 1 / slope_square
    bias = q - weight * mean_square
    if bool((bias.abs() <= 1e-12 * q).all()):
        return pd.DataFrame({"q": [1.0], "sigma_w": [float(weight[0]) ** 0.5], "sigma_b": [0.0]})
    line = bias >= 0
    stable = weight[line] * map_in_octaves(lambda r, x, _: maps.growth(r, x), row, q[line], q[line]) <= 1
    columns = {"q": q, "sigma_w": weight.sqrt(), "sigma_b": bias.sqrt()}
    return pd.DataFrame({name: values[line][stable].numpy() for name, values in columns.items()})


def half_stable(activation: Given) -> tuple[float, float, float]:
    """(sigma_w, sigma_b, q) on the critical line where V' = 1 too: q attracts from one side only.

    GELU has sigma_w^2 = 1.98305826, sigma_b^2 = 0.17292239, q = (3 + sqrt 17)/2. Raises UsageError for an activation
    without such a point.
    """
    row = as_activation(activation)
    q = _tabulate(row)[0]
    inner = q[(q > 1e-3) & (q < 1e4)]

    def excess(at: Tensor) -> Tensor:
        return maps.growth(row, at) / maps.slope_moment(row, at) - 1

    for k, (left, right) in enumerate(pairwise(excess(inner).tolist())):
        if left * right < 0 and min(abs(left), abs(right)) > 1e-12:
            root = _bisect(excess, float(inner[k]), float(inner[k + 1]))
            at = torch.tensor([root], dtype=torch.float64)
            return float(maps.slope_moment(row, at)) ** -0.5, float(_line_bias(row, at)) ** 0.5, root
    raise UsageError(f"activation={name_of(activation)}: V' and chi_1 are 1 together at no second moment")


def _line_bias(row: Activation, q: Tensor) -> Tensor:
    """sigma_b^2 of the critical line at its fixed points q."""
    return q - maps.moment(row, q) / maps.slope_moment(row, q)


def _bisect(f: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    """The last root between two points of opposite sign, to the last bit; f takes many points at once."""
    rising = float(f(torch.tensor([high], dtype=torch.float64))) > 0
    while True:
        points = torch.linspace(low, high, SECTIONS + 1, dtype=torch.float64)
        points = points[(points > low) & (points < high)]
        if not len(points):
            return (low + high) / 2
        before = len(points) - int(((f(points) > 0) == rising).flip(0).long().cumprod(0).sum())
        sides = [low, *points.tolist(), high]
        low, high = sides[before], sides[before + 1]
