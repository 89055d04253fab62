"""Where the rows of a few recorded steps are kept until they are handed over: memory that is allocated once.

Knows which tensors a network has and nothing of how they are made. Legend: E ensemble, N batch, C units, F fields,
B octaves.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from initlab.stats.kernels.cpu import expanded
from initlab.stats.statistics import Key, Rows
from initlab.stats.summarize import FIELDS, octaves, summarize, summarize_and_count

PAGE_STEPS, PAGE_BYTES = 64, 2**24  # steps of a page at most, and what its rows, or its histograms, may take
BIAS_UPDATE = "bias update"  # the compiled pass makes its row on the way; the tables have the weights' alone


class Slot(NamedTuple):
    """Which tensor of a step a row is about."""

    layer: int
    tensor: str
    direction: str


def slots(layers: int) -> list[Slot]:
    """All tensors of a network of so many layers; the last has a preactivation and no activation."""
    both, all_layers = ("forward", "backward"), range(1, layers + 1)
    found = [Slot(*key) for key in product(all_layers, ("preactivation",), both)]
    found += [Slot(*key) for key in product(range(1, layers), ("activation",), both)]
    found += [Slot(*key) for key in product(all_layers, ("weight", "bias"), both)]
    found += [Slot(layer, "update", "forward") for layer in all_layers]
    return found + [Slot(layer, BIAS_UPDATE, "forward") for layer in all_layers]


class Page:
    """The rows of a few steps: `fields` (steps, slots, E, F), and histograms, as runs of counts or with all octaves."""

    def __init__(
        self, layers: int, count: int, like: Tensor, histograms: bool, accelerated: bool = True, in_runs: bool = False
    ) -> None:
        self.accelerated, self.in_runs = accelerated, in_runs
        self.slots = slots(layers)
        self.place = {slot: k for k, slot in enumerate(self.slots)}
        self.octaves = octaves(like.dtype)[1] - octaves(like.dtype)[0] + 1
        a_row = max(8 * len(FIELDS), 8 * self.octaves if histograms and not in_runs else 0)
        self.steps = max(1, min(PAGE_STEPS, PAGE_BYTES // (a_row * len(self.slots) * count)))
        shape = (self.steps, len(self.slots), count)
        self.fields = torch.full((*shape, len(FIELDS)), torch.nan, dtype=torch.float64, device=like.device)
        self.histograms, self.dtype = histograms, like.dtype
        self.dense: Tensor | None = None
        self.starts = np.zeros(shape, dtype=np.int64)
        # Before every step there is room for the most that it can write; as a rule it writes a tenth of that.
        self._most = len(self.slots) * count * (2 + 2 * self.octaves) if histograms and in_runs else 0
        self.runs = np.empty(max(2 * self._most, min(PAGE_BYTES // 4, self._most * self.steps)), dtype=np.int32)
        self.arena = np.array([self.runs.ctypes.data, 0, 0], dtype=np.int64)

    def open(self, at: int) -> tuple[int, int | None]:
        """Addresses of a step's rows and of the arena for its histograms, for the compiled passes."""
        assert self.in_runs and 0 <= at < self.steps, "the compiled passes would write beyond the page"
        self.arena[2] = self.starts.ctypes.data + at * self.starts.strides[0]
        step = self.fields.stride(0) * self.fields.element_size()
        return self.fields.data_ptr() + at * step, self.arena.ctypes.data if self.histograms else None

    def full(self, written: int) -> bool:
        """Whether there is no room for another step."""
        return written == self.steps or int(self.arena[1]) + self._most > len(self.runs)

    @contextmanager
    def step(self, at: int) -> Iterator[int]:
        """The writing of one step; what an interrupted one has put into the arena is forgotten."""
        used = int(self.arena[1])
        try:
            yield at
        except BaseException:
            self.arena[1] = used
            raise

    def rows_of(self, layers: range, tensor: str, direction: str) -> slice:
        """The places of a tensor of successive layers: they lie at equal distances."""
        first, last = (self.place[Slot(layer, tensor, direction)] for layer in (layers[0], layers[-1]))
        return slice(first, last + 1, (last - first) // max(1, len(layers) - 1) or 1)

    def write(self, at: int, places: slice, first: int, values: Tensor, batched: bool) -> None:
        """Describe (K, E, N, C), a place for each K, networks from `first` on."""
        if self.histograms:
            self.put(at, places, first, *summarize_and_count(values, batched, self.accelerated))
        else:
            self.put(at, places, first, summarize(values, batched, self.accelerated))

    def put(self, at: int, places: slice, first: int, fields: Tensor, counts: Tensor | None = None) -> None:
        """Rows (F, K, E) and histograms (K, E, 2, B)."""
        until = first + fields.shape[-1]
        self.fields[at, places, first:until] = fields.movedim(0, -1)
        if self.histograms and counts is not None:
            if self.dense is None:
                size = (*self.starts.shape, 2, self.octaves)
                self.dense = torch.zeros(size, dtype=torch.int32, device=counts.device)
            self.dense[at, places, first:until] = counts

    def empty(self, steps: Sequence[int], rows: Rows, implementation: str) -> None:
        """Hand over what was written for these steps; the page is empty afterwards."""
        told = [k for k, slot in enumerate(self.slots) if slot.tensor != BIAS_UPDATE]
        keys = [Key("train", implementation, step, *self.slots[k]) for step in steps for k in told]
        fields = self.fields[: len(steps), told]
        rows.put(keys, fields.movedim(-1, 0).flatten(1, 2).clone())
        if self.dense is not None:
            rows.put_histograms(keys, self.dense[: len(steps), told].flatten(0, 1), self.dtype)
        elif self.histograms:
            counts, lowest = expanded(self.runs, self.starts[: len(steps), told])
            rows.put_histograms(keys, torch.from_numpy(counts).flatten(0, 1), self.dtype, lowest)
        self.arena[1] = 0
