"""A custom function as a row of the table of activations: checked, its kinks found, its slope by torch's autograd.

Theory holds for functions that are elementwise, finite and the same at every call: others are refused. Where autograd
cannot go (a function of numpy, a value detached from its argument) the slope is a difference quotient, and
`slope_source` says so.
"""

import copy
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from initlab.errors import UsageError, choose, library_call, show
from initlab.nn import activations
from initlab.nn.activations import ACTIVATIONS, Activation
from initlab.nn.breaks import JUMP, NEAR, ROOT, Break, find_breaks

Given: TypeAlias = str | Activation | Callable[[Tensor], Tensor]

STEP = 2.0**-13  # of a difference quotient of fourth order: truncation about 1e-16, rounding about 1e-12
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


def slope_source(row: Activation) -> str:
    """Where phi' comes from: `given` with the row, `autograd`, or a `numerical derivative` where autograd cannot go."""
    if isinstance(row.slope, _Differences):
        return "numerical derivative"
    return "autograd" if isinstance(row.slope, _Autograd) else "given"


class _Differences:
    """phi'(z) by a difference quotient of fourth order, of points on the side of z next to a kink and to 0.

    The step is 2^-13, and 2^-18 |z| from |z| = 32 on; relative error about 1e-10.
    """

    def __init__(self, phi: Callable[[Tensor], Tensor], kinks: tuple[float, ...]) -> None:
        self.phi, self.kinks = phi, sorted({0.0, *kinks})

    def __call__(self, z: Tensor) -> Tensor:
        wide = z.detach().double()
        step = (wide.abs() * 2.0**-18).clamp(min=STEP)
        side = torch.zeros_like(wide)  # where the points must lie: above, below, or about z
        for kink in self.kinks:
            offset = wide - kink
            side = torch.where(offset.abs() < 2 * step, torch.where(offset > 0, 1.0, -1.0), side)
        phi = [self.phi(wide + k * step).double() for k in (-2, -1, 1, 2)]
        found = (phi[0] - phi[3] + 8 * (phi[2] - phi[1])) / (12 * step)
        if bool((side != 0).any()):
            step = step * torch.where(side < 0, -1.0, 1.0)
            at = [self.phi(wide + k * step).double() for k in range(5)]
            one_sided = (-25 * at[0] + 48 * at[1] - 36 * at[2] + 16 * at[3] - 3 * at[4]) / (12 * step)
            found = torch.where(side == 0, found, one_sided)
        return found.to(z.dtype)


class _Autograd:
    """phi'(z) as torch differentiates phi, in the number format of z; a difference quotient where that is nan."""

    def __init__(self, phi: Callable[[Tensor], Tensor], kinks: tuple[float, ...]) -> None:
        self.phi, self.differences = phi, _Differences(phi, kinks)
        nothing = torch.full((64,), torch.nan, device="cpu")
        self.of_nan = float(self.differentiate(torch.ones_like(nothing), nothing)[0])  # torch's tail of 16 has another

    def __call__(self, z: Tensor) -> Tensor:
        return self.pull_back(torch.ones_like(z), z)

    def pull_back(self, grad: Tensor, z: Tensor) -> Tensor:
        """grad phi'(z), 0 where autograd has 0 though the other factor is inf."""
        found = torch.where(z.isnan(), grad * self.of_nan, self.differentiate(grad, z))
        lost = found.isnan() & z.isfinite() & grad.isfinite()
        return torch.where(lost, grad * self.differences(z), found) if bool(lost.any()) else found

    def differentiate(self, grad: Tensor, z: Tensor) -> Tensor:
        """The same, nan where autograd has nan."""
        with torch.inference_mode(False), torch.enable_grad():
            upstream = (grad.detach() + torch.zeros_like(z)).clone()
            x = z.detach().expand_as(upstream).clone().requires_grad_()
            value = self.phi(x)
            found: Tensor = torch.autograd.grad(value, x, upstream.to(value.dtype))[0]
        return found


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
    """An elementwise function as a row of the table: checked on a grid, its kinks and jumps searched."""
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
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        breaks = find_breaks(phi)
        kinks = tuple(sorted(sorted((one.place for one in breaks if abs(one.place) <= NEAR), key=abs)[:MOST_KINKS]))
        if sum(abs(one.place) <= REACH for one in breaks) > MOST_KINKS:
            raise UsageError(f"activation: it or its slope jumps at more than {MOST_KINKS} places between -16 and 16")
        slope: _Autograd | _Differences = _Differences(phi, kinks)
        with suppress(Exception):  # whatever keeps autograd from a function of the user's
            exact = _Autograd(phi, kinks)
            if int(exact.differentiate(torch.ones_like(grid), grid).isnan().sum()) < len(grid) / 100:
                slope = exact
        steepest = _largest_slope(slope, grid)
    return Activation(
        phi=phi,
        slope=slope,
        module=partial(ElementwiseModule, phi),
        kinks=kinks,
        largest_slope=steepest,
        backward=slope.pull_back if isinstance(slope, _Autograd) else None,
        no_slope=_find_trouble(phi, slope, breaks, grid),
    )


def _largest_slope(slope: Callable[[Tensor], Tensor], grid: Tensor) -> float:
    """max |phi'|, about the largest one of the grid on finer and finer ones."""
    width = float(grid[1] - grid[0])
    size = slope(grid).abs()
    for _ in range(4):
        best = grid[size.argmax()]
        grid = torch.cat([best[None], best + width * torch.linspace(-1, 1, 64, dtype=torch.float64)])
        size, width = slope(grid).abs(), width / 16
    return float(size.max())


def _find_trouble(
    phi: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor], breaks: list[Break], grid: Tensor
) -> str:
    """Why theory that needs phi' does not hold for phi; "" where it does."""
    for one in sorted(breaks, key=lambda one: abs(one.place)):
        if one.order < JUMP:
            return f"jumps at z={one.place:.6g}, where its slope is infinite"
        if one.order < ROOT:
            return f"has a slope at z={one.place:.6g} whose square has no mean"
    found = slope(grid)
    off = torch.ones_like(grid, dtype=torch.bool)
    for step in (2.0**-23, 2.0**-9):  # the one for what is steep, the other for what is computed in float32
        quotient = (phi(grid + step) - phi(grid - step)).double() / (2 * step)
        off &= (quotient - found).abs() > 1e-3 * found.abs().max()
    if int(off.sum()) > len(grid) / 100:
        z = float(grid[off][0])
        return f"has another slope than autograd gives, at z={z:.4g} for one"
    return ""


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
