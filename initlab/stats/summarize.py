"""From a tensor to its row, from rows to statistics, and how far two tensors are apart: in plain PyTorch.

On a CPU a row is made of plain sums, a few passes over memory. A tensor whose sums show that digits may be lost gets
the safe row of reference.py, as every tensor on a GPU does. Rows are float64 and carry a power of two, so that a
float32 tensor of 1e30 or 1e-40 has a finite rms other than 0.

Sums in float64 are right to 1e-12. Those in float32 take a third of the time and leave std, rms, the std inside units
and the cosine right to 1e-6, usually to 1e-7: each of them loses some roundings of 6e-8. Counts, smallest and largest
entry are exact. Where float32 sums may not be trusted, float64 ones follow.
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
Truths = NDArray[np.bool_]

_AT = {name: place for place, name in enumerate(FIELDS)}
_UNITS, _ROWS = 2**10, 2**12  # of one sum in float32 without parts, along a vector and along the batch


class Precision(NamedTuple):
    """A number format for sums, and where they may be trusted; shares are of the sum of squares."""

    dtype: torch.dtype
    largest: float  # an entry's magnitude
    shortest: float  # a vector's length: shorter ones may have lost their squares
    centred: float  # units that keep less than this share when they are centred are centred in a second pass
    constant: float  # units with less than this share after it may be constant, their variance exactly 0
    pooled: float  # the least share of the tensor's own variance


SINGLE = Precision(torch.float32, 2.0**50, 2.0**-45, 2.0**-3, 2.0**-14, 2.0**-4)
DOUBLE = Precision(torch.float64, 2.0**SAFE, 2.0**-SAFE, 2.0**-4, 1e-10, 2.0**-20)
WIDENED = DOUBLE._replace(shortest=0.0)  # of narrower numbers: no square leaves float64


def summarize(x: Tensor, batched: bool = True, single: bool = False, part_of: Tensor | None = None) -> Tensor:
    """The row of (..., N, C) over its last two dimensions, (F, ...) in float64; never waits for a GPU.

    `batched` says that N counts inputs; else `within`, `dead`, `alive` and `resultant` have no meaning and are nan.
    single: sums in float32 of what has no more digits. part_of: the row of a tensor that has the same entries or 0, as
    the input of a ReLU; saves a look for subnormal entries. Of an empty tensor everything but the counts is nan.
    """
    x = detach_checked(x)
    if x.device.type != "cpu" or x.numel() == 0 or x.shape[-1] > AT_ONCE:
        return safe_row(x, batched).fields
    normal = part_of is not None and not bool(part_of[_AT["n_nan"] : _AT["n_zero"]].any())
    precision = DOUBLE if x.dtype == torch.float64 else SINGLE if single else WIDENED
    with np.errstate(all="ignore"):  # nan and inf are data
        fields = _plain(x.reshape(-1, *x.shape[-2:]), batched, normal, precision)
    return torch.from_numpy(fields).view(-1, *x.shape[:-2])


class _Read(NamedTuple):
    """What one reading of (E, N, C) says of each network."""

    low: Tensor
    high: Tensor
    below: Tensor  # entries smaller than the smallest normal number, zeros among them
    zeros: Tensor
    length: Tensor  # (E, N), of the vectors
    unit: Tensor  # (E, C), sums over the batch
    heading: Tensor  # (E, C), of the vectors divided by their lengths


def _plain(x: Tensor, batched: bool, normal: bool, precision: Precision) -> Array:
    """The rows (F, E) of (E, N, C) on a CPU by plain sums, or by better ones where these may not be trusted.

    They may where all entries are finite, no square leaves the format, and centring leaves enough of the squares.
    `normal` says that no entry is subnormal.
    """
    fields = np.full((len(FIELDS), len(x)), np.nan)
    good = _fill(fields, x, _read(x, batched, normal, precision), batched, precision)
    if not good.all():
        rest = x[torch.from_numpy(~good)]
        if precision is SINGLE:
            fields[:, ~good] = _plain(rest, batched, normal, WIDENED)
        else:
            blocks = torch.split(rest, max(1, BLOCK["cpu"] // x[0].numel()))
            fields[:, ~good] = np.concatenate([safe_row(block, batched).fields.numpy() for block in blocks], -1)
    return fields


def _read(x: Tensor, batched: bool, normal: bool, precision: Precision) -> _Read:
    """A few passes over what the cache holds at a time: some networks, or a part of the batch of one."""
    if len(x) > 1 and x.numel() > AT_ONCE:
        parts = [_read(part, batched, normal, precision) for part in torch.split(x, max(1, AT_ONCE // x[0].numel()))]
        return _Read(*map(torch.cat, zip(*parts, strict=True)))
    rows = min(_ROWS, AT_ONCE // (len(x) * x.shape[-1]))
    if rows < x.shape[-2]:
        parts = [_read(part, batched, normal, precision) for part in torch.split(x, rows, -2)]
        return _Read(
            low=torch.stack([part.low for part in parts]).amin(0),
            high=torch.stack([part.high for part in parts]).amax(0),
            below=torch.stack([part.below for part in parts]).double().sum(0),
            zeros=torch.stack([part.zeros for part in parts]).double().sum(0),
            length=torch.cat([part.length for part in parts], -1),
            unit=torch.stack([part.unit for part in parts]).double().sum(0),
            heading=torch.stack([part.heading for part in parts]).double().sum(0),
        )
    wide, size = workspace(x.shape, precision.dtype)
    wide = x if x.dtype == precision.dtype else wide.copy_(x)
    low, high = wide.amin((-2, -1)), wide.amax((-2, -1))
    below = zeros = torch.zeros_like(low)
    tiny = torch.finfo(x.dtype).tiny
    some = normal or not torch.abs(wide, out=size).amin().item() >= tiny  # also where another network has nan
    if some and not normal:  # counts are sums of ones, exact in float32 below 2^24
        below = size.lt_(tiny).sum((-2, -1))
    if some:
        zeros = torch.eq(wide, 0, out=size).sum((-2, -1))
        below = zeros if normal else below
    if x.shape[-1] > _UNITS:
        length = torch.mul(wide, wide, out=size).sum(-1).sqrt()
    else:
        length = torch.linalg.vector_norm(wide, dim=-1)
    unit = heading = wide.sum(-2)  # a product's sum of alike entries would lose more digits
    if batched:
        inverse = length.reciprocal()
        if not length.amin().item() > 0:
            inverse.masked_fill_(length == 0, 0)
        heading = torch.bmm(inverse.unsqueeze(-2), wide).squeeze(-2)
    return _Read(low, high, below, zeros, length, unit, heading)


def _fill(fields: Array, x: Tensor, read: _Read, batched: bool, precision: Precision) -> Truths:
    """Write the rows of (E, N, C); say of which networks they may be trusted.

    The tensor's M2 is that inside its units and the spread of their means; without a batch all entries are one unit.
    """
    n, c = x.shape[-2:]
    low, high, below, zeros, length, unit, heading = (values.double().numpy() for values in read)
    shortest = length.min(-1)
    second = np.einsum("en,en->e", length, length)
    mean = unit.sum(-1, keepdims=True) / (n * c)
    means = unit / n if batched else np.broadcast_to(mean, unit.shape)
    inside = second - n * np.einsum("ec,ec->e", means, means)
    finite: Truths = np.isfinite(second)
    again = ~(inside > precision.centred * second) & (second > 0) & finite
    if again.any():
        inside[again] = _inside(x, means, again, precision)
    m2 = inside + n * np.square(means - mean).sum(-1)
    sure = (m2 > precision.pooled * second) & (inside > precision.constant * second) | (second == 0)
    fields[: _AT["mean"]] = 0
    fields[_AT["count"]] = n * c
    fields[_AT["n_subnormal"]], fields[_AT["n_zero"]] = below - zeros, zeros
    fields[_AT["mean"]], fields[_AT["m2"]] = mean[:, 0], m2
    fields[_AT["min"]], fields[_AT["max"]] = low, high
    if batched:
        fields[_AT["within"]], fields[_AT["dead"]] = inside / (n * c), _dead(x, unit, low)
        fields[_AT["alive"]] = n if shortest.all() else (length > 0).sum(-1)
        fields[_AT["resultant"]] = np.einsum("ec,ec->e", heading, heading)
    long = (shortest if batched else length.max(-1)) >= precision.shortest
    good: Truths = finite & sure & long & (np.maximum(-low, high) < precision.largest)
    return good


def _inside(x: Tensor, means: Array, which: Truths, precision: Precision) -> Array:
    """Sum of squared distances from the unit's mean over the batch and the units, of some networks."""
    centre = torch.from_numpy(means[which]).unsqueeze(-2).to(precision.dtype)
    x = x if which.all() else x[torch.from_numpy(which)]
    parts = torch.split(x, max(1, AT_ONCE // (len(x) * x.shape[-1])), -2)
    return np.asarray(sum((part - centre).square_().sum((-2, -1)).double().numpy() for part in parts))


def _dead(x: Tensor, unit: Array, low: Array) -> Array:
    """Share of units that are 0 in the whole batch: their sums are 0, and tell it where no entry is negative."""
    if unit.all():
        return np.zeros(len(unit))
    silent: Truths = unit == 0
    networks, units = np.nonzero(silent & (low < 0)[:, None])
    if len(units):
        silent[networks, units] = (x[torch.from_numpy(networks), :, torch.from_numpy(units)] == 0).all(-1).numpy()
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
    entries = slope.shape[-2] * slope.shape[-1]
    small = slope.detach().abs().lt_(SATURATED * largest)  # a sum of ones, exact in float32 below 2^24
    return small.sum((-2, -1), dtype=torch.float32 if entries < 2**24 else torch.float64).double() / entries


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
