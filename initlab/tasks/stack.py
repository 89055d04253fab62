"""A stack of L layers: a unit-Gaussian batch pushed through, a unit-Gaussian gradient pulled back down."""

import time
from collections.abc import Callable, Iterator, Sequence

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from initlab.errors import UsageError, check, choose
from initlab.signal.activations import ACTIVATIONS, Activation
from initlab.signal.init import Rule
from initlab.signal.moments import FIELDS, compiled, derive, mask_in_place, relu_in_place, summarize
from initlab.signal.stats import STATISTICS, Blocks, Key, saturated_share
from initlab.tasks import beyond
from initlab.tasks.beyond import Companion
from initlab.tasks.memory import is_out_of_memory
from initlab.tasks.networks import Networks, Plan, Shape, multiply, name_of, plan, rules_of
from initlab.tasks.place import DTYPES, find_device

Frames = dict[str, pd.DataFrame]
Producer = Callable[[Tensor], Tensor]

WINDOW = 16  # layers between two looks at what was measured; on a GPU each look waits for the device
FLUSH_SECONDS, FLUSH_ROWS = 30.0, 1000  # 0.2 MB of rows


def stack(
    init: str | Rule | Sequence[str | Rule] = "kaiming",
    activation: str = "relu",
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
    A rule that is fitted to data is fitted to the stack's own input; how it went is handed over as the table `lsuv`.
    `producer` measures: (..., N, C) -> rows (F, ...) of `moments.FIELDS`, nan where it does not look.
    """
    shape = Shape(depth, width, width if inputs is None else inputs, batch)
    check(depth=depth, width=width, batch=batch, inputs=shape.inputs, seeds=len(seeds))
    rules, phi = rules_of(init, len(seeds)), choose(ACTIVATIONS, activation, "activation")
    names = None if isinstance(init, str | Rule) else pd.Categorical([name_of(one) for one in init])
    place, number = find_device(device), choose(DTYPES, dtype, "dtype")
    planned = plan(shape, len(seeds), number, place, backward)
    collected: list[Frames] = []
    total = len(seeds) * depth * (2 if backward else 1)
    with tqdm(total=total, desc="stack", unit="layer", disable=None if progress else True) as bar:

        def run(chunk: slice) -> None:
            kept = planned.keep_weights
            nets = Networks(rules[chunk], activation, shape, seeds[chunk], number, place, kept, generator)
            if nets.fit is not None:
                (emit or collected.append)({"lsuv": nets.fit.frame().assign(stage="stack")})
            record = _Record(nets, None if names is None else names[chunk], emit or collected.append, emit is not None)
            _Pass(nets, phi, record, producer, backward, bar).run()

        _in_chunks(run, len(seeds), planned, shape)
    found = [part["stats"] for part in collected if "stats" in part]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def _in_chunks(run: Callable[[slice], None], networks: int, planned: Plan, shape: Shape) -> None:
    """All networks, as many at a time as planned; half as many where memory turns out to be short."""
    start, size = 0, planned.networks
    while start < networks:
        try:
            run(slice(start, start + size))
            start += size
        except (RuntimeError, MemoryError) as fault:
            if not is_out_of_memory(fault):
                raise
            if size == 1:
                raise UsageError(f"{shape.said()}: not enough memory for one network; make it smaller") from fault
            size //= 2


def _key(layer: int, tensor: str, direction: str) -> Key:
    return Key("stack", "scratch", 0, layer, tensor, direction)


_KEYS = ("stage", "implementation", "seed", "step", "layer", "tensor", "direction")
_DEAD, _SATURATED = list(STATISTICS).index("frac_dead"), list(FIELDS).index("saturated")
_N_NAN, _N_ZERO, _COUNT = (list(FIELDS).index(name) for name in ("n_nan", "n_zero", "count"))


class _Record:
    """What has been measured of a chunk of networks: in the window of layers that is passing, and before it."""

    def __init__(
        self, nets: Networks, names: pd.Categorical | None, deliver: Callable[[Frames], None], streams: bool
    ) -> None:
        self._nets, self._names, self._deliver, self._streams = nets, names, deliver, streams
        self._blocks = Blocks(nets.seeds, _KEYS, [*STATISTICS, *beyond.NUMBERS])
        self._window: list[tuple[list[Key], Tensor]] = []
        self._since, self._relu = time.monotonic(), nets.activation == "relu"
        self.inside = torch.ones(len(nets), dtype=torch.bool, device=nets.device)
        self.delivered = False

    def add(self, keys: list[Key], fields: Tensor) -> None:
        """Rows (F, keys, E) in the order of FIELDS."""
        self._window.append((keys, fields))

    def close(self, layers: int, follow: Callable[[Tensor, Tensor], None]) -> None:
        """End a window of so many layers; `follow` corrects what has left the range, see `Companion.forward`."""
        keys = [key for some, _ in self._window for key in some]
        fields = torch.cat([fields for _, fields in self._window], 1)
        self._window = []
        if self._relu and keys[-1].direction == "forward":  # saturated is what comes out as 0, or as nan
            z, out = fields[:, -2 * layers :: 2], fields[:, 1 - 2 * layers :: 2]
            z[_SATURATED] = (out[_N_ZERO] + out[_N_NAN]) / out[_COUNT]
        found = derive(fields)
        found[_DEAD, [k for k, key in enumerate(keys) if key[-2:] != ("activation", "forward")]] = torch.nan
        true, rows = beyond.read_off(found), 2 * layers
        kept = beyond.inside(found, self._nets.dtype)[-rows:]
        kept = torch.cat([self.inside[None], kept]).cumprod(0).bool()
        self.inside = kept[-1]
        if not bool(self.inside.all()):
            follow(true[:, -rows:], kept[1:])
        self._blocks.put(keys, torch.cat([found, true]))
        late = time.monotonic() - self._since > FLUSH_SECONDS
        if self._streams and (late or len(self._blocks) >= FLUSH_ROWS):
            self.flush()

    def flush(self) -> None:
        if len(self._blocks):
            frame = self._blocks.frame()
            self._deliver({"stats": frame if self._names is None else self._nets.columns(frame, self._names)})
            self.delivered, self._since = True, time.monotonic()


def _windows(layers: Sequence[int]) -> Iterator[Sequence[int]]:
    return (layers[k : k + WINDOW] for k in range(0, len(layers), WINDOW))


class _Pass:
    """A chunk of networks on its way up and down.

    One buffer holds a layer's preactivation and activation, or their gradients, side by side: they are measured in one
    call, and the next layer overwrites them.
    """

    def __init__(
        self, nets: Networks, phi: Activation, record: _Record, producer: Producer, backward: bool, bar: tqdm
    ) -> None:
        self.nets, self.phi, self.record, self.producer, self.bar = nets, phi, record, producer, bar
        shape = nets.shape
        self.companion = Companion(nets, phi)
        self.pair = torch.empty(2, len(nets), shape.batch, shape.width, dtype=nets.dtype, device=nets.device)
        self.fused = phi is ACTIVATIONS["relu"] and producer is summarize and compiled(self.pair)
        self.passed = self.pair.new_empty(shape.depth if backward else 0, *self.pair.shape[1:])

    def run(self) -> None:
        """The whole way. What was measured is handed over however it ends, unless the chunk can be tried again."""
        try:
            self.forward()
            if len(self.passed):
                self.record.inside = self.companion.turn()
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
        x = self.nets.gaussian(self.nets.shape.inputs, "input")
        self.record.add([_key(0, "activation", "forward")], self.producer(x)[:, None])
        for window in _windows(range(1, self.nets.shape.depth + 1)):
            start = x.clone()
            for layer in window:
                x = self._up(layer, x)
                self.bar.update(len(self.nets))
            self.record.close(len(window), lambda *rows, w=window, x=start: self.companion.forward(w, x, *rows))

    def _up(self, layer: int, x: Tensor) -> Tensor:
        """z = x w + b and phi(z), measured; z is kept if a backward pass will come."""
        w, b = self.nets.weights(layer)
        # Fused with its statistics ReLU overwrites z, and layers take turns in the two halves.
        z, out = (self.pair[layer % 2],) * 2 if self.fused else (self.pair[0], self.pair[1])
        multiply(x, w, out=z)
        if b is not None:
            z += b.unsqueeze(-2)
        if len(self.passed):
            self.passed[layer - 1] = z
        fields = relu_in_place(z) if self.fused else self._activate(z, out)
        self.record.add([_key(layer, tensor, "forward") for tensor in ("preactivation", "activation")], fields)
        return out

    def _activate(self, z: Tensor, out: Tensor) -> Tensor:
        """out = phi(z), and what there is to say of both, (F, 2, E)."""
        if self.phi is ACTIVATIONS["relu"]:
            torch.clamp_min(z, 0, out=out)
            return self.producer(self.pair)
        out.copy_(self.phi.phi(z))
        fields = self.producer(self.pair)
        fields[_SATURATED, 0] = saturated_share(self.phi.slope(z), self.phi.largest_slope)
        return fields

    def backward(self) -> None:
        depth = self.nets.shape.depth
        self._gradient(depth).copy_(self.nets.gaussian(self.nets.shape.width, "gradient"))
        for window in _windows(range(depth, 0, -1)):
            start = self._gradient(window[0]).clone()
            for layer in window:
                self._down(layer)
                self.bar.update(len(self.nets))
            self.record.close(len(window), lambda *rows, w=window, x=start: self._follow_down(w, x, *rows))

    def _gradient(self, layer: int) -> Tensor:
        """Where dL/da of a layer stands."""
        return self.pair[layer % 2 if self.fused else 0]

    def _down(self, layer: int) -> None:
        """dL/dz = dL/da phi'(z), measured, and dL/da = dL/dz w^T of the layer below."""
        g, z = self._gradient(layer), self.passed[layer - 1]
        if self.fused:
            z_grad, fields = g, mask_in_place(g, z)
        else:
            z_grad = self.pair[1]
            self._pull_back(g, z, z_grad)
            fields = self.producer(self.pair)
        self.record.add([_key(layer, tensor, "backward") for tensor in ("activation", "preactivation")], fields)
        if layer > 1:
            multiply(z_grad, self.nets.weights(layer)[0].mT, out=self._gradient(layer - 1))

    def _pull_back(self, g: Tensor, z: Tensor, out: Tensor) -> None:
        if self.phi is ACTIVATIONS["relu"]:  # autograd's own kernel, eight times as fast as a mask
            torch.ops.aten.threshold_backward.grad_input(g, z, 0, grad_input=out)
        else:
            out.copy_(self.phi.pull_back(g, z))

    def _follow_down(self, layers: Sequence[int], start: Tensor, true: Tensor, inside: Tensor) -> None:
        self.companion.backward(layers, start, true, inside, lambda layer: self.passed[layer - 1])
