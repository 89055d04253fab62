"""The networks of an ensemble in chunks: as many as planned at a time, a chunk to each processor, fewer where memory is
short. Knows nothing of what is done with them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from initlab.errors import UsageError
from initlab.tasks.ensemble.memory import is_out_of_memory
from initlab.tasks.ensemble.networks import Plan, Shape

Run = Callable[[slice], None]


def in_chunks(run: Run, networks: int, planned: Plan, shape: Shape, threads: int = 1) -> None:
    """`run` every chunk of networks; with several threads each thread takes chunks of its own and computes alone."""
    size = min(planned.networks, -(-networks // threads))
    chunks = [slice(start, min(start + size, networks)) for start in range(0, networks, size)]
    if threads == 1 or len(chunks) == 1:
        for chunk in chunks:
            _run_halving(run, chunk, shape)
        return
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for running in [pool.submit(_run_halving, run, chunk, shape) for chunk in chunks]:
            running.result()
    finally:  # also when a chunk fails or the user stops: those under way end, the others never begin
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


def _run_halving(run: Run, chunk: slice, shape: Shape) -> None:
    """A chunk, or where memory turns out to be short its halves one after the other."""
    try:
        run(chunk)
    except (RuntimeError, MemoryError) as fault:
        if not is_out_of_memory(fault):
            raise
        if chunk.stop - chunk.start == 1:
            raise UsageError(f"{shape.said()}: not enough memory for one network; make it smaller") from fault
        middle = (chunk.start + chunk.stop) // 2
        for half in (slice(chunk.start, middle), slice(middle, chunk.stop)):
            _run_halving(run, half, shape)
