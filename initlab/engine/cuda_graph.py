"""A step recorded once as a CUDA graph and replayed, and the way of its rows out of the GPU; on a CPU the step itself.

Nothing here waits for the GPU inside a step. Knows nothing of networks: a step is a function of tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from initlab.errors import UsageError

Found = TypeVar("Found")


def captured(step: Callable[..., Any], device: torch.device, warmup: int = 3) -> Callable[..., Any]:
    """The step, for a GPU recorded after `warmup` calls and replayed from then on; every call is one step, these too.

    Its arguments must be tensors of unchanging shape: a replay copies them to where the recorded kernels read. What it
    returns is written anew by the next call. It must not wait for the GPU, and Python inside it runs once more, then
    never again. On a CPU this is the step itself.
    """
    return _Replayed(step, device, warmup) if device.type == "cuda" else step


class _Replayed:
    def __init__(self, step: Callable[..., Any], device: torch.device, warmup: int) -> None:
        self.step, self.warmup, self.device = step, warmup, device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.found: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        if self.warmup > 0:
            self.warmup -= 1
            return self._aside(inputs)
        if self.graph is None:
            self.graph = self._record(inputs)
        refuse_other(self.inputs, inputs)
        for place, given in zip(self.inputs, inputs, strict=True):
            if place.data_ptr() != given.data_ptr():
                place.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.found

    def _aside(self, inputs: Sequence[Tensor]) -> Any:
        """A step as it is, on the stream that will be recorded: what libraries set up at first use is then there."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            found = self.step(*inputs)
        here.wait_stream(self.stream)
        return found

    def _record(self, inputs: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        """Records the step and runs nothing."""
        refuse_other(inputs, inputs)
        self.inputs = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.found = self.step(*self.inputs)
        return graph


def refuse_other(recorded: Sequence[Tensor], given: Sequence[Any]) -> None:
    """A number would stay what it was when it was recorded, and another shape be read as the old one: one line."""
    for x in given:
        if not isinstance(x, Tensor):
            raise UsageError(f"a replayed step takes tensors alone, not {x!r}: it would stay as it was recorded")
    shapes, wanted = ([(tuple(x.shape), x.dtype) for x in several] for several in (given, recorded))
    if shapes != wanted:
        said, expected = (", ".join(f"{shape} {dtype}" for shape, dtype in kinds) for kinds in (shapes, wanted))
        raise UsageError(f"a replayed step was recorded for {expected}; it was given {said}")


class Beside:
    """A second stream for what only reads: `beside(f, x)` runs f(x) while the step goes on; `join` brings it back.

    x must keep its values until `join`. Inside a recorded step the two streams become branches of one graph. On a CPU
    f runs at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.away = device, False
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, f: Callable[..., Found], *read: Tensor) -> Found:
        if self.stream is None:
            return f(*read)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        self.away = True
        with torch.cuda.stream(self.stream):
            found = f(*read)
        for x in read:  # its memory must not be given to others while this stream reads it
            x.record_stream(self.stream)
        return found

    def join(self) -> None:
        """What follows waits for all that was sent beside."""
        if self.stream is not None and self.away:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.away = False


class Outbox:
    """Rows of one shape, k at most, kept on their device and sent off together in one copy that nobody waits for.

    `put` may be part of a recorded step: it counts on the device. The copy lands in pinned memory, and its rows are
    handed over by the call after the next k steps, when it has long arrived. On a CPU all is plain memory.
    """

    def __init__(self, k: int, shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float64) -> None:
        self.k, self.shape = k, tuple(shape)
        size = k * torch.Size(shape).numel()
        self._all = torch.zeros(size + 1, dtype=dtype, device=device)
        self._rows, self._sent_count = self._all[:size].view(k, *shape), self._all[size:]
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        pinned = device.type == "cuda"
        self._landed = torch.zeros(size + 1, dtype=dtype, pin_memory=pinned)
        self._arrival = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def put(self, row: Tensor) -> None:
        """Keeps one row."""
        self._rows.index_copy_(0, self._count % self.k, row.unsqueeze(0))
        self._count += 1

    def flush(self) -> Tensor:
        """Sends off what was put since the last flush; gives the rows of the flush before, (n, *shape) on the CPU."""
        arrived = self._arrived()
        self._sent_count.copy_(self._count)
        self._landed.copy_(self._all, non_blocking=True)
        self._count.zero_()
        if self._arrival is not None:
            self._arrival.record()
        return arrived

    def drain(self) -> Tensor:
        """All rows that have not been given yet; waits for them."""
        return torch.cat([self.flush(), self._arrived()])

    def _arrived(self) -> Tensor:
        if self._arrival is not None:
            self._arrival.synchronize()
        n = int(self._landed[-1])
        self._landed[-1] = 0
        if n > self.k:
            raise RuntimeError(f"{n} rows were put between two flushes of a box for {self.k}: rows are lost")
        return self._landed[:-1].view(self.k, *self.shape)[:n].clone()
