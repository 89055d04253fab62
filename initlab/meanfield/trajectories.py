"""Infinite width, layer by layer, for many (sw2, sb2) at once: lengths, correlations and slopes on their way to a fixed
point.

The maps are those of `maps.py`, tabulated once for an activation and interpolated: cubic in ln q, Chebyshev in t =
sqrt(1 - c), in which the correlation map of a kinked function is smooth too. Relative error about 1e-5 of q and 1e-3 of
1 - c (selu at large q: up to 7e-2); `phases.py` has the fixed points themselves to 1e-9. Legend: P rules, L layers.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from initlab.meanfield import maps
from initlab.meanfield.correlation_points import in_octaves
from initlab.nn.activations import Activation

NODES, PER_PANEL = 16, 10  # of a correlation map: nodes in t from 0 to 1, nodes a panel of its quadrature
TINY = torch.finfo(torch.float64).tiny


class Grid(NamedTuple):
    """Of q: powers of ten, and steps a decade. Beyond its ends an activation is taken for what it is there."""

    low: int
    high: int
    steps: int

    @property
    def size(self) -> int:
        return (self.high - self.low) * self.steps + 1

    def q(self, place: int) -> float:
        return float(10.0 ** (self.low + place / self.steps))


LENGTHS, CORRELATIONS = Grid(-12, 8, 16), Grid(-6, 4, 4)


class Trajectory(NamedTuple):
    """Of the preactivations of layers 1 to L, float64 (P, L): second moment, 1 - correlation, chi_1 = sw2 E[phi'^2]."""

    q: Tensor
    apart: Tensor
    chi_1: Tensor


def trajectory(row: Activation, sw2: Tensor, sb2: Tensor, depth: int, c0: float = 0.0) -> Trajectory:
    """From inputs of second moment 1 and correlation c0 on; sw2 and sb2 (P,) in float64.

    1 - c' = sw2 (E[phi^2] - E[phi(z1) phi(z2)]) / (sw2 E[phi^2] + sb2), from differences, so that a correlation near 1
    keeps its digits.
    """
    q, apart = sw2 + sb2, (1 - c0) * sw2 / (sw2 + sb2).clamp(min=TINY)
    found = []
    for _ in range(depth):
        places, weights = _neighbours(LENGTHS, q)
        ratio, slope_square = ((table[places] * weights).sum(-1) for table in _means(row))
        found.append((q, apart, sw2 * slope_square))
        growth, bias = sw2 * ratio, sb2 / q.clamp(min=TINY)
        apart = apart * growth * _narrowing(row, q, apart) / (growth + bias).clamp(min=TINY)
        q = torch.where(q > 0, q * (growth + bias), sb2)
    return Trajectory(*(torch.stack(parts, -1) for parts in zip(*found, strict=True)))


def _neighbours(grid: Grid, q: Tensor) -> tuple[Tensor, Tensor]:
    """Four places of the grid about each q (P, 4), and Lagrange's weights of them, cubic in ln q."""
    place = (q.clamp(grid.q(0), grid.q(grid.size - 1)).log10() - grid.low) * grid.steps
    first = (place.floor().long() - 1).clamp(0, grid.size - 4)
    a, b, c, d = (place - first - k for k in range(4))
    weights = torch.stack([-b * c * d / 6, a * c * d / 2, -a * b * d / 2, a * b * c / 6], -1)
    return first[:, None] + torch.arange(4), weights


@lru_cache(maxsize=32)
def _means(row: Activation) -> tuple[Tensor, Tensor]:
    """E[phi^2]/q and E[phi'^2] on the grid."""
    q = torch.tensor([LENGTHS.q(k) for k in range(LENGTHS.size)], dtype=torch.float64)
    square = in_octaves(lambda r, x, _: maps.moment(r, x), row, q, q)
    return square / q, in_octaves(lambda r, x, _: maps.slope_moment(r, x), row, q, q)


def _narrowing(row: Activation, q: Tensor, apart: Tensor) -> Tensor:
    """(1 - E[phi(z1) phi(z2)] / E[phi^2]) / (1 - c): by what a layer without biases narrows an angle."""
    places, weights = _neighbours(CORRELATIONS, torch.ones_like(q) if row.homogeneous else q)
    used, index = torch.unique(places, return_inverse=True)
    table = torch.stack([_coefficients(row, place) for place in used.tolist()])
    angle = torch.acos((2 * apart.clamp(0, 1).sqrt() - 1).clamp(-1, 1))
    basis = torch.cos(angle[:, None] * torch.arange(NODES))
    return ((table[index] @ basis[..., None])[..., 0] * weights).sum(-1)


@lru_cache(maxsize=4096)
def _coefficients(row: Activation, place: int) -> Tensor:
    """Chebyshev coefficients (NODES,) of `_narrowing` in t at one q of the grid.

    At t = 0 it is q E[phi'^2]/E[phi^2], elsewhere (1 - E[phi(z1) phi(z2)]/E[phi^2]) / t^2; nodes are the extrema of the
    polynomials, both ends among them.
    """
    q = torch.tensor([CORRELATIONS.q(place)], dtype=torch.float64)
    square = maps.moment(row, q)
    k = torch.arange(NODES, dtype=torch.float64)
    t = (1 - torch.cos(math.pi * k / (NODES - 1))) / 2
    values = (1 - maps.overlap(row, q, 1 - t * t, PER_PANEL) / square) / (t * t).clamp(min=TINY)
    values[0] = q * maps.slope_moment(row, q) / square
    ends = torch.ones(NODES, dtype=torch.float64)
    ends[[0, -1]] = 0.5
    cosines = torch.cos(math.pi * k[:, None] * (1 - k / (NODES - 1)))
    return 2 / (NODES - 1) * ends * (cosines @ (ends * values))
