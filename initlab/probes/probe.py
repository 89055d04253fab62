"""Recording a training loop: a context manager around it, and tidy rows at its end.

    with initlab.probe(model, optimizer=optimizer, every=10, layers="encoder.*") as p:
        for x, y in batches: ...
    rows = p.frame()

`probed_modules` says what is measured, `hooks` numbers it, `steps` knows what a step is. A hand-written network has no
modules: it offers `watch(sink)` and hands over its tensors itself.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Protocol, runtime_checkable

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from initlab.errors import UsageError, check, check_functions, library_call
from initlab.probes.probe_buffer import ProbeBuffer
from initlab.probes.probed_modules import find_parameter_device, list_patterns, refuse_several
from initlab.probes.steps import StepTracker
from initlab.probes.torch_private import ignore_functions
from initlab.probes.updates import list_optimizers
from initlab.stats.buffer import BATCHED
from initlab.stats.dtypes import resolve_formats
from initlab.stats.format_shares import LossScale
from initlab.stats.keys import Seeds, TensorKey, resolve_seeds
from initlab.stats.measure import backend_for
from initlab.stats.statistics import Function

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
            row = self._buffer.put(self._buffer.code(key), tensor, key.tensor in BATCHED)
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
        with ExitStack() as undo, ignore_functions():
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
        with ignore_functions():
            try:
                self._release()
            finally:
                self._buffer.flush()
        if kind is None and isinstance(self._network, StepTracker):
            self._network.warn(3)
        if self._buffer.bin_tables.has_lost:
            text = "histograms of earlier frames are gone: ask for p.histograms() in emit, or leave out histograms=True"
            warnings.warn(f"probe: {text}", UserWarning, stacklevel=2)

    def frame(self) -> pd.DataFrame:
        """The table `stats` with further columns, `name` to `loss_scale`; what `emit` has got is left out."""
        return self._buffer.frame()

    def histograms(self) -> pd.DataFrame:
        """The table `histograms` of the steps closed since it was last asked for.

        With `emit`, that of a frame can be asked for until the next frame comes: best in `emit` itself.
        """
        return self._buffer.take_bins().histograms()

    def formats(self) -> pd.DataFrame:
        """What number formats would lose: a row for each row of `frame` and each of the `formats` that were asked for.

        With `emit`, that of a frame can be asked for until the next frame comes. Shares of all entries: `overflow`
        (finite, beyond the largest number), `underflow` (not 0, and rounded to 0), `subnormal` (kept less precisely).
        `overflow` is what is sure, `overflow_most` counts all of the octave that the format's end cuts.
        """
        return self._buffer.take_bins().shares()

    def loss_scale(self, format: str = "float16") -> LossScale:
        """The largest power of two for a loss with which no recorded gradient overflows, and what still becomes 0.

        format: the number format of the gradients. Needs `formats=` to have been asked for, of whatever format.

        >>> model = nn.Linear(3, 2)
        >>> with probe(model, formats=["float16"]) as p:
        ...     (2.0**-20 * model(torch.ones(5, 3))).sum().backward()
        >>> p.loss_scale().scale == 2.0**33  # gradients of 5 * 2^-20, and 65504 is the largest number of float16
        True
        """
        return self._buffer.take_bins().find_scale(resolve_formats([format])[0])

    def merged(self) -> pd.DataFrame:
        """A row for each output over all recorded batches, as if they had been one: dead in the whole epoch."""
        return self._buffer.merged()


@library_call
def probe(
    model: nn.Module | Watchable,
    x: None = None,
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    every: int = 1,
    layers: str | Iterable[str] = "*",
    seeds: Seeds = 1,
    emit: Emit | None = None,
    flush_steps: int = 100,
    histograms: bool = False,
    merged: bool = False,
    statistics: Mapping[str, Function] | None = None,
    formats: Sequence[str | torch.dtype] = (),
) -> Probe:
    """Record the statistics of a training loop: `with probe(model, optimizer=optimizer) as p: ...`, then `p.frame()`.

    model: an nn.Module, or a hand-written network that offers `watch(sink)`. x: is refused; `measure` takes one pass.
    optimizer: one or several; a step ends when all gradients have been used (stage `train`, gradients as the optimizer
    gets them, updates; passes under `no_grad` are left out). Gradients are those of the loss, also where a GradScaler
    multiplies it by what the column `loss_scale` says. Without an optimizer a step ends with the next forward pass
    (stage `probe`, no updates).
    every: record every k-th step. layers: one or several globs on the dotted names of modules. seeds: labels of the
    rows, how many networks the model holds or a seed for each; an nn.Module is one. emit: a function that gets a frame
    every `flush_steps` recorded steps or 30 seconds. histograms: count entries by sign and power of two too, see
    `p.histograms()`. merged: put the outputs of all recorded batches together unit by unit too, see `p.merged()`.
    statistics: your functions (..., N, C) -> (...) by the names of their columns. formats: number formats, as
    ["float16"]: `p.formats()` says which share of a tensor each would lose, `p.loss_scale()` what saves gradients. Both
    are read from histograms and cost what these cost; nothing if empty.

    Outputs and gradients are bit for bit those of the unwatched model, but for compiled models, whose recorded steps
    run uncompiled, and for torch's fused inference paths of attention, which give way to any hook. Raises UsageError
    for what does not fit together.

    >>> model = nn.Linear(3, 2)
    >>> with probe(model) as p:
    ...     model(torch.ones(5, 3)).sum().backward()
    >>> sorted(p.frame()["tensor"].unique())
    ['activation', 'bias', 'loss', 'preactivation', 'weight']
    """
    if x is not None:
        raise UsageError("probe: records a loop; for one pass on x use initlab.measure(model, x, y, loss)")
    every, flush_steps = check(every=every, flush_steps=flush_steps)
    histograms, merged = check(histograms=histograms, merged=merged)
    check_functions(emit=emit)
    patterns, labels = list_patterns(layers), list(resolve_seeds(seeds))
    names = resolve_formats(formats) if formats else ()
    with ignore_functions():
        backend = backend_for(find_parameter_device(model), statistics)
        buffer = ProbeBuffer(labels, backend, emit, flush_steps, histograms, merged, names)
        sink = Sink(buffer, every, patterns)
    if isinstance(model, nn.Module):
        refuse_several(buffer.seeds)
        optimizers = [] if optimizer is None else list_optimizers(model, optimizer)
        return Probe(buffer, StepTracker(model, optimizers, patterns, every, buffer), sink)
    if not isinstance(model, Watchable) or isinstance(model, type):
        raise UsageError(f"model={type(model).__name__}: must be an nn.Module, or offer watch(sink)")
    if optimizer is not None:
        raise UsageError("optimizer: a hand-written network says itself when a step ends; leave it out")
    return Probe(buffer, model, sink)
