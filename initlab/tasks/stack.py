"""A stack of L layers: a unit-Gaussian batch pushed through, a unit-Gaussian gradient pulled back down."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from threading import Lock
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from initlab import stops
from initlab.errors import UsageError, check, check_functions, library_call
from initlab.nn.activations import Activation
from initlab.nn.custom_activation import Given
from initlab.nn.network import backward, forward, multiply, resolve_directions
from initlab.stats.backend import SATURATED, Backend
from initlab.stats.buffer import RangeBuffer
from initlab.stats.gathering import Gathering
from initlab.stats.keys import Seeds, TensorKey
from initlab.stats.measure import backend_for
from initlab.stats.reference import FIELDS
from initlab.stats.statistics import Function
from initlab.tasks.ensemble.device import Where
from initlab.tasks.ensemble.memory import is_out_of_memory
from initlab.tasks.ensemble.networks import Emit, Ensemble, Frames, Init, Net, Networks
from initlab.tasks.ensemble.plan import plan, run_chunks
from initlab.tasks.ensemble.unbounded_twin import GUARD, UnboundedTwin, read_off
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
    input_gradient: bool = False,
    **rule_fields: Any,
) -> pd.DataFrame:
    """The `stats` rows of a stack: every layer's preactivation and activation, forward and backward.

    init: a rule's name, a `Rule`, or a sequence with one for each network, which then stands in the columns `init` and
    `gain`. activation: a name, a row of the table, or an elementwise function. depth: layers. width: units of every
    layer. inputs: units of the input, those of the first layer if None. batch: inputs. widths: units of each layer,
    which replaces depth and width. seeds: how many networks, or their seeds. dtype: float16, bfloat16, float32 or
    float64, as a name or torch's. device: "cpu", "cuda", "cuda:1", "auto" or torch's. generator: who draws the numbers,
    `philox` or `torch`. residual: add each layer's input to what comes out of it, a = x + phi(z), where it has as many
    units. backward: pull a gradient back down too, with input_gradient down to the input: layer 0, backward.
    statistics: functions (..., N, C) -> (...) by name, a column each behind the built-in ones. emit: gets the tables as
    they come, every 1000 rows or 30 seconds and at the end of each chunk of networks; the frame returned is then empty.
    progress: show a bar. rule_fields: fields of the rule, as gain=1.5.

    Nothing raises when a signal dies: the counts say it, and `log2_rms_true`, `log2_std_true` say what the signal would
    be. These are log2 of rms and std in arithmetic that has no range: what the dtype holds, rounding included, up to
    where a network leaves the range of its dtype (an entry not finite, or an rms below 16 times the smallest normal
    number), and from there, and on all its way down, the same weights in float64 with a power of two carried. For
    float32 that is right to 1e-6 against exact arithmetic; -inf is a true zero.

    Rows stand by layer in the order of travel, then by network in the order of `seeds`, whatever ran together. On a CPU
    each of torch's threads takes a chunk of its own: small matrices gain nothing from sharing one. A rule that
    is fitted to data is fitted to the stack's own input; how it went is emitted as the table `lsuv`.
    Errors: an unknown name, a number out of its range, a network that does not fit into memory.

    >>> frame = stack("kaiming", "relu", depth=2, width=8, seeds=1)
    >>> frame[["layer", "tensor", "direction"]].head(3).to_numpy().tolist()
    [[0, 'activation', 'forward'], [1, 'preactivation', 'forward'], [1, 'activation', 'forward']]
    """
    backward, input_gradient = resolve_directions(backward, input_gradient)
    [progress] = check(progress=progress)
    check_functions(emit=emit)
    net = Net.resolve(activation, depth, width, inputs, batch, residual, widths)
    ensemble = Ensemble.resolve(init, seeds, net.activation, rule_fields)
    where = Where.resolve(dtype, device, generator)
    return run_stack(net, ensemble, where, backward, emit, progress, statistics, input_gradient)


def run_stack(
    net: Net,
    ensemble: Ensemble,
    where: Where,
    backward: bool = True,
    emit: Emit | None = None,
    progress: bool = False,
    statistics: Mapping[str, Function] | None = None,
    input_gradient: bool = False,
) -> pd.DataFrame:
    """`stack` of what has been resolved. Without `backward` nothing that is kept grows with depth."""
    backend = backend_for(where.device, statistics)
    planned = plan(net, len(ensemble), where, backward)
    collected: dict[int, RangeBuffer] = {}  # by the first network of a chunk
    lock = Lock()
    total = len(ensemble) * net.depth * (2 if backward else 1)
    with Bar(total=total, desc="stack", unit="layer", disable=None if progress else True) as bar:

        def run(chunk: slice) -> None:
            def deliver(frames: Frames) -> None:
                with lock:
                    emit(frames) if emit is not None else None

            nets = Networks(net, ensemble.part(chunk), where, planned.keep_weights)
            if nets.fit is not None:
                deliver({"lsuv": nets.fit.frame(nets.ensemble.columns).assign(stage="stack")})
            record = _Record(nets, backend, None if emit is None else deliver)
            _Pass(nets, record, backward, bar, input_gradient).run()
            collected[chunk.start] = record.rows

        threads = torch.get_num_threads() if where.device.type == "cpu" else 1
        run_chunks(run, len(ensemble), planned.networks, net, threads)
    if emit is not None:
        return pd.DataFrame()
    first, *others = (collected[start] for start in sorted(collected))
    return ensemble.add_columns(first.join(others))


@lru_cache(1000)
def _keys(layers: Sequence[int], direction: str, with_input: bool = False) -> list[TensorKey]:
    """Two tensors a layer, and the input's at its end of the way, in the order of travel."""
    tensors = ("preactivation", "activation") if direction == "forward" else ("activation", "preactivation")
    places, own = [(layer, tensor) for layer in layers for tensor in tensors], [(0, "activation")] * with_input
    places = own + places if direction == "forward" else places + own
    return [TensorKey("stack", "scratch", *place, direction) for place in places]


class _Record:
    """What has been measured of a chunk of networks: in the window of layers that is passing, and before it."""

    def __init__(self, nets: Networks, backend: Backend, deliver: Callable[[Frames], None] | None) -> None:
        """`deliver` gets the rows as they come; without it they stay here."""
        self._nets, self._deliver = nets, deliver
        self.rows = RangeBuffer(nets.ensemble.seeds, backend, FLUSH_ROWS)
        self._smallest = GUARD * torch.finfo(nets.where.dtype).tiny
        self.delivered = False
        self.start(torch.ones(len(nets), dtype=torch.bool, device=nets.where.device))

    def start(self, inside: Tensor) -> None:
        """Which networks (E,) are inside the range of their number format so far."""
        self.inside, self.all_inside = inside, bool(inside.all())

    def open(self, rows: int) -> Tensor:
        """Memory for so many rows of a window, (rows, E, F + M)."""
        numbers = len(FIELDS) + len(self.rows.backend.statistics)
        self.window = torch.empty(rows, len(self._nets), numbers, dtype=torch.float64, device=self._nets.where.device)
        return self.window

    def close(self, keys: Sequence[TensorKey], follow: Callable[[Tensor, Tensor], None]) -> None:
        """End a window with these keys; `follow` corrects what has left the range, see `UnboundedTwin.forward`."""
        fields = self.window.movedim(-1, 0)
        if not self.all_inside or not self.rows.backend.inside(self.window, self._smallest):
            given = int(keys[0].layer == 0)  # the input itself is as it was drawn
            true, kept = read_off(fields, self._nets.where.dtype)
            kept = torch.cat([self.inside[None], kept[given:]]).cumprod(0).bool()
            self.start(kept[-1])
            follow(true[:, given:], kept[1:])
            self.rows.correct(true)
        self.rows.put(keys, fields)
        if self._deliver is not None and self.rows.due():
            self.flush()

    def flush(self) -> None:
        if self._deliver is not None and len(self.rows):
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
    """The arithmetic of a stack on memory that is used again, with the rows of what stands in it.

    A product of matrices reads `out` and writes `into`; the pass behind it, ReLU or the mask of its gradient with the
    rows of what it reads and writes, goes from `into` to `out`. With `keep` preactivations have memory of their own.
    What stands there before a window of layers stays until its end.
    """

    def __init__(self, nets: Networks, backend: Backend, keep: bool) -> None:
        """`keep`: hold on to the preactivations for a backward pass, as `passed`, (E, N, O) each."""
        net, where = nets.net, nets.where
        lead = (len(nets), net.batch)
        entries = math.prod(lead) * net.width  # each half of its own: small ones come from memory that was there before
        parts = [torch.empty(entries, dtype=where.dtype, device=where.device) for _ in range(4 if keep else 3)]
        views = [
            {n: _Signal.from_tensor(part[: math.prod(lead) * n].view(*lead, n)) for n in {*net.sizes[1:]}}
            for part in parts
        ]
        self.intos, self.outs = (views[3:] or views[2:]) + views[2:3], views[:2]
        self.passed: list[Tensor] = []
        if keep:
            sizes = [math.prod(lead) * n for n in net.sizes[1:]]
            split = torch.split(parts[0].new_empty(sum(sizes)), sizes)
            self.passed = [part.view(*lead, n) for part, n in zip(split, net.sizes[1:], strict=True)]
        self.sizes, self.blocks, self.residual = net.sizes, net.network.blocks, net.network.residual
        self.backend, self.gathering, self.on_cpu = backend, Gathering(backend), where.device.type == "cpu"
        self.maker: Backend | Gathering = backend if backend.fuses(self.intos[0][net.width].whole) else self.gathering
        self.layer = 0  # the one whose tensors are being made
        self.entered: Tensor | None = None  # the gradient that a residual connection passes on

    def open(self, rows: Tensor, at: int) -> None:
        """A window begins whose rows go into memory (K, E, F + M), from row `at` on."""
        self.rows, self.at = rows, at
        self.outs, self.intos = self.outs[::-1], self.intos[::-1]
        self.out, self.into = self.outs[0], self.intos[0]

    def linear(self, x: _Signal, w: Tensor, b: Tensor | None) -> _Signal:
        z = _Signal.from_tensor(self.passed[self.layer]) if self.passed else self.into[self.sizes[self.layer + 1]]
        self.layer += 1
        self._multiply(x, w, z)
        if b is not None:
            z.whole.add_(b.unsqueeze(-2))
        return z

    def activate(self, z: _Signal, row: Activation) -> _Signal:
        a = self.out[self.sizes[self.layer]]
        self.at += 2
        if not self.residual:
            self.maker.activation_rows(z.whole, row, a.whole, self.rows, self.at - 2)
            return a
        own = self.backend.rows(z.whole, out=self.rows[self.at - 2])  # the second is of the sum that leaves the layer
        own[..., SATURATED] = row.saturated_share(z.whole)
        value = row.phi(z.whole)
        if self.blocks[self.layer - 1].residual:
            return _Signal(value)
        a.whole.copy_(value)
        return a

    def linear_back(self, g: _Signal, w: Tensor) -> _Signal:
        self.layer -= 1
        n = self.sizes[self.layer]  # of an input it may be a number that no layer has
        below = self.into.get(n) or _Signal.from_tensor(g.whole.new_empty(*g.whole.shape[:-1], n))
        self._multiply(g, w.mT, below)
        return below

    def activate_back(self, g: _Signal, z: _Signal, row: Activation) -> _Signal:
        self.entered = g.whole.clone() if self.residual else None
        dz = self.out[self.sizes[self.layer]]
        self.at += 2
        self.maker.gradient_rows(g.whole, z.whole, row, dz.whole, self.rows, self.at - 2)
        return dz

    def add(self, a: _Signal, b: _Signal) -> _Signal:
        """x + phi(z) where x stands; on the way back what has come down plus what entered the layer."""
        if self.entered is not None:
            a.whole.add_(self.entered)
            return a
        b.whole.add_(a.whole)
        return b

    def _multiply(self, x: _Signal, w: Tensor, out: _Signal) -> None:
        if self.on_cpu:
            multiply(x.each, w, out.each)
        else:
            torch.bmm(x.whole, w, out=out.whole)


class _Pass:
    """A chunk of networks on its way up and down."""

    def __init__(self, nets: Networks, record: _Record, backward: bool, bar: Bar, input_gradient: bool = False) -> None:
        self.nets, self.record, self.bar, self.backend = nets, record, bar, record.rows.backend
        self.keep, self.to_input, self.networks = backward, input_gradient, len(nets)
        self.twin, self.buffers = UnboundedTwin(nets), _Buffers(nets, self.backend, backward)

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
        net, record, buffers = self.nets.net, self.record, self.buffers

        def visit_sum(layer: int, z: _Signal, a: _Signal) -> None:
            self.backend.rows(a.whole, out=buffers.rows[buffers.at - 1])
            self._pass_layer()

        visit = visit_sum if buffers.residual else self._pass_layer
        x = _Signal.from_tensor(self.nets.gaussian(net.inputs, "input"))
        for window in self._windows(range(1, net.depth + 1)):
            first, start = window[0] == 1, x.whole
            rows = record.open(2 * len(window) + first)
            if first:
                self.backend.rows(start, out=rows[0])
            elif buffers.residual:
                start = start.clone()
            buffers.open(rows, int(first))
            x = forward(net.network, self.nets.weights, x, visit, buffers, window)
            buffers.gathering.settle()
            record.close(_keys(window, "forward", first), partial(self.twin.forward, window, start))

    def backward(self) -> None:
        net, record, buffers = self.nets.net, self.record, self.buffers
        g = buffers.intos[0][net.sizes[-1]]
        g.whole.copy_(self.nets.gaussian(net.sizes[-1], "gradient"))
        for window in self._windows(range(net.depth, 0, -1)):
            start = g.whole.clone() if buffers.residual else g.whole
            last = self.to_input and window[-1] == 1
            buffers.open(record.open(2 * len(window) + last), 0)
            signal = lambda layer: _Signal(buffers.passed[layer - 1])  # noqa: E731
            g = backward(net.network, self.nets.weights, signal, g, self._pass_layer, buffers, window, last)
            if last:
                self.backend.rows(g.whole, out=buffers.rows[-1])
            buffers.gathering.settle()
            follow = partial(self.twin.backward, window, start, passed=buffers.passed)
            record.close(_keys(window, "backward", last), follow)

    def _pass_layer(self, *_: object) -> None:
        self.bar.update(self.networks)
        stops.check()

    def _windows(self, layers: Sequence[int]) -> Iterator[Sequence[int]]:
        """The layers, so many together as are looked at."""
        size = WINDOW if self.buffers.maker is self.backend else GATHERED
        return (layers[k : k + size] for k in range(0, len(layers), size))
