"""How many networks run together: as many as memory and cache hold, in chunks, a chunk to each processor."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import torch

from initlab.errors import UsageError
from initlab.tasks.ensemble.device import Where
from initlab.tasks.ensemble.memory import free_memory, is_out_of_memory, readable
from initlab.tasks.ensemble.networks import Net

CACHED = 8  # networks whose tensors stay in a processor's cache
WORKING = 12  # float64 tensors of a layer's shape that its statistics take, at most


class Plan(NamedTuple):
    """How many networks run together, whether their weights are kept or drawn again, and the bytes that are kept."""

    networks: int
    keep_weights: bool
    kept: float

    def __str__(self) -> str:
        weights = "preactivations and weights" if self.keep_weights else "preactivations, and draws weights twice"
        return f"the stack's backward pass keeps {readable(self.kept)}: {weights}, {self.networks} networks at a time"


def plan(net: Net, networks: int, where: Where, backward: bool = True) -> Plan:
    """As many networks as half of the free memory holds, the rest is for those that leave; on a CPU what a cache holds.

    A backward pass keeps L N O preactivations of every network; its weights too if they fit, else they are drawn a
    second time, which costs about one more matmul per layer. Without it nothing that is kept grows with depth.
    Errors: a single network that does not fit.
    """
    size, entries = where.dtype.itemsize, [i * o for i, o in pairwise(net.sizes)]
    working = net.batch * max(net.sizes) * (3 * size + 8 * WORKING) + 2 * max(entries) * (4 + size)
    preactivations = net.batch * sum(net.sizes[1:]) * size if backward else 0
    weights = sum(entries) * size
    free = free_memory(where.device)
    if preactivations + working > free:
        keeps = f"keeps {readable(preactivations)} for the backward pass; use backward=false, or less depth,"
        needs = keeps if preactivations > working else f"works on {readable(working)}; use less"
        raise UsageError(f"{net}: {readable(free)} are free and one network {needs} width or batch")
    most = min(networks, CACHED) if where.device.type == "cpu" else networks
    together = max(1, int(min(most, free / 2 / (preactivations + working))))
    keep_weights = backward and together * (preactivations + working + weights) <= free / 2
    return Plan(together, keep_weights, float(together * (preactivations + weights * keep_weights)))


def split(networks: int, size: int) -> list[slice]:
    """The networks in chunks of a size."""
    return [slice(start, min(start + size, networks)) for start in range(0, networks, size)]


def run_chunks(run: Callable[[slice], None], networks: int, size: int, net: Net, threads: int = 1) -> None:
    """`run` all chunks of at most `size` networks; several threads take a chunk each and compute with one core."""
    chunks = split(networks, min(size, -(-networks // threads)))
    if threads == 1 or len(chunks) == 1:
        for chunk in chunks:
            _run_halving(run, chunk, net)
        return
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for running in [pool.submit(_run_halving, run, chunk, net) for chunk in chunks]:
            running.result()
    finally:  # also when a chunk fails or the user stops: those under way end, the others never begin
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


def _run_halving(run: Callable[[slice], None], chunk: slice, net: Net) -> None:
    """A chunk, or where memory turns out to be short its halves one after the other."""
    try:
        run(chunk)
    except (RuntimeError, MemoryError) as fault:
        if not is_out_of_memory(fault):
            raise
        if chunk.stop - chunk.start == 1:
            raise UsageError(f"{net}: not enough memory for one network; make it smaller") from fault
        middle = (chunk.start + chunk.stop) // 2
        for half in (slice(chunk.start, middle), slice(middle, chunk.stop)):
            _run_halving(run, half, net)
