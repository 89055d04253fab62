"""Two runs or two sweeps: what differs in their configuration, and in their numbers beyond what seeds do.

Rows are joined on what tells the runs of either side apart, on the place in the network (KEYS) and on the seed; the
distance of two numbers is that of `distance.py`. Equal are two sides if no distance is beyond 4 and neither has a
setting, step, layer or tensor that the other has not; more seeds of the same setting make no difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from initlab.errors import UsageError
from initlab.runs import collect, distance, gather
from initlab.runs.distance import BEYOND, Joined, Side
from initlab.runs.gather import Run
from initlab.runs.summary import TELLING
from initlab.stats.dtypes import epsilon_of

PLACE = ("stage", "implementation", "step", "layer", "tensor", "direction")
# table -> what names a row beside the setting and the seed. Measured times never repeat and are not compared.
KEYS: dict[str, tuple[str, ...]] = {
    "stats": PLACE,
    "losses": ("implementation", "step"),
    "parity": ("step", "layer", "tensor", "direction"),
    "theory": (*PLACE, "statistic"),
    "lsuv": ("stage", "layer", "attempt"),
    "jacobian": ("layer",),
    "singular_values": ("layer", "rank"),
    "gains": ("activation", "gain"),
    "phase": ("gain", "sigma_b", "layer"),
    "formats": ("format", "event"),
    "ends": ("format", "event"),
}
# Tables whose other columns repeat what another table holds.
ONLY: dict[str, tuple[str, ...]] = {"theory": ("predicted", "band_low", "band_high", "limit")}
SHOWN = 8  # statistics of a table that are listed


@dataclass
class Table:
    """What comparing one table gave: lines for the reader, and what decides."""

    lines: list[str]
    largest: float  # distance
    identical: bool
    one_sided: bool  # rows that only one side has, for another reason than their seed


@dataclass
class Comparison:
    """All of it; `equal` within the spread, `identical` to the last bit."""

    configuration: list[str]
    tables: dict[str, Table]
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


def compare(a: Sequence[str], b: Sequence[str]) -> Comparison:
    """Two sides, each any number of run folders, sweep folders or globs; a UsageError if no table is to be compared."""
    sides = [collect.runs(paths, "stats") for paths in (a, b)]
    tables = {}
    for name in KEYS:
        runs = [gather.of(side, name) for side in sides]
        has = [any(run.rows for run in some) for some in runs]
        if all(has):
            frame_a, frame_b = (gather.frame(some) for some in runs)
            tables[name] = compare_table(name, frame_a, frame_b, _settings(runs))
        elif any(has):
            tables[name] = Table([f"only in {'A' if has[0] else 'B'}"], 0.0, False, True)
    if not tables:
        raise UsageError(f"{', '.join([*a, *b])}: no run has a table that can be compared ({', '.join(KEYS)})")
    frames = [pd.DataFrame([_described(run) for run in side]) for side in sides]
    notes = dict.fromkeys(line for side in sides for line in gather.notes(side, "stats"))
    return Comparison(_differences(*frames), tables, list(notes))


def _settings(sides: Sequence[Sequence[Run]]) -> list[str]:
    said = [columns for side in sides for run in side if isinstance(columns := run.said.get("columns"), Mapping)]
    swept = (key for side in sides for run in side for key in run.set if key not in ("seed", "seeds"))
    return list(dict.fromkeys([*(name for columns in said for name in columns), *swept]))


def _described(run: Run) -> dict[str, Any]:
    """What a run was told, and what it ran with."""
    columns, versions = run.said.get("columns"), run.said.get("versions")
    told = dict(columns) if isinstance(columns, Mapping) else {}
    more = {key: value for key, value in run.set.items() if not gather.column_of(key) & set(told)}
    seeds = run.said.get("seeds")
    if isinstance(seeds, list) and seeds:
        told["seeds"] = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])
    of = {f"{k} (version)": v for k, v in versions.items()} if isinstance(versions, Mapping) else {}
    said = {"processor": run.said.get("device"), "revision": run.said.get("git_revision")}
    return {**told, **{k: v for k, v in more.items() if k not in ("seed", "seeds")}, **of, **said}


def _differences(a: pd.DataFrame, b: pd.DataFrame) -> list[str]:
    """Columns whose values in A are not those in B; a sweep's values are listed together."""
    found = []
    for name in dict.fromkeys([*a.columns, *b.columns]):
        sets = [list(dict.fromkeys(_text(v) for v in side.get(name, pd.Series([None])))) for side in (a, b)]
        if set(sets[0]) != set(sets[1]):
            found.append(f"{name}: {_listed(sets[0])} | {_listed(sets[1])}")
    return found


def _text(value: object) -> str:
    if value is None or value != value:
        return "not given"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _listed(texts: Sequence[str]) -> str:
    return ", ".join(texts) if len(texts) <= collect.FEW else f"{', '.join(texts[:3])}, ... ({len(texts)} values)"


def telling(a: pd.DataFrame, b: pd.DataFrame, settings: Sequence[str]) -> list[str]:
    """The fewest configuration columns that tell the runs of either side apart; what follows from them is left out.

    A column that is constant within both sides tells nothing apart: where it differs between them, it is what is asked.
    """
    names = [name for name in [*TELLING, *settings] if name in settings and name in a and name in b]
    some = [frame.loc[:, list(dict.fromkeys(names))].drop_duplicates() for frame in (a, b)]
    found: list[str] = []
    count = [1, 1]
    for name in dict.fromkeys(names):
        now = [len(frame[[*found, name]].drop_duplicates()) for frame in some]
        if now[0] > count[0] or now[1] > count[1]:
            found.append(name)
            count = now
    return found


def compare_table(name: str, a: pd.DataFrame, b: pd.DataFrame, settings: Sequence[str]) -> Table:
    """Join the rows of one table, measure how far apart they are, and say so."""
    if "seed" not in a or "seed" not in b:
        a, b = a.assign(seed=0), b.assign(seed=0)
    a, b = (frame[frame["seed"] >= 0].reset_index(drop=True) for frame in (a, b))  # -1 is a mean over the others
    place = [key for key in KEYS[name] if key in a and key in b]
    tell = [key for key in telling(a, b, settings) if key not in place]
    statistics = _statistics(name, a, b, {*place, *settings, "seed", "run"})
    at_a, at_b = distance.codes(a, b, [*tell, *place])
    whole = [
        Side(at, frame["seed"].to_numpy(), frame[statistics].to_numpy(float)) for at, frame in ((at_a, a), (at_b, b))
    ]
    (one, rows), (other, rows_b) = (distance.first_of_each(side) for side in whole)
    found = distance.join(one, other, statistics, _epsilon(a, b))
    here = a.iloc[rows].reset_index(drop=True)
    repeated = [side for side, frame, kept in (("A", a, rows), ("B", b, rows_b)) if len(kept) < len(frame)]
    lines = [_first_line(found, one, other)]
    lines += [f"{side} has some networks more than once; the first of each is compared" for side in repeated]
    lone = [~np.isin(one.group, other.group), ~np.isin(other.group, one.group)]
    for side, rows_alone, frame in (("A", lone[0], here), ("B", lone[1], b.iloc[rows_b])):
        if rows_alone.any():
            opposite = b if side == "A" else a
            lines.append(
                f"only in {side}: {rows_alone.sum():,} rows{_whose(frame[rows_alone], opposite, [*tell, *place])}"
            )
    largest = float(found.z.max(initial=0))
    lines += _farthest(found, here, statistics, tell, place)
    one_sided = bool(lone[0].any() or lone[1].any())
    same_rows = len(one.group) == len(other.group) == int(found.paired.sum())
    return Table(lines, largest, bool(same_rows and largest == 0), one_sided)


def _statistics(table: str, a: pd.DataFrame, b: pd.DataFrame, without: set[str]) -> list[str]:
    both = [name for name in a if name in b and name not in without]
    numbers = [n for n in both if pd.api.types.is_numeric_dtype(a[n]) and pd.api.types.is_numeric_dtype(b[n])]
    return [name for name in numbers if name in ONLY.get(table, numbers)]


def _epsilon(a: pd.DataFrame, b: pd.DataFrame) -> float:
    """That of the coarser number format."""
    formats = {str(value) for frame in (a, b) if "dtype" in frame for value in frame["dtype"].unique()}
    return epsilon_of(formats)


def _first_line(found: Joined, a: Side, b: Side) -> str:
    pairs, means = int(found.paired.sum()), int((~found.paired).sum())
    parts = [f"{pairs:,} rows of the same networks"] * (pairs > 0) + [f"{means:,} means over other seeds"] * (means > 0)
    said = " and ".join(parts) or "no row in common"
    alone = sum(len(np.setdiff1d(x.seed, y.seed)) for x, y in ((a, b), (b, a)))
    if alone and pairs:
        said += f"; {alone} seeds on one side alone"
    z = found.z
    if not z.size:
        return said
    if not z.any():
        return f"{said}: all the same"
    numbers = int((z > 0).any(axis=1).sum())
    beyond = int((z > BEYOND).any(axis=1).sum())
    return f"{said}, {numbers:,} of them differ, {beyond:,} beyond {BEYOND:g} spreads"


def _far(found: Joined, row: int, k: int) -> str:
    """The distance of two numbers in words; where seeds make no difference, as their relative difference."""
    a, b, z = found.a[row, k], found.b[row, k], found.z[row, k]
    if np.isinf(z):
        return "nan or inf against a number"
    if found.rounding[row, k]:
        return f"{abs(a - b) / max(abs(a), abs(b)):.2g} relative"
    return f"{z:.3g} spreads"


def _whose(rows: pd.DataFrame, opposite: pd.DataFrame, keys: Sequence[str]) -> str:
    """The values of the keys that the other side never has."""
    found = []
    for key in keys:
        new = sorted(set(rows[key].unique()) - set(opposite[key].unique()), key=lambda v: (str(type(v)), v))
        if new and pd.api.types.is_numeric_dtype(rows[key]) and len(new) > collect.FEW:
            found.append(f"{key} {_text(new[0])} to {_text(new[-1])}")
        elif new:
            found.append(f"{key} {_listed([_text(value) for value in new])}")
    return f" ({', '.join(found)})" if found else ""


def _farthest(
    found: Joined, rows: pd.DataFrame, statistics: Sequence[str], tell: Sequence[str], place: Sequence[str]
) -> list[str]:
    """Of each statistic the largest difference and its place, the largest first; then the first layer beyond."""
    if not found.z.any():
        return []
    top = found.z.argmax(axis=0)
    order = sorted((k for k in range(len(statistics)) if found.z[top[k], k] > 0), key=lambda k: -found.z[top[k], k])

    def said(row: int, k: int) -> str:
        where = rows.iloc[found.at[row]]
        names = [*tell, *place, *(["seed"] if found.paired[row] else [])]
        words = [str(where[n]) if isinstance(where[n], str) else f"{n} {_text(where[n])}" for n in names]
        far = _far(found, row, k)
        pair = f"{found.a[row, k]:.6g} | {found.b[row, k]:.6g}"
        return f"{statistics[k]}: {pair}, {far}, {', '.join(words)}"

    lines = [said(top[k], k) for k in order[:SHOWN]]
    if len(order) > SHOWN:
        lines.append(f"... and {len(order) - SHOWN} more statistics")
    beyond = np.flatnonzero((found.z > BEYOND).any(axis=1))
    if "layer" in place and len(beyond):
        places = rows.iloc[found.at[beyond]][[n for n in ("stage", "step", "layer", "direction") if n in rows]].astype(
            object
        )
        places["direction"] = places.get("direction", pd.Series("forward", places.index)) != "forward"
        first = beyond[np.lexsort([places[n].factorize(sort=True)[0] for n in reversed(list(places))])[0]]
        layer = rows["layer"].iloc[found.at[first]]
        lines.append(f"first layer beyond {BEYOND:g}: {layer}, {said(first, int(found.z[first].argmax()))}")
    return lines
