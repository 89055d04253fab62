"""Rows of many layers at a time, where the row of one costs more calls than arithmetic: in plain PyTorch.

A pass in place leaves a copy of what was there, and the copies of many layers are measured together. A backend that
fuses a pass with its rows makes them at once.
Legend: E networks, N batch, C units, F fields, M functions of the user, K layers that wait.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from initlab.stats.backend import COUNT, N_NAN, N_ZERO, SATURATED, Backend, Elementwise

_ENTRIES = 2**20  # that wait at most
_FEWEST = 4  # layers that are worth their copies


class Gathering:
    """Passes in place over tensors (E, N, C), whose rows `put` gets: (F + M, 2 K, E), before and after each.

    backend: makes the rows. put: is called at once, when enough layers wait, and by `settle`; in the order of the
    passes.

    >>> from initlab.nn.activations import ACTIVATIONS
    >>> found: list[Tensor] = []
    >>> gathering = Gathering(Backend(), found.append)
    >>> for _ in range(3):
    ...     gathering.activate_(torch.randn(2, 5, 4), ACTIVATIONS["relu"])
    >>> gathering.settle()
    >>> [rows.shape[1] for rows in found]
    [6]
    """

    def __init__(self, backend: Backend, put: Callable[[Tensor], object]) -> None:
        self.backend, self.put = backend, put
        self._block = torch.empty(2, 0, device="cpu")  # (2, K, E, N, C): before, and after all but a ReLU
        self._pairs: list[tuple[Tensor, Tensor]] = []  # the same layer by layer: views are made once
        self._count = 0  # layers that wait
        self._activation: Elementwise | None = None  # of preactivations that wait; None: gradients do

    def activate_(self, z: Tensor, activation: Elementwise) -> None:
        """z becomes phi(z); the row of z has its saturated share."""
        if not self._make_room(z, activation):
            self.put(self.backend.activation_rows_(z, activation))
            return
        before, after = self._pairs[self._count]
        before.copy_(z)
        if activation.rectifies:  # made again of all that waits
            z.relu_()
        else:
            after.copy_(z.copy_(activation.phi(z)))
        self._count += 1

    def pull_back_(self, g: Tensor, z: Tensor, activation: Elementwise) -> None:
        """g, the gradient of phi(z), becomes that of z."""
        if not self._make_room(g, None):
            self.put(self.backend.gradient_rows_(g, z, activation))
            return
        before, after = self._pairs[self._count]
        before.copy_(g)
        after.copy_(g.copy_(activation.pull_back(g, z)))
        self._count += 1

    def settle(self) -> None:
        """Measure what waits."""
        if not self._count:
            return
        x, after = self._block[:, : self._count]
        self._count, activation = 0, self._activation
        rows = self.backend.rows(x)
        if activation is not None and activation.rectifies:
            others = self.backend.rows(x.relu_(), part_of=rows)
            rows[SATURATED] = (others[N_ZERO] + others[N_NAN]) / others[COUNT]
        else:
            rows[SATURATED] = torch.nan if activation is None else activation.saturated_share(x)
            others = self.backend.rows(after)
        self.put(torch.stack([rows, others], 2).flatten(1, 2))

    def _make_room(self, x: Tensor, activation: Elementwise | None) -> bool:
        """Whether x may wait, with room for it then; what waits is measured first where x cannot join it."""
        waits = not (self.backend.fuses(x) or self.backend.statistics) and _FEWEST * x.numel() <= _ENTRIES
        alike = self._block.shape[2:] == x.shape and self._block.dtype == x.dtype and self._block.device == x.device
        if not waits or not alike or activation is not self._activation or self._count == len(self._pairs):
            self.settle()
        if waits and not alike:
            self._block = x.new_empty(2, _ENTRIES // max(1, x.numel()), *x.shape)
            self._pairs = list(zip(*(side.unbind() for side in self._block), strict=True))
        self._activation = activation
        return waits
