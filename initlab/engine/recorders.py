"""How a recorded step writes its rows: the same step as the engine's own, and a row for every tensor of every layer.

`Apart` keeps the tensors and describes them afterwards, shape by shape: any activation, number format and device.
`Fused` lets the compiled passes take their statistics where they make a ReLU, its mask or an update: float32 on a CPU.
Legend: E ensemble, N batch, I fan_in, O fan_out.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from initlab.engine.fast_network import KEPT_SPACES, Network, Stack
from initlab.engine.step_buffer import BIAS_UPDATE, Page, Slot
from initlab.stats.kernels.cpu import JOB, library
from initlab.stats.statistics import saturated_share
from initlab.stats.summarize import FIELDS

_SATURATED = list(FIELDS).index("saturated")


class Pen(Protocol):
    """How a network's step is written down."""

    def step(self, x: Tensor, y: Tensor, at: int) -> Tensor:
        """One update; the rows at position `at` of the page; the loss before it."""


class Apart:
    """Any activation, number format and device: tensors are kept apart and described afterwards, shape by shape."""

    def __init__(self, net: Network, page: Page, first: int) -> None:
        self.net, self.page, self.first = net, page, first

    def step(self, x: Tensor, y: Tensor, at: int) -> Tensor:
        net = self.net
        s = net.space(x.shape[-2], apart=True)
        out = net.forward(x, s)
        net.out = out
        value, g = net.loss.both(out, y)
        net.backward(g, s)
        net.bias_gradients(g, s.bias_sums)
        net.weight_gradients(x, g, s)
        for stack, tensor, direction in (
            (s.z, "preactivation", "forward"),
            (s.a, "activation", "forward"),
            (s.a_grad, "activation", "backward"),
            (s.g, "preactivation", "backward"),
        ):
            self._write(at, stack, tensor, direction, batched=True)
        for values, direction in ((out, "forward"), (g, "backward")):
            self._write_run(at, values[None], len(net.w) - 1, "preactivation", direction, batched=True)
        self._saturation(at, s.z)
        self._update(at, net.w, net.w_grad, net.w_rates, "weight", "update")
        self._update(at, net.b, net.b_grad, net.b_rates, "bias", BIAS_UPDATE)
        return value

    def _update(self, at: int, values: Stack, grads: Stack, rates: Sequence[float], tensor: str, change: str) -> None:
        self._write(at, values, tensor, "forward", batched=False)
        self._write(at, grads, tensor, "backward", batched=False)
        for run, block, grad, rate in zip(values.runs, values.whole, grads.whole, rates, strict=True):
            before = block.clone()
            block.sub_(grad, alpha=rate)
            self._write_run(at, block - before, run.start, change, "forward", batched=False)

    def _write(self, at: int, stack: Stack, tensor: str, direction: str, batched: bool) -> None:
        for run, block in zip(stack.runs, stack.whole, strict=True):
            self._write_run(at, block, run.start, tensor, direction, batched)

    def _write_run(self, at: int, block: Tensor, start: int, tensor: str, direction: str, batched: bool) -> None:
        """(K, ...) of the layers from `start` + 1 on, as (K, E, N, C); a bias is (1, O)."""
        places = self.page.rows_of(range(start + 1, start + 1 + len(block)), tensor, direction)
        rows = block.shape[-2] if block.ndim > 2 else 1
        self.page.write(at, places, self.first, block.reshape(len(block), self.net.count, rows, -1), batched)

    def _saturation(self, at: int, z: Stack) -> None:
        row, until = self.net.activation, self.first + self.net.count
        for run, block in zip(z.runs, z.whole, strict=True):
            share = saturated_share(row.slope(block), row.largest_slope).reshape(len(block), self.net.count)
            places = self.page.rows_of(range(run.start + 1, run.stop + 1), "preactivation", "forward")
            self.page.fields[at, places, self.first : until, _SATURATED] = share


class Fused:
    """A ReLU network in float32 on a CPU: the compiled passes take the statistics of what they have at hand."""

    def __init__(self, net: Network, page: Page, first: int) -> None:
        found = library()
        assert found is not None
        self.net, self.page, self.first, self.lib = net, page, first, found
        by_shape = {w.shape: torch.empty_like(w) for w in net.w.each[1:]}  # one of a shape is ever needed
        self.grads = [torch.empty_like(net.w[0]), *(by_shape[w.shape] for w in net.w.each[1:])]
        self._weights = self._updates(net.w.each, self.grads, "weight", "update")
        self._biases = self._updates(net.b.each, net.b_grad.each, "bias", BIAS_UPDATE)
        self._of_one_rate = [
            (int(self._biases[same[0]].ctypes.data), len(same), rate)
            for rate, same in ((rate, list(same)) for rate, same in groupby(range(len(net.b)), net.b.rates.__getitem__))
        ]
        self._prepared: dict[int, _Addresses] = {}

    def step(self, x: Tensor, y: Tensor, at: int) -> Tensor:
        net, lib, todo = self.net, self.lib, self._addresses(x.shape[-2])
        rows, arena = self.page.open(at)
        inp = x
        for w, b, a, relu in todo.up:
            inp = net.affine(b, inp, w, out=a)
            lib.relu_job(relu, rows, arena)
        out = net.affine(net.b[-1], inp, net.w[-1])
        net.out = out
        value, g = net.loss.both(out, y)
        torch.sum(g, -2, keepdim=bool(net.lead), out=net.b_grad[-1])
        for values, job in ((out, todo.out), (g, todo.out_grad)):
            job[0] = values.data_ptr()
            lib.describe_job(job.ctypes.data, rows, arena)
        for w_t, inp_t, grad, update, rate, below, mask in todo.down:
            net.product(g, w_t, out=below)
            net.product(inp_t, g, out=grad)
            lib.update_jobs(update, 1, rate, rows, arena)
            lib.mask_job(mask, rows, arena)
            g = below
        net.product(x.mT, g, out=self.grads[0])
        lib.update_jobs(self._weights.ctypes.data, 1, net.w.rates[0], rows, arena)
        for jobs, count, rate in self._of_one_rate:
            lib.update_jobs(jobs, count, rate, rows, arena)
        return value

    def _row(self, layer: int, tensor: str, direction: str) -> int:
        return self.page.place[Slot(layer, tensor, direction)] * self.page.fields.shape[2] + self.first

    def _updates(self, values: Sequence[Tensor], grads: Sequence[Tensor], tensor: str, change: str) -> np.ndarray:
        jobs = []
        for layer, (w, g) in enumerate(zip(values, grads, strict=True), start=1):
            places = [self._row(layer, tensor, way) for way in ("forward", "backward")]
            shape = [self.net.count, 1, w.numel() // self.net.count]
            jobs.append([w.data_ptr(), g.data_ptr(), 0, *shape, *places, self._row(layer, change, "forward")])
        return np.array(jobs, dtype=np.int64)

    def _addresses(self, rows: int) -> "_Addresses":
        if rows not in self._prepared:
            if len(self._prepared) == KEPT_SPACES:
                self._prepared.clear()
            self._prepared[rows] = _Addresses(self, rows)
        return self._prepared[rows]


class _Addresses:
    """What a step of so many rows calls, in order: tensors, and the addresses of the jobs of the compiled passes."""

    def __init__(self, pen: Fused, rows: int) -> None:
        net, s, hidden = pen.net, pen.net.space(rows), range(len(pen.net.w) - 1)
        self.jobs = np.zeros((2, len(hidden), len(JOB)), dtype=np.int64)
        relu, mask = ([int(job.ctypes.data) for job in jobs] for jobs in self.jobs)
        updates = [int(job.ctypes.data) for job in pen._weights]
        # Two gradients are alive at a time: layers of one width take turns in two pieces of memory.
        turns = {(a.shape, k): torch.empty_like(a) for a in s.a.each for k in (0, 1)}
        grads = [turns[s.a[k].shape, k % 2] for k in hidden]
        for k in hidden:
            shape = [net.count, rows, net.sizes[k + 1]]
            z, z_grad = (pen._row(k + 1, "preactivation", way) for way in ("forward", "backward"))
            a, a_grad = (pen._row(k + 1, "activation", way) for way in ("forward", "backward"))
            self.jobs[0, k] = [s.a[k].data_ptr(), 0, 0, *shape, z, a, 0]
            sums = net.b_grad[k].data_ptr()
            self.jobs[1, k] = [grads[k].data_ptr(), s.a[k].data_ptr(), sums, *shape, a_grad, z_grad, 0]
        self.up = [(net.w[k], net.b[k], s.a[k], relu[k]) for k in hidden]
        self.down = [
            (net.w_t[k + 1], s.a_t[k], pen.grads[k + 1], updates[k + 1], net.w.rates[k + 1], grads[k], mask[k])
            for k in reversed(hidden)
        ]
        shape = [net.count, rows, net.sizes[-1]]
        self.out, self.out_grad = (
            np.array([0, 0, 0, *shape, pen._row(len(net.w), "preactivation", way), 0, 0], dtype=np.int64)
            for way in ("forward", "backward")
        )
