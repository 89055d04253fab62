"""What a number format would do to tensors that were measured in a wider one, from their histograms alone.

An octave holds the numbers from 2^k up to 2^(k+1). Formats end at powers of two, so that counts by octave say how many
entries would become inf, subnormal or 0; only the octave of the largest number may be cut.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from initlab.errors import UsageError
from initlab.stats.dtypes import FORMATS
from initlab.stats.keys import TEXT_COLUMNS

BINS = ("first", "positive", "negative")  # columns of a histogram beside its keys
SHARES = ("overflow", "overflow_most", "underflow", "subnormal")
MOST_SCALE = 126  # log2 of the largest loss scale: float32 must hold it, and its inverse


def format_shares(octaves: pd.DataFrame, frame: pd.DataFrame, formats: Sequence[str]) -> pd.DataFrame:
    """The share of each tensor's entries that each format would lose: a row per row of the frame and format.

    octaves: the table `histograms`; frame: the rows of the same tensors in the table `stats`; formats: names of
    FORMATS. Columns: the keys, `format`, and of all entries the shares `overflow` (finite, and beyond the format's
    largest number after rounding), `underflow` (not 0, and rounded to 0), `subnormal` (kept with less precision).
    `overflow` counts whole octaves, and one entry of the octave that the format's end cuts where the largest is beyond
    it; `overflow_most` counts all of that octave. The others are exact, but for entries half a unit from an end. What
    overflows becomes inf; of float8_e4m3, which has none, nan or the largest number, as the version of torch has it.
    """
    keys = [name for name in octaves if name not in BINS]
    rows = octaves.merge(frame[[*keys, "count", "min", "max"]], on=keys).reset_index(drop=True)
    row, octave, counts = flatten_octaves(rows)
    largest = np.maximum(-rows["min"], rows["max"]).to_numpy(float)
    total = rows["count"].to_numpy(float)

    def share(where: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return np.asarray(np.bincount(row[where], counts[where], len(rows)) / total)

    tables = []
    for name in formats:
        one = FORMATS[name]
        top = one.octaves[1]
        beyond, cut = largest >= one.overflow_value, share(octave == top)
        overflow = share(octave > top)
        with np.errstate(invalid="ignore"):
            at_least = np.where(beyond & (overflow == 0), 1 / total, overflow)
        tables.append(
            rows[keys].assign(
                format=name,
                overflow=at_least,
                overflow_most=overflow + np.where(beyond, cut, 0.0),
                underflow=share(octave < one.octaves[0] - 1),
                subnormal=share((octave >= one.octaves[0] - 1) & (octave < np.log2(one.tiny))),
            )
        )
    order = np.arange(len(rows) * len(tables)).reshape(len(tables), -1).T.reshape(-1)
    return pd.concat(tables, ignore_index=True).iloc[order].reset_index(drop=True)


def spread_formats(frame: pd.DataFrame, shares: pd.DataFrame) -> pd.DataFrame:
    """The frame with a column for each format and share, such as `float16_overflow`."""
    keys = [name for name in shares if name in frame]
    for name, mine in shares.groupby("format", sort=False):
        columns = {share: f"{name}_{share}" for share in SHARES}
        frame = frame.merge(mine[[*keys, *SHARES]].rename(columns=columns), "left", keys)
    return frame


def flatten_octaves(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every bin of a table of histograms: the number of its row, its octave, and its count of both signs."""
    length = rows["positive"].map(len).to_numpy(int)
    starts = np.repeat(np.cumsum(length) - length, length)
    row = np.repeat(np.arange(len(rows)), length)
    octave = np.repeat(rows["first"].to_numpy(int), length) + np.arange(length.sum()) - starts
    both = [np.concatenate(rows[sign].to_list() or [[]]).astype(float) for sign in ("positive", "negative")]
    return row, octave, both[0] + both[1]


class LossScale(NamedTuple):
    """The power of two that a loss can be multiplied by, so that a format holds the most of its gradients.

    `scale` is the largest with which no recorded gradient overflows, nan without a gradient that is not 0; `largest` is
    the largest gradient and `where` its tensor; `underflow` is the share of the gradients' entries other than 0 that
    still become 0 with the scale, `underflow_without` without one. Entries that are inf or nan count nowhere.
    """

    format: str
    scale: float
    largest: float
    where: str
    underflow: float
    underflow_without: float

    def __str__(self) -> str:
        if not self.scale > 0:
            return f"{self.format}: no gradient was recorded that is finite and not 0, so that no loss scale is found"
        return (
            f"{self.format}: multiply the loss by 2^{np.log2(self.scale):.0f} = {self.scale:g}: the largest gradient, "
            f"{self.largest:.3g} of {self.where}, does not overflow, and {100 * self.underflow:.2g} % of the entries "
            f"become 0 ({100 * self.underflow_without:.2g} % without a scale)"
        )


class BinTables:
    """The histograms of a probe, which come part by part, and what formats would lose of them.

    histograms: whether the histograms themselves are kept until they are taken. formats: names of FORMATS. The range of
    all gradients, a count for each octave and the largest one, is never forgotten.
    """

    def __init__(self, histograms: bool, formats: Sequence[str]) -> None:
        self._keeps, self._formats = histograms, list(formats)
        self._tables, self._shares = list[pd.DataFrame](), list[pd.DataFrame]()
        self.has_lost = False  # whether histograms were forgotten that nobody has taken
        self._counts: dict[int, float] = {}
        self._largest, self._where = 0.0, ""

    def forget(self) -> None:
        """Forget all parts so far."""
        self.has_lost |= any(len(table) for table in self._tables)
        self._tables, self._shares = [], []

    def histograms(self) -> pd.DataFrame:
        """The histograms since they were last taken."""
        if not self._keeps:
            raise UsageError("histograms: none were recorded; ask for them with histograms=True")
        tables, self._tables = self._tables, []
        return join_parts(tables)

    def shares(self) -> pd.DataFrame:
        """The shares of all parts, see `format_shares`."""
        self._refuse_none()
        return join_parts(self._shares)

    def _refuse_none(self) -> None:
        if not self._formats:
            raise UsageError("formats: none were asked for; ask with formats=['float16']")

    def add(self, octaves: pd.DataFrame, make_frame: Callable[[], pd.DataFrame]) -> None:
        """Take rows of the table `histograms`; the same rows of `stats` are made where formats need them."""
        self._tables += [octaves] if self._keeps else []
        if not self._formats:
            return
        frame = make_frame()
        self._shares.append(format_shares(octaves, frame, self._formats))
        keys = [name for name in octaves if name not in BINS]
        rows = octaves[octaves["direction"] == "backward"].merge(frame[[*keys, "min", "max"]], on=keys)
        _, octave, counts = flatten_octaves(rows)
        for k in np.unique(octave).tolist():
            self._counts[k] = self._counts.get(k, 0) + float(counts[octave == k].sum())
        largest = np.maximum(-rows["min"], rows["max"]).fillna(0).to_numpy(float)
        if len(rows) and largest.max() > self._largest:
            row = rows.iloc[int(largest.argmax())]
            name = " ".join(str(row[key]) for key in ("name", "tensor") if key in row and row[key] != "")
            self._largest, self._where = float(largest.max()), f"{name} at step {row['step']}"

    def find_scale(self, name: str = "float16") -> LossScale:
        """The largest power of two with which no gradient so far overflows in a format, and what underflows then."""
        self._refuse_none()
        one = FORMATS[name]
        octave = np.array(list(self._counts), dtype=int)
        counts = np.array(list(self._counts.values()))
        if not self._largest > 0:
            return LossScale(name, np.nan, self._largest, self._where, np.nan, np.nan)
        power = find_power(name, self._largest)
        lost, without = (float(counts[octave + k < one.octaves[0] - 1].sum() / counts.sum()) for k in (power, 0))
        return LossScale(name, 2.0**power, self._largest, self._where, lost, without)


def find_power(name: str, largest: float) -> int:
    """log2 of the largest power of two with which a number above 0 does not overflow in a format."""
    end = FORMATS[name].overflow_value
    power = int(np.floor(np.log2(end) - np.log2(largest)))
    power -= int(largest * 2.0**power >= end)  # equal, or by the rounding of a logarithm
    return min(max(power, -MOST_SCALE), MOST_SCALE)


def join_parts(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables one after the other, their texts as categories."""
    some = [table for table in tables if len(table)] or tables[:1]  # pandas 2 warns of empty ones
    table = pd.concat(some, ignore_index=True)
    return table.astype({name: "category" for name in TEXT_COLUMNS if name in table})
