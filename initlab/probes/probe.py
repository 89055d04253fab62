"""`initlab.probe`: watch a network for one pass or through a training loop, and get tidy rows.

    rows = initlab.probe(model, x, y, loss=torch.nn.functional.cross_entropy)

    with initlab.probe(model, optimizer=optimizer, every=10, layers="encoder.*") as p:
        for x, y in batches: ...
    rows = p.frame()

What is measured: watched.py; how it is numbered: hooks.py; what a step is: loop.py. A network written by hand has no
modules: it offers `watch(sink)` and hands its tensors over itself. Knows nothing of tasks and of what the rows mean.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, Protocol, overload, runtime_checkable

import pandas as pd
from torch import Tensor, nn
from torch.optim import Optimizer

from initlab.errors import UsageError, check
from initlab.probes.probe_buffer import ProbeBuffer
from initlab.probes.probed_modules import select
from initlab.probes.snapshot import one_pass
from initlab.probes.steps import StepTracker
from initlab.stats.custom import Function
from initlab.stats.keys import TensorKey
from initlab.stats.measure import backend_for

Emit = Callable[[pd.DataFrame], None]


class Sink:
    """Where a hand-written network puts its tensors, (N, C) or (E, N, C); they may be overwritten afterwards."""

    def __init__(self, buffer: ProbeBuffer, every: int, layers: Sequence[str]) -> None:
        self._buffer, self._every, self._layers = buffer, every, layers

    def due(self, step: int) -> bool:
        """Whether the step is recorded; where it is not, nothing need be put."""
        return step % self._every == 0

    def put(self, key: TensorKey, tensor: Tensor, saturated: Tensor | None = None) -> None:
        """A row for each network of the tensor as it is now, with the saturated share (E,) of preactivations."""
        networks = tensor.shape[:-2].numel()
        if networks != len(self._buffer.seeds):
            raise UsageError(f"seeds: {len(self._buffer.seeds)} given, the network has {networks}: must be as many")
        if tensor.numel() and any(fnmatchcase(str(key.layer), pattern) for pattern in self._layers):
            row = self._buffer.put(key, tensor.detach())
            if saturated is not None:
                self._buffer.set_saturated(row, saturated)

    def end(self, step: int) -> None:
        """The step is over; its rows can be handed over."""
        self._buffer.end_step(step)


@runtime_checkable
class Watchable(Protocol):
    """A network written by hand: puts its tensors into the sink it was given last, or into none."""

    def watch(self, sink: Sink | None) -> None: ...


class Probe:
    """Watches from `with` to its end, also when it ends with an exception; `frame` gives the rows of closed steps."""

    def __init__(self, buffer: ProbeBuffer, network: StepTracker | Watchable, sink: Sink) -> None:
        self._buffer, self._network, self._sink, self._open = buffer, network, sink, False

    def __enter__(self) -> "Probe":
        if self._open:
            raise UsageError("probe: is open already; make another one")
        with ExitStack() as undo:
            undo.callback(self._release)
            self._open = True
            if isinstance(self._network, StepTracker):
                self._network.open()
            else:
                self._network.watch(self._sink)
            undo.pop_all()
        return self

    def _release(self) -> None:
        self._open = False
        if isinstance(self._network, StepTracker):
            self._network.close()
        else:
            self._network.watch(None)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._release()
        finally:
            self._buffer.flush()
        if kind is None and isinstance(self._network, StepTracker):
            self._network.warn(3)

    def frame(self) -> pd.DataFrame:
        """Columns of the table `stats`, and `name`, `part`, `call`, `update_ratio`; what `emit` has got is left out."""
        return self._buffer.frame()

    def histograms(self) -> pd.DataFrame:
        """The table `histograms` of the steps closed since it was last asked for (in `emit`, those of the frame)."""
        return self._buffer.histograms()


@overload
def probe(
    model: nn.Module | Watchable,
    x: None = None,
    y: None = None,
    loss: None = None,
    *,
    optimizer: Optimizer | None = None,
    every: int = 1,
    layers: str | Iterable[str] = "*",
    seeds: int | Sequence[int] = 0,
    emit: Emit | None = None,
    flush_steps: int = 100,
    histograms: bool = False,
    statistics: Mapping[str, Function] | None = None,
) -> Probe: ...


@overload
def probe(
    model: nn.Module,
    x: Any,
    y: Any = None,
    loss: Callable[..., Tensor] | None = None,
    *,
    layers: str | Iterable[str] = "*",
    seeds: int | Sequence[int] = 0,
    statistics: Mapping[str, Function] | None = None,
) -> pd.DataFrame: ...


def probe(
    model: nn.Module | Watchable,
    x: Any = None,
    y: Any = None,
    loss: Callable[..., Tensor] | None = None,
    *,
    optimizer: Optimizer | None = None,
    every: int = 1,
    layers: str | Iterable[str] = "*",
    seeds: int | Sequence[int] = 0,
    emit: Emit | None = None,
    flush_steps: int = 100,
    histograms: bool = False,
    statistics: Mapping[str, Function] | None = None,
) -> pd.DataFrame | Probe:
    """Rows of one forward and backward pass on x; without x a context manager around a loop of one's own.

    x is a tensor, a tuple of arguments or a dict of named ones; `loss(out, y)`, or `loss(out)` without y, one number.
    The pass is the one that would come next, in the mode the model is in; parameters, `.grad`, buffers (BatchNorm's
    running statistics) and torch's random numbers are afterwards what they were. No loss, no backward rows.

    In a loop every `every`-th step is recorded: a step ends with `optimizer.step()` (stage `train`; gradients as the
    optimizer gets them; updates) or, without an optimizer, with the next forward pass (stage `probe`, no updates). With
    an optimizer, passes under `no_grad` are left out. `layers`: globs on dotted names. `seeds` only labels the rows,
    one for each network of an ensemble. `emit` takes a frame every `flush_steps` recorded steps or 30 seconds.
    `histograms` counts entries by sign and octave too: `p.histograms()`. `statistics`: functions (..., N, C) -> (...)
    of the user by name, a column each.

    Outputs and gradients are bit for bit those of the unwatched model, but for compiled models, whose recorded steps
    run uncompiled, and for torch's fused inference paths of attention, which give way to any hook.
    """
    patterns = [layers] if isinstance(layers, str) else list(layers)
    networks = [seeds] if isinstance(seeds, int) else list(seeds)
    # Tensors on a GPU are measured by plain PyTorch.
    buffer = ProbeBuffer(networks, backend_for("cpu", statistics), emit, flush_steps, histograms)
    check(every=every)
    if x is not None and (optimizer is not None or every != 1 or emit is not None or histograms):
        raise UsageError("probe: x makes one pass and no loop: leave optimizer, every, emit and histograms out")
    _refuse(model, x, y, loss, optimizer, buffer)
    sink = Sink(buffer, every, patterns)
    if not isinstance(model, nn.Module):
        return Probe(buffer, model, sink)
    loop = StepTracker(model, optimizer, select(model, patterns), every, buffer)
    if x is None:
        return Probe(buffer, loop, sink)
    one_pass(loop, model, x, y, loss)
    return buffer.frame()


def _refuse(model: object, x: object, y: object, loss: object, optimizer: object, buffer: ProbeBuffer) -> None:
    """What does not go together, in one line each."""
    if not isinstance(model, nn.Module):
        if not isinstance(model, Watchable) or isinstance(model, type):
            raise UsageError(f"model={type(model).__name__}: must be an nn.Module, or offer watch(sink)")
        if x is not None or optimizer is not None:
            raise UsageError("probe: a hand-written network is watched in its own loop: give neither x nor optimizer")
    elif len(buffer.seeds) != 1:
        raise UsageError(f"seeds: {len(buffer.seeds)} given; an nn.Module is one network and has one")
    if x is None and (y is not None or loss is not None):
        raise UsageError("probe: y or loss without x: give the batch too, or in a loop none of them")
