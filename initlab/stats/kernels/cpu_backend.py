"""Rows by the C++ passes of cpu.cpp: float32 on a CPU, read once where memory is read anyway.

Other formats, tensors with gaps, and the user's own statistics are left to plain PyTorch.
Legend: E networks, N batch, C units, K rows, F fields, B octaves.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from initlab.stats.backend import Backend, Elementwise, into
from initlab.stats.histogram import Bins, octaves
from initlab.stats.reference import FIELDS
from initlab.stats.statistics import STATISTICS, Function

_ROW = 8 * len(FIELDS)  # bytes of a row
_LONGEST = 2 + 2 * (octaves(torch.float32)[1] - octaves(torch.float32)[0] + 1)  # numbers of one histogram at most
_WAITING = 2**14  # rows whose histograms wait together


class CpuBackend(Backend):
    """See `Backend`."""

    def __init__(self, library: ctypes.CDLL, statistics: Mapping[str, Function] | None = None) -> None:
        super().__init__(statistics)
        self._passes = library

    def is_quick(self, x: Tensor) -> bool:
        return x.dtype is torch.float32 and x.is_cpu and not self.statistics

    def fuses(self, x: Tensor) -> bool:
        return x.dtype is torch.float32 and x.is_cpu and x.is_contiguous() and x.numel() > 0 and not self.statistics

    def bins(self, networks: int) -> Bins:
        return Arena(networks)

    def rows(
        self,
        x: Tensor,
        batched: bool = True,
        bins: Bins | None = None,
        out: Tensor | None = None,
        part_of: Tensor | None = None,
    ) -> Tensor:
        entries = x.numel()
        if x.dtype is not torch.float32 or not x.is_cpu or not entries or x.ndim < 2:
            return super().rows(x, batched, bins, out, part_of)
        x = x.contiguous()
        *_, n, c = x.shape
        networks = entries // (n * c)
        rows = (
            torch.empty((*x.shape[:-2], len(FIELDS)), dtype=torch.float64, device="cpu")
            if out is None or self.statistics
            else out
        )
        arena = None if bins is None else _arena(bins, networks)
        self._passes.describe_rows(x.data_ptr(), networks, n, c, batched, rows.data_ptr(), arena)
        return rows if rows is out else into(out, self._with_custom(rows.movedim(-1, 0), x, None))

    def rows_of_each(self, tensors: Sequence[Tensor], bins: Bins | None = None, batched: bool = False) -> Tensor:
        if not all(map(self.fuses, tensors)):
            return super().rows_of_each(tensors, bins, batched)
        return self._describe_each(tensors, None, bins, batched)

    def change_rows_(self, before: Sequence[Tensor], tensors: Sequence[Tensor], bins: Bins | None = None) -> Tensor:
        pairs = zip(before, tensors, strict=True)
        if not all(self.fuses(old) and self.fuses(x) and old.shape == x.shape for old, x in pairs):
            return super().change_rows_(before, tensors, bins)
        return self._describe_each(tensors, before, bins)

    def _describe_each(
        self, tensors: Sequence[Tensor], before: Sequence[Tensor] | None, bins: Bins | None, batched: bool = False
    ) -> Tensor:
        lists = [[x.data_ptr() for x in tensors], [x.data_ptr() for x in before or tensors]]
        units = [x.shape[-1] if batched else 1 for x in tensors]
        numbers = np.array([*lists, [x.numel() for x in tensors], units], dtype=np.int64)
        addresses, old, sizes, widths = (row.ctypes.data for row in numbers)
        rows = torch.empty((len(tensors), len(FIELDS)), dtype=torch.float64, device="cpu")
        arena = None if bins is None else _arena(bins, len(rows))
        given = (addresses, old if before else None, sizes, widths, batched)
        self._passes.describe_many(*given, len(rows), rows.data_ptr(), arena)
        return rows.t()

    def compare_each(self, tensors: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
        across = [x.ndim == 2 and not x.is_contiguous() and x.mT.is_contiguous() for x in references]
        memory = [x.mT if turned else x for x, turned in zip(references, across, strict=True)]
        if not all(map(self.fuses, [*tensors, *memory])):
            return super().compare_each(tensors, references)
        units = [x.shape[-1] if turned else 0 for x, turned in zip(references, across, strict=True)]
        lists = [[x.data_ptr() for x in side] for side in (tensors, memory)]
        numbers = np.array([*lists, [x.numel() for x in tensors], units], dtype=np.int64)
        found = torch.empty((2, len(tensors)), dtype=torch.float64, device="cpu")
        self._passes.compare_many(*(row.ctypes.data for row in numbers), len(tensors), found.data_ptr())
        return found

    def prepare(self, name: str, *given: Any, bins: Bins | None, out: Tensor) -> Callable[[], object]:
        if not all(self.fuses(x) for x in given if isinstance(x, Tensor)):
            return super().prepare(name, *given, bins=bins, out=out)
        asked: list[tuple[str, tuple[Any, ...]]] = []
        listener = CpuBackend(self._passes)  # what it is told to call is noted, with its addresses, and not called
        listener._passes = _Notes(asked)  # type: ignore[assignment]
        getattr(listener, name)(*given, bins=None, out=out)
        ((function, arguments),) = asked
        run = partial(getattr(self._passes, function), *arguments[:-1])  # the last one is that of histograms
        if bins is None:
            return partial(run, None)
        rows = out.numel() // len(FIELDS)
        return lambda: run(_arena(bins, rows))

    def relu_rows_(self, z: Tensor, bins: Bins | None = None, out: Tensor | None = None) -> Tensor:
        if not self.fuses(z):
            return super().relu_rows_(z, bins, out)
        rows, shape, arena = _room(z, 2, bins, out)
        self._passes.relu_rows(z.data_ptr(), z.data_ptr(), *shape, rows.data_ptr(), arena)
        return rows.movedim(-1, 0) if out is None else out

    def mask_rows_(
        self, g: Tensor, a: Tensor, sums: Tensor | None = None, bins: Bins | None = None, out: Tensor | None = None
    ) -> Tensor:
        if not self.fuses(g) or not self.fuses(a):
            return super().mask_rows_(g, a, sums, bins, out)
        rows, shape, arena = _room(g, 2, bins, out)
        where = None if sums is None else sums.data_ptr()
        self._passes.mask_rows(g.data_ptr(), a.data_ptr(), g.data_ptr(), *shape, where, rows.data_ptr(), arena)
        return rows.movedim(-1, 0) if out is None else out

    def activation_rows(self, z: Tensor, activation: Elementwise, out: Tensor, rows: Tensor, at: int = 0) -> None:
        linear = not activation.rectifies and activation.phi(z) is z
        if not (linear or activation.rectifies) or not self.fuses(z) or not out.is_contiguous():
            super().activation_rows(z, activation, out, rows, at)
            return
        e, n, c = z.shape
        address = rows.data_ptr() + at * e * _ROW
        if linear:
            self._passes.linear_rows(z.data_ptr(), out.data_ptr(), e, n, c, 0.0, address)
        else:
            self._passes.relu_rows(z.data_ptr(), out.data_ptr(), e, n, c, address, None)

    def gradient_rows(
        self, g: Tensor, z: Tensor, activation: Elementwise, out: Tensor, rows: Tensor, at: int = 0
    ) -> None:
        linear = not activation.rectifies and activation.pull_back(g, z) is g
        both = linear or activation.rectifies
        if not both or not self.fuses(g) or not self.fuses(z) or not out.is_contiguous():
            super().gradient_rows(g, z, activation, out, rows, at)
            return
        e, n, c = g.shape
        address = rows.data_ptr() + at * e * _ROW
        if linear:
            self._passes.linear_rows(g.data_ptr(), out.data_ptr(), e, n, c, float("nan"), address)
        else:
            self._passes.mask_rows(g.data_ptr(), z.data_ptr(), out.data_ptr(), e, n, c, None, address, None)

    def derive(self, rows: Tensor) -> Tensor:
        if not rows.is_cpu or rows.dtype is not torch.float64:
            return super().derive(rows)
        found = torch.empty((len(STATISTICS), *rows.shape[1:]), dtype=torch.float64, device="cpu")
        flat = rows.view(len(rows), 1) if rows.ndim == 1 else rows.flatten(1)
        self._passes.derive_rows(flat.data_ptr(), flat.shape[1], *flat.stride(), found.data_ptr())
        return found

    def inside(self, rows: Tensor, smallest: float) -> bool:
        if self.statistics:
            return super().inside(rows, smallest)
        return bool(self._passes.all_inside(rows.data_ptr(), rows.numel() // len(FIELDS), smallest))

    def update_rows_(
        self, w: Tensor, g: Tensor, lr: float, bins: Bins | None = None, out: Tensor | None = None
    ) -> Tensor:
        if not self.fuses(w) or not self.fuses(g):
            return super().update_rows_(w, g, lr, bins, out)
        rows, (networks, n, c), arena = _room(w, 3, bins, out)
        self._passes.update_rows(w.data_ptr(), g.data_ptr(), networks, n * c, lr, rows.data_ptr(), arena)
        return rows.movedim(-1, 0) if out is None else out


class _Notes:
    """Stands in for the library: notes what is called, and with what."""

    def __init__(self, asked: list[tuple[str, tuple[Any, ...]]]) -> None:
        self._asked = asked

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self._asked.append((name, arguments))


def _room(
    x: Tensor, count: int, bins: Bins | None, out: Tensor | None
) -> tuple[Tensor, tuple[int, int, int], int | None]:
    """Memory for the rows of so many tensors like x, (networks, N, C) of x, and the address of the arena, if any."""
    n, c = x.shape[-2:]
    networks = x.numel() // (n * c)
    rows = torch.empty((count, *x.shape[:-2], len(FIELDS)), dtype=torch.float64, device="cpu") if out is None else out
    return rows, (networks, n, c), None if bins is None else _arena(bins, count * networks)


class Arena(Bins):
    """Histograms that C++ writes one after the other, each as long as it needs to be; joined to counts when taken."""

    def __init__(self, networks: int) -> None:
        super().__init__(networks)
        self._waiting = 0
        self._allocate(_WAITING)

    def _allocate(self, rows: int) -> None:
        # Room for the worst case, of which only what is written becomes memory.
        self._runs = np.empty(rows * _LONGEST, dtype=np.int32)
        self._starts = np.zeros(rows, dtype=np.int64)
        self._struct = np.array([self._runs.ctypes.data, 0, 0], dtype=np.int64)  # struct Arena in cpu.cpp
        self._starts_address, self._address = int(self._starts.ctypes.data), int(self._struct.ctypes.data)

    def address(self, rows: int) -> int:
        """The address of a struct Arena that is ready for the histograms of so many rows of one network."""
        if self._waiting + rows > len(self._starts):
            self._settle()
            if rows > len(self._starts):
                self._allocate(rows)
        self._struct[2] = self._starts_address + 8 * self._waiting
        self._waiting += rows
        return self._address

    def add(self, counts: Tensor, lowest: int) -> None:
        self._settle()  # the rows before these come first
        super().add(counts, lowest)

    def __len__(self) -> int:
        return super().__len__() + self._waiting // self.networks

    def take(self) -> list[tuple[Tensor, int]]:
        self._settle()
        return super().take()

    def _settle(self) -> None:
        """Make counts of what C++ has written: at a start stand the lowest octave, their number, and the counts."""
        if not self._waiting:
            return
        runs, starts = self._runs, self._starts[: self._waiting]
        low, size = runs[starts].astype(np.int64), runs[starts + 1].astype(np.int64)
        lowest = int(low.min())
        counts = np.zeros((len(starts), 2, int((low + size).max()) - lowest), dtype=np.int32)
        row = np.repeat(np.arange(len(starts)), size)
        inside = np.arange(len(row)) - np.repeat(np.cumsum(size) - size, size)
        for sign in (0, 1):
            counts[row, sign, (low - lowest)[row] + inside] = runs[(starts + 2 + sign * size)[row] + inside]
        self._waiting, self._struct[1] = 0, 0
        self._parts.append((torch.from_numpy(counts).view(-1, self.networks, *counts.shape[1:]), lowest))


def _arena(bins: Bins, rows: int) -> int:
    assert isinstance(bins, Arena), "bins come from the backend that fills them"
    return bins.address(rows)
