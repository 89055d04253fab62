# mypy: ignore-errors
"""The numbers of `philox.py` in one pass over the tensor: Triton's compiler reads this source.

Triton brings the same Philox4x32-10. Uniform numbers are bit for bit those of `philox.py`, normal ones too but for the
last rounding of a logarithm or a cosine. Legend: E ensemble.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTERS = 512  # of four words each, in a program
FULL_TURN = tl.constexpr(2 * math.pi)
WORD = tl.constexpr(2.0**-32)
STEP = tl.constexpr(2.0**-24)


@triton.jit
def normal_pair(first, second):
    """Box & Muller 1958, in float64."""
    u, v = (first.to(tl.float64) + 0.5) * WORD, (second.to(tl.float64) + 0.5) * WORD
    radius, angle = tl.sqrt(-2 * tl.log(u)), v * FULL_TURN
    return (radius * tl.cos(angle)).to(tl.float32), (radius * tl.sin(angle)).to(tl.float32)


@triton.jit
def to_uniform(word):
    """An odd multiple of 2^-24 in (-1, 1), exactly."""
    return ((word >> 8).to(tl.int32) * 2 + (1 - 16777216)).to(tl.float32) * STEP


@triton.jit
def draw_kernel(keys, out, entries, NORMAL: tl.constexpr, COUNTERS: tl.constexpr):
    """Four entries of one network's tensor for each counter."""
    network = tl.program_id(0).to(tl.int64)
    counter = tl.program_id(1).to(tl.int64) * COUNTERS + tl.arange(0, COUNTERS)
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    none = tl.zeros_like(low)
    a, b, c, d = tl.philox(tl.load(keys + network).to(tl.uint64, bitcast=True), low, high, none, none)
    if NORMAL:
        w, x = normal_pair(a, b)
        y, z = normal_pair(c, d)
    else:
        w, x, y, z = to_uniform(a), to_uniform(b), to_uniform(c), to_uniform(d)
    entry = counter * 4
    at = out + network * entries + entry
    tl.store(at, w, mask=entry < entries)
    tl.store(at + 1, x, mask=entry + 1 < entries)
    tl.store(at + 2, y, mask=entry + 2 < entries)
    tl.store(at + 3, z, mask=entry + 3 < entries)


def draw(keys: Sequence[int], shape: Sequence[int], device: torch.device, normal: bool) -> Tensor:
    """Numbers (E, *shape), float32, a network for each key."""
    signed = torch.tensor([k - (k >> 63 << 64) for k in keys], dtype=torch.int64, device=device)  # the same 64 bits
    out = torch.empty(len(keys), *shape, device=device)
    entries = math.prod(shape)
    if out.numel():
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            grid = (len(keys), triton.cdiv(entries, 4 * COUNTERS))
            draw_kernel[grid](signed, out, entries, NORMAL=normal, COUNTERS=COUNTERS)
    return out
