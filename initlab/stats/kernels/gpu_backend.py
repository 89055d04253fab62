"""Rows by Triton's kernels, for float32, float16 and bfloat16 on a CUDA GPU.

A pass in place makes the rows of what it reads and writes; a tensor by itself costs three launches where plain PyTorch
needs over a hundred. Everything else is left to plain PyTorch. Nothing waits for the GPU.
Legend: E networks, N batch, C units, F fields.
"""

import logging
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from initlab.stats.backend import Backend, Elementwise, into
from initlab.stats.histogram import Bins, octaves
from initlab.stats.kernels import triton_rows
from initlab.stats.kernels.triton_rows import Blocks, blocks
from initlab.stats.reference import detach_checked
from initlab.stats.statistics import Function
from initlab.stats.summarize import summarize


@lru_cache
def works(device: torch.device) -> bool:
    """Whether the kernels run here and give the rows of plain PyTorch: tried once; why not is logged."""
    if triton_rows.missing(device):
        return False
    x = torch.arange(-300.0, 300.0, device=device).reshape(20, 30)
    try:
        same = torch.allclose(triton_rows.measure_alone(x)[0], summarize(x), rtol=1e-12, atol=0, equal_nan=True)
        reason = "" if same else "their rows are not those of plain PyTorch"
    except Exception as error:  # compilers and drivers fail in ways of their own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if reason:
        logging.getLogger(__name__).warning("statistics in plain PyTorch, slower: fused passes fail: %s", reason)
    return not reason


class GpuBackend(Backend):
    """See `Backend`."""

    def __init__(self, statistics: Mapping[str, Function] | None = None) -> None:
        super().__init__(statistics)
        self._rates: dict[tuple[float, torch.device], Tensor] = {}  # a new tensor would be copied to the GPU each time

    def rows(
        self,
        x: Tensor,
        batched: bool = True,
        bins: Bins | None = None,
        out: Tensor | None = None,
        part_of: Tensor | None = None,
    ) -> Tensor:
        x = detach_checked(x).contiguous()
        if not self.fuses(x):
            return super().rows(x, batched, bins, out, part_of)
        room = _room(x, 1, batched)
        triton_rows.measure(x, room.split()[0])
        return into(out, _finish(room, bins)[:, 0])

    def relu_rows_(self, z: Tensor, bins: Bins | None = None, out: Tensor | None = None) -> Tensor:
        if not self.fuses(z):
            return super().relu_rows_(z, bins, out)
        return into(out, _measure_relu(z, z, bins))

    def mask_rows_(
        self, g: Tensor, a: Tensor, sums: Tensor | None = None, bins: Bins | None = None, out: Tensor | None = None
    ) -> Tensor:
        if not self.fuses(g) or not self.fuses(a):
            return super().mask_rows_(g, a, sums, bins, out)
        rows = _measure_mask(g, a, g, bins)
        if sums is not None:
            torch.sum(g, -2, out=sums)
        return into(out, rows)

    def activation_rows(self, z: Tensor, activation: Elementwise, out: Tensor, rows: Tensor, at: int = 0) -> None:
        if not activation.rectifies or not self.fuses(z):
            super().activation_rows(z, activation, out, rows, at)
            return
        into(rows[at : at + 2], _measure_relu(z, out, None))

    def gradient_rows(
        self, g: Tensor, z: Tensor, activation: Elementwise, out: Tensor, rows: Tensor, at: int = 0
    ) -> None:
        if not activation.rectifies or not self.fuses(g) or not self.fuses(z):
            super().gradient_rows(g, z, activation, out, rows, at)
            return
        into(rows[at : at + 2], _measure_mask(g, z, out, None))

    def update_rows_(
        self, w: Tensor, g: Tensor, lr: float, bins: Bins | None = None, out: Tensor | None = None
    ) -> Tensor:
        if not self.fuses(w) or not self.fuses(g):
            return super().update_rows_(w, g, lr, bins, out)
        rate = self._rate(lr, w.device)
        room = _room(w, 4, False)
        old, gradient, change, new = room.split()
        triton_rows.measure(w, old)
        triton_rows.update(w, g, rate, gradient, change, new)
        return into(out, _finish(room, bins, 3))

    def _rate(self, lr: float, device: torch.device) -> Tensor:
        if (lr, device) not in self._rates:
            self._rates[lr, device] = torch.tensor([lr], dtype=torch.float32, device=device)
        return self._rates[lr, device]

    def fuses(self, x: Tensor) -> bool:
        here = not triton_rows.missing(x.device)
        return not self.statistics and here and x.dtype in triton_rows.DTYPES and x.is_contiguous() and x.numel() > 0


def _room(x: Tensor, count: int, batched: bool, saturated: bool = False) -> Blocks:
    """Memory for the blocks of so many tensors like x, the first of them preactivations if `saturated`."""
    lead, networks = (count, *x.shape[:-2]), x.shape[:-2].numel()
    return blocks(lead, (x.shape[-2], x.shape[-1]), x.dtype, x.device, batched, networks if saturated else 0)


def _measure_relu(z: Tensor, out: Tensor, bins: Bins | None) -> Tensor:
    """The rows (F, 2, ...) of z, with its saturated share, and of max(z, 0), which `out` becomes."""
    room = _room(z, 2, True, saturated=True)
    before, after = room.split()
    triton_rows.relu(z, before, after, out=out)
    return _finish(room, bins)


def _measure_mask(g: Tensor, a: Tensor, out: Tensor, bins: Bins | None) -> Tensor:
    """The rows (F, 2, ...) of g, the gradient of a ReLU's output a, and of that of its input, which `out` becomes."""
    room = _room(g, 2, True)
    before, after = room.split()
    triton_rows.mask(g, a, before, after, out=out)
    return _finish(room, bins)


def _finish(room: Blocks, bins: Bins | None, wanted: int | None = None) -> Tensor:
    """The rows (F, K, ...) of the first K tensors from what their blocks say; their histograms go into the bins."""
    fields, counts = triton_rows.finish(room)
    if bins is not None:
        for one in counts[:wanted]:
            bins.add(one, octaves(room.dtype)[0])
    return fields[:, :wanted]
