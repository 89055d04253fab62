"""Random numbers by position: Philox4x32-10 in torch's integers, on whatever device the network lives.

Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.3. Every number is a function
of (seed, what it is, layer) and of its position in the tensor alone: no state, no order, and one program draws a whole
ensemble. The integers are the same on every device. Uniform numbers are exact in float32; normal ones are made in
float64 and rounded once, so that two programs' logarithms and cosines can differ by a rounding of float32, and rarely.
The same numbers in one pass: on a CPU by the compiled library (stats/kernels/random.h), on a GPU by Triton
(triton_philox.py).
Legend: E ensemble, L layers.
"""

import hashlib
import importlib.util
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from initlab.stats.kernels import cpu

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1: what the key grows by in a round
ROUNDS = 10
LOW = 0xFFFFFFFF

TRITON = importlib.util.find_spec("triton") is not None

Words = tuple[Tensor, Tensor, Tensor, Tensor]


Layers = int | Sequence[int]  # a layer, or some whose tensors stand one after the other


def key(seed: int, what: str, layer: int) -> int:
    """64 bits that stand for one tensor; texts differ, so their keys do."""
    digest = hashlib.blake2b(f"{seed}/{what}/{layer}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def keys(seeds: Sequence[int], what: str, layers: Layers) -> list[int]:
    """Those of all networks, layer after layer."""
    every = [layers] if isinstance(layers, int) else layers
    return [key(seed, what, layer) for layer in every for seed in seeds]


def philox(counter: Words, low_key: Tensor, high_key: Tensor) -> Words:
    """Four random words for each counter of four words; int64 tensors that broadcast, every word below 2^32.

    A product of two words needs 64 unsigned bits. int64 wraps, which leaves those bits as they are: the upper word is
    the shifted product without the copies of its sign.
    """
    a, b, c, d = (word + torch.zeros_like(low_key) for word in counter)
    left, right = torch.empty_like(a), torch.empty_like(a)
    for turn in range(ROUNDS):  # in place: new memory would cost as much as the arithmetic
        torch.mul(a, MULTIPLIERS[0], out=left)
        torch.mul(c, MULTIPLIERS[1], out=right)
        torch.bitwise_right_shift(right, 32, out=a).bitwise_xor_(b).bitwise_xor_(low_key + turn * WEYL[0])
        torch.bitwise_right_shift(left, 32, out=c).bitwise_xor_(d).bitwise_xor_(high_key + turn * WEYL[1])
        a.bitwise_and_(LOW), c.bitwise_and_(LOW)
        torch.bitwise_and(right, LOW, out=b)
        torch.bitwise_and(left, LOW, out=d)
    return a, b, c, d


def words(keys: Sequence[int], n: int, device: str | torch.device = "cpu") -> Tensor:
    """The first n random words of every key, (E, n) int64 below 2^32; entry i is word i mod 4 of counter i div 4."""
    halves = torch.tensor([(k & LOW, k >> 32) for k in keys], dtype=torch.int64, device=device)
    low_key, high_key = halves.reshape(-1, 2, 1).unbind(1)
    block = torch.arange(-(-n // 4), device=device)
    zero = torch.zeros_like(block)
    drawn = torch.stack(philox((block & LOW, block >> 32, zero, zero), low_key, high_key), -1)
    return drawn.flatten(1)[:, :n]


def _in_one_pass(keys: Sequence[int], shape: Sequence[int], device: str | torch.device, normal: bool) -> Tensor | None:
    """The numbers by a program of the device's own, None where there is none."""
    where = torch.device(device)
    if where.type == "cpu" and (compiled := cpu.library()) is not None:
        # the same 64 bits as signed numbers
        signed, out = torch.tensor([k - (k >> 63 << 64) for k in keys]), torch.empty(len(keys), *shape)
        compiled.draw_numbers(signed.data_ptr(), len(keys), math.prod(shape), normal, out.data_ptr())
        return out
    if not TRITON or where.type != "cuda":
        return None
    from initlab.nn import triton_philox

    found: Tensor = triton_philox.draw(keys, shape, where, normal)
    return found


def uniform(
    shape: Sequence[int], seeds: Sequence[int], what: str, layer: Layers = 0, device: str | torch.device = "cpu"
) -> Tensor:
    """Uniform numbers on (-1, 1), float32 (L E, *shape): the odd multiples of 2^-24, from a word's upper 24 bits."""
    own = keys(seeds, what, layer)
    if (found := _in_one_pass(own, shape, device, normal=False)) is not None:
        return found
    odd = (words(own, math.prod(shape), device) >> 8) * 2 + (1 - 2**24)
    return odd.float().mul_(2.0**-24).reshape(len(own), *shape)


def gaussian(
    shape: Sequence[int], seeds: Sequence[int], what: str, layer: Layers = 0, device: str | torch.device = "cpu"
) -> Tensor:
    """Standard normal numbers, float32 (L E, *shape), two from every two words (Box & Muller 1958).

    z = sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v) with u, v = (word + 1/2) / 2^32: neither is ever 0 or 1, so that no
    logarithm is of 0; |z| stays below sqrt(66 ln 2) = 6.76.
    """
    own = keys(seeds, what, layer)
    if (found := _in_one_pass(own, shape, device, normal=True)) is not None:
        return found
    pairs = words(own, -(-math.prod(shape) // 2) * 2, device).reshape(len(own), -1, 2)
    u, v = (pairs[..., k].double().add_(0.5).mul_(2.0**-32) for k in (0, 1))
    radius, angle = u.log_().mul_(-2).sqrt_(), v.mul_(2 * math.pi)
    normal = torch.empty(pairs.shape, device=device)
    normal[..., 0].copy_(angle.cos().mul_(radius))
    normal[..., 1].copy_(angle.sin_().mul_(radius))
    return normal.flatten(1)[:, : math.prod(shape)].reshape(len(own), *shape)
