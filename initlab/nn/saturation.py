"""The share of preactivations where an activation lets little of a gradient through.

That is where |phi'(z)| is below 5 % of its largest value: for a function of the table a few stretches of the line. They
are found once, and counting the entries inside of them costs a tenth of computing phi'.
Legend: E networks, N batch, C units.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from initlab.stats.kernels.cpu import library
from initlab.stats.statistics import SATURATED
from initlab.stats.summarize import saturated_share

MOST = 4  # stretches; beyond, phi' is computed
Slope = Callable[[Tensor], Tensor]


def measure_share(z: Tensor, slope: Slope, largest: float) -> Tensor:
    """Share of entries where |slope(z)| is below 5 % of `largest`, (..., N, C) -> (...) in float64.

    z: preactivations. slope: phi', the same function for ever. largest: max |phi'|. Float32 on a CPU is compared with
    the ends of the stretches; any other format, and a function with more stretches, is computed.
    """
    stretches = find_stretches(slope, largest) if z.dtype is torch.float32 and z.is_cpu and z.numel() else None
    if stretches is None:
        return saturated_share(slope(z), largest)
    compiled, shares = library(), torch.zeros(z.shape[:-2], dtype=torch.float64, device="cpu")
    entries = z.shape[-2:].numel()
    if compiled is not None and z.is_contiguous():
        ends = (stretches.data_ptr(), len(stretches), shares.data_ptr())
        compiled.share_inside(z.data_ptr(), shares.numel(), entries, *ends)
        return shares
    for low, high in stretches:
        shares += ((z >= low) & (z <= high)).sum((-2, -1))
    return shares / entries


@lru_cache
def find_stretches(slope: Slope, largest: float) -> Tensor | None:
    """The first and the last float32 of every stretch where phi' is that small, (stretches, 2); None of too many.

    None also where nan counts as small: a stretch has no place for it.
    """

    def is_small(z: Tensor) -> Tensor:
        return slope(z).abs() < SATURATED * largest

    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        powers = 2.0 ** torch.arange(-149, 128, dtype=torch.float64)
        ends = torch.tensor([torch.finfo(torch.float32).max, torch.inf], dtype=torch.float64)
        far = torch.cat([powers, ends])
        near = torch.linspace(-40, 40, 20481, dtype=torch.float64)
        grid = torch.unique(torch.cat([-far, near, far]).float())
        small, below, above = find_changes(is_small, grid)
        if len(below) > 2 * MOST or bool(is_small(torch.tensor([torch.nan])).any()):
            return None
        begins = bool(small[0])  # the changes take turns: into a stretch, and out of it
        firsts, lasts = above[int(begins) :: 2], below[int(not begins) :: 2]
        firsts = torch.cat([grid[:1], firsts]) if begins else firsts
        lasts = torch.cat([lasts, grid[-1:]]) if small[-1] else lasts
        return torch.stack([firsts, lasts], 1).contiguous()


def find_changes(true: Slope, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where a statement about numbers comes to hold or ceases to, by bisection between the numbers of a grid.

    true: bool for each number. grid: ascending, float32 or float64. Returns what holds on the grid, and for each change
    the last number before and the first one after it: neighbours in their format, where the grid has every octave.
    """
    holds = true(grid)
    places = (holds[1:] != holds[:-1]).nonzero().flatten()
    low, high = grid[places], grid[places + 1]
    for _ in range(60):
        middle = ((low.double() + high.double()) / 2).to(grid.dtype)
        is_low = true(middle) == holds[places]
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    return holds, low, high
