"""A stack of L layers: a unit-Gaussian batch pushed through, a unit-Gaussian gradient pulled back down."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from initlab import stops
from initlab.errors import UsageError, check, check_functions, library_call
from initlab.nn.activations import Activation
from initlab.nn.custom_activation import Given
from initlab.nn.network import backward, forward, multiply
from initlab.stats.backend import SATURATED, Backend
from initlab.stats.buffer import StatsBuffer
from initlab.stats.gathering import Gathering
from initlab.stats.keys import Seeds, TensorKey
from initlab.stats.measure import backend_for
from initlab.stats.row_order import NETWORK, sort_rows
from initlab.stats.statistics import TRUE_COLUMNS, Function
from initlab.tasks.ensemble.device import Where
from initlab.tasks.ensemble.memory import is_out_of_memory
from initlab.tasks.ensemble.networks import Emit, Ensemble, Frames, Init, Net, Networks
from initlab.tasks.ensemble.plan import plan, run_chunks
from initlab.tasks.ensemble.unbounded_twin import UnboundedTwin, read_off
from initlab.terminal import Bar

WINDOW = 16  # layers between two looks at what was measured; on a GPU each look waits for the device
GATHERED = 50  # the same where rows are measured together
FLUSH_ROWS = 1000  # 0.2 MB of rows


@library_call
def stack(
    init: Init = "kaiming",
    activation: Given = "relu",
    depth: int = 50,
    width: int = 100,
    inputs: int | None = None,
    batch: int = 200,
    seeds: Seeds = 8,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    generator: str = "philox",
    residual: bool = False,
    backward: bool = True,
    statistics: Mapping[str, Function] | None = None,
    emit: Emit | None = None,
    progress: bool = False,
    widths: Sequence[int] | None = None,
    **rule_fields: Any,
) -> pd.DataFrame:
    """The `stats` rows of a stack: every layer's preactivation and activation, forward and backward.

    init: a rule's name, a `Rule`, or a sequence with one for each network, which then stands in the columns `init` and
    `gain`. activation: a name, a row of the table, or an elementwise function. depth: layers. width: units of every
    layer. inputs: units of the input, those of the first layer if None. batch: inputs. widths: units of each layer,
    which replaces depth and width. seeds: how many networks, or their seeds. dtype: float16, bfloat16, float32 or
    float64, as a name or torch's. device: "cpu", "cuda", "cuda:1", "auto" or torch's. generator: who draws the numbers,
    `philox` or `torch`. residual: add each layer's input to what comes out of it, a = x + phi(z), where it has as many
    units. backward: pull a gradient back down too. statistics: functions (..., N, C) -> (...) by name, a column each
    behind the built-in ones. emit: gets the tables as they come, every 1000 rows or 30 seconds and at the end of each
    chunk of networks; the frame returned is then empty. progress: show a bar. rule_fields: fields of the rule, as
    gain=1.5.

    Layer 0 is the input, forward only. Nothing raises when a signal dies: the counts say it, and `log2_rms_true`,
    `log2_std_true` say what the signal would be. These are log2 of rms and std in arithmetic that has no range: what
    the dtype holds, rounding included, up to where a network leaves the range of its dtype (an entry not finite, or an
    rms below 16 times the smallest normal number), and from there, and on all its way down, the same weights in float64
    with a power of two carried. For float32 that is right to 1e-6 against exact arithmetic; -inf is a true zero.

    Rows stand by layer in the order of travel, then by network in the order of `seeds`, whatever ran together. On a CPU
    each of torch's threads takes a chunk of its own: small matrices gain nothing from sharing one. A rule that
    is fitted to data is fitted to the stack's own input; how it went is emitted as the table `lsuv`.
    Errors: an unknown name, a number out of its range, a network that does not fit into memory.

    >>> frame = stack("kaiming", "relu", depth=2, width=8, seeds=1)
    >>> frame[["layer", "tensor", "direction"]].head(3).to_numpy().tolist()
    [[0, 'activation', 'forward'], [1, 'preactivation', 'forward'], [1, 'activation', 'forward']]
    """
    backward, progress = check(backward=backward, progress=progress)
    check_functions(emit=emit)
    net = Net.resolve(activation, depth, width, inputs, batch, residual, widths)
    ensemble, where = (
        Ensemble.resolve(init, seeds, net.activation, rule_fields),
        Where.resolve(dtype, device, generator),
    )
    return run_stack(net, ensemble, where, backward, emit, progress, statistics)


def run_stack(
    net: Net,
    ensemble: Ensemble,
    where: Where,
    backward: bool = True,
    emit: Emit | None = None,
    progress: bool = False,
    statistics: Mapping[str, Function] | None = None,
) -> pd.DataFrame:
    """`stack` of what has been resolved. Without `backward` nothing that is kept grows with depth."""
    backend = backend_for(where.device, statistics)
    planned = plan(net, len(ensemble), where, backward)
    collected: dict[tuple[int, int], list[Frames]] = {}
    lock = Lock()
    total = len(ensemble) * net.depth * (2 if backward else 1)
    with Bar(total=total, desc="stack", unit="layer", disable=None if progress else True) as bar:

        def run(chunk: slice) -> None:
            def deliver(frames: Frames) -> None:
                if emit is None:
                    collected.setdefault((chunk.start, chunk.stop), []).append(frames)
                else:
                    with lock:
                        emit(frames)

            nets = Networks(net, ensemble.part(chunk), where, planned.keep_weights)
            if nets.fit is not None:
                deliver({"lsuv": nets.fit.frame(nets.ensemble.columns).assign(stage="stack")})
            _Pass(nets, _Record(nets, backend, deliver, emit is not None), backward, bar).run()

        threads = torch.get_num_threads() if where.device.type == "cpu" else 1
        run_chunks(run, len(ensemble), planned.networks, net, threads)
    parts = [
        part["stats"].assign(**{NETWORK: start + np.arange(len(part["stats"])) % (stop - start)})
        for (start, stop), parts in collected.items()
        for part in parts
        if "stats" in part
    ]
    return sort_rows(pd.concat(parts, ignore_index=True)) if parts else pd.DataFrame()


def _keys(layers: Iterable[int], direction: str) -> list[TensorKey]:
    """Two tensors a layer, in the order of travel."""
    tensors = ("preactivation", "activation") if direction == "forward" else ("activation", "preactivation")
    return [TensorKey("stack", "scratch", layer, tensor, direction) for layer in layers for tensor in tensors]


_INPUT = TensorKey("stack", "scratch", 0, "activation", "forward")


class _Record:
    """What has been measured of a chunk of networks: in the window of layers that is passing, and before it."""

    def __init__(self, nets: Networks, backend: Backend, deliver: Callable[[Frames], None], streams: bool) -> None:
        self._nets, self._deliver, self._streams = nets, deliver, streams
        self.rows = StatsBuffer(nets.ensemble.seeds, backend, more=TRUE_COLUMNS, flush_rows=FLUSH_ROWS)
        self.window: list[Tensor] = []  # rows (F, keys, E) in the order of FIELDS
        self.delivered = False
        self.start(torch.ones(len(nets), dtype=torch.bool, device=nets.where.device))

    def start(self, inside: Tensor) -> None:
        """Which networks (E,) are inside the range of their number format so far."""
        self.inside, self.all_inside = inside, bool(inside.all())

    def close(self, keys: Sequence[TensorKey], follow: Callable[[Tensor, Tensor], None]) -> None:
        """End a window with these keys; `follow` corrects what has left the range, see `UnboundedTwin.forward`."""
        fields = self.window[0] if len(self.window) == 1 else torch.cat(self.window, 1)
        self.window.clear()
        rows = len(keys) - len(keys) % 2  # the input stands before the pairs of the layers
        true, kept = read_off(fields, self._nets.where.dtype)
        if not self.all_inside or not bool(kept[-rows:].all()):
            kept = torch.cat([self.inside[None], kept[-rows:]]).cumprod(0).bool()
            self.start(kept[-1])
            follow(true[:, -rows:], kept[1:])
        self.rows.put(keys, torch.cat([fields, true]))
        if self._streams and self.rows.due():
            self.flush()

    def flush(self) -> None:
        if len(self.rows):
            self._deliver({"stats": self._nets.ensemble.add_columns(self.rows.take())})
            self.delivered = True


class _Signal(NamedTuple):
    """What passes through a layer, (E, N, O), and the same memory network by network: views are made once."""

    whole: Tensor
    each: tuple[Tensor, ...] = ()

    @classmethod
    def from_tensor(cls, x: Tensor) -> "_Signal":
        return cls(x, x.unbind())


class _Buffers:
    """The arithmetic of a stack on buffers that every layer uses again, with the rows of what stands in them.

    A layer's preactivation becomes its activation in one half of the memory while the layer below stands in the other
    half; the gradients of a layer likewise. `rows` gets those of every tensor, (F, K, E) for K tensors, in the order in
    which they are made.
    """

    def __init__(self, nets: Networks, backend: Backend, rows: Callable[[Tensor], object], keep: bool) -> None:
        """`keep`: hold on to the preactivations for a backward pass, as `passed`, (E, N, O) each."""
        net, where = nets.net, nets.where
        lead = (len(nets), net.batch)
        pair = torch.empty(2, math.prod(lead) * net.width, dtype=where.dtype, device=where.device)
        made: dict[tuple[int, int], _Signal] = {}
        self.signals = [  # of every layer, the input's first
            made.setdefault((k % 2, n), _Signal.from_tensor(pair[k % 2, : math.prod(lead) * n].view(*lead, n)))
            for k, n in enumerate([1, *net.sizes[1:]])
        ]
        self.passed: list[Tensor] = []
        if keep:
            sizes = [math.prod(lead) * n for n in net.sizes[1:]]
            parts = torch.split(pair.new_empty(sum(sizes)), sizes)
            self.passed = [part.view(*lead, n) for part, n in zip(parts, net.sizes[1:], strict=True)]
        self.residual, self.backend, self.rows = net.network.residual, backend, rows
        self.gathering = Gathering(backend, rows)
        self.layer = 0  # the one whose tensors are being made
        self.entered: Tensor | None = None  # the gradient that a residual connection passes on

    def linear(self, x: _Signal, w: Tensor, b: Tensor | None) -> _Signal:
        self.layer += 1
        z = self.signals[self.layer]
        self._multiply(x, w, z)
        if b is not None:
            z.whole.add_(b.unsqueeze(-2))
        if len(self.passed):
            self.passed[self.layer - 1].copy_(z.whole)
        return z

    def activate(self, z: _Signal, row: Activation) -> _Signal:
        if not self.residual:
            self.gathering.activate_(z.whole, row)
        else:  # the second row is of the sum that leaves the layer
            before = self.backend.rows(z.whole)
            before[SATURATED] = row.saturated_share(z.whole)
            self.rows(before[:, None])
            z.whole.copy_(row.phi(z.whole))
        return z

    def linear_back(self, g: _Signal, w: Tensor) -> _Signal:
        self.layer -= 1
        below = self.signals[self.layer]
        self._multiply(g, w.mT, below)
        return below

    def activate_back(self, g: _Signal, z: _Signal, row: Activation) -> _Signal:
        self.entered = g.whole.clone() if self.residual else None
        self.gathering.pull_back_(g.whole, z.whole, row)
        return g

    def add(self, a: _Signal, b: _Signal) -> _Signal:
        """a + b into a; on the way back what b was before it became dL/dz."""
        a.whole.add_(b.whole if self.entered is None else self.entered)
        return a

    def _multiply(self, x: _Signal, w: Tensor, out: _Signal) -> None:
        if w.device.type == "cpu":
            multiply(x.each, w, out.each)
        else:
            torch.bmm(x.whole, w, out=out.whole)


class _Pass:
    """A chunk of networks on its way up and down."""

    def __init__(self, nets: Networks, record: _Record, backward: bool, bar: Bar) -> None:
        self.nets, self.record, self.keep, self.bar = nets, record, backward, bar
        self.backend = record.rows.backend
        self.twin, self.buffers = UnboundedTwin(nets), _Buffers(nets, self.backend, record.window.append, backward)

    def run(self) -> None:
        """The whole way. What was measured is delivered however it ends, unless the chunk can be tried again."""
        try:
            self.forward()
            if self.keep:
                self.record.start(self.twin.turn())
                self.backward()
        except BaseException as fault:
            short = isinstance(fault, Exception) and is_out_of_memory(fault)
            if short and not self.record.delivered:
                raise
            self.record.flush()
            if short:
                raise UsageError(f"{self.nets.net}: out of memory on the way; its rows so far are kept") from fault
            raise
        self.record.flush()

    def forward(self) -> None:
        net = self.nets.net
        residual = net.network.residual

        def visit(layer: int, z: _Signal, a: _Signal) -> None:
            if residual:
                self.record.window.append(self.backend.rows(a.whole)[:, None])
            self.bar.update(len(self.nets))
            stops.check()

        x = _Signal.from_tensor(self.nets.gaussian(net.inputs, "input"))
        self.record.window.append(self.backend.rows(x.whole)[:, None])
        for window in self.windows(range(1, net.depth + 1)):
            start = x.whole.clone()
            x = forward(net.network, self.nets.weights, x, visit, self.buffers, window)
            self.buffers.gathering.settle()
            keys = [_INPUT] * (window[0] == 1) + _keys(window, "forward")
            self.record.close(keys, partial(self.twin.forward, window, start))

    def backward(self) -> None:
        net, buffers = self.nets.net, self.buffers

        def preactivation(layer: int) -> Tensor:
            return buffers.passed[layer - 1]

        def visit(*_: object) -> None:
            self.bar.update(len(self.nets))
            stops.check()

        g = buffers.signals[net.depth]
        g.whole.copy_(self.nets.gaussian(net.sizes[-1], "gradient"))
        for window in self.windows(range(net.depth, 0, -1)):
            start = g.whole.clone()
            signal = lambda layer: _Signal(preactivation(layer))  # noqa: E731
            g = backward(net.network, self.nets.weights, signal, g, visit, buffers, window)
            buffers.gathering.settle()
            follow = partial(self.twin.backward, window, start, passed=preactivation)
            self.record.close(_keys(window, "backward"), follow)

    def windows(self, layers: Sequence[int]) -> Iterator[Sequence[int]]:
        """The layers, so many together as are looked at."""
        size = WINDOW if self.backend.fuses(self.buffers.signals[-1].whole) else GATHERED
        return (layers[k : k + size] for k in range(0, len(layers), size))
