"""How many entries of a tensor lie in which octave: a histogram of log2 |x| by sign that needs no range.

Read from the bits of the numbers, so it is exact, subnormal numbers included, and merging is adding. Never waits for a
GPU. Knows nothing of moments. Legend: E ensemble, N batch, C units, B octaves.
"""

from functools import cache

import torch
from torch import Tensor

from initlab.stats.dtypes import format_of
from initlab.stats.workspace import AT_ONCE, ones, workspace

# The layout of float64: sign, 11 bits of exponent with this bias, 52 bits of mantissa.
_MANTISSA, _BIAS, _EXPONENTS = 52, 1023, 2048


@cache
def octaves(dtype: torch.dtype) -> tuple[int, int]:
    """Lowest and highest octave floor(log2 |x|) of a number format that networks compute in."""
    return format_of(dtype).octaves


def histogram(x: Tensor) -> Tensor:
    """Entries of (..., N, C) by sign (0: positive) and octave, int32 (..., 2, B); zeros, nan and inf are in no bin."""
    lowest, highest = octaves(x.dtype)
    lead = x.shape[:-2]
    flat = x.detach().reshape(lead.numel(), x.shape[-2:].numel())
    counts = _counts(flat)
    if x.dtype == torch.float64:
        # Its subnormal numbers are counted after multiplication by a power of two that makes them normal, and put back.
        lift = 2 * _MANTISSA
        lifted = _counts(torch.where(flat.abs() < torch.finfo(x.dtype).tiny, flat * 2.0**lift, 0))
        counts = torch.cat([lifted[..., lowest + _BIAS + lift : lift + 1], counts[..., 1:-1]], -1)
    else:  # in float64 the subnormal numbers of the smaller formats are normal
        counts = counts[..., lowest + _BIAS : highest + _BIAS + 1]
    return counts.flip(-2).reshape(*lead, 2, highest - lowest + 1).int()


def _counts(flat: Tensor) -> Tensor:
    """Entries of (E, n) by the sign and the exponent bits of float64: int64 (E, 2, 2048), negative numbers first."""
    counts = torch.zeros(len(flat), 2 * _EXPONENTS, dtype=torch.int64, device=flat.device)
    offsets = torch.arange(_EXPONENTS, counts.numel(), 2 * _EXPONENTS, device=flat.device)[:, None]
    if flat.device.type != "cpu":
        _count(flat.double().clone(), offsets, counts, torch.ones(flat.numel(), dtype=torch.int64, device=flat.device))
        return counts.view(-1, 2, _EXPONENTS)
    members = max(1, AT_ONCE // max(1, flat.shape[-1]))
    for some, mine in zip(torch.split(flat, members), torch.split(counts, members), strict=True):
        for block in torch.split(some, AT_ONCE, -1):
            wide, _ = workspace(block.shape, torch.float64)
            _count(wide.copy_(block), offsets[: len(block)], mine, ones()[: block.numel()])
    return counts.view(-1, 2, _EXPONENTS)


def _count(wide: Tensor, offsets: Tensor, counts: Tensor, each: Tensor) -> None:
    """Add the entries of (E, n) to counts (E, 4096); `wide` is written over."""
    place = wide.view(torch.int64)
    place >>= _MANTISSA  # -2048 to 2047: the sign bit makes it negative
    place += offsets
    counts.view(-1).scatter_add_(0, place.view(-1), each)
