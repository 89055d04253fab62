"""What is said about a tensor: a table of statistics that outlive the number format, as tidy rows.

Moments are population moments over the finite entries, derived from rows of float64 that carry a power of two
(moments.py), so that a float32 tensor of 1e30 or 1e-40 has a finite, non-zero rms. With no finite entry they are nan.
Knows nothing of networks: it is handed tensors and keys. Legend: E ensemble, N batch, C units, K keys, F fields.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from initlab.stats.reference import BLOCK
from initlab.stats.summarize import FIELDS, derive, octaves, summarize, summarize_and_count
from initlab.stats.workspace import AT_ONCE

# Order of the rows of a measured block, and the columns of the frame.
STATISTICS: dict[str, str] = {
    "count": "entries, finite or not",
    "n_nan": "entries that are nan",
    "n_inf": "entries that are inf or -inf",
    "n_subnormal": "entries smaller than the dtype's smallest normal number, zero not counted",
    "mean": "mean of the finite entries",
    "std": "their standard deviation, pooled over batch and units",
    "rms": "square root of their second moment",
    "q": "their second moment",
    "norm": "square root of the sum of their squares",
    "min": "smallest finite entry",
    "max": "largest finite entry",
    "frac_zero": "share of entries that are exactly 0",
    "frac_saturated": "share of preactivations where |phi'| is below 5 % of its largest value",
    "frac_dead": "share of units whose activation is 0 for the whole batch",
    "std_within": "batch std inside a unit, root mean square over units",
    "cosine": "mean pairwise cosine of the batch's vectors, those of length 0 left out",
}
COUNTS = ("count", "n_nan", "n_inf", "n_subnormal", "n_nonfinite")
SATURATED = 0.05


class Key(NamedTuple):
    """Which tensor a row is about; the words of the columns stand in the README's glossary."""

    stage: str
    implementation: str
    step: int
    layer: int
    tensor: str
    direction: str


class Item(NamedTuple):
    """A tensor (E, N, C) to be measured, and for preactivations the saturated share of each network, (E,)."""

    key: Key
    values: Tensor
    saturated: Tensor | None = None


def saturated_share(slope: Tensor, largest: float) -> Tensor:
    """Share of |phi'(z)| below 5 % of its largest value, (..., N, C) -> (...)."""
    return (slope.abs() < SATURATED * largest).double().mean((-2, -1))


def measure(x: Tensor, batched: bool = True) -> Tensor:
    """All statistics of (..., N, C) over its last two dimensions: float64 of shape (S, ...), in order of STATISTICS.

    `batched` says that N counts inputs, so that `frac_dead`, `std_within` and `cosine` have a meaning; else they are
    nan. `frac_saturated` is nan here: it needs phi'.
    """
    return derive(summarize(x, batched))


def relative_error(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """||a - b|| / ||b|| over the last two dimensions, and how many entries of either are not finite.

    0/0 is 0: two tensors of zeros agree. Where anything is not finite the error is nan.
    """
    wide_a, wide_b = a.double(), b.double()
    n_bad = torch.zeros(a.shape[:-2], dtype=torch.int64, device=a.device)
    if not _surely_finite(wide_a) or not _surely_finite(wide_b):
        n_bad = (wide_a.isfinite() & wide_b.isfinite()).logical_not_().sum((-2, -1))
    if a.dtype == torch.float64:  # squares of float64 leave float64; quotients do not
        peak = torch.maximum(wide_a.abs(), wide_b.abs()).amax((-2, -1), keepdim=True)
        scale = torch.where((peak > 0) & peak.isfinite(), peak, 1)
        wide_a, wide_b = wide_a / scale, wide_b / scale
    difference, reference = (torch.linalg.vector_norm(t, dim=(-2, -1)) for t in (wide_a - wide_b, wide_b))
    error = torch.where(difference == 0, 0, difference / reference)
    return torch.where(n_bad > 0, torch.nan, error), n_bad


def _surely_finite(wide: Tensor) -> bool:
    """True without looking at every entry, on a CPU; never waits for a GPU."""
    return wide.device.type == "cpu" and bool(wide.sum().isfinite())


BATCHED = ("preactivation", "activation", "drift")
_SATURATED = list(FIELDS).index("saturated")


def _groups(items: Iterable[Item]) -> list[list[Item]]:
    """Items of one shape together, as many as are looked at together."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault((item.values.shape, item.values.dtype, item.key.tensor in BATCHED), []).append(item)
    found = []
    for group in groups.values():
        first = group[0].values
        size = max(1, (AT_ONCE if first.device.type == "cpu" else BLOCK["cuda"]) // max(1, first.numel()))
        found += [group[k : k + size] for k in range(0, len(group), size)]
    return found


class Blocks:
    """Measured numbers on their device, (numbers, K, E) at a time; nothing is copied before `frame`.

    `finish` makes the named numbers (len(names), K, E) of what was put; without it they are put as they are.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        key_names: Sequence[str],
        names: Sequence[str],
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.seeds, self.key_names, self.names = list(seeds), tuple(key_names), tuple(names)
        self._finish = finish
        self._keys: list[Key] = []
        self._blocks: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._keys) * len(self.seeds)

    def put(self, keys: Sequence[Key], block: Tensor) -> None:
        self._keys += keys
        self._blocks.append(block)

    def frame(self) -> pd.DataFrame:
        """The rows so far, a column per key and per number; the collector is empty afterwards."""
        keys, blocks = self._keys, self._blocks
        self._keys, self._blocks = [], []
        shape = (len(self.names), len(keys) * len(self.seeds))
        values = np.empty(shape)
        if blocks:
            whole = torch.cat(blocks, 1)
            values = (self._finish(whole) if self._finish else whole).cpu().numpy().reshape(shape)
        columns = self._key_columns(keys)
        for name, row in zip(self.names, values, strict=True):
            columns[name] = row.astype(np.int64) if name in COUNTS else row
        return pd.DataFrame(columns)

    def _key_columns(self, keys: Sequence[Key]) -> dict[str, np.ndarray | pd.Categorical]:
        return {name: self._key_column(name, keys) for name in self.key_names}

    def _key_column(self, name: str, keys: Sequence[Key]) -> np.ndarray | pd.Categorical:
        """One key column; the seed runs fastest."""
        if name == "seed":
            return np.tile(np.asarray(self.seeds, dtype=np.int64), len(keys))
        given = [getattr(key, name) for key in keys]
        if name in ("step", "layer"):
            return np.repeat(np.array(given, dtype=np.int64), len(self.seeds))
        codes, found = pd.factorize(np.array(given, dtype=object))
        return pd.Categorical.from_codes(np.repeat(codes, len(self.seeds)), list(found))


class Rows(Blocks):
    """The table `stats`. Tensors of one shape are measured together: a step costs a few operations for each shape.

    What is put are the fields of rows, (F, K, E), by whatever means they were found; statistics are derived in `frame`.
    """

    def __init__(self, seeds: Sequence[int], histograms: bool = False) -> None:
        names = ("stage", "implementation", "seed", "step", "layer", "tensor", "direction")
        super().__init__(seeds, names, list(STATISTICS), derive)
        self._with_histograms, self._histograms = histograms, _Histograms(seeds, names, ())

    def add(self, items: Iterable[Item]) -> None:
        for group in _groups(items):
            keys = [item.key for item in group]
            x = torch.stack([item.values for item in group]) if len(group) > 1 else group[0].values[None]
            batched = group[0].key.tensor in BATCHED
            fields, counts = summarize_and_count(x, batched) if self._with_histograms else (summarize(x, batched), None)
            for k, item in enumerate(group):
                if item.saturated is not None:
                    fields[_SATURATED, k] = item.saturated
            self.put(keys, fields)
            if counts is not None:
                self.put_histograms(keys, counts, x.dtype)

    def frame(self) -> pd.DataFrame:
        """Only a unit whose activation is always 0 is dead: the share of all other tensors is nan."""
        frame = super().frame()
        activation = (frame["tensor"] == "activation") & (frame["direction"] == "forward")
        return frame.assign(frac_dead=frame["frac_dead"].where(activation))

    def put_histograms(
        self, keys: Sequence[Key], counts: Tensor, dtype: torch.dtype, lowest: int | None = None
    ) -> None:
        """Counts (K, E, 2, B) of tensors of that dtype as `histogram` makes them, or from another lowest octave on."""
        self._histograms.put_counts(keys, counts, octaves(dtype)[0] if lowest is None else lowest)

    def histograms(self) -> pd.DataFrame:
        """The table `histograms` of what was recorded so far; the collector of histograms is empty afterwards.

        After the keys: `first`, the octave of the first bin, and `positive` and `negative`, the counts of entries from
        that octave on, as long as each other and without empty bins at either end. With no entry in any bin `first`
        is 0 and the lists are empty.
        """
        return self._histograms.frame()


class _Histograms(Blocks):
    """Histograms on their device, (K, E, 2, B) at a time; on a CPU without the octaves that a block does not touch."""

    def __init__(self, seeds: Sequence[int], key_names: Sequence[str], names: Sequence[str]) -> None:
        super().__init__(seeds, key_names, names)
        self._lowest: list[int] = []

    def put_counts(self, keys: Sequence[Key], counts: Tensor, lowest: int) -> None:
        first, end = 0, counts.shape[-1]
        if counts.device.type == "cpu":
            first, end = _touched(counts.numpy())
        self._lowest.append(lowest + first)
        self.put(keys, counts[..., first:end].clone())

    def frame(self) -> pd.DataFrame:
        keys, blocks, lowest = self._keys, self._blocks, self._lowest
        self._keys, self._blocks, self._lowest = [], [], []
        rows = [row for block, low in zip(blocks, lowest, strict=True) for row in _trimmed(block, low)]
        columns: dict[str, Any] = self._key_columns(keys)
        columns["first"] = np.array([first for first, _ in rows], dtype=np.int64)
        for sign, name in enumerate(("positive", "negative")):
            columns[name] = np.empty(len(rows), dtype=object)
            for place, (_, counts) in enumerate(rows):  # one by one: numpy makes a matrix of lists of one length
                columns[name][place] = counts[sign]
        return pd.DataFrame(columns)


def _trimmed(block: Tensor, lowest: int) -> Iterator[tuple[int, np.ndarray]]:
    """First octave and counts (2, octaves) of each histogram of (K, E, 2, B), the seed running fastest."""
    for counts in block.cpu().numpy().astype(np.int64).reshape(block.shape[:-2].numel(), *block.shape[-2:]):
        first, end = _touched(counts)
        yield lowest + first if end else 0, counts[:, first:end]


def _touched(counts: np.ndarray) -> tuple[int, int]:
    """First bin of (..., B) that has an entry, and the one after the last; 0, 0 where there is none."""
    places = np.flatnonzero(counts.any(tuple(range(counts.ndim - 1))))
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


class Differences(Blocks):
    """The table `parity`: relative error of one implementation's tensors against the other's."""

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__(seeds, ("seed", "step", "layer", "tensor", "direction"), ("relative_error", "n_nonfinite"))

    def add(self, items: Iterable[Item], references: Iterable[Item]) -> None:
        """Both in the same order and of the same shapes."""
        for ours, theirs in zip(_groups(items), _groups(references), strict=True):
            stacked = (torch.stack([item.values for item in group]) for group in (ours, theirs))
            error, n_bad = relative_error(*stacked)
            self.put([item.key for item in ours], torch.stack([error, n_bad.double()]))
