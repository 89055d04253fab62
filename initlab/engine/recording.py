"""Recorded steps of an engine: a row for every tensor of every layer at every step, collected as tables.

The rows are the same whoever writes them (pens.py, launched.py); they wait on a page (page.py) to be handed over.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from initlab.engine.fast_network import Engine, Network
from initlab.engine.gpu_recorder import Launched, works
from initlab.engine.recorders import Apart, Fused, Pen
from initlab.engine.step_buffer import Page
from initlab.stats.kernels import triton_rows
from initlab.stats.kernels.cpu import library
from initlab.stats.statistics import Rows


def pen_for(net: Network) -> Callable[[Network, Page, int], Pen]:
    """The fastest way to write the rows of a network that this machine has."""
    w = net.w[0]
    if net.in_place and w.device.type == "cpu" and w.dtype == torch.float32 and library() is not None:
        return Fused
    if net.in_place and w.dtype in triton_rows.DTYPES and w.device.type == "cuda" and works(w.device):
        return Launched
    return Apart


class Recording:
    """Recorded steps of an engine, collected as rows of the table `stats`, and of `histograms` if wanted.

    `accelerated=False` takes the plain road also where the compiled passes could be had.
    """

    def __init__(
        self, engine: Engine, rows: Rows, histograms: bool = True, accelerated: bool = True, name: str = "scratch"
    ) -> None:
        self.engine, self.rows, self.name = engine, rows, name
        first = engine.networks[0].w[0]
        kind = pen_for(engine.networks[0]) if accelerated else Apart
        layers = len(engine.networks[0].w)
        self.page = Page(layers, engine.count, first, histograms, accelerated, in_runs=kind is Fused)
        self.pens: list[Pen] = [
            kind(net, self.page, part.start) for net, part in zip(engine.networks, engine.slices, strict=True)
        ]
        self._steps: list[int] = []

    def step(self, xb: Tensor, yb: Tensor, step: int) -> Tensor:
        """One update of every network, recorded as that step; the losses before it, (E,)."""
        if self.page.full(len(self._steps)):
            self.flush()
        with self.page.step(len(self._steps)) as at:
            parts = zip(self.pens, self.engine.parts(xb, yb), strict=True)
            losses = torch.cat([pen.step(x, y, at).reshape(-1) for pen, (x, y) in parts])
        self._steps.append(step)  # whole: a step that was interrupted leaves no row
        return losses

    def flush(self) -> None:
        """Hand over to `rows` what has been recorded."""
        if self._steps:
            self.page.empty(self._steps, self.rows, self.name)
            self._steps.clear()
