"""Rows on their device: tensors in, a tidy frame out, and nothing waits for the device until the frame is asked for.

Where the compiled pass can be had a tensor is measured where it lies, when it is handed over. Else small tensors of one
shape are gathered into a block that a processor's cache holds and measured together; they are copied when they are
handed over, so that what is overwritten afterwards has been seen. Large ones are measured at once.
Knows nothing of modules and of hooks. Legend: E ensemble, N batch, C units, F fields, S statistics.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from ctypes import CDLL

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from initlab.errors import UsageError
from initlab.signal.accelerate import library
from initlab.signal.activations import Activation
from initlab.signal.moments import FIELDS, derive, octaves, summarize, summarize_and_count
from initlab.signal.stats import BATCHED, COUNTS, STATISTICS, Key, Rows, saturated_share
from initlab.signal.tidy import WORDS, Spot, key_columns, update_ratio

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


class _Counting:
    """Histograms that the compiled pass writes, a block of rows at a time."""

    def __init__(self, octaves_of: Rows) -> None:
        self._octaves = octaves_of
        low, high = octaves(torch.float32)
        with torch.inference_mode(False):
            self._counts = torch.zeros((TOGETHER, 1, 2, high - low + 1), dtype=torch.int32)
        self._bytes = self._counts.stride(0) * self._counts.element_size()
        self._rows: list[int] = []

    def next(self, row: int) -> int:
        """Where the counts of that row go."""
        if len(self._rows) == TOGETHER:
            self.settle()
        self._rows.append(row)
        return self._counts.data_ptr() + (len(self._rows) - 1) * self._bytes

    def settle(self) -> None:
        if self._rows:
            used = self._counts[: len(self._rows)]
            self._octaves.put_histograms(_numbered(self._rows), used, torch.float32)
            used.zero_()
            self._rows = []


def _numbered(rows: list[int]) -> list[Key]:
    """The words come later: until then a histogram goes by the number of its row."""
    return [Key("", "", 0, row, "", "") for row in rows]


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
        self._compiled = library() if len(self.seeds) == 1 else None
        self._counting = _Counting(self._octaves) if self._octaves is not None else None
        self._clear()

    def _clear(self) -> None:
        self._used = 0
        self._spots: list[Spot] = []
        self._steps: list[tuple[int, int]] = []  # a step, and the first row after it
        self._order: list[int] = []  # the row that stands at each place of the room, then of the spill
        self._spill: list[Tensor] = []
        self._shares: list[tuple[list[int], Tensor]] = []
        self._relus: list[tuple[int, int]] = []
        self._since = time.monotonic()

    def put(self, spot: Spot, x: Tensor) -> int:
        """Take the values of (N, C) or (E, N, C) as they are now; returns the number of its row."""
        row = len(self._spots)
        if (
            self._compiled is not None
            and x.dtype is torch.float32
            and x.is_cpu
            and x.is_contiguous()
            and not self._spill
        ):
            self._describe(self._compiled, row, x, spot.tensor in BATCHED)
            self._spots.append(spot)
            return row
        size = min(GATHERED // x.numel(), TOGETHER)
        if size < 2:
            self._store([row], x.unsqueeze(0), spot.tensor in BATCHED)
            self._spots.append(spot)
            return row
        key = (x.shape, x.dtype, x.device, spot.tensor in BATCHED)
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = _Block(x, size)
        elif block.full:
            self._settle(block, key[-1])
        block.slots[len(block.rows)].copy_(x)
        block.rows.append(row)
        self._spots.append(spot)
        return row

    def _describe(self, compiled: CDLL, row: int, x: Tensor, batched: bool) -> None:
        """Let the compiled pass read x where it lies and write its row, and its counts, where they stay."""
        if self._room is None or self._used == len(self._room):
            self._grow(FIRST_ROWS)
        room = self._room
        assert room is not None
        address = room.data_ptr() + self._used * room.stride(0) * room.element_size()
        counts = self._counting.next(row) if self._counting is not None else None
        compiled.describe_rows(x.data_ptr(), 1, x.shape[-2], x.shape[-1], batched, address, counts)
        self._used += 1
        self._order.append(row)

    def put_all(self, spots: Sequence[Spot], stacked: Tensor) -> None:
        """Measure tensors that lie together, (n, N, C) or (n, E, N, C), at once."""
        first = len(self._spots)
        self._store(list(range(first, first + len(spots))), stacked, spots[0].tensor in BATCHED)
        self._spots += spots

    def share(self, row: int, saturated: Tensor) -> None:
        """The saturated share of a row, (E,) or one number."""
        self._shares.append(([row], saturated.reshape(1, -1)))

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
        self._relus.append((row, activation_row))

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
            self._shares.append(([rows[place] for place in places], share))

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
                _numbered(rows), counts.reshape(len(rows), -1, *counts.shape[-2:]), values.dtype
            )

    def _keep(self, rows: list[int], fields: Tensor) -> None:
        if not self._spill and self._room is not None and self._used + len(rows) <= len(self._room):
            self._room[self._used : self._used + len(rows)].copy_(fields)
            self._used += len(rows)
        else:
            self._spill.append(fields)
        self._order += rows

    def end_step(self, step: int) -> None:
        """Close a step: measure what waits, make room for one more step like this one, hand over what is due."""
        self._blocks = {
            key: block for key, block in self._blocks.items() if block.rows
        }  # other shapes may never return
        for key, block in self._blocks.items():
            self._settle(block, key[-1])
        before = self._steps[-1][1] if self._steps else 0
        if len(self._spots) == before:
            return
        self._steps.append((step, len(self._spots)))
        late = time.monotonic() - self._since > FLUSH_SECONDS
        if self._emit is not None and (late or len(self._steps) >= self._flush_steps):
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

    def _parts(self) -> list[Tensor]:
        return [*([] if self._room is None else [self._room[: self._used]]), *self._spill]

    def flush(self) -> None:
        """Hand the rows to `emit` and forget them."""
        if self._emit is not None and self._steps:
            if self._octaves is not None:
                self._name_histograms()
            self._emit(self.frame())
            self._clear()

    def frame(self) -> pd.DataFrame:
        """The rows of closed steps: the columns of the table `stats`, and `name`, `part`, `call`, `update_ratio`."""
        rows = self._closed
        values = derive(self._fields(rows)).numpy()
        spots, code, steps = self._words(np.arange(rows))
        columns = key_columns(spots, code, steps, self.seeds)
        for name, column in zip(STATISTICS, values, strict=True):
            columns[name] = column.reshape(-1).astype(np.int64) if name in COUNTS else column.reshape(-1)
        rms = values[list(STATISTICS).index("rms")]
        columns["update_ratio"] = update_ratio(spots, code, steps, rms).reshape(-1)
        return pd.DataFrame(columns)

    @property
    def _closed(self) -> int:
        """Rows of closed steps."""
        return self._steps[-1][1] if self._steps else 0

    def _words(self, rows: np.ndarray) -> tuple[list[Spot], np.ndarray, np.ndarray]:
        """Spots that occur, which of them each row has, and its step."""
        steps, ends = np.array(self._steps, dtype=np.int64).reshape(-1, 2).T
        codes: dict[Spot, int] = {}
        code = np.array([codes.setdefault(self._spots[row], len(codes)) for row in rows.tolist()], dtype=np.int64)
        return list(codes), code, steps[np.searchsorted(ends, rows, side="right")]

    def histograms(self) -> pd.DataFrame:
        """The table `histograms` of what was closed since it was last asked for, with `name`, `part` and `call`."""
        self._name_histograms()
        found, self._histograms = self._histograms, []
        return pd.concat(found, ignore_index=True).astype(dict.fromkeys(WORDS, "category"))

    def _name_histograms(self) -> None:
        """Give the histograms their words while the rows are here; those of an open step wait."""
        if self._octaves is None or self._counting is None:
            raise UsageError("histograms: none were recorded; ask for them with histograms=True")
        self._counting.settle()
        found = pd.concat([*self._open_histograms, self._octaves.histograms()])
        found = found.sort_values("layer", kind="stable", ignore_index=True)
        closed = found["layer"] < self._closed
        self._open_histograms, found = [found[~closed]], found[closed]
        rows = found["layer"].to_numpy()[:: len(self.seeds)]
        columns = pd.DataFrame(key_columns(*self._words(rows), self.seeds), index=found.index)
        self._histograms.append(pd.concat([columns, found[["first", "positive", "negative"]]], axis=1))

    def _fields(self, rows: int) -> Tensor:
        """(F, rows, E) on the host, in the order in which the tensors came."""
        size = len(self.seeds)
        if rows == 0:
            return torch.empty(len(FIELDS), 0, size, dtype=torch.float64)
        parts = self._parts()
        found = torch.cat([part.to(parts[0].device) for part in parts]).cpu()
        fields = found[torch.from_numpy(np.argsort(np.array(self._order)))[:rows]].movedim(1, 0).contiguous()
        undead = [(spot.tensor, spot.direction) != ("activation", "forward") for spot in self._spots[:rows]]
        fields[_PLACE["dead"], torch.tensor(undead)] = torch.nan
        if self._shares:
            at = [row for places, _ in self._shares for row in places]
            share = torch.cat([share.double().expand(-1, size) for _, share in self._shares]).cpu()
            kept = [place for place, row in enumerate(at) if row < rows]
            fields[_PLACE["saturated"], torch.tensor(at, dtype=torch.int64)[kept]] = share[kept]
        kept_relus = [pair for pair in self._relus if max(pair) < rows]
        if kept_relus:
            z, phi = torch.tensor(kept_relus).T
            seen = fields[_PLACE["n_zero"], phi] + fields[_PLACE["n_nan"], phi]
            fields[_PLACE["saturated"], z] = seen / fields[_PLACE["count"], phi]
        return fields


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
