"""A custom function as a row of the table of activations: checked, its kinks found, its slope by differences.

Theory holds for functions that are elementwise, finite and the same at every call: others are refused.
"""

import copy
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from initlab.errors import UsageError, choose, library_call, show
from initlab.nn import activations
from initlab.nn.activations import ACTIVATIONS, Activation

Given: TypeAlias = str | Activation | Callable[[Tensor], Tensor]

STEP = 2.0**-13  # of the central difference of fourth order: truncation about 1e-16, rounding about 1e-12
REACH = 16.0
MOST_KINKS = 64  # theory integrates between any two of them


def name_of(given: Given) -> str:
    """How an activation is called in a table."""
    if isinstance(given, str):
        return given
    known = (name for name, row in ACTIVATIONS.items() if row is given)
    return next(known, getattr(given, "__name__", type(given).__name__))


def as_activation(given: Given) -> Activation:
    """The row of an activation, however it is given: its name, a row itself, or any elementwise function of a tensor.

    Errors: an unknown name; a function that is not elementwise or not finite.
    """
    if isinstance(given, str):
        return choose(ACTIVATIONS, given, "activation")
    if isinstance(given, Activation):
        return given
    if not callable(given):
        raise UsageError(f"activation={show(given)}: must be a name, a row of the table or an elementwise function")
    if isinstance(given, nn.Module) and next(given.parameters(), None) is not None:
        return row_of(_Frozen(given))
    return row_of(given if isinstance(given, Hashable) else partial(given))


class _Frozen:
    """The function of a module with parameters, such as nn.PReLU, as they are now, for every number format."""

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module).double().requires_grad_(False)

    def __call__(self, z: Tensor) -> Tensor:
        value: Tensor = self.module(z.double()).to(z.dtype)
        return value


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


class ElementwiseModule(nn.Module):
    """A function as a module; autograd differentiates it by its own rules."""

    def __init__(self, phi: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.phi = phi

    def forward(self, z: Tensor) -> Tensor:
        return self.phi(z)


@library_call
def gain(activation: Given, kind: str = "chi") -> float:
    """Gain (dimensionless) by which the weights of an activation are scaled.

    activation: a name of the table, a row of it, or an elementwise function. kind: `chi` keeps gradients,
    E[phi'(u)^2] gain^2 = 1 with u standard normal; `rms` second moments, E[phi(u)^2] gain^2 = 1; `std` the variance of
    activations, Var[phi(u)] gain^2 = 1; `torch` is torch.nn.init.calculate_gain's number.
    Errors: an unknown name or kind; a function that is no activation; no gain of this kind.

    >>> round(gain("tanh"), 5), round(gain(torch.sin), 4)
    (1.46741, 1.3273)
    """
    choose(activations.GAIN_KINDS, kind, "init.gain_kind")
    return activations.gain(as_activation(activation), kind)


@lru_cache
def row_of(phi: Callable[[Tensor], Tensor]) -> Activation:
    """An elementwise function as a row of the table: checked on a grid, where its kinks are searched too."""
    grid = torch.linspace(-REACH, REACH, 4096, dtype=torch.float64, device="cpu")
    values = _evaluate(phi, grid)
    _evaluate(
        phi, torch.arange(-REACH, REACH + 1 / 32, 1 / 16, dtype=torch.float64, device="cpu")
    )  # poles like round numbers
    order = torch.randperm(len(grid), generator=torch.Generator().manual_seed(0))
    for some in (order, order[: len(grid) // 4].reshape(16, -1)):  # another order, and other neighbours
        again = _evaluate(phi, grid[some])
        if not torch.allclose(again, values[some], rtol=1e-12, atol=0):
            random = not torch.allclose(_evaluate(phi, grid), values, rtol=1e-12, atol=0)
            raise UsageError(
                "activation: gives other values at each call; theory needs a function (of a module, call .eval() first)"
                if random
                else "activation: not an elementwise function; phi(z) of an entry must depend on that entry alone"
            )
    with warnings.catch_warnings(action="ignore"):
        kinks = find_kinks(phi, grid)
        slope = _Differences(phi, kinks)
        largest = float(slope(grid).abs().max())
    return Activation(phi=phi, slope=slope, module=partial(ElementwiseModule, phi), kinks=kinks, largest_slope=largest)


@contextmanager
def _own_words(what: str) -> Iterator[None]:
    """Whatever a function of the user's raises in the block, or warns of, is about that function."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except (Exception, SystemExit) as error:
        raise UsageError(f"activation: {what} ({str(error) or type(error).__name__})") from error


def check_trainable(row: Activation, dtype: torch.dtype) -> None:
    """Refuse a function that autograd cannot differentiate, or that does not keep the number format."""
    name = str(dtype).removeprefix("torch.")
    with torch.random.fork_rng(devices=[]), _own_words(f"cannot be trained with {name} tensors"), torch.enable_grad():
        z = torch.linspace(-1, 1, 6, dtype=dtype).reshape(2, 3).requires_grad_()
        value = row.module()(z)
        if value.dtype != dtype:
            raise TypeError(f"it gives {str(value.dtype).removeprefix('torch.')}")
        if z.grad is not None or torch.autograd.grad(value.sum(), z)[0].shape != z.shape:
            raise TypeError("its gradient has another shape")


def _evaluate(phi: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """phi(z), or one line on what is wrong with phi."""
    argument = z.clone()
    with _own_words("cannot be called with a float64 tensor"):
        value = phi(argument)
    if not torch.equal(argument, z):
        raise UsageError("activation: changes its argument in place; it must leave it as it is")
    if not isinstance(value, Tensor) or value.shape != z.shape:
        raise UsageError("activation: not an elementwise function; it must return a tensor of its argument's shape")
    if not bool(value.isfinite().all()):
        bad = float(z[~value.isfinite()][0])
        raise UsageError(f"activation: not finite at z={bad:g}; theory needs a finite value everywhere")
    if not value.is_floating_point():
        raise UsageError(f"activation: gives {str(value.dtype).removeprefix('torch.')}; it must return floats")
    return value.double()


def find_kinks(phi: Callable[[Tensor], Tensor], grid: Tensor) -> tuple[float, ...]:
    """Where phi or its slope jumps between the points of a grid; a kink to about 1e-9, a jump to the cell's 4096th.

    A cell of the grid holds one if phi is as far from a parabola across it however small it is made. A kink is where
    the straight lines from both sides meet; a jump of phi itself is put in the middle of what is left of the cell.
    """
    edges = grid + 0.37 * float(grid[1] - grid[0])  # so that no edge of a cell is a round number
    bend = _measure_bends(phi, edges)
    cells = (bend > 1e-3 * _slope_at(phi, edges).abs().max()).nonzero().flatten()
    if not len(cells):
        return ()
    low, high = edges[cells], edges[cells + 1]
    for _ in range(12):
        middle = (low + high) / 2
        halves = _measure_bends(phi, torch.stack([low, middle, high], -1))
        left = halves[:, 0] >= halves[:, 1]
        low, high = torch.where(left, low, middle), torch.where(left, middle, high)
    kept = halves.amax(-1) > 0.5 * bend[cells]
    if int(kept.sum()) > MOST_KINKS:
        raise UsageError(f"activation: it or its slope jumps at more than {MOST_KINKS} places between -16 and 16")
    low, high = low[kept], high[kept]
    width = high - low + 1e-6
    points = torch.stack([low - 2 * width, low - width, high + width, high + 2 * width], -1)
    a, b, c, d = phi(points).double().unbind(-1)
    before, after = (b - a) / width, (d - c) / width
    x = (c - b + before * points[:, 1] - after * points[:, 2]) / (before - after)
    kinks = torch.where((low - width <= x) & (x <= high + width), x, (low + high) / 2)
    return tuple(torch.where((kinks - kinks.round()).abs() < 1e-6, kinks.round(), kinks).tolist())


def _measure_bends(phi: Callable[[Tensor], Tensor], edges: Tensor) -> Tensor:
    """For each cell how far its slope changes, and how far phi's own difference is from what the slopes say."""
    slope = _slope_at(phi, edges)
    chord = phi(edges).double().diff() / edges.diff()
    return slope.diff().abs() + (chord - (slope[..., 1:] + slope[..., :-1]) / 2).abs()


def _slope_at(phi: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    step = 1e-7
    return (phi(z + step) - phi(z - step)).double() / (2 * step)
