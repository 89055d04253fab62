"""What is said about a tensor: a table of statistics that outlive the number format, as tidy rows.

Moments are population moments over the finite entries, accumulated in float64 (float64 tensors after division by a
power of two), so that a float32 tensor of 1e30 or 1e-40 has a finite, non-zero rms. With no finite entry they are nan.
Knows nothing of networks: it is handed tensors and keys. Legend: E ensemble, N batch, C units.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from initlab.signal.moments import derive, summarize

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


BLOCK_ENTRIES = 2**18
BATCHED = ("preactivation", "activation")
_SATURATED_ROW, _DEAD_ROW = list(STATISTICS).index("frac_saturated"), list(STATISTICS).index("frac_dead")


def _groups(items: Iterable[Item]) -> list[list[Item]]:
    """Items of one shape together, as many as make a block that a processor's cache holds."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault((item.values.shape, item.values.dtype, item.key.tensor in BATCHED), []).append(item)
    found = []
    for group in groups.values():
        size = max(1, BLOCK_ENTRIES // max(1, group[0].values.numel()))
        found += [group[k : k + size] for k in range(0, len(group), size)]
    return found


class Blocks:
    """Measured numbers on their device, (len(names), keys, E) at a time; nothing is copied before `frame`."""

    def __init__(self, seeds: Sequence[int], key_names: Sequence[str], names: Sequence[str]) -> None:
        self.seeds, self.key_names, self.names = list(seeds), tuple(key_names), tuple(names)
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
        values = torch.cat(blocks, 1).cpu().numpy().reshape(shape) if blocks else np.empty(shape)
        columns = {name: self._key_column(name, keys) for name in self.key_names}
        for name, row in zip(self.names, values, strict=True):
            columns[name] = row.astype(np.int64) if name in COUNTS else row
        return pd.DataFrame(columns)

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
    """The table `stats`. Tensors of one shape are measured together: a step costs a few operations for each shape."""

    def __init__(self, seeds: Sequence[int]) -> None:
        names = ("stage", "implementation", "seed", "step", "layer", "tensor", "direction")
        super().__init__(seeds, names, list(STATISTICS))

    def add(self, items: Iterable[Item]) -> None:
        for group in _groups(items):
            block = measure(torch.stack([item.values for item in group]), group[0].key.tensor in BATCHED)
            for k, item in enumerate(group):
                if item.saturated is not None:
                    block[_SATURATED_ROW, k] = item.saturated
                if item.key[-2:] != ("activation", "forward"):
                    block[_DEAD_ROW, k] = torch.nan
            self.put([item.key for item in group], block)


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
