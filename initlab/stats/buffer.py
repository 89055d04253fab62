"""Rows on their device: tensors in, a tidy frame out, and nothing waits for the device until the frame is asked for.

Where the compiled pass can be had a tensor is measured where it lies, when it is handed over: seats.py. Else small
tensors of one shape are gathered into a block that a processor's cache holds and measured together; they are copied
when they are handed over, so that what is overwritten afterwards has been seen. Large ones are measured at once.
What the rows are about: ledger.py. Knows nothing of modules and of hooks.
Legend: E ensemble, N batch, C units, F fields, S statistics.
"""

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from initlab.errors import UsageError
from initlab.nn.activations import Activation
from initlab.stats.kernels.addresses import ROW, Counts, Seat, aim, in_reach, numbered
from initlab.stats.kernels.cpu import library
from initlab.stats.keys import WORDS, Spot, key_columns, update_ratio
from initlab.stats.row_index import Ledger
from initlab.stats.statistics import BATCHED, COUNTS, STATISTICS, Rows, saturated_share
from initlab.stats.summarize import FIELDS, derive, summarize, summarize_and_count

FLUSH_SECONDS = 30.0
GATHERED = 2**18  # entries of a block that a processor's cache holds
FIRST_ROWS = 256
TOGETHER = 64  # tensors of a block at most: beyond, handing each over costs more than measuring it
_PLACE = {name: place for place, name in enumerate(FIELDS)}


class _Block:
    """Room for `size` tensors of one shape, and the rows that they will become."""

    def __init__(self, like: Tensor, size: int) -> None:
        # A block made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.values = torch.empty((size, *like.shape), dtype=like.dtype, device=like.device)
            self.slots = self.values.unbind()
        self.rows: list[int] = []
        self.activations: dict[int, Activation] = {}

    @property
    def full(self) -> bool:
        return len(self.rows) == len(self.slots)


class Buffer:
    """What was measured, (rows, F, E) on its device, and the words of the rows on the host.

    The room grows by doubling at the end of a step; what a step brings beyond it waits in blocks of its own. With
    `emit` the rows are handed over every `flush_steps` recorded steps or every 30 seconds, and are then forgotten here.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        emit: Callable[[pd.DataFrame], None] | None = None,
        flush_steps: int = 100,
        histograms: bool = False,
    ) -> None:
        if flush_steps < 1:
            raise UsageError(f"flush_steps={flush_steps}: must be at least 1")
        self.seeds = list(seeds)
        self._emit, self._flush_steps = emit, flush_steps
        self._room: Tensor | None = None
        self._blocks: dict[tuple[torch.Size, torch.dtype, torch.device, bool], _Block] = {}
        self._octaves = Rows(seeds, histograms) if histograms else None
        self._histograms: list[pd.DataFrame] = []
        self._open_histograms: list[pd.DataFrame] = []
        passes = library() if len(self.seeds) == 1 else None
        self._counts = Counts(self._octaves) if self._octaves is not None and passes is not None else None
        self._passes = passes
        if passes is not None:
            self._describe, self._foresee = passes.describe_job, passes.foresee_job
        self._ledger = Ledger()
        self.code, self._spots, self._order = self._ledger.code, self._ledger.spots, self._ledger.order
        self._clear()

    def _clear(self) -> None:
        self._used = 0
        self._ledger.clear()
        self._spill: list[Tensor] = []
        self._since = time.monotonic()
        self._aim()

    def _aim(self) -> None:
        """Find out how many rows the compiled pass may write, and where."""
        room = self._room if self._passes is not None and not self._spill else None
        self._limit, self._base = (len(room), room.data_ptr()) if room is not None and room.is_cpu else (0, 0)

    def _reserve(self, rows: int) -> bool:
        """Make room for rows of the compiled pass; False where the room lies elsewhere or rows wait beside it."""
        if self._passes is None or self._spill or (self._room is not None and not self._room.is_cpu):
            return False
        if self._used + rows > self._limit:
            self._grow(max(rows, FIRST_ROWS))
        return True

    def seat(self, spot: Spot, shape: torch.Size) -> Seat | None:
        """What `take` wants to know of a tensor beforehand; None where there is no compiled pass."""
        return Seat(self.code(spot), spot, shape) if self._passes is not None else None

    def take(self, seat: Seat, x: Tensor, foresee: bool = False) -> int:
        """Let the compiled pass read a tensor of the seat's shape `in_reach` where it lies; the row's number, or -1.

        With `foresee` it finds the row of max(x, 0) too, which `foreseen` puts behind this one if it comes true.
        """
        used = self._used
        if used + foresee >= self._limit and not self._reserve(2):
            return -1
        spots = self._spots
        row = len(spots)
        seat.job[0] = x.data_ptr()
        arena = None if self._counts is None else self._counts.next([row])
        (self._foresee if foresee else self._describe)(seat.address, self._base + used * ROW, arena)
        self._used = used + 1
        self._order.append(row)
        spots.append(seat.code)
        return row

    @property
    def foresees(self) -> bool:
        """Whether `take` can foresee: not while it counts octaves."""
        return self._counts is None

    def foreseen(self, seat: Seat, row: int) -> bool:
        """Keep the activation's row, which the row taken last has foreseen; False if others were taken since."""
        spots = self._spots
        if len(spots) != row + 1:
            return False
        self._used += 1
        self._order.append(row + 1)
        spots.append(seat.code)
        self.relu(row, row + 1)
        return True

    def take_jobs(self, jobs: np.ndarray, addresses: Sequence[int], codes: Sequence[int], change: bool = False) -> bool:
        """Rows of tensors without a batch at these addresses, `in_reach` all of them; False if that cannot be."""
        rows = range(len(self._spots), len(self._spots) + len(codes))
        if self._passes is None or not self._reserve(len(codes)):
            return False
        aim(jobs, addresses)
        arena = None if self._counts is None else self._counts.next(rows)
        work = self._passes.change_jobs if change else self._passes.entries_jobs
        work(jobs.ctypes.data, len(jobs), self._base + self._used * ROW, arena)
        self._used += len(rows)
        self._order += rows
        self._spots += codes
        return True

    def put(self, spot: Spot, x: Tensor) -> int:
        """Take the values of (N, C) or (E, N, C) as they are now; returns the number of its row."""
        if self._passes is not None and in_reach(x):
            row = self._take_alone(spot, x)
            if row >= 0:
                return row
        row = len(self._spots)
        size = min(GATHERED // x.numel(), TOGETHER)
        if size < 2:
            self._store([row], x.unsqueeze(0), spot.tensor in BATCHED)
            self._spots.append(self.code(spot))
            return row
        key = (x.shape, x.dtype, x.device, spot.tensor in BATCHED)
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = _Block(x, size)
        elif block.full:
            self._settle(block, key[-1])
        block.slots[len(block.rows)].copy_(x)
        block.rows.append(row)
        self._spots.append(self.code(spot))
        return row

    def _take_alone(self, spot: Spot, x: Tensor) -> int:
        seat = Seat(self.code(spot), spot, x.shape)
        if seat.batched:
            return self.take(seat, x)
        row = len(self._spots)
        return row if self.take_jobs(seat.job[None], [x.data_ptr()], [seat.code]) else -1

    def put_all(self, spots: Sequence[Spot], stacked: Tensor) -> None:
        """Measure tensors that lie together, (n, N, C) or (n, E, N, C), at once."""
        first = len(self._spots)
        self._store(list(range(first, first + len(spots))), stacked, spots[0].tensor in BATCHED)
        self._spots += [self.code(spot) for spot in spots]

    def share(self, row: int, saturated: Tensor) -> None:
        """The saturated share of a row, (E,) or one number."""
        self._ledger.shares.append(([row], saturated.reshape(1, -1)))

    def saturate(self, row: int, z: Tensor, activation: Activation) -> None:
        """The row of preactivations z is saturated where phi' is small; found with its block, if that still waits."""
        key = (z.shape, z.dtype, z.device, True)
        block = self._blocks.get(key)
        if block is not None and row in block.rows[-1:]:
            block.activations[len(block.rows) - 1] = activation
        else:
            self.share(row, saturated_share(activation.slope(z), activation.largest_slope))

    def relu(self, row: int, activation_row: int) -> None:
        """The row of preactivations is saturated where its ReLU, measured too, is 0 or nan: nothing to compute."""
        self._ledger.relus[0].append(row)
        self._ledger.relus[1].append(activation_row)

    def _settle(self, block: _Block, batched: bool) -> None:
        """Measure what waits in a block; if that fails, its rows say that they count nothing."""
        rows, block.rows = block.rows, []
        marks, block.activations = block.activations, {}
        try:
            self._store(rows, block.values[: len(rows)], batched)
        except BaseException:
            self._keep(rows, _unmeasured(len(rows), len(self.seeds), block.values.device))
            raise
        for activation in set(marks.values()):
            places = [place for place, found in marks.items() if found is activation]
            slope = activation.slope(torch.stack([block.slots[place] for place in places]))
            share = saturated_share(slope, activation.largest_slope).reshape(len(places), -1)
            self._ledger.shares.append(([rows[place] for place in places], share))

    def _store(self, rows: list[int], values: Tensor, batched: bool) -> None:
        counts = None
        with torch.autocast(values.device.type, enabled=False):
            if self._octaves is None:
                fields = summarize(values, batched)
            else:
                fields, counts = summarize_and_count(values, batched)
        self._keep(rows, fields.reshape(len(FIELDS), len(rows), -1).movedim(0, 1))
        if self._octaves is not None and counts is not None:
            self._octaves.put_histograms(
                numbered(rows), counts.reshape(len(rows), -1, *counts.shape[-2:]), values.dtype
            )

    def _keep(self, rows: list[int], fields: Tensor) -> None:
        if not self._spill and self._room is not None and self._used + len(rows) <= len(self._room):
            self._room[self._used : self._used + len(rows)].copy_(fields)
            self._used += len(rows)
        else:
            self._spill.append(fields)
            self._aim()
        self._order += rows

    def end_step(self, step: int) -> None:
        """Close a step: measure what waits, make room for one more step like this one, hand over what is due."""
        self._blocks = {
            key: block for key, block in self._blocks.items() if block.rows
        }  # other shapes may never return
        for key, block in self._blocks.items():
            self._settle(block, key[-1])
        before = self._ledger.steps[-1][1] if self._ledger.steps else 0
        if len(self._spots) == before:
            return
        self._ledger.steps.append((step, len(self._spots)))
        late = time.monotonic() - self._since > FLUSH_SECONDS
        if self._emit is not None and (late or len(self._ledger.steps) >= self._flush_steps):
            self.flush()
        elif self._spill:
            self._grow(len(self._spots) - before)

    def _grow(self, coming: int) -> None:
        parts = self._parts()
        have = self._used + sum(len(part) for part in self._spill)
        room = max(2 * (len(self._room) if self._room is not None else 0), have + coming)
        device = parts[0].device if parts else torch.device("cpu")
        with torch.inference_mode(False):
            grown = torch.empty((room, len(FIELDS), len(self.seeds)), dtype=torch.float64, device=device)
        place = 0
        for part in parts:
            grown[place : place + len(part)].copy_(part)
            place += len(part)
        self._room, self._used, self._spill = grown, place, []
        self._aim()

    def _parts(self) -> list[Tensor]:
        return [*([] if self._room is None else [self._room[: self._used]]), *self._spill]

    def flush(self) -> None:
        """Hand the rows to `emit` and forget them."""
        if self._emit is not None and self._ledger.steps:
            if self._octaves is not None:
                self._name_histograms()
            self._emit(self.frame())
            self._clear()

    def frame(self) -> pd.DataFrame:
        """The rows of closed steps: the columns of the table `stats`, and `name`, `part`, `call`, `update_ratio`."""
        rows = self._ledger.closed
        values = derive(self._fields(rows)).numpy()
        spots, code, steps = self._ledger.words(np.arange(rows))
        columns = key_columns(spots, code, steps, self.seeds)
        for name, column in zip(STATISTICS, values, strict=True):
            columns[name] = column.reshape(-1).astype(np.int64) if name in COUNTS else column.reshape(-1)
        rms = values[list(STATISTICS).index("rms")]
        columns["update_ratio"] = update_ratio(spots, code, steps, rms).reshape(-1)
        return pd.DataFrame(columns)

    def _fields(self, rows: int) -> Tensor:
        """(F, rows, E) on the host, in the order in which the tensors came."""
        if rows == 0:
            return torch.empty(len(FIELDS), 0, len(self.seeds), dtype=torch.float64)
        parts = self._parts()
        return self._ledger.fields(torch.cat([part.to(parts[0].device) for part in parts]).cpu(), rows)

    def histograms(self) -> pd.DataFrame:
        """The table `histograms` of what was closed since it was last asked for, with `name`, `part` and `call`."""
        self._name_histograms()
        found, self._histograms = self._histograms, []
        return pd.concat(found, ignore_index=True).astype(dict.fromkeys(WORDS, "category"))

    def _name_histograms(self) -> None:
        """Give the histograms their words while the rows are here; those of an open step wait."""
        if self._octaves is None:
            raise UsageError("histograms: none were recorded; ask for them with histograms=True")
        if self._counts is not None:
            self._counts.settle()
        found = pd.concat([*self._open_histograms, self._octaves.histograms()])
        found = found.sort_values("layer", kind="stable", ignore_index=True)
        closed = found["layer"] < self._ledger.closed
        self._open_histograms, found = [found[~closed]], found[closed]
        rows = found["layer"].to_numpy()[:: len(self.seeds)]
        columns = pd.DataFrame(key_columns(*self._ledger.words(rows), self.seeds), index=found.index)
        self._histograms.append(pd.concat([columns, found[["first", "positive", "negative"]]], axis=1))


def _unmeasured(rows: int, networks: int, device: torch.device) -> Tensor:
    """(rows, F, E): no entry was counted, all else is nan."""
    fields = torch.full((rows, len(FIELDS), networks), torch.nan, dtype=torch.float64, device=device)
    fields[:, [_PLACE[name] for name in FIELDS if name in COUNTS]] = 0
    return fields


def stacks(tensors: Iterable[Tensor]) -> list[list[int]]:
    """Places of tensors of one shape and format, as many as make a block."""
    groups: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = {}
    for place, x in enumerate(tensors):
        groups.setdefault((x.shape, x.dtype, x.device), []).append(place)
    found = []
    for (shape, _, _), places in groups.items():
        size = max(1, GATHERED // max(1, shape.numel()))
        found += [places[k : k + size] for k in range(0, len(places), size)]
    return found
