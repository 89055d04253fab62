"""Where a function of one number jumps, has a kink or an infinite slope: found by ever finer grids.

Across a cell of width h a smooth function is off a parabola by h^3, and one like |z|^p by h^p: a jump (p = 0) stays as
large as it is however small the cell, a kink (p = 1) shrinks with it, and what is steep but continuous ends as h^3.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NEAR, FAR = 40.0, 400.0  # evenly searched up to NEAR, from there to FAR in cells of half a percent
CELLS = 2**14  # up to NEAR, on both sides of 0 together
PARTS = 15  # of a cell; the one that stands out and its neighbours are the next cell
LEVELS = 24
LEAST_JUMP = 1e-6  # of phi's size; below is what computing in float32 makes of a smooth function
SMOOTH = 2.5  # an order from here on is that of a smooth function
JUMP, ROOT = 0.1, 0.51  # orders up to here are jumps, and slopes whose square has no integral
_EPS = torch.finfo(torch.float64).eps


class Break(NamedTuple):
    """A place z near which phi is a smooth function plus a multiple of |z - place|^order, on one side or both."""

    place: float
    order: float


def find_breaks(phi: Callable[[Tensor], Tensor]) -> list[Break]:
    """All places between -400 and 400 at which phi, its slope or its second derivative jumps, in their order.

    phi: a function of a float64 tensor, elementwise. A place is right to 1e-9, where the second derivative jumps to
    1e-6. Jumps below 1e-6 of phi's own size are left out.
    """
    low, high = _make_cells()
    usual = float(phi(torch.linspace(-4, 4, 257, dtype=torch.float64)).abs().max())
    alive, parts = torch.arange(len(low)), torch.arange(PARTS + 1, dtype=torch.float64)
    found = torch.full((LEVELS, 4, len(low)), torch.nan, dtype=torch.float64)  # ln width, ln off, off / size, place
    for level in range(LEVELS):
        step = (high - low) / PARTS
        z = low[:, None] + step[:, None] * parts
        values = phi(z.flatten()).double().reshape(z.shape)
        rise = values.diff(dim=-1)
        off, at = (rise[:, 1:-1] - (rise[:, :-2] + rise[:, 2:]) / 2).abs().max(-1)
        reach = z.abs().amax(-1)
        size = usual + values.abs().amax(-1) + reach * rise.abs().median(-1).values / step
        kept = (off > 64 * _EPS * size) & (step > 2 * _EPS * reach)
        alive, at = alive[kept], at[kept, None]
        if not len(alive):
            break
        low, high = z[kept].gather(1, at)[:, 0], z[kept].gather(1, at + 3)[:, 0]
        found[level, :3, alive] = torch.stack([step.log(), off.log(), off / size])[:, kept]
        found[level, 3, alive] = (low + high) / 2
    return _tell_breaks(phi, found)


def _make_cells() -> tuple[Tensor, Tensor]:
    """Cells that overlap by a part, with no round number on an edge."""
    even = np.linspace(-NEAR, NEAR, CELLS + 1) + 0.37 * 2 * NEAR / CELLS
    far, near = np.geomspace(NEAR, FAR, 461), np.geomspace(1e-12, 2 * NEAR / CELLS, 96)
    sides = even, far, -far[::-1], near, -near[::-1]
    low = torch.from_numpy(np.concatenate([side[:-1] for side in sides]))
    high = torch.from_numpy(np.concatenate([side[1:] for side in sides]))
    overlap = (high - low) / (PARTS - 2)
    return low - overlap, high + overlap


def _tell_breaks(phi: Callable[[Tensor], Tensor], found: Tensor) -> list[Break]:
    """The breaks among cells, from how fast what is off has shrunk over the last levels of each."""
    depth = found[:, 0].isfinite().sum(0)
    some = (depth >= 4).nonzero().flatten()
    depth = depth[some]
    last, before = found[depth - 1, :, some], found[(depth - 5).clamp(min=0), :, some]
    order = (last[:, 1] - before[:, 1]) / (last[:, 0] - before[:, 0])
    here = (order < SMOOTH) & ~((order < JUMP) & (last[:, 2] < LEAST_JUMP))
    breaks: list[Break] = []
    for place, p in sorted(zip(last[here, 3].tolist(), order[here].tolist(), strict=True)):
        at = round(place) if abs(place - round(place)) < 1e-6 else place
        one = Break(at, _measure_order(phi, at) if JUMP < p < 1 else p)
        if not breaks or at - breaks[-1].place > 1e-6 * max(1.0, abs(at)):
            breaks.append(one)
        elif one.order < breaks[-1].order:
            breaks[-1] = one
    return breaks


def _measure_order(phi: Callable[[Tensor], Tensor], place: float) -> float:
    """p from the largest of three second differences, over widths of 1e-4 and 1e-7."""
    width = torch.tensor([1e-4, 1e-7], dtype=torch.float64)[:, None, None]
    sides = torch.tensor([[0.0, 1.0, 2.0], [0.0, -1.0, -2.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)
    a, b, c = phi((place + width * sides).flatten()).double().reshape(2, 3, 3).unbind(-1)
    wide, narrow = (a - 2 * b + c).abs().amax(-1).tolist()
    return math.log(wide / narrow) / math.log(1e3) if wide > 0 < narrow else 1.0
