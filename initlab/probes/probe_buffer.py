"""The rows of a probe: tensors come one by one, and the rows of a step can be handed over when the step ends.

Where a backend makes rows quickly a tensor is measured when it comes. Elsewhere small tensors of one shape are copied
into a block and measured together: what overwrites them afterwards changes no row.
Legend: E networks, N batch, C units, K rows, F numbers of a row.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import count, pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from initlab.errors import UsageError
from initlab.stats import reference
from initlab.stats.backend import COUNT, N_NAN, N_ZERO, SATURATED, Backend
from initlab.stats.buffer import StatsBuffer
from initlab.stats.format_shares import BinTables
from initlab.stats.histogram import Bins, bin_columns
from initlab.stats.keys import KEY_COLUMNS, MODULE_COLUMNS, TensorKey, key_columns, update_ratio
from initlab.stats.reference import FIELDS, Row
from initlab.stats.statistics import CHANCE, COUNTS, IN_LN, LOSS_SCALE, STATISTICS, UPDATE_RATIO
from initlab.stats.summarize import derive

# Fields of a row that grow with the tensor, and with its square.
LINEAR, SQUARED = ([list(FIELDS).index(name) for name in names] for names in (("mean", "min", "max"), ("m2", "within")))
BLOCK_ENTRIES = 2**18  # entries of a block that a processor's cache holds
BLOCK_TENSORS = 64  # of a block at most: beyond, copying costs more than measuring


class _Block(NamedTuple):
    """Memory for some tensors of one shape, and the rows that they will be."""

    values: Tensor
    rows: list[int]


class ProbeBuffer(StatsBuffer):
    """The table `stats` with the columns `name`, `part`, `call` and `update_ratio`.

    With `emit` the rows are handed over every `flush_steps` recorded steps or 30 seconds, and are then forgotten here.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        backend: Backend,
        emit: Callable[[pd.DataFrame], None] | None = None,
        flush_steps: int = 100,
        histograms: bool = False,
        merged: bool = False,
        formats: Sequence[str] = (),
    ) -> None:
        super().__init__(seeds, backend, histograms or bool(formats), columns=(*KEY_COLUMNS, *MODULE_COLUMNS))
        # Of a key: the rows of its shapes, each of how many batches.
        self._merged: dict[int, list[tuple[Row, int]]] | None = {} if merged else None
        self._emit, self._flush_steps = emit, flush_steps
        self.scaled: set[int] = set()  # keys of what a gradient scaler multiplies, and nobody divides again
        self.pass_scale = 1.0  # what multiplied the loss of the backward pass under way
        self._bin_rows: list[int] = []  # which rows the histograms belong to
        self.bin_tables = BinTables(histograms, formats)
        numbers = len(FIELDS) + len(backend.statistics)
        self._page = torch.empty(
            0, len(self.seeds), numbers, dtype=torch.float64, device="cpu"
        )  # rows of the step under way
        self._lines: list[Tensor] = []  # the same row by row: views are made once

    def clear(self) -> None:
        super().clear()
        self._used: set[int] = set()  # keys that have a row in it
        self._first = 0  # row of the step under way
        self._gathered: dict[tuple[object, ...], _Block] = {}
        self._shares: list[tuple[int, Tensor]] = []  # of a row: its saturated share
        self._rectified: list[tuple[int, int]] = []  # of a row: that of its ReLU, which says the share
        self._scales: dict[int, float] = {}  # of rows: what multiplied the loss, and is divided out
        self._step_scales: dict[int, float] = {}  # of steps, by their first row: the same, for all other rows
        self._rare: list[int] = []  # rows that are shown only where something is not finite
        self._alike: list[tuple[int, int]] = []  # a row that is shown only where it differs from another
        self._chances: list[tuple[int, Tensor]] = []  # of a loss: its value at chance

    def put(self, code: int, x: Tensor, batched: bool = True) -> int:  # type: ignore[override]
        """Take the values of (N, C) or (E, N, C) as they are now; gives the number of the row.

        code: the number of the key. batched: whether N counts inputs.
        """
        code = self._find_unused(code)
        x = _as_float(x)
        if self._merged is not None and batched and code not in self.scaled:
            self._merge(code, x)
        row, line = len(self.rows), len(self.rows) - self._first
        if self.pass_scale != 1 and code in self.scaled:
            self.set_scale([row], self.pass_scale)
        if not line or line >= len(self._lines):
            self._make_room(line + 1, x.device)
        quick = self.backend.is_quick(x) and self._page.is_cpu
        size = 1 if quick else min(BLOCK_ENTRIES // x.numel(), BLOCK_TENSORS)
        if size < 2:
            self.backend.rows(x, batched, self.bins, self._lines[line])
            if self.bins is not None:
                self._bin_rows.append(row)
            self.rows.append(code)
            return row
        kind = (x.shape, x.dtype, x.device, batched)
        if kind not in self._gathered:
            with torch.inference_mode(False):  # made in inference mode it could not be written to outside of it
                values = torch.empty((size, *x.shape), dtype=x.dtype, device=x.device)
            self._gathered[kind] = _Block(values, [])
        block = self._gathered[kind]
        block.values[len(block.rows)].copy_(x.detach())
        block.rows.append(row)
        self.rows.append(code)
        if len(block.rows) == size:
            self._measure_block(block, batched)
        return row

    def put_each(self, codes: Sequence[int], tensors: Sequence[Tensor], before: Sequence[Tensor] = ()) -> range:
        """Measure tensors of a single network that have no batch, of any shapes, or what `before` has become since.

        codes: the numbers of their keys. before: earlier values, which the changes take the place of. Gives the numbers
        of the rows.
        """
        if not codes:
            return range(0)
        rows = self.backend.change_rows_(before, tensors, self.bins) if before else self.describe(tensors, self.bins)
        self._bin_rows += [] if self.bins is None else range(len(self.rows), len(self.rows) + len(codes))
        return self._put_rows(codes, rows)

    def describe(self, tensors: Iterable[Tensor], bins: Bins | None = None) -> Tensor:
        """Rows (F, K) of tensors that have no batch, not kept yet."""
        return self.backend.rows_of_each([_as_float(x) for x in tensors], bins)

    def put_unless_alike(
        self, codes: Sequence[int], rows: Tensor, scales: Sequence[float], others: Sequence[int]
    ) -> None:
        """Rows (F, K) of multiplied losses that are left out of frames where they say what `others` say."""
        numbers = self._put_rows(codes, rows)
        self._scales |= {row: scale for row, scale in zip(numbers, scales, strict=True) if scale != 1}
        self._alike += zip(numbers, others, strict=True)

    def set_rare(self, row: int) -> None:
        """A row that is left out of frames where all entries are finite."""
        self._rare.append(row)

    def _put_rows(self, codes: Sequence[int], rows: Tensor) -> range:
        first, place = len(self.rows), len(self.rows) - self._first
        codes = [self._find_unused(code) for code in codes]
        self._make_room(place + len(codes), rows.device)
        self._page[place : place + len(codes)] = rows.t().unsqueeze(1)
        self.rows += codes
        return range(first, first + len(codes))

    def _find_unused(self, code: int) -> int:
        """The number of a key; in a step that has a row of it, that of the same key with a number behind its part."""
        if code in self._used:
            key = list(self.codes)[code]
            n = next(n for n in count(1) if self.codes.get(_number(key, n)) not in self._used)
            self.scaled.update({self.code(_number(key, n))} if code in self.scaled else ())
            code = self.code(_number(key, n))
        self._used.add(code)
        return code

    def _make_room(self, rows: int, device: torch.device) -> None:
        """Let so many rows of the step under way have room; the memory grows by doubling."""
        if rows > len(self._page) or (rows == 1 and device != self._page.device):
            with torch.inference_mode(False):
                page = torch.empty(max(64, 2 * rows), *self._page.shape[1:], dtype=torch.float64, device=device)
                page[: len(self._page)].copy_(self._page)
            self._page, self._lines = page, list(page.unbind())

    def _merge(self, code: int, x: Tensor) -> None:
        """Merge a batch unit by unit with those before it of the same key and shape."""
        assert self._merged is not None
        own = reference.row(x)
        known = self._merged.setdefault(code, [])
        if known and known[-1][0].heading.shape == own.heading.shape:
            before, n = known.pop()
            known.append((reference.merge(before, own), n + 1))
        else:
            known.append((own, 1))

    def merged(self) -> pd.DataFrame:
        """A row for each output over all batches that were recorded: the columns of a frame but those of a step."""
        if self._merged is None:
            raise UsageError("merged: batches were not merged; ask for it with merged=True")
        found = [(code, row, n) for code, rows in self._merged.items() for row, n in rows]
        found.sort(key=lambda one: one[0])
        keys, codes = list(self.codes), np.array([code for code, _, _ in found], dtype=np.int64)
        names = [name for name in self.columns if name != "step"]
        columns: dict[str, Any] = key_columns(keys, codes, np.zeros_like(codes), self.seeds, names)
        columns["batches"] = np.repeat([n for _, _, n in found], len(self.seeds))
        width = len(self.seeds)
        fields = [row.fields.cpu().reshape(len(FIELDS), -1).expand(-1, width) for _, row, _ in found]
        values = derive(torch.stack(fields, 1)) if found else torch.empty(len(STATISTICS), 0, width)
        ours = np.array([keys[code].tensor == "activation" for code in codes], dtype=bool)
        for (name, one), column in zip(STATISTICS.items(), values, strict=True):
            if one.of_activations:
                column[torch.from_numpy(~ours)] = torch.nan
            columns[name] = column.reshape(-1).numpy().astype(np.int64 if one.is_count else np.float64)
        return pd.DataFrame(columns)

    def set_saturated(self, row: int, share: Tensor) -> None:
        """The saturated share of a row of preactivations, (E,) or one number."""
        self._shares.append((row, share.reshape(1, -1)))

    def set_chance(self, row: int, value: Tensor) -> None:
        """What the loss of a row would be if all classes were equally probable."""
        self._chances.append((row, value))

    def set_rectified(self, row: int, activation_row: int) -> None:
        """Preactivations are saturated where their ReLU, which is measured too, is 0 or nan: nothing to compute."""
        self._rectified.append((row, activation_row))

    def set_scale(self, rows: Iterable[int], scale: float) -> None:
        """What multiplied the loss that rows belong to: they are divided by it."""
        self._scales |= dict.fromkeys(rows if scale != 1 else (), scale)

    def set_step_scale(self, scale: float) -> None:
        """What multiplied a loss of the step under way, which is shown beside all rows that belong to no pass."""
        self._step_scales[self._first] = scale

    def end_step(self, step: int) -> None:
        """Close a step: measure what was gathered, and hand over what is due."""
        for (*_, batched), block in self._gathered.items():
            self._measure_block(block, bool(batched))
        self._used.clear()
        self._gathered.clear()  # other shapes may never return
        if len(self.rows) > self.n_closed:
            super().put([], self._page[: len(self.rows) - self._first].clone().movedim(-1, 0), step)
            self._first = len(self.rows)
        if self._emit is not None and (len(self.steps) >= self._flush_steps or self.due()):
            self.flush()

    def flush(self) -> None:
        """Hand the rows to `emit` and forget them."""
        if self._emit is not None and self.steps:
            self.bin_tables.forget()
            self.take_bins()
            self._emit(self.frame())
            self.clear()

    def frame(self) -> pd.DataFrame:
        """The rows of closed steps: the columns of the table `stats`, and `name`, `part`, `call`, `update_ratio`."""
        frame = super().frame()
        rms = frame["rms"].to_numpy().reshape(-1, len(self.seeds))
        codes, steps = self.code_and_step(np.arange(self.n_closed))
        ratio = update_ratio(self.codes, codes, steps, rms)
        scale, chance = np.ones(self.n_closed), np.full(self.n_closed, np.nan)
        for first, value in self._step_scales.items():
            scale[first:][steps[first:] == steps[first : first + 1]] = value
        scale = np.where(np.isin(codes, list(self.scaled)), self._find_divisors(), scale)
        chances = [(row, float(value)) for row, value in self._chances if row < self.n_closed]
        if chances:
            rows, values = (list(side) for side in zip(*chances, strict=True))
            chance[rows] = values / self._find_divisors()[rows]
        more = {UPDATE_RATIO: ratio.reshape(-1)}
        more |= {name: np.repeat(column, len(self.seeds)) for name, column in ((LOSS_SCALE, scale), (CHANCE, chance))}
        frame = frame.assign(**more)
        lost = frame[["n_nan", "n_inf"]].to_numpy().any(1)
        finite = [row for row in self._rare if row < self.n_closed and not lost[row]]
        dropped = [*finite, *self._find_alike(frame)]
        return frame.drop(dropped).reset_index(drop=True) if dropped else frame

    def _find_alike(self, frame: pd.DataFrame) -> list[int]:
        """The rows that differ from others by rounding at most: those of a scaled loss were divided twice."""
        pairs = [pair for pair in self._alike if max(pair) < self.n_closed]
        if not pairs:
            return []
        rows, others = (frame[[*IN_LN, "min", "max"]].to_numpy()[list(side)] for side in zip(*pairs, strict=True))
        alike = np.isclose(rows, others, rtol=1e-5 if self._scales else 1e-12, atol=0, equal_nan=True).all(1)
        return [row for (row, _), same in zip(pairs, alike, strict=True) if same]

    def take_bins(self) -> BinTables:
        """The histograms of closed steps and what is made of them, with `name`, `part` and `call`."""
        if self.bins is not None:
            self.bin_tables.add(self._name_bins(), self.frame)
        return self.bin_tables

    def _measure_block(self, block: _Block, batched: bool) -> None:
        """Measure what waits in a block; if that fails, its rows say that they count nothing."""
        rows = block.rows.copy()
        block.rows.clear()
        if rows:
            lines = torch.tensor([row - self._first for row in rows], device=self._page.device)
            nothing = torch.full((self._page.shape[-1], 1, 1), torch.nan, dtype=torch.float64, device="cpu")
            nothing[[k for k, name in enumerate(FIELDS) if name in COUNTS]] = 0
            self._page[lines] = nothing.movedim(0, -1).to(self._page.device)
            found = self.backend.rows(block.values[: len(rows)], batched, self.bins)
            self._page[lines] = found.reshape(len(found), len(rows), -1).permute(1, 2, 0).to(self._page.device)
            self._bin_rows += [] if self.bins is None else rows

    def _find_divisors(self) -> np.ndarray:
        """What each row of closed steps is divided by; a scaler divides the gradients of parameters itself."""
        found = np.ones(self.n_closed)
        for row, scale in self._scales.items():
            found[row : row + 1] = scale  # of the step under way there is nothing yet
        return found

    def _statistics(self, rows: Tensor) -> Tensor:
        if self._scales:
            scale = torch.from_numpy(self._find_divisors())[:, None]
            rows[LINEAR] /= scale
            rows[SQUARED] /= scale.square()
        shares = [(row, share) for row, share in self._shares if row < self.n_closed]
        if shares:
            share = torch.cat([share.double().cpu().expand(-1, rows.shape[-1]) for _, share in shares])
            rows[SATURATED, [row for row, _ in shares]] = share
        pairs = [pair for pair in self._rectified if pair[1] < self.n_closed]
        if pairs:
            z, a = torch.tensor(pairs, device="cpu").T
            rows[SATURATED, z] = (rows[N_ZERO, a] + rows[N_NAN, a]) / rows[COUNT, a]
        return super()._statistics(rows)

    def _name_bins(self) -> pd.DataFrame:
        """The histograms of closed steps under the keys of their rows; those of the step under way stay here."""
        assert self.bins is not None
        self.put_bins(self.bins.take())
        parts, rows = self.counts, np.array(self._bin_rows, dtype=np.int64)
        ends = np.cumsum([0, *(len(counts) for counts, _ in parts)])
        closed = [torch.from_numpy(rows[start:end] < self.n_closed) for start, end in pairwise(ends)]
        columns = bin_columns([(part[own], low) for (part, low), own in zip(parts, closed, strict=True)])
        self.counts = [(part[~own], low) for (part, low), own in zip(parts, closed, strict=True) if not own.all()]
        self._bin_rows = rows[rows >= self.n_closed].tolist()
        rows = rows[rows < self.n_closed]
        order = np.argsort(rows, kind="stable")
        each = (order[:, None] * len(self.seeds) + np.arange(len(self.seeds))).reshape(-1)
        keys = self._key_columns(rows[order])
        frame = pd.DataFrame({**keys, **{name: column[each] for name, column in columns.items()}})
        if self._scales:  # powers of two, so that entries only move by octaves
            moved = np.log2(self._find_divisors()[rows[order]]).round().astype(np.int64)
            frame["first"] -= np.repeat(moved, len(self.seeds))
        return frame


def _as_float(x: Tensor) -> Tensor:
    """Numbers that float32 holds with the same exponents, and that a processor measures many times quicker as such."""
    return x.detach().float() if x.dtype is torch.bfloat16 and x.is_cpu else x


def _number(key: TensorKey, n: int) -> TensorKey:
    return key._replace(part=f"{key.part}~{n}")
