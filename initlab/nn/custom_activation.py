"""A function of one's own as a row of the table of activations: checked, its kinks found, its slope by differences.

Knows what a function must be so that theory holds for it: elementwise, finite, the same at every call.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from initlab.errors import UsageError, choose
from initlab.nn import activations
from initlab.nn.activations import ACTIVATIONS, Activation

Given: TypeAlias = str | Activation | Callable[[Tensor], Tensor]

STEP = 2.0**-13  # of the central difference of fourth order: truncation about 1e-16, rounding about 1e-12
REACH = 16.0


def name_of(given: Given) -> str:
    """How an activation is called in a table."""
    if isinstance(given, str):
        return given
    known = (name for name, row in ACTIVATIONS.items() if row is given)
    return next(known, getattr(given, "__name__", type(given).__name__))


def as_activation(given: Given) -> Activation:
    """The row: a name of the table, a row itself, or any elementwise function of a tensor.

    Errors: an unknown name; a function that is not elementwise or not finite.
    """
    if isinstance(given, str):
        return choose(ACTIVATIONS, given, "activation")
    if isinstance(given, Activation):
        return given
    if not callable(given):
        raise UsageError(f"activation={given!r}: must be a name, a row of the table or an elementwise function")
    return _row(given)


def numerical(row: Activation) -> bool:
    """Whether phi' was not given and is a difference quotient."""
    return isinstance(row.slope, _Differences)


class _Differences:
    """phi'(z) by a central difference of fourth order, one-sided next to a kink; relative error about 1e-11."""

    def __init__(self, phi: Callable[[Tensor], Tensor], kinks: tuple[float, ...]) -> None:
        self.phi, self.kinks = phi, kinks

    def __call__(self, z: Tensor) -> Tensor:
        wide = z.double()
        centre = wide.clone()
        for kink in self.kinks:  # keep the four points on the side of z
            offset = wide - kink
            away = torch.where(offset > 0, 1.0, -1.0) * 3 * STEP
            centre = torch.where(offset.abs() < 3 * STEP, kink + away, centre)
        near, far = (self.phi(centre + k * STEP) - self.phi(centre - k * STEP) for k in (1, 2))
        return ((8 * near - far) / (12 * STEP)).to(z.dtype)


class Elementwise(nn.Module):
    """A function as a module; autograd differentiates it by its own rules."""

    def __init__(self, phi: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.phi = phi

    def forward(self, z: Tensor) -> Tensor:
        return self.phi(z)


def gain(activation: Given, kind: str = "chi") -> float:
    """Gain (dimensionless) by which an activation's weights are scaled: kind `chi` keeps gradients, E[phi'(u)^2] gain^2
    = 1; `rms` second moments, E[phi(u)^2] gain^2 = 1; `std` the variance of activations; `torch` is calculate_gain's.

    Errors: an unknown name or kind; a function that is no activation; no gain of this kind.
    """
    return activations.gain(activation if isinstance(activation, str) else as_activation(activation), kind)


@lru_cache
def _row(phi: Callable[[Tensor], Tensor]) -> Activation:
    """Checked on a grid; kinks searched there too."""
    grid = torch.linspace(-REACH, REACH, 4096, dtype=torch.float64)
    values = _evaluated(phi, grid)
    _evaluated(phi, torch.arange(-REACH, REACH + 1 / 32, 1 / 16, dtype=torch.float64))  # poles like round numbers
    part = grid.flip(0)[:1000].reshape(10, 100)
    if not torch.allclose(_evaluated(phi, part).reshape(-1), values.flip(0)[:1000], rtol=1e-12, atol=0):
        raise UsageError("activation: not an elementwise function; phi(z) of an entry must depend on that entry alone")
    kinks = _kinks(phi, grid)
    slope = _Differences(phi, kinks)
    largest = float(slope(grid).abs().max())
    module = partial(Elementwise, phi)
    return Activation(phi=phi, slope=slope, module=module, kinks=kinks, largest_slope=largest)


def _evaluated(phi: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    try:
        given = z.clone()
        value = phi(given)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"activation: cannot be called with a float64 tensor ({reason})") from error
    if not torch.equal(given, z):
        raise UsageError("activation: changes its argument in place; it must leave it as it is")
    if not isinstance(value, Tensor) or value.shape != z.shape:
        raise UsageError("activation: not an elementwise function; it must return a tensor of its argument's shape")
    if not bool(value.isfinite().all()):
        bad = float(z[~value.isfinite()][0])
        raise UsageError(f"activation: not finite at z={bad:g}; theory needs a finite value everywhere")
    return value.double()


def _kinks(phi: Callable[[Tensor], Tensor], grid: Tensor) -> tuple[float, ...]:
    """Places where the slope jumps: cells in which it changes as much however small they are made."""
    offset = 0.37 * float(grid[1] - grid[0])  # so that no edge of a cell is a round number
    edges = grid + offset
    found: list[float] = []
    slope = _edge_slope(phi, edges)
    jump = slope.diff().abs()
    for index in (jump > 1e-3 * slope.abs().max()).nonzero().flatten().tolist():
        low, high = float(edges[index]), float(edges[index + 1])
        whole = float(jump[index])
        for _ in range(12):
            middle = (low + high) / 2
            ends = _edge_slope(phi, torch.tensor([low, middle, high], dtype=torch.float64)).diff().abs().tolist()
            low, high = (low, middle) if ends[0] >= ends[1] else (middle, high)
        if max(ends) > 0.5 * whole:
            found.append(_meeting(phi, low, high))
    return tuple(found)


def _edge_slope(phi: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    step = 1e-7
    return (phi(z + step) - phi(z - step)).double() / (2 * step)


def _meeting(phi: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    """Where the straight lines from both sides of a cell meet, to about 1e-9; a jump of phi is left at the middle."""
    width = high - low + 1e-6
    places = torch.tensor([low - 2 * width, low - width, high + width, high + 2 * width], dtype=torch.float64)
    a, b, c, d = phi(places).double().tolist()
    left, right = (b - a) / width, (d - c) / width
    x = (c - b + left * float(places[1]) - right * float(places[2])) / (left - right) if left != right else low
    meeting = x if low - width <= x <= high + width else (low + high) / 2
    return float(round(meeting)) if abs(meeting - round(meeting)) < 1e-6 else float(meeting)
