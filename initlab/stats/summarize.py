"""From a tensor to its row, from rows to statistics, and how far two tensors are apart: in plain PyTorch.

On a CPU a row is made of plain sums, a few passes over memory; a tensor whose sums show that digits may be lost gets
the safe row of reference.py, as every tensor on a GPU does. Rows are float64 and carry a power of two, so that a
float32 tensor of 1e30 or 1e-40 has a finite rms other than 0.
Legend: E networks, N batch, C units, F fields of a row, S statistics.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from initlab.stats.reference import BLOCK, FIELDS, SAFE, detach_checked, power_of_two, safe_row
from initlab.stats.statistics import SATURATED, STATISTICS
from initlab.stats.workspace import AT_ONCE, workspace

Array = NDArray[np.float64]

_AT = {name: place for place, name in enumerate(FIELDS)}
# Rounding of plain sums grows by (plain / centred sum of squares): 2^8 leaves a digit and a half below 1e-12.
_CANCELLED = 2.0**-8
# Below this the units may be constant, and the batch variance inside them exactly 0: the safe row says so.
_CONSTANT = 1e-10


def summarize(x: Tensor, batched: bool = True) -> Tensor:
    """The row of (..., N, C) over its last two dimensions, (F, ...) in float64; never waits for a GPU.

    `batched` says that N counts inputs; else `within`, `dead`, `alive` and `resultant` have no meaning and are nan.
    Of an empty tensor everything but the counts is nan.
    """
    x = detach_checked(x)
    if x.device.type != "cpu" or x.numel() == 0 or x.shape[-1] > AT_ONCE:
        return safe_row(x, batched).fields
    return torch.from_numpy(_plain(x.reshape(-1, *x.shape[-2:]), batched)).view(-1, *x.shape[:-2])


class _Sums(NamedTuple):
    """What plain sums say of (E, N, C), each (E,) but for those over the batch, (E, C); those of its parts add up."""

    second: Array  # sum of squares
    unit: Array  # (E, C)
    heading: Array  # (E, C), sum of the vectors divided by their lengths
    alive: Array
    nonzero: Array
    below: Array  # entries smaller than the smallest normal number, zeros among them
    risky: Array  # vectors of float64 so small that their squares may have left it


def _plain(x: Tensor, batched: bool) -> Array:
    """The rows (F, E) of (E, N, C) on a CPU by plain sums, and the safe rows where these may not be trusted.

    They may where all entries are finite, no square leaves float64 and centring takes at most 255/256 of the sum of
    squares; where it takes more inside the units alone, these are centred in a second pass.
    """
    narrow = x if x.dtype in (torch.float32, torch.float64) else x.float()  # exact, and what a processor is made for
    size = max(1, AT_ONCE // x[0].numel())
    fields = np.full((len(FIELDS), len(x)), np.nan)
    with np.errstate(all="ignore"):  # nan and inf are data
        parts = [_sums(part, torch.finfo(x.dtype).tiny, batched) for part in torch.split(narrow, size)]
        sums = parts[0] if len(parts) == 1 else _Sums(*map(np.concatenate, zip(*parts, strict=True)))
        good = _fill(fields, narrow, sums, batched)
    if not good.all():
        rest = torch.split(x[torch.from_numpy(~good)], max(1, BLOCK["cpu"] // x[0].numel()))
        fields[:, ~good] = np.concatenate([safe_row(part, batched).fields.numpy() for part in rest], -1)
    return fields


def _sums(x: Tensor, tiny: float, batched: bool) -> _Sums:
    """A few passes over what the cache holds; a single network that does not fit is read in parts of its batch."""
    rows = AT_ONCE // (len(x) * x.shape[-1])
    if rows < x.shape[-2]:
        parts = [_sums(part, tiny, batched) for part in torch.split(x, rows, -2)]
        return _Sums(*(np.add.reduce(column) for column in zip(*parts, strict=True)))
    wide, squares = workspace(x.shape, torch.float64)
    _, flags = workspace(x.shape, x.dtype)  # in the place of the squares, when these are summed
    wide.copy_(x)
    lengths = torch.mul(wide, wide, out=squares).sum(-1).numpy()
    unit = wide.sum(-2).numpy()
    # Counts are sums of ones, exact in float32 below 2^24.
    below = torch.abs(x, out=flags).lt_(tiny).sum((-2, -1)).numpy()
    nonzero = torch.ne(x, 0, out=flags).sum((-2, -1)).numpy() if below.any() else np.full(len(x), float(x[0].numel()))
    heading = unit
    if batched:
        inverse = np.divide(1, np.sqrt(lengths), out=np.zeros_like(lengths), where=lengths > 0)
        heading = torch.bmm(torch.from_numpy(inverse).unsqueeze(-2), wide).squeeze(-2).numpy()
    return _Sums(
        second=lengths.sum(-1),
        unit=unit,
        heading=heading,
        alive=np.count_nonzero(lengths, -1).astype(np.float64),
        nonzero=nonzero.astype(np.float64),
        below=below.astype(np.float64),
        risky=(lengths < 2.0 ** (-2 * SAFE)).sum(-1) if x.dtype == torch.float64 else np.zeros(len(x)),
    )


def _fill(fields: Array, x: Tensor, sums: _Sums, batched: bool) -> NDArray[np.bool_]:
    """Write the rows of (E, N, C); say of which networks they may be trusted."""
    n, c = x.shape[-2:]
    low, high = (edge.numpy().astype(np.float64) for edge in (x.amin((-2, -1)), x.amax((-2, -1))))
    mean = sums.unit.sum(-1) / (n * c)
    m2 = sums.second - n * c * mean * mean
    good: NDArray[np.bool_] = np.isfinite(sums.second) & (np.maximum(-low, high) < 2.0**SAFE) & (sums.risky == 0)
    good &= (m2 > _CANCELLED * sums.second) | (sums.second == 0)
    zeros = n * c - sums.nonzero
    fields[: _AT["mean"]] = 0
    fields[_AT["count"]] = n * c
    fields[_AT["n_subnormal"]], fields[_AT["n_zero"]] = sums.below - zeros, zeros
    fields[_AT["mean"]], fields[_AT["m2"]] = mean, m2
    fields[_AT["min"]], fields[_AT["max"]] = low, high
    if batched:
        inside, sure = _inside(x, sums)
        good &= sure
        fields[_AT["within"]], fields[_AT["dead"]] = inside / (n * c), _dead(x, sums.unit, low)
        fields[_AT["alive"]], fields[_AT["resultant"]] = sums.alive, np.square(sums.heading).sum(-1)
    return good


def _inside(x: Tensor, sums: _Sums) -> tuple[Array, NDArray[np.bool_]]:
    """Sum of squared distances from the unit's mean over the batch and the units (E,), and where it may be trusted."""
    means = sums.unit / x.shape[-2]
    inside = sums.second - x.shape[-2] * np.square(means).sum(-1)
    cancelled = ~(inside > _CANCELLED * sums.second) & (sums.second > 0) & np.isfinite(sums.second)
    if cancelled.any():
        which = torch.from_numpy(cancelled)
        centre = torch.from_numpy(means)[which].unsqueeze(-2)
        parts = torch.split(x[which], max(1, AT_ONCE // (len(x) * x.shape[-1])), -2)
        inside[cancelled] = sum((part - centre).square_().sum((-2, -1)).numpy() for part in parts)
    return inside, (inside > _CONSTANT * sums.second) | (sums.second == 0)


def _dead(x: Tensor, unit: Array, low: Array) -> Array:
    """Share of units that are 0 in the whole batch: their sums are 0, and tell it where no entry is negative."""
    silent: NDArray[np.bool_] = unit == 0
    if (silent.any(-1) & (low < 0)).any():
        silent &= ~(x != 0).any(-2).numpy()
    return np.asarray(silent.mean(-1), np.float64)


def derive(rows: Tensor, names: Iterable[str] = STATISTICS) -> Tensor:
    """The statistics (S, ...) of rows (F, ...): those that are named, or all in the order of STATISTICS.

    std = sqrt(m2 / n) 2^e, rms = sqrt(m2 / n + mean^2) 2^e, n finite entries. All are as exact as the row as long as
    float64 holds them: q = rms^2 is inf beyond an rms of 1e154 and 0 below 1e-162. The cosine is a difference: its
    error is a rounding of the larger of itself and 1 / (k - 1), what k vectors reach that cancel.
    """
    fields = dict(zip(FIELDS, rows, strict=False))
    fields["finite"] = fields["count"] - fields["n_nan"] - fields["n_inf"]
    fields["scale"] = power_of_two(fields["exponent"])
    fields["root"] = (fields["m2"] / fields["finite"] + fields["mean"].square()).sqrt()
    return torch.stack([STATISTICS[name].formula(fields) for name in names])


def saturated_share(slope: Tensor, largest: float) -> Tensor:
    """Share of |phi'(z)| below 5 % of its largest value, (..., N, C) -> (...)."""
    return (slope.abs() < SATURATED * largest).double().mean((-2, -1))


def relative_error(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """||a - b|| / ||b|| over the last two dimensions, and how many entries of either are not finite.

    0/0 is 0: two tensors of zeros agree. Where anything is not finite the error is nan.
    """
    wide_a, wide_b = a.double(), b.double()
    n_bad = torch.zeros(a.shape[:-2], dtype=torch.int64, device=a.device)
    # On a CPU a finite sum shows that all entries are finite; a GPU is not waited for.
    if a.device.type != "cpu" or not bool((wide_a.sum() + wide_b.sum()).isfinite()):
        n_bad = (wide_a.isfinite() & wide_b.isfinite()).logical_not_().sum((-2, -1))
    if a.dtype == torch.float64:  # squares of float64 leave float64; quotients do not
        peak = torch.maximum(wide_a.abs(), wide_b.abs()).amax((-2, -1), keepdim=True)
        scale = torch.where((peak > 0) & peak.isfinite(), peak, 1)
        wide_a, wide_b = wide_a / scale, wide_b / scale
    difference, reference = (torch.linalg.vector_norm(t, dim=(-2, -1)) for t in (wide_a - wide_b, wide_b))
    error = torch.where(difference == 0, 0, difference / reference)
    return torch.where(n_bad > 0, torch.nan, error), n_bad
