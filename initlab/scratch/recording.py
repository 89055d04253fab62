"""Recorded steps of an engine: a row for every tensor of every layer at every step, collected as tables.

The rows are the same whoever writes them (pens.py, launched.py); they wait on a page (page.py) to be handed over.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from initlab.scratch.engine import Engine, Network
from initlab.scratch.launched import Launched, works
from initlab.scratch.page import PAGE_STEPS, Page
from initlab.scratch.pens import Apart, Fused, Pen
from initlab.signal import fused_triton
from initlab.signal.accelerate import library
from initlab.signal.stats import Rows


def pen_for(net: Network) -> Callable[[Network, Page, int], Pen]:
    """The fastest way to write the rows of a network that this machine has."""
    w = net.w[0]
    if net.in_place and w.device.type == "cpu" and w.dtype == torch.float32 and library() is not None:
        return Fused
    if net.in_place and w.dtype in fused_triton.DTYPES and w.device.type == "cuda" and works(w.device):
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
        self.page = Page(len(engine.networks[0].w), engine.count, first, histograms, accelerated)
        kind = pen_for(engine.networks[0]) if accelerated else Apart
        self.pens: list[Pen] = [
            kind(net, self.page, part.start) for net, part in zip(engine.networks, engine.slices, strict=True)
        ]
        self._steps: list[int] = []

    def step(self, xb: Tensor, yb: Tensor, step: int) -> Tensor:
        """One update of every network, recorded as that step; the losses before it, (E,)."""
        at = len(self._steps)
        self._steps.append(step)
        parts = zip(self.pens, self.engine.parts(xb, yb), strict=True)
        losses = torch.cat([pen.step(x, y, at).reshape(-1) for pen, (x, y) in parts])
        if len(self._steps) == PAGE_STEPS:
            self.flush()
        return losses

    def flush(self) -> None:
        """Hand over to `rows` what has been recorded."""
        if self._steps:
            self.page.empty(self._steps, self.rows, self.name)
            self._steps.clear()
