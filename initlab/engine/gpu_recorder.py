"""The recorded step of a ReLU network on a GPU: statistics made by the kernels that make ReLU, its mask and the update.

Nothing waits for the device, and every launch is the same at every step, so that the step can be replayed as a graph.
Legend: E ensemble, N batch, I fan_in, O fan_out, K layers of one shape.
"""

import logging
from functools import lru_cache

import torch
from torch import Tensor

from initlab.engine.fast_network import Network, Stack
from initlab.engine.step_buffer import BIAS_UPDATE, Page
from initlab.stats.kernels import triton_rows as fused
from initlab.stats.kernels.triton_rows import Blocks
from initlab.stats.summarize import summarize


@lru_cache
def works(device: torch.device) -> bool:
    """Whether the fused passes run here and give the rows of plain PyTorch: tried once; why not is logged."""
    if fused.missing(device):
        return False
    x = torch.arange(-300.0, 300.0, device=device).reshape(20, 30)
    try:
        ours, plain = fused.measured(x)[0], summarize(x, accelerated=False)
        good = bool(torch.allclose(ours, plain, rtol=1e-12, atol=0, equal_nan=True))
        reason = "" if good else "their rows are not those of plain PyTorch"
    except Exception as error:  # compilers and drivers fail in ways of their own
        good, reason = False, str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not good:
        logging.getLogger(__name__).warning("statistics in plain PyTorch, slower: fused passes fail: %s", reason)
    return good


class Launched:
    """A pen, see pens.py; the memory of its blocks is made by the first step."""

    def __init__(self, net: Network, page: Page, first: int) -> None:
        self.net, self.page, self.first = net, page, first
        self.rates = {rate: net.w[0].new_tensor([rate], dtype=torch.float32) for rate in {*net.w_rates, *net.b_rates}}
        self._rooms: dict[tuple[object, ...], Blocks] = {}

    def step(self, x: Tensor, y: Tensor, at: int) -> Tensor:
        net = self.net
        s = net.space(x.shape[-2])
        inp = x
        for k, a in enumerate(s.a.each):
            inp = net.affine(net.b[k], inp, net.w[k], out=a)
            fused.relu(a, self._of(s.a, k, "z"), self._of(s.a, k, "a"), out=a)
        net.out = net.affine(net.b[-1], inp, net.w[-1])
        value, g = net.loss.both(net.out, y)
        self._describe(at, net.out, "forward")
        self._describe(at, g, "backward")
        above = g
        for k in range(len(s.g) - 1, -1, -1):
            above = net.product(above, net.w_t[k + 1], out=s.g[k])
            fused.mask(above, s.a[k], self._of(s.g, k, "da"), self._of(s.g, k, "dz"), out=above)
        self._hand_over(at, s.a, "z", "preactivation", "forward")
        self._hand_over(at, s.a, "a", "activation", "forward")
        self._hand_over(at, s.g, "da", "activation", "backward")
        self._hand_over(at, s.g, "dz", "preactivation", "backward")
        net.bias_gradients(g, s.bias_sums)
        net.weight_gradients(x, g, s)
        self._update(at, net.w, net.w_grad, "weight", "update")
        self._update(at, net.b, net.b_grad, "bias", BIAS_UPDATE)
        return value

    def _room(self, name: str, run: int, block: Tensor, batched: bool) -> Blocks:
        """Room for what the blocks of (K, *lead, N, C) say; of parameters for (K, E, 1, I O)."""
        key = (name, run, tuple(block.shape))
        if key not in self._rooms:
            shape = (block.shape[-2], block.shape[-1])
            self._rooms[key] = fused.blocks(
                block.shape[:-2], shape, block.dtype, block.device, batched, saturated=name == "z"
            )
        return self._rooms[key]

    def _of(self, stack: Stack, k: int, name: str) -> Blocks:
        """The room of one layer."""
        run = next(r for r, part in enumerate(stack.runs) if part.start <= k < part.stop)
        return self._room(name, run, stack.whole[run], batched=True).at(k - stack.runs[run].start)

    def _hand_over(self, at: int, stack: Stack, name: str, tensor: str, direction: str) -> None:
        for run, block in enumerate(stack.whole):
            self._write(at, self._room(name, run, block, batched=True), stack.runs[run], tensor, direction)

    def _write(self, at: int, blocks: Blocks, run: slice, tensor: str, direction: str) -> None:
        fields, counts = fused.finish(blocks)
        layers = range(run.start + 1, run.stop + 1)
        shape = (len(layers), self.net.count)
        places = self.page.rows_of(layers, tensor, direction)
        fields = fields.reshape(len(fields), *shape)
        self.page.put(at, places, self.first, fields, counts.reshape(*shape, *counts.shape[-2:]))

    def _describe(self, at: int, values: Tensor, direction: str) -> None:
        """The last layer's preactivation has no ReLU to be fused with."""
        room = self._room(direction, -1, values[None], batched=True)
        fused.measure(values[None].contiguous(), room)
        last = len(self.net.w)
        self._write(at, room, slice(last - 1, last), "preactivation", direction)

    def _update(self, at: int, values: Stack, grads: Stack, tensor: str, change: str) -> None:
        """Three rows of each parameter: what it was, its gradient, what changed."""
        for run, (part, block, grad) in enumerate(zip(values.runs, values.whole, grads.whole, strict=True)):
            lr = self.rates[values.rates[part.start]]
            w, g = (t.reshape(len(block), self.net.count, 1, -1) for t in (block, grad))
            before, gradient, moved, after = (
                self._room(f"{tensor} {name}", run, w, batched=False) for name in ("w", "g", "u", "new")
            )
            fused.measure(w, before)
            fused.update(w, g, lr, gradient, moved, after)
            self._write(at, before, part, tensor, "forward")
            self._write(at, gradient, part, tensor, "backward")
            self._write(at, moved, part, change, "forward")
