"""Infinite width: length map, correlation map, their slopes, and one layer after another.

    q_{l+1} = V(q_l) = sw2 E[phi(sqrt(q_l) u)^2] + sb2                         (Poole et al. 2016, eq. 3)
    c_{l+1} = (sw2 E[phi(z1) phi(z2)] + sb2) / q_{l+1}                         (eq. 5)
    chi_c   = sw2 E[phi'(z1) phi'(z2)], the slope of the correlation map at c  (Schoenholz et al. 2017, eq. 5)

u is standard normal, z1 and z2 have variance q and correlation c; sw2 is fan times the variance of a weight, sb2 the
variance of a bias. All float64. Knows activations, neither widths nor fluctuations.
"""

import torch
from torch import Tensor

from initlab.nn.activations import Activation
from initlab.stats.quadrature import gaussian_means, pair_mean

Number = Tensor | float
TINY, HUGE = 1e-40, 1e40  # second moments beyond stand for the limits of 0 and infinity


def _tensor(x: Number) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def _inside(q: Number) -> Tensor:
    return _tensor(q).clamp(TINY, HUGE)


def moment(row: Activation, q: Number, power: int = 2) -> Tensor:
    """E[phi(z)^power] at variance q; shape of q."""
    return gaussian_means(lambda z, u: row.phi(z) ** power, _inside(q), row.kinks)


def slope_moment(row: Activation, q: Number) -> Tensor:
    """E[phi'(z)^2], shape of q."""
    return gaussian_means(lambda z, u: row.slope(z).square(), _inside(q), row.kinks)


def growth(row: Activation, q: Number) -> Tensor:
    """d/dq E[phi(z)^2] = E[phi(z)^2 (u^2 - 1)] / (2 q), which holds at kinks too; V' is sw2 times this."""
    inside = _inside(q)
    return gaussian_means(lambda z, u: row.phi(z).square() * (u * u - 1), inside, row.kinks) / (2 * inside)


def length_map(row: Activation, q: Number, sw2: Number, sb2: Number = 0.0) -> Tensor:
    """V(q) = sw2 E[phi^2] + sb2."""
    return sw2 * moment(row, q) + sb2


def length_slope(row: Activation, q: Number, sw2: Number) -> Tensor:
    """V'(q)."""
    return sw2 * growth(row, q)


def overlap(row: Activation, q: Number, c: Number, per_panel: int = 20) -> Tensor:
    """E[phi(z1) phi(z2)]; q and c broadcast."""
    return pair_mean(row.phi, _inside(q), c, row.kinks, per_panel)


def slope_overlap(row: Activation, q: Number, c: Number, per_panel: int = 20) -> Tensor:
    """E[phi'(z1) phi'(z2)]; at a kink phi' jumps and the mean does not mind."""
    return pair_mean(row.slope, _inside(q), c, row.kinks, per_panel)


def correlation_map(row: Activation, c: Number, q: Number, sw2: Number, sb2: Number = 0.0) -> Tensor:
    """The next layer's correlation; divided by V(q), so that q need not be a fixed point."""
    return (sw2 * overlap(row, q, c) + sb2) / length_map(row, q, sw2, sb2)


def chi(row: Activation, q: Number, sw2: Number, c: Number = 1.0) -> Tensor:
    """chi_c: mean product of the factors by which a layer multiplies two inputs' gradients; c = 1: of one gradient."""
    c = _tensor(c)
    return sw2 * (slope_moment(row, q) if bool((c == 1).all()) else slope_overlap(row, q, c))
