"""The memory of the fast training: tensors of successive layers, neighbours of one shape in one piece.

Layers of one shape can then be multiplied, summed and updated together.
Legend: E ensemble, N batch, I fan_in, O fan_out; layer l is position l - 1 of every list.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor


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
