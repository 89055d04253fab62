"""A stack of L layers: a unit-Gaussian batch pushed through, a unit-Gaussian gradient pulled back down."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS, Activation
from initlab.nn.custom_activation import Given
from initlab.nn.network import backward, forward, multiply
from initlab.stats.statistics import STATISTICS, Blocks, Key, saturated_share
from initlab.stats.summarize import FIELDS, InPlace, compiled, derive, summarize
from initlab.tasks.ensemble.device import Where
from initlab.tasks.ensemble.memory import is_out_of_memory
from initlab.tasks.ensemble.networks import Ensemble, Init, Net, Networks, Seeds
from initlab.tasks.ensemble.plan import plan, run_chunks
from initlab.tasks.ensemble.unbounded_twin import NUMBERS, UnboundedTwin, read_off

Frames = dict[str, pd.DataFrame]
Emit = Callable[[Frames], object]

WINDOW = 16  # layers between two looks at what was measured; on a GPU each look waits for the device
FLUSH_SECONDS, FLUSH_ROWS = 30.0, 1000  # 0.2 MB of rows


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
    generator: str = "torch",
    residual: bool = False,
    backward: bool = True,
    emit: Emit | None = None,
    progress: bool = False,
    **rule_fields: Any,
) -> pd.DataFrame:
    """The `stats` rows of a stack: every layer's preactivation and activation, forward and backward.

    init: a rule's name, a `Rule`, or a sequence with one for each network, which then stands in the columns `init` and
    `gain`. activation: a name, a row of the table, or an elementwise function. depth: layers. width: units of every
    layer. inputs: units of the input, `width` if None. batch: inputs. seeds: how many networks, or their seeds.
    dtype: float16, bfloat16, float32 or float64, as a name or torch's. device: "cpu", "cuda", "cuda:1", "auto" or
    torch's. generator: who draws the numbers, `torch` or `philox`. residual: add each layer's input to what comes out
    of it, a = x + phi(z), where it has as many units. backward: pull a gradient back down too. emit: gets the tables as
    they come, every 1000 rows or 30 seconds and at the end of each chunk of networks; the frame returned is then empty.
    progress: show a bar. rule_fields: fields of the rule, as gain=1.5.

    Layer 0 is the input, forward only. Nothing raises when a signal dies: the counts say it, and `log2_rms_true`,
    `log2_std_true` say what the signal would be. These are log2 of rms and std in arithmetic that has no range: what
    the dtype holds, rounding included, up to where a network leaves the range of its dtype (an entry not finite, or an
    rms below 16 times the smallest normal number), and from there, and on all its way down, the same weights in float64
    with a power of two carried. For float32 that is right to 1e-6 against exact arithmetic; -inf is a true zero.

    On a CPU each of torch's threads takes a chunk of its own: small matrices gain nothing from sharing one. A rule that
    is fitted to data is fitted to the stack's own input; how it went is emitted as the table `lsuv`.
    Errors: an unknown name, a number out of its range, a network that does not fit into memory.

    >>> frame = stack("kaiming", "relu", depth=2, width=8, seeds=1)
    >>> frame[["layer", "tensor", "direction"]].head(3).to_numpy().tolist()
    [[0, 'activation', 'forward'], [1, 'preactivation', 'forward'], [1, 'activation', 'forward']]
    """
    net = Net.of(activation, depth, width, inputs, batch, residual)
    ensemble, where = Ensemble.of(init, seeds, net.activation, rule_fields), Where.of(dtype, device, generator)
    return run_stack(net, ensemble, where, backward, emit, progress)


def run_stack(
    net: Net, ensemble: Ensemble, where: Where, backward: bool = True, emit: Emit | None = None, progress: bool = False
) -> pd.DataFrame:
    """`stack` of what has been resolved. Without `backward` nothing that is kept grows with depth."""
    planned = plan(net, len(ensemble), where, backward)
    collected: dict[int, list[Frames]] = {}
    lock = Lock()
    total = len(ensemble) * net.depth * (2 if backward else 1)
    with tqdm(total=total, desc="stack", unit="layer", disable=None if progress else True) as bar:

        def run(chunk: slice) -> None:
            def deliver(frames: Frames) -> None:
                if emit is None:
                    collected.setdefault(chunk.start, []).append(frames)
                else:
                    with lock:
                        emit(frames)

            nets = Networks(net, ensemble.part(chunk), where, planned.keep_weights)
            if nets.fit is not None:
                deliver({"lsuv": nets.fit.frame(nets.ensemble.columns).assign(stage="stack")})
            _Pass(nets, _Record(nets, deliver, emit is not None), backward, bar).run()

        threads = torch.get_num_threads() if where.device.type == "cpu" else 1
        run_chunks(run, len(ensemble), planned.networks, net, threads)
    parts = [part["stats"] for start in sorted(collected) for part in collected[start] if "stats" in part]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _keys(layers: Iterable[int], direction: str) -> list[Key]:
    """Two tensors a layer, in the order of travel."""
    tensors = ("preactivation", "activation") if direction == "forward" else ("activation", "preactivation")
    return [Key("stack", "scratch", 0, layer, tensor, direction) for layer in layers for tensor in tensors]


_KEYS = ("stage", "implementation", "seed", "step", "layer", "tensor", "direction")
_INPUT = Key("stack", "scratch", 0, 0, "activation", "forward")
_DEAD, _SATURATED, _N_NAN, _N_ZERO, _COUNT = (
    list(FIELDS).index(name) for name in ("dead", "saturated", "n_nan", "n_zero", "count")
)


def _derive_all(whole: Tensor) -> Tensor:
    """Rows and the true numbers, (F + 2, K, E), as statistics and the true numbers."""
    return torch.cat([derive(whole[: len(FIELDS)]), whole[len(FIELDS) :]])


def _saturates_at_zero(net: Net) -> bool:
    """Whether the saturated share of a preactivation is the share of zeros in what comes out."""
    return net.activation is ACTIVATIONS["relu"] and not net.network.residual


class _Record:
    """What has been measured of a chunk of networks: in the window of layers that is passing, and before it."""

    def __init__(self, nets: Networks, deliver: Callable[[Frames], None], streams: bool) -> None:
        self._nets, self._deliver, self._streams = nets, deliver, streams
        self._blocks = Blocks(nets.ensemble.seeds, _KEYS, [*STATISTICS, *NUMBERS], _derive_all)
        self._window: list[Tensor] = []
        self._since = time.monotonic()
        self.delivered = False
        self.start(torch.ones(len(nets), dtype=torch.bool, device=nets.where.device))

    def start(self, inside: Tensor) -> None:
        """Which networks (E,) are inside the range of their number format so far."""
        self.inside, self.all_inside = inside, bool(inside.all())

    def add(self, fields: Tensor) -> None:
        """Rows (F, keys, E) in the order of FIELDS."""
        self._window.append(fields)

    def close(self, keys: Sequence[Key], follow: Callable[[Tensor, Tensor], None]) -> None:
        """End a window with these keys; `follow` corrects what has left the range, see `UnboundedTwin.forward`."""
        fields = self._window[0] if len(self._window) == 1 else torch.cat(self._window, 1)
        self._window = []
        rows = len(keys) - len(keys) % 2  # the input stands before the pairs of the layers
        if keys[-1].direction == "backward":
            fields[_DEAD] = torch.nan
        else:
            z, out = fields[:, -rows::2], fields[:, 1 - rows :: 2]
            z[_DEAD] = torch.nan
            if _saturates_at_zero(self._nets.net):  # saturated is what comes out as 0, or as nan
                z[_SATURATED] = (out[_N_ZERO] + out[_N_NAN]) / out[_COUNT]
        true, kept = read_off(fields, self._nets.where.dtype)
        if not self.all_inside or not bool(kept[-rows:].all()):
            kept = torch.cat([self.inside[None], kept[-rows:]]).cumprod(0).bool()
            self.start(kept[-1])
            follow(true[:, -rows:], kept[1:])
        self._blocks.put(keys, torch.cat([fields, true]))
        late = time.monotonic() - self._since > FLUSH_SECONDS
        if self._streams and (late or len(self._blocks) >= FLUSH_ROWS):
            self.flush()

    def flush(self) -> None:
        if len(self._blocks):
            self._deliver({"stats": self._nets.ensemble.add_columns(self._blocks.frame())})
            self.delivered, self._since = True, time.monotonic()


class _Signal(NamedTuple):
    """What passes through a layer, (E, N, O), and the same memory network by network: views are made once."""

    whole: Tensor
    each: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, x: Tensor) -> "_Signal":
        return cls(x, x.unbind())


class _Buffers:
    """The arithmetic of a stack on buffers that every layer uses again, with the rows of what stands in them.

    `pair` holds a layer's preactivation and activation, or their gradients, side by side: they are measured in one
    call, and the next layer overwrites them. Where both are the same, or the one becomes the other under the compiled
    pass, a layer has one half of the buffer and the next layer the other: they take turns.
    """

    def __init__(self, nets: Networks, keep: bool) -> None:
        """`keep`: hold on to the preactivations for a backward pass, as `passed` (L, E, N, O)."""
        net, where, phi = nets.net, nets.where, nets.net.activation
        self.pair = torch.empty(2, len(nets), net.batch, net.width, dtype=where.dtype, device=where.device)
        self.halves = [_Signal.of(half) for half in self.pair]
        self.entered = self.pair[0].clone() if net.network.residual else None  # what a residual connection adds
        plain = self.entered is None
        fuses = plain and phi is ACTIVATIONS["relu"] and compiled(self.pair)
        self.fused = InPlace(self.pair, WINDOW) if fuses else None
        self.linear_only = plain and phi is ACTIVATIONS["linear"]
        self.take_turns = self.fused is not None or self.linear_only
        self.passed = self.pair.new_empty(net.depth if keep else 0, *self.pair.shape[1:])
        self.layer = 0  # the one whose tensors stand in the buffers

    def half(self, which: int) -> _Signal:
        """Where the preactivation (0) or the activation (1) of the layer stands; of gradients it is the other way."""
        return self.halves[self.layer % 2 if self.take_turns else which]

    def linear(self, x: _Signal, w: Tensor, b: Tensor | None) -> _Signal:
        self.layer += 1
        self._remember(x)
        z = self.half(0)
        self._multiply(x, w, z)
        if b is not None:
            z.whole.add_(b.unsqueeze(-2))
        if len(self.passed):
            self.passed[self.layer - 1] = z.whole
        return z

    def linear_back(self, g: _Signal, w: Tensor) -> _Signal:
        self.layer -= 1
        below = self.half(0)
        self._multiply(g, w.mT, below)
        return below

    def activate(self, z: _Signal, row: Activation) -> _Signal:
        out = self.half(1)
        if self.fused:
            self.fused.relu(self.layer % 2)
        elif row is ACTIVATIONS["relu"]:
            torch.clamp_min(z.whole, 0, out=out.whole)
        elif not self.linear_only:
            out.whole.copy_(row.phi(z.whole))
        return out

    def activate_back(self, g: _Signal, z: _Signal, row: Activation) -> _Signal:
        self._remember(g)
        out = self.half(1)
        if self.fused:
            self.fused.mask(self.layer % 2, z.whole)
        elif row is ACTIVATIONS["relu"]:  # autograd's own kernel, eight times as fast as a mask
            torch.ops.aten.threshold_backward.grad_input(g.whole, z.whole, 0, grad_input=out.whole)
        elif not self.linear_only:
            out.whole.copy_(row.pull_back(g.whole, z.whole))
        return out

    def add(self, a: _Signal, b: _Signal) -> _Signal:
        """a + b into a; b's buffer has been overwritten by a, so that what was remembered of it is added."""
        assert self.entered is not None
        a.whole.add_(self.entered)
        return a

    def _remember(self, x: _Signal) -> None:
        if self.entered is not None and x.whole.shape == self.entered.shape:
            self.entered.copy_(x.whole)

    def _multiply(self, x: _Signal, w: Tensor, out: _Signal) -> None:
        if w.device.type == "cpu":
            multiply(x.each, w, out.each)
        else:
            torch.bmm(x.whole, w, out=out.whole)

    def preactivation(self, layer: int) -> _Signal:
        """z of the forward pass."""
        return _Signal(self.passed[layer - 1])

    def rows(self) -> Tensor | None:
        """The rows (F, 2, E) of both halves; None where the compiled pass has made them."""
        if self.fused:
            return None
        if self.linear_only:
            return summarize(self.half(0).whole)[:, None].repeat(1, 2, 1)
        return summarize(self.pair)


class _Pass:
    """A chunk of networks on its way up and down."""

    def __init__(self, nets: Networks, record: _Record, backward: bool, bar: tqdm) -> None:
        self.nets, self.record, self.keep, self.bar = nets, record, backward, bar
        self.twin, self.buffers = UnboundedTwin(nets), _Buffers(nets, backward)

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
        net, row = self.nets.net, self.nets.net.activation

        def measure(layer: int, z: _Signal, a: _Signal) -> None:
            rows = self.buffers.rows()
            if rows is not None:
                if not _saturates_at_zero(net):
                    linear = self.buffers.linear_only
                    rows[_SATURATED, 0] = 0.0 if linear else saturated_share(row.slope(z.whole), row.largest_slope)
                self.record.add(rows)
            self.bar.update(len(self.nets))

        x = _Signal.of(self.nets.gaussian(net.inputs, "input"))
        self.record.add(summarize(x.whole)[:, None])
        for window in _windows(range(1, net.depth + 1)):
            start = x.whole.clone()
            x = forward(net.network, self.nets.weights, x, measure, self.buffers, window)
            keys = [_INPUT] * (window[0] == 1) + _keys(window, "forward")
            self._close(keys, partial(self.twin.forward, window, start))

    def backward(self) -> None:
        net, buffers = self.nets.net, self.buffers

        def measure(layer: int, dz: _Signal, g: _Signal) -> None:
            rows = buffers.rows()
            if rows is not None:
                self.record.add(rows)
            self.bar.update(len(self.nets))

        g = buffers.half(0)
        g.whole.copy_(self.nets.gaussian(net.width, "gradient"))
        for window in _windows(range(net.depth, 0, -1)):
            start = g.whole.clone()
            g = backward(net.network, self.nets.weights, buffers.preactivation, g, measure, buffers, window)
            follow = partial(self.twin.backward, window, start, passed=lambda layer: buffers.passed[layer - 1])
            self._close(_keys(window, "backward"), follow)

    def _close(self, keys: Sequence[Key], follow: Callable[[Tensor, Tensor], None]) -> None:
        if self.buffers.fused:
            self.record.add(self.buffers.fused.take())
        self.record.close(keys, follow)


def _windows(layers: Sequence[int]) -> Iterator[Sequence[int]]:
    return (layers[k : k + WINDOW] for k in range(0, len(layers), WINDOW))
