"""Infinite width: the length map, the correlation map and their slopes, as integrals over a standard normal u.

    q_{l+1} = V(q_l) = sigma_w^2 E[phi(sqrt(q_l) u)^2] + sigma_b^2                    (Poole et al. 2016, eq. 3)
    c_{l+1} = (sigma_w^2 E[phi(z1) phi(z2)] + sigma_b^2) / q_{l+1}                    (eq. 5)
    chi_c   = sigma_w^2 E[phi'(z1) phi'(z2)], slope of the correlation map at c       (Schoenholz et al. 2017, eq. 5)

q is the second moment of a preactivation and c the correlation of two inputs' preactivations z1, z2. sigma_w is the
standard deviation of a weight times sqrt(fan), sigma_b that of a bias. Everything is float64.
"""

import torch
from torch import Tensor

from initlab.nn.activations import Activation, check_slope
from initlab.stats.quadrature import gaussian_means, pair_mean

Number = Tensor | float
TINY, HUGE = 1e-40, 1e40  # second moments beyond stand for the limits of 0 and infinity


def _clamp(q: Number) -> Tensor:
    return torch.as_tensor(q, dtype=torch.float64).clamp(TINY, HUGE)


def moment(row: Activation, q: Number, power: int = 2) -> Tensor:
    """E[phi(z)^power] at variance q; shape of q."""
    return gaussian_means(lambda z, u: row.phi(z) ** power, _clamp(q), row.kinks)


def slope_moment(row: Activation, q: Number) -> Tensor:
    """E[phi'(z)^2], shape of q. Raises UsageError where phi jumps."""
    check_slope(row)
    return gaussian_means(lambda z, u: row.slope(z).square(), _clamp(q), row.kinks)


def growth(row: Activation, q: Number) -> Tensor:
    """d/dq E[phi(z)^2] = E[phi(z)^2 (u^2 - 1)] / (2 q), which holds at kinks too; V' is sigma_w^2 times this."""
    inside = _clamp(q)
    return gaussian_means(lambda z, u: row.phi(z).square() * (u * u - 1), inside, row.kinks) / (2 * inside)


def overlap(row: Activation, q: Number, c: Number, per_panel: int = 20) -> Tensor:
    """E[phi(z1) phi(z2)] by `per_panel` nodes a panel, to 1e-9 for functions of the user's; q and c broadcast."""
    return pair_mean(row.phi, _clamp(q), c, row.kinks, per_panel if row.formula else None)


def slope_overlap(row: Activation, q: Number, c: Number, per_panel: int = 20) -> Tensor:
    """E[phi'(z1) phi'(z2)] likewise; the jumps of phi' at kinks do not matter to the mean."""
    check_slope(row)
    return pair_mean(row.slope, _clamp(q), c, row.kinks, per_panel if row.formula else None)


def length_map(row: Activation, q: Number, sigma_w: Number, sigma_b: Number = 0.0) -> Tensor:
    """V(q), the second moment of the next layer's preactivations."""
    return sigma_w**2 * moment(row, q) + sigma_b**2


def correlation_map(row: Activation, c: Number, q: Number, sigma_w: Number, sigma_b: Number = 0.0) -> Tensor:
    """The next layer's correlation; divided by V(q), so that q need not be a fixed point."""
    return (sigma_w**2 * overlap(row, q, c) + sigma_b**2) / length_map(row, q, sigma_w, sigma_b)


def chi(row: Activation, q: Number, sigma_w: Number, c: Number = 1.0) -> Tensor:
    """chi_c: mean product of the factors by which a layer multiplies the gradients of two inputs."""
    c = torch.as_tensor(c, dtype=torch.float64)
    return sigma_w**2 * (slope_moment(row, q) if bool((c == 1).all()) else slope_overlap(row, q, c))
