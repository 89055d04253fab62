"""Memory that is kept between calls on a CPU, because allocating it anew costs more than the sums made in it.

Each thread has two blocks of float64; the ones to count with are never written.
"""

import threading
from functools import cache

import torch
from torch import Tensor

# Entries looked at together: with their squares, in float64, a processor's caches hold them.
AT_ONCE = 2**18
_VIEWS = 64


class _Kept(threading.local):
    """The blocks of a thread, and views of them by shape: making a view takes as long as a pass over a small tensor."""

    def __init__(self) -> None:
        with torch.inference_mode(False):  # what is allocated inside that mode cannot be written outside it
            self.blocks = torch.empty(2, AT_ONCE, dtype=torch.float64, device="cpu")
        self.views: dict[tuple[torch.Size, torch.dtype], tuple[Tensor, Tensor]] = {}


_KEPT = _Kept()


def workspace(shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors of at most AT_ONCE entries, of any values, not overlapping.

    They are this thread's until its next call; whoever asks again writes over them.
    """
    views = _KEPT.views
    if (shape, dtype) not in views:
        if len(views) == _VIEWS:
            views.clear()
        with torch.inference_mode(False):
            first, second = (block.view(dtype)[: shape.numel()].view(shape) for block in _KEPT.blocks)
            views[shape, dtype] = first, second
    return views[shape, dtype]


@cache
def ones() -> Tensor:
    """AT_ONCE times 1, in int64."""
    with torch.inference_mode(False):
        return torch.ones(AT_ONCE, dtype=torch.int64)
