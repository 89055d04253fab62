"""Rows of statistics made on a GPU by the passes that make the tensors: ReLU, its mask in the backward, the SGD update.

These passes read and write every entry anyway; the sums of a row are taken on the way, in float64, and nothing waits
for the GPU. A pass leaves the sums of every block of a tensor in `Blocks`; `finish` joins the blocks to rows.
For float32, float16 and bfloat16. Needs Triton.
Legend: N batch, C units, P blocks of a tensor, F fields, B octaves.
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from initlab.errors import UsageError
from initlab.stats.dtypes import DTYPES as ALL
from initlab.stats.dtypes import FORMATS, dtype_name, format_of, resolve_dtype
from initlab.stats.histogram import octaves
from initlab.stats.reference import FIELDS

NAMES = tuple(name for name in ALL if FORMATS[name].eps >= FORMATS["float32"].eps)
DTYPES = tuple(map(resolve_dtype, NAMES))
# The tile of a batched tensor, the block of one without a batch, and the warps that share one: with half as many warps
# the float64 copies of a tile do not fit in the registers of an H200 (ptxas: 1.3 kB spilled).
ROWS, COLUMNS, ENTRIES, WARPS = 16, 128, 2048, 8
EXTRA = 4  # bins behind the octaves: zeros, inf, -inf, nan
CELLS, TALLIES = 6, 3  # numbers that a block keeps of each unit, and of itself
MANY = 8  # blocks of a batch: from so many on the units are merged by programs of their own, before the tensor

TRITON = importlib.util.find_spec("triton") is not None


def missing(device: torch.device) -> str:
    """Why the fused passes cannot run on a device; "" where they can. Triton's interpreter runs them on a CPU."""
    if not TRITON:
        return "Triton is not installed"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return f"needs tensors on a CUDA GPU, not on {device.type}"


@cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    from initlab.stats.kernels import triton_merge, triton_programs

    return triton_programs, triton_merge


def _on_device(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


@dataclass(frozen=True)
class Blocks:
    """Memory for the sums of the blocks of tensors (*lead, N, C) of one kind, for one pass.

    `batched` as in `summarize`. So many of the first tensors as `saturated` says are preactivations of a ReLU, whose
    slope is small where it is 0: everywhere but at z > 0.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    batched: bool
    saturated: int
    cells: Tensor  # (*lead, P, 6, C), or (*lead, P, 6, 1) without a batch
    tallies: Tensor  # (*lead, P, 3)
    bins: Tensor  # (*lead, bins), int32, of the whole tensor

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.bins.shape[:-1])

    def split(self) -> list["Blocks"]:
        """The same memory along the first of `lead`: tensors that one pass makes are finished together."""
        parts = zip(self.cells, self.tallies, self.bins, strict=True)
        return [replace(self, cells=cells, tallies=tallies, bins=bins) for cells, tallies, bins in parts]


def blocks(
    lead: Sequence[int],
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: str | torch.device,
    batched: bool = True,
    saturated: int = 0,
) -> Blocks:
    """Memory for the sums of the blocks of tensors (*lead, N, C), the first `saturated` of them preactivations."""
    format_of(dtype, NAMES)
    n, c = shape
    if n < 1 or c < 1:
        raise UsageError(f"fused statistics of tensors (..., {n}, {c}): must have at least one entry")
    p, units = (-(-n // ROWS), c) if batched else (-(-n * c // ENTRIES), 1)
    cells = torch.empty(*lead, p, CELLS, units, dtype=torch.float64, device=device)
    tallies = torch.empty(*lead, p, TALLIES, dtype=torch.float64, device=device)
    counts = torch.zeros(*lead, _formats(dtype)["BINS"], dtype=torch.int32, device=device)
    return Blocks((n, c), dtype, batched, saturated, cells, tallies, counts)


def _formats(dtype: torch.dtype) -> dict[str, int]:
    """What the programs must know of a number format; one bin more than are used takes what lies outside."""
    lowest, highest = octaves(dtype)
    size = highest - lowest + 1
    return {"LOWEST": lowest, "OCTAVES": size, "BINS": _power_of_two(2 * size + EXTRA + 1)}


def _refuse(into: Blocks, *tensors: Tensor, batched: bool) -> None:
    """Anything but contiguous tensors of the shape and format that there is room for: one line."""
    expected = (*into.lead, *into.shape)
    for x in tensors:
        given = f"fused statistics of {tuple(x.shape)} {dtype_name(x.dtype)} on {x.device}"
        if reason := missing(x.device):
            raise UsageError(f"{given}: {reason}")
        if tuple(x.shape) != expected or x.dtype != into.dtype or x.device != into.bins.device:
            wanted = f"{expected} {dtype_name(into.dtype)} on {into.bins.device}"
            raise UsageError(f"{given}: there is room for {wanted}")
        if not x.is_contiguous():
            raise UsageError(f"{given}: must be contiguous; call .contiguous() first")
    if into.batched != batched:
        raise UsageError(f"fused statistics: room made with batched={into.batched}, needed is batched={batched}")


def _grid(into: Blocks) -> tuple[int, int]:
    return into.bins.shape[:-1].numel(), into.cells.shape[-3]


def _run_batched(x: Tensor, gate: Tensor, out: Tensor, x_blocks: Blocks, out_blocks: Blocks, kind: int) -> None:
    n, c = x_blocks.shape
    buffers = [t for b in (x_blocks, out_blocks) for t in (b.cells, b.tallies, b.bins)]
    # A tile of fewer entries than threads would be held twice, and one copy read after the other was overwritten.
    columns = max(32 * WARPS // ROWS, min(COLUMNS, _power_of_two(c)))
    sizes = {"KIND": kind, "ROWS": ROWS, "COLUMNS": columns, "num_warps": WARPS}
    with _on_device(x.device):
        _kernels()[0].measure_batched[_grid(x_blocks)](x, gate, out, *buffers, n, c, **sizes, **_formats(x.dtype))


def measure(x: Tensor, into: Blocks) -> None:
    """The sums of the blocks of x (*lead, N, C), which stays as it is."""
    _refuse(into, x, batched=into.batched)
    if into.batched:
        _run_batched(x, x, x, into, into, 0)
        return
    with _on_device(x.device):
        _kernels()[0].measure_flat[_grid(into)](
            x, into.cells, into.tallies, into.bins, into.shape[0] * into.shape[1],
            ENTRIES=ENTRIES, num_warps=WARPS, **_formats(x.dtype),
        )  # fmt: skip


def relu(z: Tensor, z_blocks: Blocks, a_blocks: Blocks, out: Tensor | None = None) -> Tensor:
    """a = max(z, 0), nan kept; measures z and a. `out=z` overwrites z."""
    a = torch.empty_like(z) if out is None else out
    _refuse(z_blocks, z, a, batched=True)
    _refuse(a_blocks, a, batched=True)
    _run_batched(z, z, a, z_blocks, a_blocks, _kernels()[0].RELU.value)
    return a


def mask(a_grad: Tensor, a: Tensor, a_blocks: Blocks, z_blocks: Blocks, out: Tensor | None = None) -> Tensor:
    """The gradient with respect to z of a = relu(z): a_grad where a > 0 or nan, else 0; measures both gradients.

    `out=a_grad` overwrites it.
    """
    z_grad = torch.empty_like(a_grad) if out is None else out
    _refuse(a_blocks, a_grad, a, z_grad, batched=True)
    _refuse(z_blocks, z_grad, batched=True)
    _run_batched(a_grad, a, z_grad, a_blocks, z_blocks, _kernels()[0].MASK.value)
    return z_grad


def update(w: Tensor, g: Tensor, lr: Tensor, g_blocks: Blocks, u_blocks: Blocks, w_blocks: Blocks) -> None:
    """SGD in place, w <- w - lr g, in float32 and rounded once; measures g, the update w' - w, and the new w'.

    `lr` is a tensor of one number, or of one for each network of *lead, on w's device: a graph that is replayed reads
    it anew.
    """
    _refuse(g_blocks, w, g, batched=False)
    for room in (u_blocks, w_blocks):
        _refuse(room, w, batched=False)
    count = _grid(g_blocks)[0]
    if lr.numel() not in (1, count) or lr.device != w.device:
        raise UsageError(f"lr of {lr.numel()} numbers on {lr.device}: must be 1 or {count} on {w.device}")
    buffers = [t for b in (g_blocks, u_blocks, w_blocks) for t in (b.cells, b.tallies, b.bins)]
    with _on_device(w.device):
        _kernels()[0].measure_update[_grid(g_blocks)](
            w, g, lr.contiguous(), int(lr.numel() > 1), *buffers, g.shape[-2:].numel(),
            ENTRIES=ENTRIES, num_warps=WARPS, **_formats(w.dtype),
        )  # fmt: skip


def finish(from_: Blocks) -> tuple[Tensor, Tensor]:
    """Rows (F, *lead) and histograms (*lead, 2, B), as `summarize` and `histogram` make them."""
    formats, entries = _formats(from_.dtype), from_.shape[0] * from_.shape[1]
    count, p = _grid(from_)
    device, units = from_.bins.device, from_.cells.shape[-1]
    fields = torch.empty(len(FIELDS), *from_.lead, dtype=torch.float64, device=device)
    counted = torch.empty(*from_.lead, 2, formats["OCTAVES"], dtype=torch.int32, device=device)
    smallest_normal = math.frexp(torch.finfo(from_.dtype).tiny)[1] - 1
    merge_units, merge = _kernels()[1].merge_units, _kernels()[1].merge
    # Where the cells of a unit lie, and those of the next; without a batch every block is merged like a unit.
    rest, unit, cell = (p, units, units) if from_.batched else (1, p, 1)
    columns = max(32, min(COLUMNS, _power_of_two(unit)))
    with _on_device(device):
        if rest >= MANY:
            merge_units[(count, -(-units // columns))](
                from_.cells, rest, units, COLUMNS=columns, num_warps=columns // 32
            )  # fmt: skip
            rest = 1
        merge[(count,)](
            from_.cells, from_.tallies, from_.bins, fields, counted, p, rest, unit, cell, entries,
            from_.saturated, NORMAL=smallest_normal - formats["LOWEST"], OCTAVES=formats["OCTAVES"],
            BATCHED=from_.batched, COLUMNS=columns, BINS=formats["BINS"],
        )  # fmt: skip
    return fields, counted


def measure_alone(x: Tensor, batched: bool = True) -> tuple[Tensor, Tensor]:
    """The row (F, ...) and the histogram (..., 2, B) of one tensor (..., N, C)."""
    into = blocks(x.shape[:-2], (x.shape[-2], x.shape[-1]), x.dtype, x.device, batched)
    measure(x.contiguous(), into)
    return finish(into)
