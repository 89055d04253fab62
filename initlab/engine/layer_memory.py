"""The memory of the fast training: tensors of successive layers, neighbours of one shape in one piece.

Layers of one shape can then be multiplied, summed and updated together.
Legend: E ensemble, N batch, I fan_in, O fan_out; layer l is position l - 1 of every list.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from initlab.engine.fast_network import Network


def equal_neighbours(shapes: Sequence[tuple[object, ...]]) -> list[slice]:
    """Neighbours that are equal, as slices of the list.

    >>> equal_neighbours([(50, 50), (50, 50), (50, 10)])
    [slice(0, 2, None), slice(2, 3, None)]
    """
    found, start = [], 0
    for _, same in groupby(shapes):
        stop = start + len(list(same))
        found.append(slice(start, stop))
        start = stop
    return found


class LayerTensors:
    """Tensors of successive layers, neighbours of one shape in one piece of memory: `stack[k]` is that of position k.

    With `inner` the first and the last layer have pieces of their own: one meets the data, one the loss.
    Parameters have `rates`, learning rates by position, and a run has one.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        like: Tensor,
        inner: bool = False,
        rates: Sequence[float] | None = None,
    ) -> None:
        self.rates = [0.0] * len(shapes) if rates is None else list(rates)
        alike = list(zip(shapes, self.rates, strict=True))
        self.runs = equal_neighbours(alike)
        if inner:
            last = len(shapes) - 1
            self.runs = [slice(r.start + 1, r.stop + 1) for r in equal_neighbours(alike[1:last])]
            self.runs = [slice(0, 1), *self.runs, *([slice(last, last + 1)] if last else [])]
        self.whole = [like.new_zeros(r.stop - r.start, *shapes[r.start]) for r in self.runs]
        self.each = [view for block in self.whole for view in block.unbind()]

    def __getitem__(self, k: int) -> Tensor:
        return self.each[k]

    def __len__(self) -> int:
        return len(self.each)

    def positions(self, start: int, stop: int) -> Tensor:
        """Positions start to stop - 1 as one tensor; they must lie in one run."""
        run, block = next((r, t) for r, t in zip(self.runs, self.whole, strict=True) if r.start <= start < r.stop)
        return block[start - run.start : stop - run.start]

    @property
    def run_rates(self) -> list[float]:
        """The learning rate of every run."""
        return [self.rates[run.start] for run in self.runs]


class Product(NamedTuple):
    """How a weight gradient is added to what it goes to: `add(inp^T, g)`, or with `across` `add(g^T, inp)`.

    `left` or `right` None stands for the gradient of the loss by the outputs; `first`: the other factor is the data.
    """

    add: Callable[..., Tensor]
    left: Tensor | None
    right: Tensor | None
    first: bool = False
    across: bool = False

    def __call__(self, x: Tensor, g: Tensor, **scales: float) -> None:
        if not self.first:
            self.add(self.left, g if self.right is None else self.right, **scales)
        elif self.across:
            self.add(g.mT if self.left is None else self.left, x, **scales)
        else:
            self.add(x.mT, g if self.left is None else self.left, **scales)


class StepMemory:
    """What a pass over n rows writes, for the hidden layers: activations `a` and their gradients dL/dz `g`.

    Preactivations `z` and dL/da `a_grad` have memory of their own if `separate`; else they are overwritten by `a`, `g`.
    """

    def __init__(self, net: "Network", rows: int, separate: bool) -> None:
        shapes, like = [(*net.lead, rows, width) for width in net.sizes[1:-1]], net.w[0]
        self.a, self.g = LayerTensors(shapes, like), LayerTensors(shapes, like)
        self.z, self.a_grad = (LayerTensors(shapes, like), LayerTensors(shapes, like)) if separate else (self.a, self.g)
        self.a_t = [a.mT for a in self.a.each]
        self.up = list(zip(net.w.each, net.b.each, self.z.each, self.a.each, strict=False))
        self.down = list(zip(net.w_t[1:], self.a_grad.each, self.g.each, self.a.each, self.z.each, strict=True))[::-1]
        self.updates, self.sums = self._products(net.w), self._products(net.w_grad)
        self.bias_sums, self.bias_parts = self._sums(net.b_grad), self._sums(net.b_part)

    def _sums(self, to: LayerTensors) -> list[tuple[Tensor | None, Tensor]]:
        """Gradients of a run of hidden layers and where their sums over the batch go; None: the loss's."""
        parts = [(run.start, min(run.stop, len(self.g))) for run in to.runs if run.start < len(self.g)]
        return [*((self.g.positions(*part), to.positions(*part)) for part in parts), (None, to[-1])]

    def _products(self, to: LayerTensors) -> list[Product]:
        """How dL/dW of a run of layers is added to `to`."""
        found = []
        for run, block in zip(to.runs, to.whole, strict=True):
            k = run.start
            grad = self.g[k] if k < len(self.g) else None
            if run.stop - run.start > 1:
                inputs, grads = self.a.positions(run.start - 1, run.stop - 1), self.g.positions(run.start, run.stop)
                found.append(Product(block.flatten(0, -3).baddbmm_, inputs.flatten(0, -3).mT, grads.flatten(0, -3)))
                continue
            across = not to[k].is_contiguous()
            target = to[k].mT if across else to[k]
            add = target.addmm_ if target.ndim == 2 else target.baddbmm_
            if k:
                found.append(Product(add, self.a_t[k - 1], grad))
            else:
                found.append(Product(add, grad if grad is None or not across else grad.mT, None, True, across))
        return found
