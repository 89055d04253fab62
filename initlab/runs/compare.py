"""Two runs or two sweeps: what differs in their configuration, and in their numbers beyond what seeds do.

Rows are matched by the options in which the runs of a side differ, by the keys of their table and by the seed; the
distance of two numbers is that of `distance.py`. Two sides are equal if no distance is beyond 4 and neither has a
setting, step, layer or tensor that the other has not; more seeds of the same setting make no difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from initlab.errors import UsageError, library_call
from initlab.runs import distance
from initlab.runs.collect import FEW, collect
from initlab.runs.distance import BEYOND, Joined, Side
from initlab.runs.folders import Paths, list_paths
from initlab.runs.read import Run, columns_of_option, notes, read_runs
from initlab.runs.schema import LABELS, STATS, TABLES
from initlab.stats.dtypes import epsilon_of
from initlab.terminal import NotebookText

SHOWN = 8  # statistics of a table that are listed


@dataclass
class TableDifference:
    """What comparing one table gave: lines for the reader, and what decides."""

    lines: list[str]
    largest: float  # distance
    identical: bool
    one_sided: bool  # rows that only one side has, for another reason than their seed


@dataclass
class Comparison(NotebookText):
    """All of it; `equal` within the spread, `identical` to the last bit."""

    configuration: list[str]
    tables: dict[str, TableDifference]
    notes: list[str]  # of runs that are not whole

    @property
    def identical(self) -> bool:
        return all(table.identical for table in self.tables.values())

    @property
    def equal(self) -> bool:
        return not any(table.largest > BEYOND or table.one_sided for table in self.tables.values())

    def __str__(self) -> str:
        lines = ["configuration: " + ("the same" if not self.configuration else "differs")]
        lines += [f"  {line}" for line in self.configuration]
        for name, table in self.tables.items():
            lines += [f"{name}: {table.lines[0]}", *(f"  {line}" for line in table.lines[1:])]
        if self.identical:
            return "\n".join([*lines, "identical: every number is the same, to the last bit"])
        if self.equal:
            return "\n".join([*lines, f"equal: nothing is beyond {BEYOND:g} seed-to-seed spreads"])
        return "\n".join([*lines, f"different: see what is beyond {BEYOND:g} spreads, or what only one side has"])


@library_call
def compare(a: Paths, b: Paths) -> Comparison:
    """Say what differs between two sides, in configuration and in numbers, beyond the spread of the seeds.

    a, b: the sides, each a run folder, a sweep folder or a glob, or any number of them.

    The result reads as prose (`str`), and has `equal` (nothing beyond the seed-to-seed spread) and `identical` (to the
    last bit). Raises `UsageError` where a path holds no run, or where there is no table to compare.

    >>> compare("nowhere", "nowhere")
    Traceback (most recent call last):
    initlab.errors.UsageError: nowhere: no such folder, and no glob of any
    """
    sides = [collect(list_paths(paths), STATS)[0] for paths in (a, b)]
    runs = [run for side in sides for run in side]
    swept = (key for run in runs for key in run.settings if key not in ("seed", "seeds"))
    settings = list(dict.fromkeys([*(name for run in runs for name in run.columns), *swept]))
    tables = {}
    compared = [name for name, table in TABLES.items() if table.keys]
    for name in compared:
        frames = [read_runs(side, name)[1] for side in sides]
        there = {side: frame for side, frame in zip("AB", frames, strict=True) if frame is not None and len(frame)}
        if len(there) == 2:
            tables[name] = compare_table(name, there["A"], there["B"], settings)
        elif there:
            tables[name] = TableDifference([f"only in {next(iter(there))}"], 0.0, False, True)
    if not tables:
        paths = ", ".join([*list_paths(a), *list_paths(b)])
        raise UsageError(f"{paths}: no run has a table that can be compared ({', '.join(compared)})")
    configurations = [pd.DataFrame([_configuration(run) for run in side]) for side in sides]
    lines = dict.fromkeys(line for side in sides for line in notes(side, STATS))
    return Comparison(_differences(*configurations), tables, list(lines))


def _configuration(run: Run) -> dict[str, Any]:
    """What a run was asked for, and what it ran with."""
    found = dict(run.columns)
    more = {key: value for key, value in run.settings.items() if not columns_of_option(key) & set(found)}
    seeds, versions = run.json.get("seeds"), run.json.get("versions")
    if isinstance(seeds, list) and seeds:
        found["seeds"] = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])
    found |= {key: value for key, value in more.items() if key not in ("seed", "seeds")}
    found |= {f"{k} (version)": v for k, v in versions.items()} if isinstance(versions, Mapping) else {}
    return found | {"processor": run.json.get("device"), "revision": run.json.get("git_revision")}


def _differences(a: pd.DataFrame, b: pd.DataFrame) -> list[str]:
    """Columns whose values in A are not those in B; a sweep's values are listed together."""
    found = []
    for name in dict.fromkeys([*a.columns, *b.columns]):
        sets = [list(dict.fromkeys(_text(v) for v in side.get(name, pd.Series([None])))) for side in (a, b)]
        if set(sets[0]) != set(sets[1]):
            found.append(f"{name}: {_list(sets[0])} | {_list(sets[1])}")
    return found


def _text(value: object) -> str:
    if value is None or value != value:
        return "not given"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _list(texts: Sequence[str]) -> str:
    return ", ".join(texts) if len(texts) <= FEW else f"{', '.join(texts[:3])}, ... ({len(texts)} values)"


def distinguishing_columns(a: pd.DataFrame, b: pd.DataFrame, settings: Sequence[str]) -> list[str]:
    """The fewest configuration columns that tell the runs of either side apart; what follows from them is left out.

    A column that is constant within both sides tells nothing apart: where it differs between them, it is what is asked.
    """
    names = [name for name in [*LABELS, *settings] if name in settings and name in a and name in b]
    some = [frame.loc[:, list(dict.fromkeys(names))].drop_duplicates() for frame in (a, b)]
    found: list[str] = []
    count = [1, 1]
    for name in dict.fromkeys(names):
        now = [len(frame[[*found, name]].drop_duplicates()) for frame in some]
        if now[0] > count[0] or now[1] > count[1]:
            found.append(name)
            count = now
    return found


def compare_table(name: str, a: pd.DataFrame, b: pd.DataFrame, settings: Sequence[str]) -> TableDifference:
    """Match the rows of one table, measure how far apart they are, and say so in lines.

    settings: the configuration columns; those that tell the runs of a side apart are part of a row's key.
    """
    if "seed" not in a or "seed" not in b:
        a, b = a.assign(seed=0), b.assign(seed=0)
    a, b = (frame[frame["seed"] >= 0].reset_index(drop=True) for frame in (a, b))  # -1 is a mean over the others
    own = [key for key in TABLES[name].keys if key in a and key in b]
    keys = [*(key for key in distinguishing_columns(a, b, settings) if key not in own), *own]
    without = {*keys, *settings, "seed", "run"}
    both = [c for c in a if c in b and c not in without and pd.api.types.is_numeric_dtype(a[c])]
    numbers = [c for c in both if pd.api.types.is_numeric_dtype(b[c])]
    statistics = [c for c in numbers if c in (TABLES[name].compared or numbers)]
    codes = distance.codes(a, b, keys)
    (one, rows), (other, rows_b) = (
        distance.first_of_each(Side(code, frame["seed"].to_numpy(), frame[statistics].to_numpy(float)))
        for code, frame in zip(codes, (a, b), strict=True)
    )
    formats = {str(value) for frame in (a, b) if "dtype" in frame for value in frame["dtype"].unique()}
    found = distance.join(one, other, statistics, epsilon_of(formats))
    here = a.iloc[rows].reset_index(drop=True)
    lines = [_first_line(found, one, other)]
    for side, frame, kept in (("A", a, rows), ("B", b, rows_b)):
        if len(kept) < len(frame):
            lines.append(f"{side} has some networks more than once; the first of each is compared")
    only = [~np.isin(one.group, other.group), ~np.isin(other.group, one.group)]
    for side, chosen, frame, opposite in (("A", only[0], here, b), ("B", only[1], b.iloc[rows_b], a)):
        if chosen.any():
            lines.append(f"only in {side}: {chosen.sum():,} rows{_new_values(frame[chosen], opposite, keys)}")
    lines += _farthest(found, here, statistics, keys)
    one_sided = bool(only[0].any() or only[1].any())
    largest = float(found.z.max(initial=0))
    same_rows = len(one.group) == len(other.group) == int(found.paired.sum())
    return TableDifference(lines, largest, bool(same_rows and largest == 0), one_sided)


def _first_line(found: Joined, a: Side, b: Side) -> str:
    pairs, means = int(found.paired.sum()), int((~found.paired).sum())
    parts = [f"{pairs:,} rows of the same networks"] * (pairs > 0) + [f"{means:,} means over other seeds"] * (means > 0)
    text = " and ".join(parts) or "no row in common"
    if pairs and (single := len(np.setxor1d(a.seed, b.seed))):
        text += f"; {single} seeds on one side alone"
    z = found.z
    if not z.size:
        return text
    if not z.any():
        return f"{text}: all the same"
    numbers, beyond = ((z > least).any(axis=1).sum() for least in (0, BEYOND))
    return f"{text}, {numbers:,} of them differ, {beyond:,} beyond {BEYOND:g} spreads"


def _new_values(rows: pd.DataFrame, opposite: pd.DataFrame, keys: Sequence[str]) -> str:
    """The values of the keys that the other side never has."""
    found = []
    for key in keys:
        new = sorted(set(rows[key].unique()) - set(opposite[key].unique()), key=lambda v: (str(type(v)), v))
        if new and pd.api.types.is_numeric_dtype(rows[key]) and len(new) > FEW:
            found.append(f"{key} {_text(new[0])} to {_text(new[-1])}")
        elif new:
            found.append(f"{key} {_list([_text(value) for value in new])}")
    return f" ({', '.join(found)})" if found else ""


def _farthest(found: Joined, rows: pd.DataFrame, statistics: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Of each statistic the largest difference and its row, the largest first; then the first layer beyond."""
    if not found.z.any():
        return []
    top = found.z.argmax(axis=0)
    order = sorted((k for k in range(len(statistics)) if found.z[top[k], k] > 0), key=lambda k: -found.z[top[k], k])

    def line(row: int, k: int) -> str:
        where = rows.iloc[found.at[row]]
        names = [*keys, *(["seed"] if found.paired[row] else [])]
        values = [str(where[n]) if isinstance(where[n], str) else f"{n} {_text(where[n])}" for n in names]
        a, b, z = found.a[row, k], found.b[row, k], found.z[row, k]
        distance = f"{z:.3g} spreads"
        if np.isinf(z):
            distance = "nan or inf against a number"
        elif found.rounding[row, k]:  # seeds make no difference
            distance = f"{abs(a - b) / max(abs(a), abs(b)):.2g} relative"
        return f"{statistics[k]}: {a:.6g} | {b:.6g}, {distance}, {', '.join(values)}"

    lines = [line(top[k], k) for k in order[:SHOWN]]
    if len(order) > SHOWN:
        lines.append(f"... and {len(order) - SHOWN} more statistics")
    beyond = np.flatnonzero((found.z > BEYOND).any(axis=1))
    if "layer" in keys and len(beyond):
        places = rows.iloc[found.at[beyond]].set_index(beyond)
        names = [name for name in ("stage", "step", "layer", "direction") if name in rows]
        forward_first = places[names].astype(object).replace({"direction": {"forward": ""}})
        first = forward_first.sort_values(names).index[0]
        layer = rows["layer"].iloc[found.at[first]]
        lines.append(f"first layer beyond {BEYOND:g}: {layer}, {line(first, int(found.z[first].argmax()))}")
    return lines
