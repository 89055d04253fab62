"""A stack of L layers: a unit-Gaussian batch pushed through, a unit-Gaussian gradient pulled back down."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from threading import Lock

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from initlab.errors import UsageError, check
from initlab.nn.activations import ACTIVATIONS, Activation
from initlab.nn.custom_activation import Given, as_activation
from initlab.nn.init import Rule
from initlab.stats.dtypes import resolve_dtype
from initlab.stats.statistics import STATISTICS, Blocks, Key, saturated_share
from initlab.stats.summarize import FIELDS, InPlace, compiled, derive, summarize
from initlab.tasks.ensemble import unbounded_twin
from initlab.tasks.ensemble.chunks import in_chunks
from initlab.tasks.ensemble.device import find_device
from initlab.tasks.ensemble.memory import is_out_of_memory
from initlab.tasks.ensemble.networks import Networks, Shape, Signal, multiply, name_of, plan, repeated, rules_of, signal
from initlab.tasks.ensemble.unbounded_twin import Companion

Frames = dict[str, pd.DataFrame]
Producer = Callable[[Tensor], Tensor]

WINDOW = 16  # layers between two looks at what was measured; on a GPU each look waits for the device
FLUSH_SECONDS, FLUSH_ROWS = 30.0, 1000  # 0.2 MB of rows


def stack(
    init: str | Rule | Sequence[str | Rule] = "kaiming",
    activation: Given = "relu",
    depth: int = 50,
    width: int = 100,
    inputs: int | None = None,
    batch: int = 200,
    seeds: Sequence[int] = range(8),
    dtype: str = "float32",
    device: str = "cpu",
    generator: str = "torch",
    backward: bool = True,
    emit: Callable[[Frames], None] | None = None,
    progress: bool = False,
    producer: Producer = summarize,
    tagged: bool = False,
) -> pd.DataFrame:
    """The `stats` rows of the stage `stack`: every layer's preactivation and activation, forward and backward.

    One network per seed, all by one rule or each by its own (`init` a sequence), which then stands in the columns
    `init` and `gain`. The input has `inputs` units, `width` if not said. Layer 0 is the input, forward only. Nothing
    raises when a signal dies: the counts say it, and `log2_rms_true`, `log2_std_true` say what the signal would be.
    These are log2 of rms and std in arithmetic that has no range: what the dtype holds, rounding included, up to where
    a network leaves the range of its dtype (an entry not finite, or an rms below 16 times the smallest normal number),
    and from there, and on all its way down, the same weights in float64 with a power of two carried. For float32 that
    is right to 1e-6 against exact arithmetic; -inf is a true zero.

    Without `backward` nothing that is kept grows with depth, else what `networks.plan` says. With `emit` rows are
    handed over every 1000 rows or 30 seconds and at the end of each chunk of networks, and the frame returned is empty.
    On a CPU each of torch's threads takes a chunk of its own: small matrices gain nothing from sharing one.
    A rule that is fitted to data is fitted to the stack's own input; how it went is handed over as the table `lsuv`.
    `tagged` adds the column `network`, a network's place in `seeds`: networks of one seed may differ in their rules.
    `producer` measures: (..., N, C) -> rows (F, ...) of `moments.FIELDS`, nan where it does not look.
    """
    shape = Shape(depth, width, width if inputs is None else inputs, batch)
    check(depth=depth, width=width, batch=batch, inputs=shape.inputs, seeds=len(seeds))
    rules, phi = rules_of(init, len(seeds)), as_activation(activation)
    names = None if isinstance(init, str | Rule) else pd.Categorical([name_of(one) for one in init])
    place, number = find_device(device), resolve_dtype(dtype)
    planned = plan(shape, len(seeds), number, place, backward)
    collected: dict[int, list[Frames]] = {}
    hand_over = None if emit is None else _one_at_a_time(emit)
    total = len(seeds) * depth * (2 if backward else 1)
    with tqdm(total=total, desc="stack", unit="layer", disable=None if progress else True) as bar:

        def run(chunk: slice) -> None:
            kept = planned.keep_weights
            nets = Networks(rules[chunk], phi, shape, seeds[chunk], number, place, kept, generator)
            deliver = hand_over or collected.setdefault(chunk.start, []).append
            first = chunk.start if tagged else None
            if nets.fit is not None:
                differing = {} if names is None else nets.differing(names[chunk])
                tags = {"network": np.arange(chunk.start, chunk.stop)} if tagged else {}
                deliver({"lsuv": nets.fit.frame({**differing, **tags}).assign(stage="stack")})
            record = _Record(nets, None if names is None else names[chunk], deliver, hand_over is not None, first)
            _Pass(nets, phi, record, producer, backward, bar).run()

        in_chunks(run, len(seeds), planned, shape, torch.get_num_threads() if place.type == "cpu" else 1)
    parts = [part["stats"] for start in sorted(collected) for part in collected[start] if "stats" in part]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _one_at_a_time(emit: Callable[[Frames], None]) -> Callable[[Frames], None]:
    """`emit` for several threads."""
    delivering = Lock()

    def hand_over(frames: Frames) -> None:
        with delivering:
            emit(frames)

    return hand_over


def _keys(layers: Iterable[int], direction: str) -> list[Key]:
    """Two tensors a layer, in the order of travel."""
    tensors = ("preactivation", "activation") if direction == "forward" else ("activation", "preactivation")
    return [Key("stack", "scratch", 0, layer, tensor, direction) for layer in layers for tensor in tensors]


_KEYS = ("stage", "implementation", "seed", "step", "layer", "tensor", "direction")
_INPUT = Key("stack", "scratch", 0, 0, "activation", "forward")
_DEAD, _SATURATED, _N_NAN, _N_ZERO, _COUNT = (
    list(FIELDS).index(name) for name in ("dead", "saturated", "n_nan", "n_zero", "count")
)


def _finished(whole: Tensor) -> Tensor:
    """Rows and the true numbers, (F + 2, K, E), as statistics and the true numbers."""
    return torch.cat([derive(whole[: len(FIELDS)]), whole[len(FIELDS) :]])


class _Record:
    """What has been measured of a chunk of networks: in the window of layers that is passing, and before it."""

    def __init__(
        self,
        nets: Networks,
        names: pd.Categorical | None,
        deliver: Callable[[Frames], None],
        streams: bool,
        first: int | None = None,
    ) -> None:
        """`first`, if the networks are to be tagged: the place of the first of them in the whole ensemble."""
        self._nets, self._names, self._deliver, self._streams, self._first = nets, names, deliver, streams, first
        self._blocks = Blocks(nets.seeds, _KEYS, [*STATISTICS, *unbounded_twin.NUMBERS], _finished)
        self._window: list[Tensor] = []
        self._since, self._relu = time.monotonic(), nets.activation is ACTIVATIONS["relu"]
        self.delivered = False
        self.start(torch.ones(len(nets), dtype=torch.bool, device=nets.device))

    def start(self, inside: Tensor) -> None:
        """Which networks (E,) are inside the range of their number format so far."""
        self.inside, self.all_inside = inside, bool(inside.all())

    def add(self, fields: Tensor) -> None:
        """Rows (F, keys, E) in the order of FIELDS."""
        self._window.append(fields)

    def close(self, keys: Sequence[Key], follow: Callable[[Tensor, Tensor], None]) -> None:
        """End a window with these keys; `follow` corrects what has left the range, see `Companion.forward`."""
        fields = self._window[0] if len(self._window) == 1 else torch.cat(self._window, 1)
        self._window = []
        rows = len(keys) - len(keys) % 2  # the input stands before the pairs of the layers
        if keys[-1].direction == "backward":
            fields[_DEAD] = torch.nan
        else:
            z, out = fields[:, -rows::2], fields[:, 1 - rows :: 2]
            z[_DEAD] = torch.nan
            if self._relu:  # saturated is what comes out as 0, or as nan
                z[_SATURATED] = (out[_N_ZERO] + out[_N_NAN]) / out[_COUNT]
        true, kept = unbounded_twin.read_off(fields, self._nets.dtype)
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
            frame = self._blocks.frame()
            if self._names is not None:
                frame = self._nets.columns(frame, self._names)
            if self._first is not None:
                places = np.arange(self._first, self._first + len(self._nets))
                frame = frame.assign(network=repeated(places, len(frame)))
            self._deliver({"stats": frame})
            self.delivered, self._since = True, time.monotonic()


def _windows(layers: Sequence[int]) -> Iterator[Sequence[int]]:
    return (layers[k : k + WINDOW] for k in range(0, len(layers), WINDOW))


class _Pass:
    """A chunk of networks on its way up and down.

    One buffer holds a layer's preactivation and activation, or their gradients, side by side: they are measured in one
    call, and the next layer overwrites them. Where both are the same, or the one becomes the other under the compiled
    pass, a layer has one half of the buffer and the next layer the other.
    """

    def __init__(
        self, nets: Networks, phi: Activation, record: _Record, producer: Producer, backward: bool, bar: tqdm
    ) -> None:
        self.nets, self.phi, self.record, self.producer, self.bar = nets, phi, record, producer, bar
        shape, self.keeps = nets.shape, backward
        self.companion = Companion(nets, phi)
        self.pair = torch.empty(2, len(nets), shape.batch, shape.width, dtype=nets.dtype, device=nets.device)
        self.half = [signal(half) for half in self.pair]
        fused = phi is ACTIVATIONS["relu"] and producer is summarize and compiled(self.pair)
        self.fused = InPlace(self.pair, WINDOW) if fused else None
        self.linear = phi is ACTIVATIONS["linear"]
        self.in_turn = fused or self.linear
        self.passed = self.pair.new_empty(shape.depth if backward else 0, *self.pair.shape[1:])

    def run(self) -> None:
        """The whole way. What was measured is handed over however it ends, unless the chunk can be tried again."""
        try:
            self.forward()
            if self.keeps:
                self.record.start(self.companion.turn())
                self.backward()
        except BaseException as fault:
            short = isinstance(fault, Exception) and is_out_of_memory(fault)
            if short and not self.record.delivered:
                raise
            self.record.flush()
            if short:
                raise UsageError(
                    f"{self.nets.shape.said()}: out of memory on the way; its rows so far are kept"
                ) from fault
            raise
        self.record.flush()

    def forward(self) -> None:
        x = signal(self.nets.gaussian(self.nets.shape.inputs, "input"))
        self.record.add(self.producer(x.whole)[:, None])
        for window in _windows(range(1, self.nets.shape.depth + 1)):
            start = x.whole.clone()
            for layer in window:
                x = self._up(layer, x)
                self.bar.update(len(self.nets))
            keys = [_INPUT] * (window[0] == 1) + _keys(window, "forward")
            self._close(keys, partial(self.companion.forward, window, start))

    def _close(self, keys: Sequence[Key], follow: Callable[[Tensor, Tensor], None]) -> None:
        if self.fused:
            self.record.add(self.fused.take())
        self.record.close(keys, follow)

    def _up(self, layer: int, x: Signal) -> Signal:
        """z = x w + b and phi(z), measured; z is kept if a backward pass will come."""
        w, b = self.nets.weights(layer)
        turn = layer % 2
        z, out = (self.half[turn],) * 2 if self.in_turn else self.half
        multiply(x, w, out=z)
        if b is not None:
            z.whole.add_(b.unsqueeze(-2))
        if self.keeps:
            self.passed[layer - 1] = z.whole
        if self.fused:
            self.fused.relu(turn)
        else:
            self.record.add(self._activate(z.whole, out.whole))
        return out

    def _activate(self, z: Tensor, out: Tensor) -> Tensor:
        """out = phi(z), and what there is to say of both, (F, 2, E)."""
        if self.phi is ACTIVATIONS["relu"]:
            torch.clamp_min(z, 0, out=out)
            return self.producer(self.pair)
        if self.linear:
            fields = self._twice(z)
            fields[_SATURATED, 0] = 0.0
            return fields
        out.copy_(self.phi.phi(z))
        fields = self.producer(self.pair)
        fields[_SATURATED, 0] = saturated_share(self.phi.slope(z), self.phi.largest_slope)
        return fields

    def _twice(self, x: Tensor) -> Tensor:
        """What there is to say of preactivation and activation that are one tensor, (F, 2, E)."""
        return self.producer(x)[:, None].repeat(1, 2, 1)

    def backward(self) -> None:
        depth = self.nets.shape.depth
        self._gradient(depth).whole.copy_(self.nets.gaussian(self.nets.shape.width, "gradient"))
        for window in _windows(range(depth, 0, -1)):
            start = self._gradient(window[0]).whole.clone()
            for layer in window:
                self._down(layer)
                self.bar.update(len(self.nets))
            follow = partial(self.companion.backward, window, start, passed=lambda layer: self.passed[layer - 1])
            self._close(_keys(window, "backward"), follow)

    def _gradient(self, layer: int) -> Signal:
        """Where dL/da of a layer stands."""
        return self.half[layer % 2 if self.in_turn else 0]

    def _down(self, layer: int) -> None:
        """dL/dz = dL/da phi'(z), measured, and dL/da = dL/dz w^T of the layer below."""
        g, z = self._gradient(layer), self.passed[layer - 1]
        z_grad = g if self.in_turn else self.half[1]
        if self.fused:
            self.fused.mask(layer % 2, z)
        elif self.linear:
            self.record.add(self._twice(g.whole))
        else:
            self._pull_back(g.whole, z, z_grad.whole)
            self.record.add(self.producer(self.pair))
        if layer > 1:
            multiply(z_grad, self.nets.weights(layer)[0].mT, out=self._gradient(layer - 1))

    def _pull_back(self, g: Tensor, z: Tensor, out: Tensor) -> None:
        if self.phi is ACTIVATIONS["relu"]:  # autograd's own kernel, eight times as fast as a mask
            torch.ops.aten.threshold_backward.grad_input(g, z, 0, grad_input=out)
        else:
            out.copy_(self.phi.pull_back(g, z))
