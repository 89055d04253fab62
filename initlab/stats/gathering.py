"""Rows of many layers at a time, where the row of one costs more calls than arithmetic: in plain PyTorch.

A pass leaves copies of what it reads and writes, and the copies of many layers are measured together. A backend that
fuses a pass with its rows makes them at once.
Legend: E networks, N batch, C units, F fields, M functions of the user, K layers that wait.
"""

import torch
from torch import Tensor

from initlab.stats.backend import COUNT, N_NAN, N_ZERO, SATURATED, Backend, Elementwise

_ENTRIES = 2**20  # that wait at most
_FEWEST = 4  # layers that are worth their copies


class Gathering:
    """Passes over tensors (E, N, C), whose rows go into memory (K, E, F + M), two neighbours before and after each.

    backend: makes the rows: at once, when enough layers wait, or when `settle` is called.

    >>> from initlab.nn.activations import ACTIVATIONS
    >>> gathering, rows = Gathering(Backend()), torch.empty(6, 2, 15, dtype=torch.float64)
    >>> for layer in range(3):
    ...     gathering.activation_rows(torch.randn(2, 5, 4), ACTIVATIONS["relu"], torch.empty(2, 5, 4), rows, 2 * layer)
    >>> gathering.settle()
    >>> rows[:, 0, 0].tolist()
    [20.0, 20.0, 20.0, 20.0, 20.0, 20.0]
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._block = torch.empty(2, 0, device="cpu")  # (2, K, E, N, C): before, and after all but a ReLU
        self._pairs: list[tuple[Tensor, Tensor]] = []  # the same layer by layer: views are made once
        self._count = 0  # layers that wait
        self._rows, self._end = self._block, 0  # memory for their rows, and where it ends
        self._activation: Elementwise | None = None  # of preactivations that wait; None: gradients do

    def activation_rows(self, z: Tensor, activation: Elementwise, out: Tensor, rows: Tensor, at: int) -> None:
        """`out` becomes phi(z); `rows[at : at + 2]` those of z, with its saturated share, and of phi(z)."""
        if not self._make_room(z, activation, rows, at):
            self.backend.activation_rows(z, activation, out, rows, at)
            return
        before, after = self._pairs[self._count]
        before.copy_(z)
        if activation.rectifies:  # made again of all that waits
            torch.clamp_min(z, 0, out=out)
        else:
            after.copy_(out.copy_(activation.phi(z)))
        self._count += 1

    def gradient_rows(self, g: Tensor, z: Tensor, activation: Elementwise, out: Tensor, rows: Tensor, at: int) -> None:
        """`out` becomes the gradient of z from g, that of phi(z); `rows[at : at + 2]` are those of both."""
        if not self._make_room(g, None, rows, at):
            self.backend.gradient_rows(g, z, activation, out, rows, at)
            return
        before, after = self._pairs[self._count]
        before.copy_(g)
        after.copy_(out.copy_(activation.pull_back(g, z)))
        self._count += 1

    def settle(self) -> None:
        """Measure what waits."""
        if not self._count:
            return
        x, after = self._block[:, : self._count]
        into = self._rows[self._end - 2 * self._count : self._end].view(self._count, 2, *self._rows.shape[1:])
        self._count, activation = 0, self._activation
        rows = self.backend.rows(x)
        if activation is not None and activation.rectifies:
            others = self.backend.rows(x.relu_(), part_of=rows)
            rows[SATURATED] = (others[N_ZERO] + others[N_NAN]) / others[COUNT]
        else:
            rows[SATURATED] = torch.nan if activation is None else activation.saturated_share(x)
            others = self.backend.rows(after)
        into.copy_(torch.stack([rows, others], 2).movedim(0, -1))

    def _make_room(self, x: Tensor, activation: Elementwise | None, rows: Tensor, at: int) -> bool:
        """Whether x may wait, with room for it then; what waits is measured first where x cannot join it."""
        waits = not (self.backend.fuses(x) or self.backend.statistics) and _FEWEST * x.numel() <= _ENTRIES
        alike = self._block.shape[2:] == x.shape and self._block.dtype == x.dtype and self._block.device == x.device
        behind = rows is self._rows and at == self._end
        joins = waits and alike and behind and activation is self._activation
        if not joins or self._count == len(self._pairs):
            self.settle()
        if waits and not alike:
            self._block = x.new_empty(2, _ENTRIES // max(1, x.numel()), *x.shape)
            self._pairs = list(zip(*(side.unbind() for side in self._block), strict=True))
        self._activation, self._rows, self._end = activation, rows, at + 2
        return waits
