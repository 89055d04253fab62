"""What rows are about: their words by number, their steps, and what other tensors and other rows say of them.

Knows nothing of how rows are measured and where they are kept. Legend: E ensemble, F fields.
"""

import numpy as np
import torch
from torch import Tensor

from initlab.stats.keys import Spot
from initlab.stats.summarize import FIELDS

_PLACE = {name: place for place, name in enumerate(FIELDS)}


class Ledger:
    """Rows are numbered in the order in which their tensors came; a spot keeps its number for good."""

    def __init__(self) -> None:
        self.codes: dict[Spot, int] = {}
        self.spots: list[int] = []  # of each row, by the number of its spot
        self.order: list[int] = []  # the row that stands at each place of what was kept
        self.steps: list[tuple[int, int]] = []  # a step, and the first row after it
        self.shares: list[tuple[list[int], Tensor]] = []
        self.relus: tuple[list[int], list[int]] = ([], [])  # rows of preactivations, and of what their ReLU made

    def clear(self) -> None:
        """Forget the rows; the numbers of the spots remain."""
        for found in (self.spots, self.order, self.steps, self.shares, *self.relus):
            found.clear()

    def code(self, spot: Spot) -> int:
        """The number that a spot has here."""
        return self.codes.setdefault(spot, len(self.codes))

    @property
    def closed(self) -> int:
        """Rows of closed steps."""
        return self.steps[-1][1] if self.steps else 0

    def words(self, rows: np.ndarray) -> tuple[list[Spot], np.ndarray, np.ndarray]:
        """Spots that occur, in the order in which they do, which of them each row has, and its step."""
        steps, ends = np.array(self.steps, dtype=np.int64).reshape(-1, 2).T
        spots = list(self.codes)
        code = np.array(self.spots, dtype=np.int64)[rows]
        first = np.full(len(spots), len(code))
        first[code[::-1]] = np.arange(len(code))[::-1]
        occur = np.argsort(first, kind="stable")[: np.count_nonzero(first < len(code))]
        new = np.zeros(len(spots), dtype=np.int64)
        new[occur] = np.arange(len(occur))
        return [spots[k] for k in occur.tolist()], new[code], steps[np.searchsorted(ends, rows, side="right")]

    def fields(self, kept: Tensor, rows: int) -> Tensor:
        """(F, rows, E) in the order of the rows, of (rows, F, E) as they were kept."""
        order = np.array(self.order)
        if not np.array_equal(order, np.arange(len(order))):
            kept = kept[torch.from_numpy(np.argsort(order))]
        fields = kept[:rows].movedim(1, 0).contiguous()
        alive = np.array([(spot.tensor, spot.direction) != ("activation", "forward") for spot in self.codes])
        fields[_PLACE["dead"], torch.from_numpy(alive[self.spots[:rows]])] = torch.nan
        if self.shares:
            at = [row for places, _ in self.shares for row in places]
            share = torch.cat([share.double().expand(-1, fields.shape[-1]) for _, share in self.shares]).cpu()
            closed = [place for place, row in enumerate(at) if row < rows]
            fields[_PLACE["saturated"], torch.tensor(at, dtype=torch.int64)[closed]] = share[closed]
        z, phi = torch.from_numpy(np.array(self.relus, dtype=np.int64))
        z, phi = z[phi < rows], phi[phi < rows]
        if len(z):
            seen = fields[_PLACE["n_zero"], phi] + fields[_PLACE["n_nan"], phi]
            fields[_PLACE["saturated"], z] = seen / fields[_PLACE["count"], phi]
        return fields
