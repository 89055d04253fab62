"""Lengths, correlations and slopes layer by layer at infinite width, for many (sigma_w, sigma_b) at once.

The maps of `maps.py` are tabulated once for an activation and interpolated: cubic in ln q, Chebyshev in t =
sqrt(1 - c), in which the correlation map of a kinked function is smooth too. Relative error about 1e-5 of q and 1e-3 of
1 - c (selu at large q: up to 7e-2); `fixed_points.py` has the fixed points to 1e-9. Legend: P rules, L layers.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from initlab.meanfield import maps
from initlab.meanfield.correlation_points import map_in_octaves
from initlab.nn.activations import Activation

NODES, PER_PANEL = 16, 10  # of a correlation map: nodes in t from 0 to 1, nodes a panel of its quadrature
TINY = torch.finfo(torch.float64).tiny


class LengthGrid(NamedTuple):
    """A grid of q: powers of ten, and steps a decade. Beyond its ends an activation is taken for what it is there."""

    low: int
    high: int
    steps: int

    @property
    def size(self) -> int:
        return (self.high - self.low) * self.steps + 1

    def q(self, place: int) -> float:
        return float(10.0 ** (self.low + place / self.steps))


LENGTHS, CORRELATIONS = LengthGrid(-12, 8, 16), LengthGrid(-6, 4, 4)


class Trajectory(NamedTuple):
    """The preactivations of layers 1 to L, float64 (P, L): second moment, 1 - correlation, chi_1 = s E[phi'^2]."""

    q: Tensor
    apart: Tensor
    chi_1: Tensor


def trajectory(row: Activation, sigma_w: Tensor, sigma_b: Tensor, depth: int, c0: float = 0.0) -> Trajectory:
    """All layers for inputs of second moment 1 and correlation c0; sigma_w and sigma_b (P,) in float64.

    With s = sigma_w^2 and b = sigma_b^2, 1 - c' = s (E[phi^2] - E[phi(z1) phi(z2)]) / (s E[phi^2] + b) is computed from
    differences, so that a correlation near 1 keeps its digits.
    """
    s, b = sigma_w * sigma_w, sigma_b * sigma_b
    q, apart = s + b, (1 - c0) * s / (s + b).clamp(min=TINY)
    found = []
    for _ in range(depth):
        places, weights = _interpolate(LENGTHS, q)
        ratio, slope_square = ((table[places] * weights).sum(-1) for table in _tabulate_means(row))
        found.append((q, apart, s * slope_square))
        growth, bias = s * ratio, b / q.clamp(min=TINY)
        apart = apart * growth * _angle_factor(row, q, apart) / (growth + bias).clamp(min=TINY)
        q = torch.where(q > 0, q * (growth + bias), b)
    return Trajectory(*(torch.stack(parts, -1) for parts in zip(*found, strict=True)))


def _interpolate(grid: LengthGrid, q: Tensor) -> tuple[Tensor, Tensor]:
    """Four places of the grid about each q (P, 4), and Lagrange's weights of them, cubic in ln q."""
    place = (q.clamp(grid.q(0), grid.q(grid.size - 1)).log10() - grid.low) * grid.steps
    first = (place.floor().long() - 1).clamp(0, grid.size - 4)
    a, b, c, d = (place - first - k for k in range(4))
    weights = torch.stack([-b * c * d / 6, a * c * d / 2, -a * b * d / 2, a * b * c / 6], -1)
    return first[:, None] + torch.arange(4), weights


@lru_cache(maxsize=32)
def _tabulate_means(row: Activation) -> tuple[Tensor, Tensor]:
    """E[phi^2]/q and E[phi'^2] on the grid."""
    q = torch.tensor([LENGTHS.q(k) for k in range(LENGTHS.size)], dtype=torch.float64)
    square = map_in_octaves(lambda r, x, _: maps.moment(r, x), row, q, q)
    return square / q, map_in_octaves(lambda r, x, _: maps.slope_moment(r, x), row, q, q)


def _angle_factor(row: Activation, q: Tensor, apart: Tensor) -> Tensor:
    """(1 - E[phi(z1) phi(z2)] / E[phi^2]) / (1 - c): the factor by which a layer without biases changes 1 - c."""
    places, weights = _interpolate(CORRELATIONS, torch.ones_like(q) if row.homogeneous else q)
    used, index = torch.unique(places, return_inverse=True)
    table = torch.stack([_coefficients(row, place) for place in used.tolist()])
    angle = torch.acos((2 * apart.clamp(0, 1).sqrt() - 1).clamp(-1, 1))
    basis = torch.cos(angle[:, None] * torch.arange(NODES))
    return ((table[index] @ basis[..., None])[..., 0] * weights).sum(-1)


@lru_cache(maxsize=4096)
def _coefficients(row: Activation, place: int) -> Tensor:
    """Chebyshev coefficients (NODES,) of `_angle_factor` in t at one q of the grid.

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
