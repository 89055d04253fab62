"""How many entries of a tensor lie in which octave: a histogram of log2 |x| by sign that needs no range.

Read from the bits of the numbers, so it is exact, subnormal numbers included, and merging is adding. Nothing waits for
a GPU. Legend: E networks, N batch, C units, K rows, B octaves.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
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


class Bins:
    """The histograms of rows that are being made, in the order of the rows."""

    def __init__(self, networks: int) -> None:
        self.networks, self._parts = networks, list[tuple[Tensor, int]]()

    def add(self, counts: Tensor, lowest: int) -> None:
        """Counts (..., 2, B) of rows of E networks each, the first bin being octave `lowest`.

        On a CPU the octaves that are empty at both ends are left out.
        """
        first, end = (0, counts.shape[-1]) if counts.device.type != "cpu" else octaves_with_entries(counts.numpy())
        rows = counts.shape[:-2].numel() // self.networks
        counts = counts[..., first:end].reshape(rows, self.networks, 2, end - first)
        self._parts.append((counts.clone(), lowest + first))

    def __len__(self) -> int:
        """How many rows have histograms here."""
        return sum(len(counts) for counts, _ in self._parts)

    def rewind(self, rows: int) -> None:
        """Forget all but the first rows."""
        for counts, lowest in self.take():
            kept = counts[: max(0, rows)]
            self._parts += [(kept, lowest)] * bool(len(kept))
            rows -= len(counts)

    def take(self) -> list[tuple[Tensor, int]]:
        """Counts (K, E, 2, B) and their lowest octave, part by part; they are forgotten here."""
        parts, self._parts = self._parts, []
        return parts


def join_bins(parts: Sequence[tuple[Tensor, int]], dim: int) -> tuple[Tensor, int]:
    """Counts (K, E, 2, B) joined along dimension 0 or 1, with bins for the octaves of all of them."""
    if len(parts) == 1:
        return parts[0]
    low = min(lowest for _, lowest in parts)
    high = max(lowest + counts.shape[-1] for counts, lowest in parts)
    padded = [
        torch.nn.functional.pad(counts, (lowest - low, high - lowest - counts.shape[-1])) for counts, lowest in parts
    ]
    return torch.cat(padded, dim), low


def octaves_with_entries(counts: np.ndarray) -> tuple[int, int]:
    """First bin of (..., B) that has an entry, and the one after the last; 0, 0 where there is none."""
    places = np.flatnonzero(counts.any(tuple(range(counts.ndim - 1))))
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


def bin_columns(parts: Sequence[tuple[Tensor, int]]) -> dict[str, np.ndarray]:
    """The columns `first`, `positive` and `negative` of histograms (K, E, 2, B), the networks running fastest.

    `first` is the octave of the first bin; the counts by sign begin there, are as long as each other, and have no empty
    bins at either end. With no entry in any bin `first` is 0 and the counts are empty.
    """
    first, positive, negative = list[int](), list[np.ndarray](), list[np.ndarray]()
    for counts, lowest in parts:
        both = counts.flatten(0, 1).cpu().numpy().astype(np.int64)
        filled = both[:, 0] + both[:, 1] > 0 if both.size else np.zeros((len(both), 1), dtype=bool)
        some = filled.any(1)
        starts, ends = filled.argmax(1) * some, (filled.shape[1] - filled[:, ::-1].argmax(1)) * some
        first += ((lowest + starts) * some).tolist()
        for start, end, up, down in zip(starts.tolist(), ends.tolist(), *both.swapaxes(0, 1), strict=True):
            positive.append(up[start:end])
            negative.append(down[start:end])
    columns = {"first": np.array(first, dtype=np.int64)}
    for name, trimmed in (("positive", positive), ("negative", negative)):
        columns[name] = np.empty(len(trimmed), dtype=object)
        for k, values in enumerate(trimmed):  # one by one: numpy makes a matrix of lists of one length
            columns[name][k] = values
    return columns
