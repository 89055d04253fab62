"""Around the matmul ladder: what is refused, the rungs beyond the book, and the table of all of them.

The book's seven rungs are plain functions in `matmul.py`. A `Rung` is such a function with what is known of it: called
through it, a (M, K) and b (K, N) must be of one float dtype on one device.
"""

import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from types import FunctionType

import torch
from torch import Tensor

from initlab.errors import UsageError
from initlab.scratch import matmul

Sizes = tuple[int, int, int]  # M, K, N
TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Rung:
    """One way to multiply. Calling the rung checks the shapes first; `f` is the bare function.

    loops: number of nested Python loops. entries: how many numbers of the tensors' dtype are alive at the peak, the
    result included, a and b not. missing: why the rung cannot run on a device; "" where it can.
    """

    f: Callable[[Tensor, Tensor], Tensor]
    loops: int = 0
    entries: Callable[[int, int, int], int] = lambda m, k, n: m * n
    missing: Callable[[torch.device], str] = lambda device: ""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        refuse_mismatch(a, b)
        if reason := self.missing(a.device):
            raise UsageError(f"matmul {self.f.__name__}: {reason}")
        return self.f(a, b)

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.f.__doc__ or "").partition("\n")[0]


def refuse_mismatch(a: Tensor, b: Tensor) -> None:
    """Anything but a (M, K) and b (K, N) of one float dtype on one device: one line that names both."""
    given = f"matmul of {_describe(a)} and {_describe(b)}"
    if a.ndim != 2 or b.ndim != 2:
        raise UsageError(f"{given}: both must have two dimensions, (M, K) and (K, N)")
    if a.shape[1] != b.shape[0]:
        raise UsageError(f"{given}: the {a.shape[1]} columns of the first must be the {b.shape[0]} rows of the second")
    if a.dtype != b.dtype or not a.is_floating_point():
        raise UsageError(f"{given}: both must have one float dtype; convert with .float()")
    if a.device != b.device:
        raise UsageError(f"{given}: both must be on one device, not {a.device} and {b.device}")


def _describe(x: Tensor) -> str:
    if not isinstance(x, Tensor):
        raise UsageError(f"matmul of a {type(x).__name__}: both must be torch tensors, (M, K) and (K, N)")
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


# --- beyond the book ----------------------------------------------------------------------------------------------

TILE = 128  # three float32 tiles of this side are 192 kB, which a core's second cache holds


def blocked(a: Tensor, b: Tensor) -> Tensor:
    """Blocked: tiles small enough to stay in the cache, which is what `@` does inside."""
    (m, k), n = a.shape, b.shape[1]
    c = a.new_zeros(m, n)
    for i in range(0, m, TILE):
        for j in range(0, n, TILE):
            tile = c[i : i + TILE, j : j + TILE]
            for l in range(0, k, TILE):  # noqa: E741
                tile.addmm_(a[i : i + TILE, l : l + TILE], b[l : l + TILE, j : j + TILE])
    return c


@cache
def _compile_outer(dtype: torch.dtype, kind: str, ones: tuple[bool, ...]) -> Callable[[Tensor, Tensor], Tensor]:
    """A function for each case that torch compiles apart: after 8 recompilations of one it would run it uncompiled."""
    copy = FunctionType(matmul.outer.__code__.replace(), matmul.outer.__globals__, "compiled")
    with warnings.catch_warnings():  # torch's compiler imports what torch itself has deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.compile(copy, dynamic=True)


def _why_no_compiler(device: torch.device) -> str:
    """A first look that loads no compiler; a compiler that is there and fails is reported by the call."""
    if device.type == "cuda":
        return "" if TRITON else "torch.compile for a GPU needs Triton, which is not installed"
    if device.type != "cpu" or sys.platform == "win32":  # torch looks there for a compiler by other means
        return ""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return "" if shutil.which(compiler) else f"torch.compile for a CPU needs a C++ compiler; there is no {compiler}"


def compiled(a: Tensor, b: Tensor) -> Tensor:
    """`torch.compile` of the broadcast form: product and sum fused, so that the M K N products are never stored.

    The first call compiles, for seconds; so does the first with another dtype, or with a size of 1. An empty product
    leaves nothing to compile.
    """
    sizes = (*a.shape, b.shape[1])
    if 0 in sizes:
        return matmul.outer(a, b)
    try:
        return _compile_outer(a.dtype, a.device.type, tuple(size == 1 for size in sizes))(a, b)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as fault:  # every fault of the compilers is one
        first_line = str(fault).strip().partition("\n")[0]
        raise UsageError(f"matmul compiled: torch.compile does not work here: {first_line}") from fault


if TRITON:
    import triton
    import triton.language as tl

    _jit = cache(triton.jit)  # when first called: a test may have asked for the interpreter by then

    # Triton reads this function's source: it is compiled for the GPU and never run by Python. One program makes one
    # tile of c; what a tile has beyond the edges is masked: loaded as 0, and not stored.
    def _tile(  # type: ignore[no-untyped-def]
        a,
        b,
        c,
        m,
        k,
        n,
        a_row,
        a_column,
        b_row,
        b_column,
        SIDE: tl.constexpr,
        DOUBLE: tl.constexpr,
    ):
        i = (tl.program_id(0) * SIDE + tl.arange(0, SIDE)).to(tl.int64)  # offsets beyond 2^31 entries
        j = (tl.program_id(1) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
        total = tl.zeros((SIDE, SIDE), dtype=tl.float64 if DOUBLE else tl.float32)
        for start in range(0, k, SIDE):
            middle = (start + tl.arange(0, SIDE)).to(tl.int64)
            left_mask = (i[:, None] < m) & (middle[None, :] < k)
            right_mask = (middle[:, None] < k) & (j[None, :] < n)
            left = tl.load(a + i[:, None] * a_row + middle[None, :] * a_column, mask=left_mask, other=0.0)
            right = tl.load(b + middle[:, None] * b_row + j[None, :] * b_column, mask=right_mask, other=0.0)
            if DOUBLE:
                total += tl.sum(left[:, :, None] * right[None, :, :], axis=1)
            else:
                total = tl.dot(left, right, total, input_precision="ieee")  # the default rounds float32 to 10 bits
        kept = (i[:, None] < m) & (j[None, :] < n)
        tl.store(c + i[:, None] * n + j[None, :], total.to(c.dtype.element_ty), mask=kept)


def _why_no_triton(device: torch.device) -> str:
    if not TRITON:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":  # Triton's own interpreter runs the kernel on a CPU, slowly
        return ""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU here"
    return "" if device.type == "cuda" else f"needs tensors on a CUDA GPU, not on {device.type}"


def triton_kernel(a: Tensor, b: Tensor) -> Tensor:
    """A Triton kernel: the blocked form on a GPU, a program for every tile.

    Sums in float32, for float64 tensors in float64.
    """
    (m, k), n = a.shape, b.shape[1]
    c = a.new_empty(m, n)
    if c.numel() == 0:
        return c
    double = a.dtype == torch.float64
    side = 16 if double else 32  # the products of a float64 tile, 16^3, must fit in a program's registers
    grid = (triton.cdiv(m, side), triton.cdiv(n, side))
    with torch.cuda.device(a.device) if a.is_cuda else nullcontext():
        _jit(_tile)[grid](a, b, c, m, k, n, *a.stride(), *b.stride(), SIDE=side, DOUBLE=double)
    return c


# --- the ladder, in reading order ---------------------------------------------------------------------------------

LADDER: dict[str, Rung] = {
    "loops": Rung(matmul.loops, loops=3),
    "lists": Rung(matmul.lists, loops=3, entries=lambda m, k, n: 8 * (m * k + k * n + m * n)),  # a float takes 32 bytes
    "elementwise": Rung(matmul.elementwise, loops=2, entries=lambda m, k, n: m * n + k),
    "row": Rung(matmul.row, loops=1, entries=lambda m, k, n: m * n + (k + 1) * n),
    "outer": Rung(matmul.outer, entries=lambda m, k, n: m * k * n + m * n),
    "einsum": Rung(matmul.einsum),
    "matmul": Rung(matmul.matmul),
    "blocked": Rung(blocked, loops=3),
    "compiled": Rung(compiled, missing=_why_no_compiler),
    "triton": Rung(triton_kernel, missing=_why_no_triton),
}

# What this machine can run; the ladder's other rows say by `missing` what they lack.
RUNGS: dict[str, Rung] = {
    name: one for name, one in LADDER.items() if not all(one.missing(torch.device(kind)) for kind in ("cpu", "cuda"))
}
