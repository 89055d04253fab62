"""One row of numbers about a tensor, from which its statistics derive and which merges with the rows of other shards.

A tensor is (..., N, C), a row (F, ...) of float64 in the order of FIELDS. Sums that could leave float64 carry a power
of two, so a row is right over the whole range of every number format; `derive` turns it into the named statistics.
A histogram counts entries by sign and octave, from the bits of the numbers, and needs no range.
Knows nothing of networks, keys and frames. Legend: N batch, C units, F fields, S statistics, B octaves.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from initlab.errors import UsageError

# A finite entry is one that is neither nan nor inf; e is the field `exponent`.
FIELDS: dict[str, str] = {
    "count": "entries, finite or not",
    "n_nan": "entries that are nan",
    "n_inf": "entries that are inf or -inf",
    "n_subnormal": "entries smaller than the dtype's smallest normal number, zero not counted",
    "n_zero": "entries that are exactly 0",
    "exponent": "e: sums below are of entries times 2^-e; 0 wherever their squares cannot leave float64",
    "mean": "mean of the finite entries, times 2^-e",
    "m2": "sum of their squared distances from the mean, times 2^-2e",
    "min": "smallest finite entry",
    "max": "largest finite entry",
    "within": "variance over the batch inside a unit, mean over the units, times 2^-2e",
    "dead": "share of units that are 0 in the whole batch",
    "alive": "the batch's vectors of length > 0",
    "resultant": "|sum over those vectors of x_a / |x_a||^2",
    "saturated": "share of entries where phi' is small; nan unless told",
}
# Octaves floor(log2 |x|) from the smallest subnormal number to the largest finite one.
_OCTAVES = {
    torch.float16: (-24, 15),
    torch.bfloat16: (-133, 127),
    torch.float32: (-149, 127),
    torch.float64: (-1074, 1023),
}
# Between these powers of two float64 holds the squares of a tensor's entries, of their differences and their sums.
_SAFE = 400


class Row(NamedTuple):
    """A row, and what has to be kept of each unit (..., C) for rows of shards to merge.

    A unit's mean is the unevaluated sum pivot + offset: means that are 1e6 times the std keep all digits of the std.
    """

    fields: Tensor
    finite: Tensor  # entries of the unit that are neither nan nor inf
    pivot: Tensor  # times 2^-e, as the next two
    offset: Tensor
    m2: Tensor
    nonzero: Tensor  # entries that are not exactly 0
    heading: Tensor  # sum of the batch's vectors, each divided by its length
    histogram: Tensor  # (..., 2, B)


def octaves(dtype: torch.dtype) -> tuple[int, int]:
    """Lowest and highest octave of a number format."""
    if dtype not in _OCTAVES:
        names = ", ".join(str(known).removeprefix("torch.") for known in _OCTAVES)
        raise UsageError(f"dtype={str(dtype).removeprefix('torch.')}: must be one of {names}")
    return _OCTAVES[dtype]


def summarize(x: Tensor, batched: bool = True) -> Tensor:
    """The row of (..., N, C) over its last two dimensions, (F, ...) in float64; never waits for a GPU.

    `batched` says that N counts inputs; else `within`, `dead`, `alive` and `resultant` have no meaning and are nan.
    """
    octaves(x.dtype)
    return _units(x.detach(), batched).fields


def row(x: Tensor, batched: bool = True) -> Row:
    """The row of (..., N, C) with the parts that `merge` needs."""
    octaves(x.dtype)
    return _units(x.detach(), batched)._replace(histogram=histogram(x))


def histogram(x: Tensor) -> Tensor:
    """Entries of (..., N, C) by sign (0: positive) and octave, int32 (..., 2, B); zeros, nan and inf are in no bin."""
    lowest, highest = octaves(x.dtype)
    size = highest - lowest + 1
    bits, octave = _bits_and_octave(x.detach())
    group = torch.arange(x.shape[:-2].numel(), device=x.device).reshape(x.shape[:-2])[..., None, None]
    # One bin more than there are octaves takes what has none.
    place = torch.where((octave >= lowest) & (octave <= highest), octave - lowest, size)
    place = place + (size + 1) * (2 * group + (bits < 0))
    counts = torch.zeros(x.shape[:-2].numel() * 2 * (size + 1), dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, place.flatten(), torch.ones_like(place, dtype=torch.int32).flatten())
    return counts.view(*x.shape[:-2], 2, size + 1)[..., :size]


def _bits_and_octave(x: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of the numbers in float64, and floor(log2 |x|): the exponent, or the mantissa's where that is all."""
    bits = x.double().view(torch.int64)
    exponent = (bits >> 52) & 0x7FF
    mantissa = bits & 0xFFFFFFFFFFFFF
    small = (mantissa.double().view(torch.int64) >> 52) - 1023 - 1074
    return bits, torch.where(exponent == 0, torch.where(mantissa == 0, -2000, small), exponent - 1023)


def _exponent(low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """e of a tensor whose finite entries lie between low and high: a matter of its largest magnitude alone."""
    if dtype != torch.float64:
        return torch.zeros_like(low)
    peak = torch.nan_to_num(torch.maximum(low.abs(), high.abs()))
    exponent = torch.frexp(peak).exponent.clamp(-1000, 1000).double()
    return torch.where((exponent.abs() <= _SAFE) | (peak == 0), 0, exponent)


def _units(x: Tensor, batched: bool) -> Row:
    """The safe road, right whatever the entries are: everything by unit, twice centred; its histogram is empty."""
    n, c = x.shape[-2:]
    wide, finite = x.double(), x.isfinite()
    unit_low = torch.where(finite, wide, torch.inf).amin(-2)
    unit_high = torch.where(finite, wide, -torch.inf).amax(-2)
    wide = torch.where(finite, wide, 0)
    heading, alive = _heading(wide, x.dtype == torch.float64)
    count = finite.sum(-2).double()
    low, high = unit_low.amin(-1), unit_high.amax(-1)
    low, high = (torch.where(edge.isinf(), torch.nan, edge) for edge in (low, high))
    e = _exponent(low, high, x.dtype)
    down = torch.exp2(-e)[..., None]
    wide = wide * down[..., None]
    pivot = torch.nan_to_num(wide.sum(-2) / count)
    # A rounded mean may leave the range of the entries; inside it a constant unit has a variance of exactly 0.
    pivot = torch.where(count > 0, pivot.clamp(unit_low * down, unit_high * down), 0)
    centred = (wide - pivot[..., None, :]) * finite
    offset = torch.nan_to_num(centred.sum(-2) / count)
    m2 = ((centred - offset[..., None, :]) * finite).square_().sum(-2)
    nonzero = (x != 0).sum(-2).double()
    zeros = n * c - nonzero.sum(-1)
    tiny = (x.abs() < torch.finfo(x.dtype).tiny).sum((-2, -1)) - zeros
    n_nan, n_inf = x.isnan().sum((-2, -1)).double(), x.isinf().sum((-2, -1)).double()
    told = {
        "count": torch.full_like(e, n * c),
        "n_nan": n_nan,
        "n_inf": n_inf,
        "n_subnormal": tiny,
        "n_zero": zeros,
        "exponent": e,
        "min": low,
        "max": high,
        "alive": alive,
        "saturated": torch.full_like(e, torch.nan),
    }
    if not batched:
        told["alive"], heading = torch.full_like(e, torch.nan), torch.full_like(heading, torch.nan)
    parts = Row(e, count, pivot, offset, m2, nonzero, heading, x.new_zeros(0))
    return parts._replace(fields=_fields(told, parts))


def _heading(wide: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    """sum_a x_a / |x_a| of (..., N, C), and over how many vectors of length > 0."""
    if by_row:  # vectors of float64 may each need a power of two of their own
        peak = wide.abs().amax(-1, keepdim=True)
        wide = wide / torch.where(peak > 0, peak, 1)
    length = wide.square().sum(-1).sqrt()
    alive = length > 0
    inverse = torch.where(alive, 1 / length, 0)
    return (inverse.unsqueeze(-2) @ wide).squeeze(-2), alive.sum(-1).double()


def _fields(told: dict[str, Tensor], parts: Row) -> Tensor:
    """The row: what was counted, and what the units say together.

    By the law of total variance: M2 = sum of the units' M2 + spread of their means, these taken from a common pivot.
    """
    n = parts.finite.sum(-1)
    pivot = torch.nan_to_num((parts.finite * parts.pivot).sum(-1) / n)
    away = (parts.pivot - pivot[..., None]) + parts.offset
    shift = (parts.finite * away).sum(-1) / n
    spread = (parts.finite * (away - shift[..., None]).square()).sum(-1)
    batched = told["alive"] >= 0
    within = (parts.m2 / parts.finite).nanmean(-1)
    dead = (parts.nonzero == 0).double().mean(-1)
    found = told | {
        "mean": pivot + shift,
        "m2": torch.where(n > 0, parts.m2.sum(-1) + spread, torch.nan),
        "within": torch.where(batched, within, torch.nan),
        "dead": torch.where(batched, dead, torch.nan),
        "resultant": parts.heading.square().sum(-1),
    }
    return torch.stack([found[name].double() for name in FIELDS])


# Statistic -> how it comes from a row; the order is that of signal/stats.py.
_DERIVED: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "count": lambda f: f["count"],
    "n_nan": lambda f: f["n_nan"],
    "n_inf": lambda f: f["n_inf"],
    "n_subnormal": lambda f: f["n_subnormal"],
    "mean": lambda f: f["mean"] * f["scale"],
    "std": lambda f: (f["m2"] / f["finite"]).sqrt() * f["scale"],
    "rms": lambda f: f["rms"],
    "q": lambda f: f["rms"].square(),
    "norm": lambda f: f["rms"] * f["finite"].sqrt(),
    "min": lambda f: f["min"],
    "max": lambda f: f["max"],
    "frac_zero": lambda f: f["n_zero"] / f["count"],
    "frac_saturated": lambda f: f["saturated"],
    "frac_dead": lambda f: f["dead"],
    "std_within": lambda f: f["within"].sqrt() * f["scale"],
    "cosine": lambda f: _cosine(f["resultant"], f["alive"]),
}


def derive(fields: Tensor) -> Tensor:
    """The statistics (S, ...) of rows (F, ...), in the order of STATISTICS in signal/stats.py.

    std = sqrt(m2 / n) 2^e, rms = sqrt(m2 / n + mean^2) 2^e, n finite entries; q = rms^2 leaves float64 beyond 1e154.
    """
    named = dict(zip(FIELDS, fields, strict=True))
    named["finite"] = named["count"] - named["n_nan"] - named["n_inf"]
    named["scale"] = torch.exp2(named["exponent"])
    named["rms"] = (named["m2"] / named["finite"] + named["mean"].square()).sqrt() * named["scale"]
    return torch.stack([rule(named) for rule in _DERIVED.values()])


def _cosine(resultant: Tensor, k: Tensor) -> Tensor:
    """Mean over pairs a != b of cos(x_a, x_b) = (resultant - k) / (k (k - 1)), k vectors of length > 0."""
    return torch.where(k > 1, ((resultant - k) / (k * (k - 1))).clamp(-1, 1), torch.nan)
