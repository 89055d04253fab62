"""The fixed point of the correlation map in the chaotic phase: how alike two inputs are in the end.

Computed for many rules at once. In what follows s = sigma_w^2, b = sigma_b^2, q is the second moment of the
preactivations and c the correlation of two of them, one entry for each rule.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from initlab.meanfield import maps
from initlab.nn.activations import Activation
from initlab.stats.quadrature import line

FINE = 14  # nodes a panel for the correlations of a fixed point; 1e-9
SERIES = 48  # terms of the correlation map's power series
NEAR_ONE = 0.97  # from here on the two fixed points are too near for the series


def map_in_octaves(f: Callable[[Activation, Tensor, Tensor], Tensor], row: Activation, q: Tensor, c: Tensor) -> Tensor:
    """f(row, q, c), sorted into groups of neighbouring q: a group shares the panels of its quadrature."""
    order = q.argsort()
    parts = [f(row, q[part], c[part]) for part in torch.split(order, 256)]
    return torch.empty_like(q).scatter_(0, order, torch.cat(parts))


def correlation_fixed_point(row: Activation, q: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """c* = C(c*) below 1 where chi_1 > 1.

    C is convex on (0, 1), so that Newton's method from the left climbs to the root without passing it.
    """
    c = _solve_by_series(row, q, s, b)
    near = c > NEAR_ONE
    c[near] = _solve_by_newton(row, q[near], s[near], b[near], torch.zeros_like(c[near]), 8, 1e-5)
    return _solve_by_newton(row, q, s, b, c, FINE, 1e-8)


def _solve_by_series(row: Activation, q: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """c* from C(c) = (s sum_k a_k^2 c^k + b) / q, a_k the Hermite coefficients of phi; the rest counts as c^K."""
    parts = []
    for part in torch.split(torch.arange(len(q)), 256):
        u, weights = line(float(q[part].max()))
        hermite = [torch.ones_like(u), u]
        for n in range(2, SERIES):
            hermite.append((u * hermite[-1] - math.sqrt(n - 1) * hermite[-2]) / math.sqrt(n))
        values = row.phi(q[part].sqrt()[:, None] * u)
        a2 = (values @ (torch.stack(hermite) * weights).T).square()
        rest = (values.square() @ weights - a2.sum(-1)).clamp(min=0)
        parts.append(torch.cat([a2, rest[:, None]], -1))
    terms = s[:, None] * torch.cat(parts) / q[:, None]
    terms[:, 0] += b / q
    k, c = torch.arange(SERIES + 1, dtype=torch.float64), torch.zeros_like(q)
    for _ in range(30):
        powers = c[:, None] ** k
        slope = 1 - (terms[:, 1:] * k[1:] * powers[:, :-1]).sum(-1)
        c = (c + torch.where(slope > 0, ((terms * powers).sum(-1) - c) / slope, 1.0)).clamp(0, 1)
    return c


def _solve_by_newton(
    row: Activation, q: Tensor, s: Tensor, b: Tensor, c: Tensor, per_panel: int, enough: float, steps: int = 40
) -> Tensor:
    """Newton's method until a step is small, every slope used twice."""
    c, slope, part = c.clone(), torch.ones_like(c), torch.arange(len(c))
    for k in range(steps):
        if not len(part):
            break
        at = row, q[part], c[part]
        image = (s[part] * map_in_octaves(partial(maps.overlap, per_panel=per_panel), *at) + b[part]) / q[part]
        if k % 2 == 0:
            slope[part] = 1 - s[part] * map_in_octaves(partial(maps.slope_overlap, per_panel=per_panel), *at)
        step = torch.where(slope[part] > 0, (image - c[part]) / slope[part], 0.0)
        c[part] = (c[part] + step).clamp(0, 1)
        part = part[step.abs() > enough]
    return c
