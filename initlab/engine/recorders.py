"""Recorded steps of an engine: the step itself, and a row for every tensor of every layer.

`FusedRecorder` lets the backend take the statistics where it makes a ReLU, its mask or an update; `PlainRecorder` keeps
the tensors and measures them afterwards, shape by shape: any activation, number format and device.
Legend: E ensemble, N batch, I fan_in, O fan_out, K rows of a step, F numbers of a row.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from initlab.engine.fast_network import KEPT_MEMORIES, Engine, FastNetwork, StepMemory
from initlab.engine.named_tensors import network_keys
from initlab.stats.backend import COUNT, N_NAN, N_ZERO, SATURATED, Backend
from initlab.stats.buffer import StatsBuffer
from initlab.stats.histogram import Bins, join_bins
from initlab.stats.reference import FIELDS

MOST_STEPS, MOST_BYTES = 64, 2**24  # that wait to be handed over
SMALL = 2**14  # entries of a tensor that is measured together with its neighbours
BIAS_UPDATE = "bias update"  # measured with the other updates; the tables have those of weights alone
RowName = tuple[int, str, str]  # layer, tensor and direction of a row, in the order in which rows are made


class StepRecorder(Protocol):
    """Makes the steps of one network, and their rows."""

    @property
    def order(self) -> Sequence[RowName]: ...

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One update; the loss before it, () or (E,), and the rows (F, K, E) in the order of `order`."""


class Recording:
    """Recorded steps of an engine; their rows are put into `buffer`, some steps at a time.

    engine: what is trained. buffer: gets the rows, and the histograms if it keeps any; its backend makes them.
    name: the implementation in the key of the rows.
    """

    def __init__(self, engine: Engine, buffer: StatsBuffer, name: str = "scratch") -> None:
        self.engine, self.buffer = engine, buffer
        self._bins = [None if buffer.bins is None else buffer.backend.bins(net.count) for net in engine.networks]
        self._recorders = [
            recorder_for(net, buffer.backend, bins) for net, bins in zip(engine.networks, self._bins, strict=True)
        ]
        self._keys = network_keys(name, len(engine.networks[0].w))
        self._codes = list(map(buffer.code, self._keys))
        self._waiting: list[tuple[int, Tensor]] = []

    def step(self, xb: Tensor, yb: Tensor, step: int) -> Tensor:
        """One update of every network, recorded as that step; the losses before it, (E,). Interrupted: no row."""
        waiting = self._waiting
        if waiting and (len(waiting) >= MOST_STEPS or len(waiting) * waiting[0][1].nbytes >= MOST_BYTES):
            self.flush()
        recorded = [0 if bins is None else len(bins) for bins in self._bins]
        try:
            parts = zip(self._recorders, self.engine.parts(xb, yb), strict=True)
            found = [recorder.step(x, y) for recorder, (x, y) in parts]
        except BaseException:
            for bins, before in zip(self._bins, recorded, strict=True):
                if bins is not None:
                    bins.rewind(before)
            raise
        rows = [rows for _, rows in found]
        self._waiting.append((step, rows[0] if len(rows) == 1 else torch.cat(rows, -1)))
        return torch.cat([loss.reshape(-1) for loss, _ in found])

    def flush(self) -> None:
        """Hand over what has been recorded."""
        position = {name: k for k, name in enumerate(self._recorders[0].order)}
        order = torch.tensor([position[key.layer, key.tensor, key.direction] for key in self._keys if position])
        if self._waiting:  # a list would be copied to a GPU again for every step
            order = order.to(self._waiting[0][1].device)
        for step, rows in self._waiting:
            self.buffer.put_codes(self._codes, rows[:, order], step)
        parts = [join_bins(bins.take(), 0) for bins in self._bins if bins is not None and len(bins)]
        if parts:
            counts, lowest = join_bins(parts, 1)
            counts = counts.view(len(self._waiting), -1, *counts.shape[1:])[:, order].flatten(0, 1)
            self.buffer.put_bins([(counts, lowest)])
        self._waiting.clear()


def recorder_for(net: FastNetwork, backend: Backend, bins: Bins | None) -> StepRecorder:
    """The faster recorder of those that can record this network."""
    fused = net.activation.rectifies and backend.fuses(net.w[0])
    return FusedRecorder(net, backend, bins) if fused else PlainRecorder(net, backend, bins)


class PlainRecorder:
    """A `Recorder` of any activation, number format and device."""

    def __init__(self, net: FastNetwork, backend: Backend, bins: Bins | None) -> None:
        self.net, self._backend, self._bins = net, backend, bins
        self.order: list[RowName] = []
        self._rows: list[Tensor] = []

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        net = self.net
        s = net.memory(x.shape[-2], separate=True)
        self.order, self._rows = [], []
        out = net.forward(x, s)
        net.out = out
        value, g = net.loss.both(out, y)
        net.backward(g, s)
        net.bias_gradients(g, s.bias_sums)
        net.weight_gradients(x, g, s)
        for before, after, names in (
            (s.z, s.a, [("preactivation", "forward"), ("activation", "forward")]),
            (s.a_grad, s.g, [("activation", "backward"), ("preactivation", "backward")]),
        ):
            for run, *blocks in zip(before.runs, before.whole, after.whole, strict=True):
                self._measure(blocks, run.start, names, net.activation.rectifies)
        ends = [("preactivation", "forward"), ("preactivation", "backward")]
        self._measure([out[None], g[None]], len(net.w) - 1, ends)
        for values, grads, rates, tensor, change in (
            (net.w, net.w_grad, net.w_rates, "weight", "update"),
            (net.b, net.b_grad, net.b_rates, "bias", BIAS_UPDATE),
        ):
            names = [(tensor, "forward"), (tensor, "backward"), (change, "forward")]
            for run, block, grad, rate in zip(values.runs, values.whole, grads.whole, rates, strict=True):
                old = block.clone()
                block.sub_(grad, alpha=rate)
                self._measure([old, grad, block - old], run.start, names)
        return value, torch.cat(self._rows, 1)

    def _measure(
        self, blocks: Sequence[Tensor], start: int, names: Sequence[tuple[str, str]], masked: bool = False
    ) -> None:
        """Tensors of one shape, (K, ...) each, of the layers from `start` + 1 on; a bias is (1, O).

        names: what each is, and its direction. masked: the second has the entries of the first, or 0.
        """
        count, batched = self.net.count, names[0][0] in ("preactivation", "activation")
        inputs, layers = blocks[0].shape[-2] if blocks[0].ndim > 2 else 1, len(blocks[0])
        shaped = [block.reshape(layers, count, inputs, -1) for block in blocks]
        if shaped[0].numel() <= SMALL:  # a copy costs less than another call
            rows = list(torch.split(self._backend.rows(torch.cat(shaped), batched, self._bins), layers, 1))
        else:
            rows = []
            for x in shaped:
                part_of = rows[0] if masked and rows else None
                rows.append(self._backend.rows(x, batched, self._bins, part_of=part_of))
        if names[0] == ("preactivation", "forward") and start < len(self.net.w) - 1:
            if masked:
                rows[0][SATURATED] = (rows[1][N_ZERO] + rows[1][N_NAN]) / rows[1][COUNT]
            else:
                rows[0][SATURATED] = self.net.activation.saturated_share(blocks[0]).reshape(layers, count)
        self.order += [(start + 1 + k, tensor, direction) for tensor, direction in names for k in range(layers)]
        self._rows += rows


class FusedRecorder:
    """A `Recorder` of a ReLU network whose backend reads memory once for a pass and its statistics."""

    def __init__(self, net: FastNetwork, backend: Backend, bins: Bins | None) -> None:
        self.net, self._backend, self._bins = net, backend, bins
        by_shape = {w.shape: torch.empty_like(w) for w in net.w.each}  # one gradient of a shape is needed at a time
        self._grads = [torch.empty_like(net.w[0]), *(by_shape[w.shape] for w in net.w.each[1:])]
        # Biases of one shape and one learning rate together, (K, ..., 1, O).
        self._b, self._b_grads = (
            [block.view(len(block), *net.lead, 1, -1) for block in biases.whole] for biases in (net.b, net.b_grad)
        )
        self._b_sums = [b.view(*net.lead, -1) for b in net.b_grad.each]
        self._prepared: dict[int, _Prepared] = {}  # by the inputs of a batch
        layers = len(net.w)
        self.order: list[RowName] = []
        for layer in range(1, layers):
            self.order += [(layer, "preactivation", "forward"), (layer, "activation", "forward")]
        self.order += [(layers, "preactivation", "forward"), (layers, "preactivation", "backward")]
        for layer in range(layers, 0, -1):
            self.order += [(layer, "weight", "forward"), (layer, "weight", "backward"), (layer, "update", "forward")]
            if layer > 1:
                self.order += [(layer - 1, "activation", "backward"), (layer - 1, "preactivation", "backward")]
        for run in net.b.runs:
            for tensor, direction in (("bias", "forward"), ("bias", "backward"), (BIAS_UPDATE, "forward")):
                self.order += [(k + 1, tensor, direction) for k in range(run.start, run.stop)]
        shape = (len(self.order), *net.lead, len(FIELDS))
        self._rows = torch.empty(shape, dtype=torch.float64, device=net.w[0].device)
        sizes = [2] * (layers - 1) + [1, 1] + [3, 2] * (layers - 1) + [3]
        outs = torch.split(self._rows, [*sizes, *(3 * len(b) for b in self._b)])
        self._outs = [out.squeeze(0) if len(out) == 1 else out for out in outs[: len(sizes)]]  # of each call
        self._outs += [out.view(3, -1, *out.shape[1:]) for out in outs[len(sizes) :]]

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        net, backend, bins, ends = self.net, self._backend, self._bins, self._outs[len(self.net.w) - 1 :]
        p = self._prepare(x.shape[-2])
        inp, last = x, len(net.w) - 1
        for w, b, a, relu_rows in zip(net.w.each, net.b.each, p.memory.a.each, p.relu, strict=False):
            inp = net.affine(b, inp, w, out=a)
            relu_rows()
        net.out = net.affine(net.b[-1], inp, net.w[-1])
        value, g = net.loss.both(net.out, y)
        torch.sum(g, -2, keepdim=bool(net.lead), out=net.b_grad[-1])
        backend.rows(net.out, True, bins, ends[0])
        backend.rows(g, True, bins, ends[1])
        for k in range(last, 0, -1):
            net.product(g, net.w_t[k], out=p.below[k - 1])
            net.product(p.memory.a_t[k - 1], g, out=self._grads[k])
            p.update[k]()
            p.mask[k - 1]()
            g = p.below[k - 1]
        net.product(x.mT, g, out=self._grads[0])
        p.update[0]()
        for update_rows in p.bias:
            update_rows()
        return value, self._rows.reshape(len(self.order), net.count, -1).clone().movedim(-1, 0)

    def _prepare(self, inputs: int) -> "_Prepared":
        """Memory for dL/da of the hidden layers, and the passes over what stays where it is, ready to be called.

        Two gradients are alive at a time, so layers of one width take turns.
        """
        net, memory = self.net, self.net.memory(inputs)
        found = self._prepared.get(inputs)
        if found is not None and found.memory is memory:
            return found
        if len(self._prepared) == KEPT_MEMORIES:
            self._prepared.clear()
        turns = {(a.shape, k): torch.empty_like(a) for a in memory.a.each for k in (0, 1)}
        below = [turns[a.shape, k % 2] for k, a in enumerate(memory.a.each)]
        outs, last = iter(self._outs), len(net.w) - 1

        def prepare(name: str, *given: Any) -> Callable[[], object]:
            return self._backend.prepare(name, *given, bins=self._bins, out=next(outs))

        relu = [prepare("relu_rows_", a) for a in memory.a.each]
        next(outs), next(outs)  # of the outputs, which are new in every step
        update, mask = [], []
        for k in range(last, -1, -1):
            update.append(prepare("update_rows_", net.w[k], self._grads[k], net.w.rates[k]))
            if k:
                mask.append(prepare("mask_rows_", below[k - 1], memory.a[k - 1], self._b_sums[k - 1]))
        bias = [prepare("update_rows_", *one) for one in zip(self._b, self._b_grads, net.b_rates, strict=True)]
        self._prepared[inputs] = _Prepared(memory, below, relu, update[::-1], mask[::-1], bias)
        return self._prepared[inputs]


class _Prepared(NamedTuple):
    """What a step over so many inputs works in, and its passes, each at the place of its layer."""

    memory: StepMemory
    below: list[Tensor]
    relu: list[Callable[[], object]]
    update: list[Callable[[], object]]
    mask: list[Callable[[], object]]
    bias: list[Callable[[], object]]
