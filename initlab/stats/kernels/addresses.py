"""Tensors by address: where the compiled pass finds what a row is about, and where it leaves the row and its histogram.

For float32 on a CPU that lies in memory without gaps. Knows nothing of modules and of the order of rows.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from initlab.stats.kernels.cpu import JOB, expanded
from initlab.stats.keys import Spot
from initlab.stats.statistics import BATCHED, Key, Rows
from initlab.stats.summarize import FIELDS, octaves

ROW = 8 * len(FIELDS)  # bytes of a row of one network
COUNTED = 4096  # rows whose histograms wait together
_LONGEST = 2 + 2 * (octaves(torch.float32)[1] - octaves(torch.float32)[0] + 1)  # of a histogram's run of numbers
_X, _OTHER, _E, _N, _C, _FIRST, _SECOND = (JOB.index(word) for word in ("x", "other", "e", "n", "c", "first", "second"))


def in_reach(x: Tensor) -> bool:
    """Whether the compiled pass can read x where it lies."""
    return x.dtype is torch.float32 and x.is_cpu and x.is_contiguous()


class Seat:
    """What a row is about, by number, and a job for tensors of one shape whose units come last."""

    __slots__ = ("address", "batched", "code", "job", "shape", "spot")

    def __init__(self, code: int, spot: Spot, shape: torch.Size) -> None:
        self.code, self.spot, self.shape, self.batched = code, spot, shape, spot.tensor in BATCHED
        units = shape[-1] if shape and self.batched else shape.numel()
        self.job = np.zeros(len(JOB), dtype=np.int64)
        self.job[[_E, _N, _C, _SECOND]] = 1, shape.numel() // max(1, units), units, 1
        self.address: int = self.job.ctypes.data


def jobs(tensors: Sequence[Tensor], kept: Mapping[int, Tensor]) -> np.ndarray:
    """Jobs for tensors without a batch, a row each, one after the other; the addresses of x are still to come."""
    found = np.zeros((len(tensors), len(JOB)), dtype=np.int64)
    found[:, [_E, _N]] = 1
    found[:, _C] = [x.numel() for x in tensors]
    found[:, _FIRST] = np.arange(len(tensors))
    for k, x in kept.items():
        found[k, _OTHER] = x.data_ptr()
    return found


def aim(work: np.ndarray, addresses: Sequence[int]) -> None:
    """Let jobs read there."""
    work[:, _X] = addresses


class Counts:
    """Histograms that the compiled pass writes, one after the other, until some thousand are named together."""

    def __init__(self, rows: Rows) -> None:
        self._octaves = rows
        self._make(COUNTED)

    def _make(self, size: int) -> None:
        # Room for the worst case, of which only what is written becomes memory.
        self._runs = np.empty(size * _LONGEST, dtype=np.int32)
        self._starts = np.zeros(size, dtype=np.int64)
        self._arena = np.array([self._runs.ctypes.data, 0, 0], dtype=np.int64)
        self._rows: list[int] = []

    def next(self, rows: Sequence[int]) -> int:
        """The arena, ready for the histograms of these rows."""
        if len(self._rows) + len(rows) > len(self._starts):
            self.settle()
            if len(rows) > len(self._starts):
                self._make(len(rows))
        self._arena[2] = self._starts.ctypes.data + self._starts.itemsize * len(self._rows)
        self._rows += rows
        return int(self._arena.ctypes.data)

    def settle(self) -> None:
        """Hand over what was counted, under the numbers of the rows."""
        if self._rows:
            counts, lowest = expanded(self._runs, self._starts[: len(self._rows), None])
            self._octaves.put_histograms(numbered(self._rows), torch.from_numpy(counts), torch.float32, lowest)
            self._arena[1], self._rows = 0, []


def numbered(rows: Sequence[int]) -> list[Key]:
    """The words come later: until then a histogram goes by the number of its row."""
    return [Key("", "", 0, row, "", "") for row in rows]
