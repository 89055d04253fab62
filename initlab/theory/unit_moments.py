"""Moments of phi and phi' of one unit over the inputs of a batch, given the unit's batch mean.

All inputs of a batch have the same law, so that the preactivations of a unit are z_a = sqrt(T) m + sqrt(W) e_a: T is
the second moment of the unit's batch mean, W the variance inside the batch, m and e_a are standard normal (m is not
quite normal with a uniform bias), and the e_a add up to 0. Two one-dimensional integrals then give every moment of
every pair and quadruple of inputs. Everything is divided by its own scale, whose logarithm is kept: nothing overflows.

Legend: G states (T, W) at once, M nodes of m, U nodes of e.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from initlab.nn.activations import Activation
from initlab.nn.saturation import find_changes
from initlab.stats.quadrature import panels
from initlab.stats.statistics import SATURATED
from initlab.theory.batch_law import NOTHING

Array: TypeAlias = NDArray[np.float64]
Intervals: TypeAlias = tuple[tuple[float, float], ...]
CLIP = 230.0  # ln of the largest scale at which phi itself is evaluated; beyond, its power law goes on


class NodeGrid(NamedTuple):
    """How finely to integrate: panels of this width, so many nodes each, edges halving this often towards a kink.

    `means_only` leaves out what only finite width needs."""

    width: float
    reach: float
    nodes: int
    halvings: int
    wide: int = 0  # octaves of z that the innermost panel may span beyond 1
    means_only: bool = False


COARSE = NodeGrid(width=3.0, reach=6.0, nodes=6, halvings=3, wide=1)  # 1e-5, for what fluctuates
FINE = NodeGrid(width=3.0, reach=7.5, nodes=10, halvings=12, means_only=True)  # 1e-9, for the limit of infinite width


@dataclass(frozen=True)
class Units:
    """Moments of phi and phi' in G states given m, (G, M) each; phi in units of exp(ln_scale / 2), slopes as they are.

    mean, variance, third, fourth: central moments of phi. With the Hermite polynomials He1(e) = e and He2(e) = e^2 - 1
    of the part e inside the batch: e1 = E[phi e], e2 = E[phi He2], e1_square and e2_square the same of
    (phi - mean)^2. slope, slope2, slope4 = E[phi'], E[phi'^2], E[phi'^4]; e1_slope, e2_slope, e2_slope2 = E[phi' e],
    E[phi' He2], E[phi'^2 He2].
    Over everything, with u the preactivation in units of sqrt(q) and He4(u) = u^4 - 6 u^2 + 3: h2_phi2, h4_phi2 (G,) =
    E[phi^2 He2(u)], E[phi^2 He4(u)]. In the first state only, (1,): h2_slope2, h4_slope2 the same of phi'^2,
    phi2_slope2 = E[phi^2 phi'^2], u_phi_slope = E[u phi phi'], u2_slope2 = E[u^2 phi'^2].
    """

    m: Array
    weights: Array  # of m, density included
    inside: Array  # W / (T + W), (G, 1)
    scale: Array  # sqrt(T + W), clipped, (G, 1)
    ln_scale: Array  # (G,)
    mean: Array
    variance: Array
    third: Array
    fourth: Array
    e1: Array
    e1_square: Array
    e2: Array
    e2_square: Array
    slope: Array
    slope2: Array
    slope4: Array
    e1_slope: Array
    e2_slope: Array
    e2_slope2: Array
    h2_phi2: Array
    h4_phi2: Array
    h2_slope2: Array
    h4_slope2: Array
    phi2_slope2: Array
    u_phi_slope: Array
    u2_slope2: Array

    def over_m(self, f: Array) -> Array:
        """E over m, (..., G, M) -> (..., G)."""
        return np.asarray((f * self.weights).sum(-1))


class JoinedUnits:
    """`Units` of many layers as one row of K nodes of m, since layers differ in their number of nodes M."""

    def __init__(self, layers: Sequence[Units]) -> None:
        self._layers = layers
        counts = [u.m.shape[-1] for u in layers for _ in range(len(u.m))]
        self._counts, self._starts = np.array(counts), np.concatenate([[0], np.cumsum(counts)[:-1]])
        self._shape = (len(layers), len(layers[0].m))
        self.m, self.weights = self.row("m"), self.row("weights")
        self.inside, self.scale = (
            self.spread(np.concatenate([getattr(u, x)[:, 0] for u in layers])) for x in ("inside", "scale")
        )

    def row(self, name: str) -> Array:
        """A moment of `Units`, (K,)."""
        return np.concatenate([getattr(u, name).ravel() for u in self._layers])

    def spread(self, by_state: Array) -> Array:
        """(L G,) or (L, G) -> (K,)."""
        return by_state.ravel().repeat(self._counts)

    def over_m(self, f: Array) -> Array:
        """E over m, (..., K) -> (..., L, G)."""
        return np.add.reduceat(f * self.weights, self._starts, axis=-1).reshape(*f.shape[:-1], *self._shape)

    def probability(self, intervals: Intervals) -> tuple[Array, Array, Array]:
        """P(z in one of the intervals) given m, and the means of He1(e) and He2(e) there, each (K,)."""
        root_w, centre = np.sqrt(self.inside) + 1e-150, np.sqrt(1 - self.inside) * self.m
        found, along, curve = np.zeros((3, *self.m.shape))
        for low, high in intervals:
            for edge, sign in ((low, -1), (high, 1)):
                e = (edge / self.scale - centre) / root_w
                near = np.clip(e, -40, 40)
                density = sign * np.exp(-near * near / 2) / math.sqrt(2 * math.pi)
                found += sign * normal_cdf(e)
                along -= density
                curve -= near * density
        return found, along, curve


def normal_cdf(x: Array) -> Array:
    return np.asarray(torch.special.ndtr(torch.from_numpy(np.ascontiguousarray(x))))


def units(row: Activation, ln_t: Array, ln_w: Array, uniform: Array, grid: NodeGrid = COARSE) -> Units:
    """Moments at states (ln T, ln W), each (G,); `uniform` is the share of T that a uniform bias makes up, (G,).

    ln W = -inf stands for a single input: m carries everything.
    """
    ln_q = np.logaddexp(ln_t, ln_w)
    t, w = np.exp(ln_t - ln_q)[:, None], np.exp(ln_w - ln_q)[:, None]
    half = ln_q / 2
    clipped = half.clip(-CLIP, CLIP)
    if row.homogeneous:  # any scale does but that of a signal that is gone
        clipped[half > NOTHING / 4] = 0
    scale = np.exp(clipped)[:, None]
    kinks = sorted({0.0, *row.kinks})
    octaves = math.ceil(min(30.0, max(0.0, clipped.max() / math.log(2))))
    octaves = max(min(octaves, 1), octaves - grid.wide)
    narrow = float((t / np.maximum(w, 1e-30)).max()) if row.kinks or not w.any() else 1.0
    m, m_weights = _outer_nodes(t, scale, kinks, octaves, narrow, uniform, grid)
    e, e_weights = _inner_nodes(m, t, w, scale, kinks, octaves, grid)
    u = (np.sqrt(t) * m)[..., None] + np.sqrt(w)[..., None] * e
    z = torch.from_numpy(scale[..., None] * u)
    f, p = row.phi(z).numpy(), row.slope(z).numpy()
    size = np.sqrt((_mean(f * f, e_weights) * m_weights).sum(-1))
    f = f / np.where(size > 0, size, 1)[:, None, None]
    ln_size = np.where(size > 0, np.log(np.where(size > 0, size, 1)), NOTHING)
    ln_scale = 2 * (ln_size + _degree(row, clipped, half) * (half - clipped))
    if not grid.means_only:
        return Units(m, m_weights, w, scale, ln_scale, **_moments(f, p, u, e, e_weights, m_weights))
    zero = {field.name: np.zeros(len(m)) for field in fields(Units)[5:]}  # moments that count at finite width only
    centre = _mean(f, e_weights)
    variance = _mean((f - centre[..., None]) ** 2, e_weights)
    found = {"mean": centre, "variance": variance, "slope": _mean(p, e_weights), "slope2": _mean(p * p, e_weights)}
    return Units(m, m_weights, w, scale, ln_scale, **{**zero, **found})


def _mean(x: Array, weights: Array) -> Array:
    return np.asarray(np.einsum("gmu,gmu->gm", x, weights))


def _moments(f: Array, p: Array, u: Array, e: Array, weights: Array, m_weights: Array) -> dict[str, Any]:
    centre = _mean(f, weights)
    off = f - centre[..., None]
    weighted = weights * e
    bent = weighted * e
    bent -= weights * bent.sum(-1, keepdims=True)  # constants have none of it, to rounding
    square, squares, p2, u2 = off * off, f * f * weights, p * p, u * u
    fourth = u2 * (u2 - 6) + 3
    centre_p2 = p2[:1] * weights[:1]

    def whole(x: Array, y: Array) -> Array:
        return np.asarray((_mean(x, y) * m_weights[: len(x)]).sum(-1))

    return {
        "mean": centre,
        "variance": _mean(square, weights),
        "third": _mean(square * off, weights),
        "fourth": _mean(square * square, weights),
        "e1": _mean(off, weighted),
        "e1_square": _mean(square, weighted),
        "e2": _mean(f, bent),
        "e2_square": _mean(square, bent),
        "slope": _mean(p, weights),
        "slope2": _mean(p2, weights),
        "slope4": _mean(p2 * p2, weights),
        "e1_slope": _mean(p, weighted),
        "e2_slope": _mean(p, bent),
        "e2_slope2": _mean(p2, bent),
        "h2_phi2": whole(u2 - 1, squares),
        "h4_phi2": whole(fourth, squares),
        "h2_slope2": whole(u2[:1] - 1, centre_p2),
        "h4_slope2": whole(fourth[:1], centre_p2),
        "phi2_slope2": whole(p2[:1], squares[:1]),
        "u_phi_slope": whole(p[:1] * u[:1], f[:1] * weights[:1]),
        "u2_slope2": whole(u2[:1], centre_p2),
    }


def _degree(row: Activation, clipped: Array, half: Array) -> Array:
    """d ln|phi| / d ln z where the scale was clipped: 1 for what goes on as a line, 0 for what saturates."""
    if row.homogeneous or (clipped == half).all():
        return np.full_like(half, row.homogeneous)
    at = torch.from_numpy(np.exp(clipped))
    one, two = (row.phi(k * at).abs() + row.phi(-k * at).abs() for k in (1, 2))
    ratio = torch.where(one > 0, two / one, 1)
    return np.asarray((ratio.log() / math.log(2)).round())


def _outer_nodes(
    t: Array, scale: Array, kinks: list[float], octaves: int, narrow: float, uniform: Array, grid: NodeGrid
) -> tuple[Array, Array]:
    """Nodes of m and weights; edges halve towards a kink, near which moments change over sqrt(W/T) = 1/sqrt(narrow)."""
    levels = min(grid.halvings, max(octaves, math.ceil(math.log2(max(1.0, narrow)) / 2)))
    centres = np.concatenate([k / (scale * np.sqrt(t) + 1e-300) for k in kinks], -1)
    moving = (centres[..., None] + _halving_offsets(levels, 0)).reshape(len(t), -1)
    if (uniform > 0).any():
        ends, width = np.sqrt(3 * uniform)[:, None], np.sqrt(1 - uniform)[:, None]
        steps = _DECAY if grid.means_only else np.zeros(1)  # the density falls off over a few widths
        moving = np.concatenate([moving, ends + width * steps, -ends - width * steps], -1)
    m, lengths = _panels_between(moving, grid)
    density = np.exp(-m * m / 2)
    if (uniform > 0).any():  # of the sum of a normal variable and a uniform one
        share = uniform[:, None].clip(1e-9, 1 - 1e-9)
        half, sigma = np.sqrt(3 * share), np.sqrt(1 - share)
        density = normal_cdf((m + half) / sigma) - normal_cdf((m - half) / sigma)
    weights = lengths * density
    return m, weights / weights.sum(-1, keepdims=True)


_DECAY = np.array([-4.0, 0, 4])


@lru_cache
def _halving_offsets(levels: int, first: int) -> Array:
    halving = 2.0 ** -np.arange(first, levels + 1)
    return np.concatenate([[0.0], halving, -halving])


def _panels_between(moving: Array, grid: NodeGrid) -> tuple[Array, Array]:
    regular = np.arange(-grid.reach, grid.reach + 0.1, grid.width)
    edges = np.concatenate([np.broadcast_to(regular, (*moving.shape[:-1], len(regular))), moving], -1)
    return panels(np.sort(edges.clip(-grid.reach, grid.reach), -1), grid.nodes)


def _inner_nodes(
    m: Array, t: Array, w: Array, scale: Array, kinks: list[float], octaves: int, grid: NodeGrid
) -> tuple[Array, Array]:
    """Nodes of e for every m, with edges where z meets a kink; a single one where nothing varies inside."""
    if (w == 0).all():
        e = np.zeros((*m.shape, 1))
        return e, np.ones_like(e)
    centres = np.stack([(k / scale - np.sqrt(t) * m) / (np.sqrt(w) + 1e-300) for k in kinks], -1)
    e, lengths = _panels_between((centres[..., None] + _halving_offsets(octaves, 1)).reshape(*m.shape, -1), grid)
    weights = lengths * np.exp(-e * e / 2)
    return e, weights / weights.sum(-1, keepdims=True)


# --- intervals of z ------------------------------------------------------------------------------------


def zero_intervals(row: Activation) -> Intervals:
    """Intervals of z in which phi is exactly 0."""
    return _intervals(row, lambda z: row.phi(z) == 0)


def zero_slope_intervals(row: Activation) -> Intervals:
    """Intervals of z that let no gradient pass."""
    return _intervals(row, lambda z: row.slope(z).abs() < 1e-300)


def rounded_zero_intervals(row: Activation) -> Intervals:
    """Intervals of z in which phi is 0 in one of float32 and float64 only: by rounding."""
    return _intervals(row, lambda z: (row.phi(z) == 0) != (row.phi(z.float()) == 0))


def rounded_slope_intervals(row: Activation) -> Intervals:
    """The same of phi'."""
    return _intervals(row, lambda z: (row.slope(z) == 0) != (row.slope(z.float()) == 0))


def saturated_intervals(row: Activation) -> Intervals:
    """Intervals of z in which |phi'| is below 5 % of its largest value."""
    return _intervals(row, lambda z: row.slope(z).abs() < SATURATED * row.largest_slope)


_FOUND: dict[tuple[Activation, str], Intervals] = {}


def _intervals(row: Activation, true: Callable[[Tensor], Tensor]) -> Intervals:
    """Intervals where `true` holds, by bisection of a grid up to |z| = 1000; single points do not count."""
    key = (row, true.__qualname__)
    if key not in _FOUND:
        far = torch.logspace(math.log10(50), 3, 500, dtype=torch.float64)[1:]
        z = torch.cat([-far.flip(0), torch.linspace(-50, 50, 20_001, dtype=torch.float64) + 1e-4, far])
        holds, _, after = find_changes(true, z)
        edges = after.tolist()
        ends = ([-math.inf] if holds[0] else []) + edges + ([math.inf] if holds[-1] else [])
        _FOUND[key] = tuple(zip(ends[::2], ends[1::2], strict=True))
    return _FOUND[key]
