"""Rows that have been measured, kept on their device until they are handed over as the frame of a table.

Nothing waits for a GPU before a frame is asked for. Legend: E networks, N batch, C units, K rows, F fields.
"""

import time
from collections.abc import Hashable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from initlab.stats.backend import Backend
from initlab.stats.histogram import bin_columns
from initlab.stats.keys import KEY_COLUMNS, TensorKey, key_columns
from initlab.stats.reference import BLOCK, FIELDS
from initlab.stats.statistics import COUNTS, STATISTICS, TRUE_COLUMNS
from initlab.stats.workspace import AT_ONCE

FLUSH_SECONDS = 30.0  # rows are handed over at least so often
BATCHED = ("preactivation", "activation", "drift")  # tensors whose rows count inputs
_SATURATED = list(FIELDS).index("saturated")
_RMS, _STD = (list(STATISTICS).index(name) for name in ("rms", "std"))
_OF_ACTIVATIONS = [k for k, row in enumerate(STATISTICS.values()) if row.of_activations]


class Item(NamedTuple):
    """A tensor (E, N, C) to be measured, and for preactivations the saturated share of each network, (E,)."""

    key: TensorKey
    values: Tensor
    saturated: Tensor | None = None


class RowBuffer:
    """Rows of one table, a column for each number, for an ensemble of networks.

    seeds: one for each network. columns: which key columns the table has. names: those of the numbers.
    flush_rows: `due` says when the buffer holds so many rows, or has held rows for 30 seconds.
    """

    def __init__(
        self, seeds: Sequence[int], columns: Sequence[str], names: Sequence[str], flush_rows: float = float("inf")
    ) -> None:
        self.seeds, self.columns, self.names, self._flush_rows = list(seeds), tuple(columns), tuple(names), flush_rows
        self.codes: dict[TensorKey, int] = {}  # every key has a number for good
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self.rows: list[int] = []  # of each tensor the number of its key
        self.steps: list[tuple[int, int]] = []  # a step, and how many tensors there were after it
        self._blocks: list[Tensor] = []
        self._since = time.monotonic()

    def __len__(self) -> int:
        return len(self.rows) * len(self.seeds)

    def code(self, key: TensorKey) -> int:
        """The number of a key."""
        return self.codes.setdefault(key, len(self.codes))

    def put(self, keys: Iterable[TensorKey], values: Tensor, step: int = 0) -> None:
        """Keep the numbers (numbers, K, E) of K tensors at a step; the memory must stay as it is."""
        self.rows += [self.codes.setdefault(key, len(self.codes)) for key in keys]
        self.steps.append((step, len(self.rows)))
        self._blocks.append(values)

    def put_codes(self, codes: Sequence[int], values: Tensor, step: int) -> None:
        """The same of keys by their numbers, which stay the same from step to step."""
        self.rows += codes
        RowBuffer.put(self, (), values, step)

    def due(self) -> bool:
        """Whether the rows should be handed over."""
        return len(self) >= self._flush_rows or time.monotonic() - self._since > FLUSH_SECONDS

    def frame(self) -> pd.DataFrame:
        """The rows in the order in which they came, the seeds running fastest."""
        return self._make_frame(self.numbers(), self.seeds)

    def take(self) -> pd.DataFrame:
        """The rows as a frame; they are forgotten here."""
        frame = self.frame()
        self.clear()
        return frame

    def numbers(self) -> Tensor:
        """(numbers, K, E) on the host."""
        if not self._blocks:
            return torch.empty(len(self.names), 0, len(self.seeds), dtype=torch.float64)
        # The numbers of a row stand together in most blocks, and stay so.
        each = [block.to(self._blocks[0].device).movedim(0, -1) for block in self._blocks]
        return torch.cat(each).cpu().movedim(-1, 0)

    @property
    def n_closed(self) -> int:
        """How many tensors the steps so far have brought."""
        return self.steps[-1][1] if self.steps else 0

    def code_and_step(self, tensors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The number of the key, and the step, of tensors by their place in the buffer."""
        steps, ends = np.array(self.steps, dtype=np.int64).reshape(-1, 2).T
        return np.array(self.rows, dtype=np.int64)[tensors], steps[np.searchsorted(ends, tensors, side="right")]

    def _make_frame(self, numbers: Tensor, seeds: Sequence[int]) -> pd.DataFrame:
        columns: dict[str, Any] = self._key_columns(np.arange(self.n_closed), seeds)
        for name, column in zip(self.names, numbers.numpy(), strict=True):
            columns[name] = column.reshape(-1).astype(np.int64) if name in COUNTS else column.reshape(-1)
        return pd.DataFrame(columns)

    def _key_columns(self, tensors: np.ndarray, seeds: Sequence[int] = ()) -> dict[str, np.ndarray | pd.Categorical]:
        return key_columns(list(self.codes), *self.code_and_step(tensors), seeds or self.seeds, self.columns)


class StatsBuffer(RowBuffer):
    """The table `stats`, and the table `histograms` where a backend's bins are put too.

    What is put are rows of the backend (F, and the user's statistics); statistics are derived when the frame is made.
    `more` names numbers that are put behind the rows.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        backend: Backend,
        histograms: bool = False,
        more: Sequence[str] = (),
        columns: Sequence[str] = KEY_COLUMNS,
        flush_rows: float = float("inf"),
    ) -> None:
        super().__init__(seeds, columns, (*STATISTICS, *backend.statistics, *more), flush_rows)
        self.backend = backend
        self.bins = backend.bins(len(self.seeds)) if histograms else None

    def clear(self) -> None:
        super().clear()
        self.counts: list[tuple[Tensor, int]] = []

    def add(self, items: Iterable[Item], step: int) -> None:
        """Measure tensors of a step; those of one shape together, so that a step costs a few operations a shape."""
        for group in _groups(items):
            x = torch.stack([item.values for item in group]) if len(group) > 1 else group[0].values[None]
            rows = self.backend.rows(x, group[0].key.tensor in BATCHED, self.bins)
            for k, item in enumerate(group):
                if item.saturated is not None:
                    rows[_SATURATED, k] = item.saturated
            self.put([item.key for item in group], rows, step)
            self.put_bins([] if self.bins is None else self.bins.take())

    def put_bins(self, parts: Iterable[tuple[Tensor, int]]) -> None:
        """Keep the histograms (K, E, 2, B) of the rows that were put, and their lowest octaves."""
        self.counts += parts

    def take_tables(self) -> dict[str, pd.DataFrame]:
        """The tables `stats` and, if wanted, `histograms`; their rows are forgotten here."""
        tables = {"stats": self.frame()}
        if self.bins is not None:
            keys = self._key_columns(np.arange(self.n_closed))
            tables["histograms"] = pd.DataFrame({**keys, **bin_columns(self.counts)})
        self.clear()
        return tables

    def numbers(self) -> Tensor:
        """Only a unit whose activation is always 0 is dead: of all other tensors that share is nan."""
        rows = super().numbers()
        if not self.n_closed:
            return rows
        values = self._statistics(rows)
        others = np.array([key.tensor != "activation" or key.direction != "forward" for key in self.codes])
        elsewhere = torch.from_numpy(others[self.rows[: self.n_closed]])[:, None]
        for k in _OF_ACTIVATIONS:
            values[k].masked_fill_(elsewhere, torch.nan)
        return values

    def _statistics(self, rows: Tensor) -> Tensor:
        values, custom = self.backend.derive(rows[: len(FIELDS)]), rows[len(FIELDS) :]
        return torch.cat([values, custom]) if len(custom) else values


class RangeBuffer(StatsBuffer):
    """The table `stats` of networks that may leave the range of their number format, with the two TRUE_COLUMNS.

    These are log2 of rms and std as the format holds them, but where `correct` has said what they truly are.
    """

    def __init__(self, seeds: Sequence[int], backend: Backend, flush_rows: float = float("inf")) -> None:
        super().__init__(seeds, backend, more=TRUE_COLUMNS, flush_rows=flush_rows)

    def clear(self) -> None:
        super().clear()
        self._true: list[tuple[int, Tensor]] = []  # a first tensor, and the two numbers (2, K, E) from there on

    def join(self, others: Sequence["RangeBuffer"]) -> pd.DataFrame:
        """The rows of these networks and of those of the others, which hold the same tensors, as one frame."""
        every = [self, *others]
        return self._make_frame(
            torch.cat([one.numbers() for one in every], -1), [s for one in every for s in one.seeds]
        )

    def correct(self, true: Tensor) -> None:
        """The two numbers (2, K, E) of the K tensors that are put next."""
        self._true.append((len(self.rows), true))

    def _statistics(self, rows: Tensor) -> Tensor:
        found = super()._statistics(rows)
        true = torch.stack([found[_RMS], found[_STD]]).log2()
        for start, numbers in self._true:
            true[:, start : start + numbers.shape[1]] = numbers
        return torch.cat([found, true])


def _groups(items: Iterable[Item]) -> Iterable[list[Item]]:
    """Items of one shape together, as many as are looked at together."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault((item.values.shape, item.values.dtype, item.key.tensor in BATCHED), []).append(item)

    def cut(group: list[Item]) -> Iterable[list[Item]]:
        first = group[0].values
        size = max(1, (AT_ONCE if first.device.type == "cpu" else BLOCK["cuda"]) // max(1, first.numel()))
        return (group[k : k + size] for k in range(0, len(group), size))

    return chain.from_iterable(map(cut, groups.values()))
