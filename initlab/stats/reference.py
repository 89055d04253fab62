"""The row of a tensor, centred unit by unit before anything is squared, and the merging of the rows of shards.

A tensor is (..., N, C), a row (F, ...) of float64 in the order of FIELDS. Sums that could leave float64 carry a power
of two, and everything is centred before it is squared: a row is right to rounding over the whole range of every number
format, also where the mean is a million times the std. No operation waits for a GPU.
Legend: N batch, C units, F fields, B octaves.
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
    "saturated": "share of entries where |phi'| is small; nan unless it is filled in",
}
# Between 2^-400 and 2^400 float64 holds squares of entries, of their differences from a mean, and sums of them.
SAFE = 400
# Entries that are measured together: what a processor's cache holds in float64; on a GPU the working memory's bound.
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
    x = detach_checked(x)
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
    of_a, of_b = (dict(zip(FIELDS, one.fields, strict=True)) for one in (a, b))
    counts = {name: of_a[name] + of_b[name] for name in ("count", "n_nan", "n_inf", "n_subnormal", "n_zero", "alive")}
    counts |= {"min": torch.fmin(of_a["min"], of_b["min"]), "max": torch.fmax(of_a["max"], of_b["max"])}
    counts["exponent"] = _exponent_of(counts["min"], counts["max"])
    weighted = [one["saturated"] * one["count"] for one in (of_a, of_b)]
    counts["saturated"] = (weighted[0] + weighted[1]) / counts["count"]
    a, b = _rescale(a, counts["exponent"]), _rescale(b, counts["exponent"])
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
    return parts._replace(fields=_join_units(counts, parts))


def detach_checked(x: Tensor) -> Tensor:
    """Refuse what has no row, in one line; a row is no part of autograd's graph."""
    octaves(x.dtype)
    if x.dim() < 2:
        raise UsageError(f"a tensor of shape {tuple(x.shape)} has no batch and units; it must be (..., N, C)")
    return x.detach()


def _exponent_of(low: Tensor, high: Tensor) -> Tensor:
    """e of a tensor whose finite entries lie between low and high: it follows from the largest magnitude."""
    peak = torch.nan_to_num(torch.maximum(low.abs(), high.abs()))
    exponent = torch.frexp(peak).exponent.clamp(-1000, 1000).double()
    return torch.where((exponent.abs() <= SAFE) | (peak == 0), 0, exponent)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^e of integers -1022 to 1023, from the bits: exact on every device."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def _rescale(one: Row, exponent: Tensor) -> Row:
    """The row with the exponent of the whole tensor, which only a shard of zeros can exceed."""
    own = one.fields[list(FIELDS).index("exponent")]
    down = power_of_two((own - exponent).clamp(-1022, 0))[..., None]
    return one._replace(pivot=one.pivot * down, offset=one.offset * down, m2=one.m2 * down * down)


def safe_row(x: Tensor, batched: bool) -> Row:
    """The row of (..., N, C) with the parts that `merge` needs, but with an empty histogram.

    Tensors larger than a block are cut along the batch and merged; a part has at least 16 vectors, since merging costs.
    """
    size = BLOCK.get(x.device.type, BLOCK["cuda"]) // max(1, x.shape[:-2].numel() * x.shape[-1])
    return reduce(merge, [_row_by_unit(part, batched) for part in torch.split(x, max(_FEWEST, size), -2)])


def _row_by_unit(x: Tensor, batched: bool) -> Row:
    """Everything by unit, centred twice: about a rounded mean, then about what that missed.

    Entries that are nan or inf are left out.
    """
    given = x.double()
    mask = (given - given).eq_(0)  # 1 where an entry is finite, else 0; a product is faster than a choice
    finite = mask.sum(-2)
    unit_low, unit_high = (
        _minimum(_replace_nonfinite(given, torch.inf), -2),
        -_minimum(-_replace_nonfinite(given, -torch.inf), -2),
    )
    edges = (_minimum(unit_low, -1), -_minimum(-unit_high, -1))
    low, high = (torch.where(edge.isinf(), torch.nan, edge) for edge in edges)
    wide = _replace_nonfinite(given, 0)
    counts, nonzero = _count_entries(given, wide, finite, torch.finfo(x.dtype).tiny)
    heading, alive = _heading(wide, x.dtype == torch.float64)
    if not batched:
        heading, alive = torch.full_like(heading, torch.nan), torch.full_like(alive, torch.nan)
    e = _exponent_of(low, high)
    down = power_of_two(-e)[..., None]
    wide *= down[..., None]
    # A rounded mean may leave the range of the entries; inside it a constant unit has a variance of exactly 0.
    pivot = (wide.sum(-2) / finite).clamp(unit_low * down, unit_high * down)
    pivot = torch.where(finite > 0, pivot, 0)
    centred = wide.sub_(pivot[..., None, :]).mul_(mask)
    offset = torch.where(finite > 0, centred.sum(-2) / finite, 0)
    m2 = centred.sub_(offset[..., None, :]).mul_(mask).square_().sum(-2)
    counts |= {"exponent": e, "min": low, "max": high, "alive": alive, "saturated": torch.full_like(e, torch.nan)}
    empty = torch.zeros(*x.shape[:-2], 2, 0, dtype=torch.int64, device=x.device)
    parts = Row(e, finite, pivot, offset, m2, nonzero, heading, empty)
    return parts._replace(fields=_join_units(counts, parts))


def _replace_nonfinite(given: Tensor, value: float) -> Tensor:
    """A copy with another value for nan and inf."""
    return torch.nan_to_num(given, nan=value, posinf=value, neginf=value)


def _count_entries(given: Tensor, wide: Tensor, finite: Tensor, tiny: float) -> tuple[dict[str, Tensor], Tensor]:
    """The counts, and for each unit the entries that are not 0; `wide` has 0 for what is not finite. Sums of ones."""
    flags = torch.empty_like(wide)
    not_finite = given.shape[-2] - finite
    nonzero = torch.ne(wide, 0, out=flags).sum(-2) + not_finite
    below = torch.abs(wide, out=flags).lt_(tiny).sum((-2, -1)) - not_finite.sum(-1)
    n_nan = torch.ne(given, given, out=flags).sum((-2, -1))
    entries = torch.full_like(n_nan, given.shape[-2] * given.shape[-1])
    zeros = entries - nonzero.sum(-1)
    counts = {"count": entries, "n_nan": n_nan, "n_inf": not_finite.sum(-1) - n_nan}
    return counts | {"n_subnormal": below - zeros, "n_zero": zeros}, nonzero


def _minimum(values: Tensor, dim: int) -> Tensor:
    """Smallest value along a dimension, inf where there is none."""
    return values.amin(dim) if values.shape[dim] else values.sum(dim) + torch.inf


def _heading(wide: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    """sum_a x_a / |x_a| of (..., N, C), (..., C), and over how many vectors of length > 0."""
    if by_row:  # vectors of float64 may each need a scale of their own
        peak = -_minimum(-wide.abs(), -1).unsqueeze(-1)
        wide = wide / torch.where(peak > 0, peak, 1)
    length = wide.square().sum(-1).sqrt()
    alive = length > 0
    inverse = torch.where(alive, 1 / length, 0)
    return (inverse.unsqueeze(-2) @ wide).squeeze(-2), alive.sum(-1).double()


def _join_units(counts: dict[str, Tensor], parts: Row) -> Tensor:
    """The fields of a row, from its counts and the sums of its units.

    By the law of total variance: M2 = sum of the units' M2 + spread of their means, these taken from a common pivot.
    """
    n, held = parts.finite.sum(-1), parts.finite > 0
    low, high = (_minimum(torch.where(held, sign * parts.pivot, torch.inf), -1) for sign in (1, -1))
    pivot = torch.where(n > 0, ((parts.finite * parts.pivot).sum(-1) / n).clamp(low, -high), 0)
    away = (parts.pivot - pivot[..., None]) + parts.offset
    shift = (parts.finite * away).sum(-1) / n
    spread = (parts.finite * (away - shift[..., None]).square()).sum(-1)
    counts_inputs = counts["alive"] >= 0
    within = (parts.m2 / parts.finite).nanmean(-1)
    dead = (parts.nonzero == 0).double().mean(-1)
    found = counts | {
        "mean": pivot + shift,
        "m2": torch.where(n > 0, parts.m2.sum(-1) + spread, torch.nan),
        "within": torch.where(counts_inputs, within, torch.nan),
        "dead": torch.where(counts_inputs & (counts["count"] > 0), dead, torch.nan),
        "resultant": parts.heading.square().sum(-1),
    }
    return torch.stack([found[name].double() for name in FIELDS])
