"""Where two inputs end: the fixed point of the correlation map in the chaotic phase, for many rules at once.

Infinite width. Knows maps and activations, not how a phase is named.
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


def in_octaves(f: Callable[[Activation, Tensor, Tensor], Tensor], row: Activation, q: Tensor, c: Tensor) -> Tensor:
    """f(row, q, c) where neighbours in q share their panels, which get finer with q."""
    order = q.argsort()
    parts = [f(row, q[part], c[part]) for part in torch.split(order, 256)]
    return torch.empty_like(q).scatter_(0, order, torch.cat(parts))


def correlation_fixed_point(row: Activation, q: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """c* = C(c*) below 1 where chi_1 > 1.

    C is convex on (0, 1), so that Newton's method from the left climbs to the root without passing it.
    """
    c = _by_series(row, q, s, b)
    near = c > NEAR_ONE
    c[near] = _climbed(row, q[near], s[near], b[near], torch.zeros_like(c[near]), 8, 1e-5)
    return _climbed(row, q, s, b, c, FINE, 1e-8)


def _by_series(row: Activation, q: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """The same by C(c) = (sw2 sum_k a_k^2 c^k + sb2) / q, a_k the Hermite coefficients of phi; what is cut is c^K's."""
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


def _climbed(
    row: Activation, q: Tensor, s: Tensor, b: Tensor, c: Tensor, per_panel: int, enough: float, steps: int = 40
) -> Tensor:
    """Newton's method until a step is small, every slope used twice."""
    c, slope, part = c.clone(), torch.ones_like(c), torch.arange(len(c))
    for k in range(steps):
        if not len(part):
            break
        rest = _residual(row, q[part], s[part], b[part], c[part], per_panel)
        if k % 2 == 0:
            image = in_octaves(partial(maps.slope_overlap, per_panel=per_panel), row, q[part], c[part])
            slope[part] = 1 - s[part] * image
        step = torch.where(slope[part] > 0, -rest / slope[part], 0.0)
        c[part] = (c[part] + step).clamp(0, 1)
        part = part[step.abs() > enough]
    return c


def _residual(row: Activation, q: Tensor, s: Tensor, b: Tensor, c: Tensor, per_panel: int) -> Tensor:
    image = s * in_octaves(partial(maps.overlap, per_panel=per_panel), row, q, c) + b
    return c - image / q
