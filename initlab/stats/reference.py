"""The row of a tensor by the safe road, unit by unit, and the merging of the rows of shards.

A tensor is (..., N, C), a row (F, ...) of float64 in the order of FIELDS. Sums that could leave float64 carry a power
of two, and everything is centred before it is squared: a row is right to rounding over the whole range of every number
format, also where the mean is a million times the std. No operation waits for a GPU.
Does not know what is derived from a row. Legend: N batch, C units, F fields, B octaves.
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from initlab.errors import UsageError
from initlab.stats.histogram import histogram, octaves

# A finite entry is one that is neither nan nor inf; e is the field `exponent`.
FIELDS: dict[str, str] = {
    "count": "entries, finite or not",
    "n_nan": "entries that are nan",
    "n_inf": "entries that are inf or -inf",
    "n_subnormal": "entries smaller than the dtype's smallest normal number, zero not counted",
    "n_zero": "entries that are exactly 0",
    "exponent": "e: the sums are of entries times 2^-e; 0 wherever squares of the entries cannot leave float64",
    "mean": "mean of the finite entries, times 2^-e",
    "m2": "sum of their squared distances from the mean, times 2^-2e",
    "min": "smallest finite entry",
    "max": "largest finite entry",
    "within": "variance over the batch inside a unit, mean over the units, times 2^-2e",
    "dead": "share of units that are 0 in the whole batch",
    "alive": "the batch's vectors of length > 0",
    "resultant": "|sum over those vectors of x_a / |x_a||^2",
    "saturated": "share of entries where |phi'| is small; nan unless told",
}
# Between 2^-400 and 2^400 float64 holds squares of entries, of their differences from a mean, and sums of them.
SAFE = 400
# Entries looked at together: what a processor's cache holds in float64; on a GPU what bounds the working memory.
BLOCK = {"cpu": 2**17, "cuda": 2**24}
_FEWEST = 16


class Row(NamedTuple):
    """A row, and what has to be kept of each unit, (..., C), for the rows of shards to merge.

    A unit's mean is the unevaluated sum pivot + offset: one that is 1e6 times the std then leaves the std its digits.
    """

    fields: Tensor
    finite: Tensor  # entries of the unit that are neither nan nor inf
    pivot: Tensor  # times 2^-e
    offset: Tensor  # times 2^-e
    m2: Tensor  # times 2^-2e
    nonzero: Tensor  # entries that are not exactly 0
    heading: Tensor  # sum of the batch's vectors, each divided by its length; nan for an unbatched tensor
    histogram: Tensor  # int64 (..., 2, B)


def row(x: Tensor, batched: bool = True) -> Row:
    """The row of (..., N, C) with the parts that `merge` needs."""
    x = checked(x)
    return safe_row(x, batched)._replace(histogram=histogram(x).long())


def merge(a: Row, b: Row) -> Row:
    """The row of two shards of one tensor, split over the batch.

    Chan's formula for each unit: delta = mean_b - mean_a, n = n_a + n_b, mean = mean_a + delta n_b / n,
    M2 = M2_a + M2_b + delta^2 n_a n_b / n (Chan, Golub and LeVeque, The American Statistician 37, 1983). Counts, min,
    max and histogram are exact.
    """
    if a.heading.shape != b.heading.shape or a.histogram.shape != b.histogram.shape:
        shapes = [f"{tuple(r.heading.shape)} units and {r.histogram.shape[-1]} octaves" for r in (a, b)]
        raise UsageError(f"merge: {' with '.join(shapes)}; shards of one tensor have the same units and dtype")
    ours, theirs = (dict(zip(FIELDS, one.fields, strict=True)) for one in (a, b))
    told = {name: ours[name] + theirs[name] for name in ("count", "n_nan", "n_inf", "n_subnormal", "n_zero", "alive")}
    told |= {"min": torch.fmin(ours["min"], theirs["min"]), "max": torch.fmax(ours["max"], theirs["max"])}
    told["exponent"] = _exponent(told["min"], told["max"])
    weighted = [one["saturated"] * one["count"] for one in (ours, theirs)]
    told["saturated"] = (weighted[0] + weighted[1]) / told["count"]
    a, b = _rescaled(a, told["exponent"]), _rescaled(b, told["exponent"])
    n = a.finite + b.finite
    share = torch.where(b.finite > 0, b.finite / n, 0)
    delta = (b.pivot - a.pivot) + (b.offset - a.offset)
    first = a.finite > 0
    parts = Row(
        fields=a.fields,
        finite=n,
        pivot=torch.where(first, a.pivot, b.pivot),
        offset=torch.where(first, a.offset + delta * share, b.offset),
        m2=a.m2 + b.m2 + delta.square() * a.finite * share,
        nonzero=a.nonzero + b.nonzero,
        heading=a.heading + b.heading,
        histogram=a.histogram + b.histogram,
    )
    return parts._replace(fields=_together(told, parts))


def checked(x: Tensor) -> Tensor:
    """Refuse what has no row, in one line; a row is no part of autograd's graph."""
    octaves(x.dtype)
    if x.dim() < 2:
        raise UsageError(f"a tensor of shape {tuple(x.shape)} has no batch and units; it must be (..., N, C)")
    return x.detach()


def _exponent(low: Tensor, high: Tensor) -> Tensor:
    """e of a tensor whose finite entries lie between low and high: a matter of its largest magnitude alone."""
    peak = torch.nan_to_num(torch.maximum(low.abs(), high.abs()))
    exponent = torch.frexp(peak).exponent.clamp(-1000, 1000).double()
    return torch.where((exponent.abs() <= SAFE) | (peak == 0), 0, exponent)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^e of integers -1022 to 1023, from the bits: exact on every device."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def _rescaled(one: Row, exponent: Tensor) -> Row:
    """With the exponent of the whole, which only a shard of zeros can exceed."""
    own = one.fields[list(FIELDS).index("exponent")]
    down = power_of_two((own - exponent).clamp(-1022, 0))[..., None]
    return one._replace(pivot=one.pivot * down, offset=one.offset * down, m2=one.m2 * down * down)


def safe_row(x: Tensor, batched: bool) -> Row:
    """The safe road; its histogram is left empty.

    What exceeds a block is cut along the batch and merged, but not into vectors so few that merging costs more.
    """
    size = BLOCK.get(x.device.type, BLOCK["cuda"]) // max(1, x.shape[:-2].numel() * x.shape[-1])
    return reduce(merge, [_by_unit(part, batched) for part in torch.split(x, max(_FEWEST, size), -2)])


def _by_unit(x: Tensor, batched: bool) -> Row:
    """Everything by unit, centred twice: about a rounded mean, then about what that missed. Holes are no entries."""
    given = x.double()
    mask = (given - given).eq_(0)  # 1 where an entry is finite, 0 at a hole; a product is faster than a choice
    finite = mask.sum(-2)
    unit_low, unit_high = _least(_filled(given, torch.inf), -2), -_least(-_filled(given, -torch.inf), -2)
    edges = (_least(unit_low, -1), -_least(-unit_high, -1))
    low, high = (torch.where(edge.isinf(), torch.nan, edge) for edge in edges)
    wide = _filled(given, 0)
    told, nonzero = _counts(given, wide, finite, torch.finfo(x.dtype).tiny)
    heading, alive = _heading(wide, x.dtype == torch.float64)
    if not batched:
        heading, alive = torch.full_like(heading, torch.nan), torch.full_like(alive, torch.nan)
    e = _exponent(low, high)
    down = power_of_two(-e)[..., None]
    wide *= down[..., None]
    # A rounded mean may leave the range of the entries; inside it a constant unit has a variance of exactly 0.
    pivot = (wide.sum(-2) / finite).clamp(unit_low * down, unit_high * down)
    pivot = torch.where(finite > 0, pivot, 0)
    centred = wide.sub_(pivot[..., None, :]).mul_(mask)
    offset = torch.where(finite > 0, centred.sum(-2) / finite, 0)
    m2 = centred.sub_(offset[..., None, :]).mul_(mask).square_().sum(-2)
    told |= {"exponent": e, "min": low, "max": high, "alive": alive, "saturated": torch.full_like(e, torch.nan)}
    empty = torch.zeros(*x.shape[:-2], 2, 0, dtype=torch.int64, device=x.device)
    parts = Row(e, finite, pivot, offset, m2, nonzero, heading, empty)
    return parts._replace(fields=_together(told, parts))


def _filled(given: Tensor, value: float) -> Tensor:
    """A copy with another value for nan and inf."""
    return torch.nan_to_num(given, nan=value, posinf=value, neginf=value)


def _counts(given: Tensor, wide: Tensor, finite: Tensor, tiny: float) -> tuple[dict[str, Tensor], Tensor]:
    """The counts, and for each unit the entries that are not 0; `wide` has zeros for holes. Sums of ones in float64."""
    flags = torch.empty_like(wide)
    holes = given.shape[-2] - finite
    nonzero = torch.ne(wide, 0, out=flags).sum(-2) + holes
    below = torch.abs(wide, out=flags).lt_(tiny).sum((-2, -1)) - holes.sum(-1)
    n_nan = torch.ne(given, given, out=flags).sum((-2, -1))
    entries = torch.full_like(n_nan, given.shape[-2] * given.shape[-1])
    zeros = entries - nonzero.sum(-1)
    told = {"count": entries, "n_nan": n_nan, "n_inf": holes.sum(-1) - n_nan}
    return told | {"n_subnormal": below - zeros, "n_zero": zeros}, nonzero


def _least(values: Tensor, dim: int) -> Tensor:
    """Smallest value along a dimension, inf where there is none."""
    return values.amin(dim) if values.shape[dim] else values.sum(dim) + torch.inf


def _heading(wide: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    """sum_a x_a / |x_a| of (..., N, C), (..., C), and over how many vectors of length > 0."""
    if by_row:  # vectors of float64 may each need a scale of their own
        peak = -_least(-wide.abs(), -1).unsqueeze(-1)
        wide = wide / torch.where(peak > 0, peak, 1)
    length = wide.square().sum(-1).sqrt()
    alive = length > 0
    inverse = torch.where(alive, 1 / length, 0)
    return (inverse.unsqueeze(-2) @ wide).squeeze(-2), alive.sum(-1).double()


def _together(told: dict[str, Tensor], parts: Row) -> Tensor:
    """The row: what was counted, and what the units say together.

    By the law of total variance: M2 = sum of the units' M2 + spread of their means, these taken from a common pivot.
    """
    n, held = parts.finite.sum(-1), parts.finite > 0
    low, high = (_least(torch.where(held, sign * parts.pivot, torch.inf), -1) for sign in (1, -1))
    pivot = torch.where(n > 0, ((parts.finite * parts.pivot).sum(-1) / n).clamp(low, -high), 0)
    away = (parts.pivot - pivot[..., None]) + parts.offset
    shift = (parts.finite * away).sum(-1) / n
    spread = (parts.finite * (away - shift[..., None]).square()).sum(-1)
    counts_inputs = told["alive"] >= 0
    within = (parts.m2 / parts.finite).nanmean(-1)
    dead = (parts.nonzero == 0).double().mean(-1)
    found = told | {
        "mean": pivot + shift,
        "m2": torch.where(n > 0, parts.m2.sum(-1) + spread, torch.nan),
        "within": torch.where(counts_inputs, within, torch.nan),
        "dead": torch.where(counts_inputs & (told["count"] > 0), dead, torch.nan),
        "resultant": parts.heading.square().sum(-1),
    }
    return torch.stack([found[name].double() for name in FIELDS])
