"""What a study's figure shows: its few words, checked beforehand, and the bands that are drawn. Draws nothing."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from initlab.errors import UsageError, choose
from initlab.runs import summary
from initlab.runs.labels import format_numbers, labels
from initlab.runs.select import LN, NothingFound, bare, networks, numbers, refuse_condition, select
from initlab.stats.statistics import COUNTS, STATISTICS

SCALES = {"linear": "", "log": ""}
# Statistics of the finite entries: where some entries are not finite the signal has ended, whatever the rest say.
OF_FINITE = {name for name in STATISTICS if name not in COUNTS and not name.startswith("frac")}


@dataclass(frozen=True)
class Picture:
    """`y` over `x` in `table` where `where` holds: median and 16-84 % of networks, a line per value of `by`.

    Without `by` a line per setting, as in the short table; a panel per value of `col`; `theory` adds what is predicted.
    """

    x: str
    y: str
    table: str = "stats"
    where: Mapping[str, Any] = field(default_factory=dict)
    by: str = ""
    col: str = ""
    x_scale: str = "linear"
    y_scale: str = "linear"
    theory: bool = False

    def columns(self) -> list[str]:
        return [bare(name) for name in (*self.where, self.x, self.y, self.by, self.col) if name]

    def tables(self) -> set[str]:
        return {self.table, "theory"} if self.theory else {self.table}

    @property
    def backwards(self) -> bool:
        """Does the signal travel from the last layer to the first?"""
        return self.x == "layer" and self.where.get("direction") == "backward"


def picture(given: Mapping[str, Any], tables: Mapping[str, Collection[str] | None]) -> Picture | None:
    """The figure that the fields describe, None for none; one line about what is wrong with them."""
    fields = {name: value for name, value in given.items() if value is not None}
    try:
        if "y" not in fields:
            lost = [name for name in ("x", "by", "col", "where") if fields.get(name)]
            if lost:
                raise UsageError(f"has {lost[0]}, but no `y`: the column that is drawn")
            return None
        if "x" not in fields:
            raise UsageError("has no `x`: the column that y is drawn over")
        for name in ("x_scale", "y_scale"):
            choose(SCALES, fields.get(name, "linear"), name)
        for name, wanted in fields.get("where", {}).items():
            refuse_condition(f"where.{name}", wanted)
        made = Picture(**fields)
        _check_columns(made, tables)
    except UsageError as error:
        raise UsageError(f"study.figure: {error}") from error
    return made


def _check_columns(made: Picture, tables: Mapping[str, Collection[str] | None]) -> None:
    known = choose(tables, made.table, "table")
    for name in made.columns() if known is not None else ():
        choose(dict.fromkeys(known or ()), name, f"column of {made.table}")
    if made.theory and (made.table != "stats" or bare(made.y) not in STATISTICS):
        raise UsageError("theory=true: theory knows statistics of the table stats only")


def rows_of(one: Picture, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """A row per network and point: `panel`, `label`, `x`, `y`, `network`; a y that is not finite is nan or inf."""
    table = choose(tables, one.table, "table")
    for name in one.columns():
        choose(table, name, f"column of {one.table}")
    rows = select(table, one.where)
    y = numbers(rows, one.y)
    if bare(one.y) in OF_FINITE and {"n_nan", "n_inf"} <= set(rows):
        y = np.where(rows["n_nan"] + rows["n_inf"] > 0, np.nan, y)
    found = pd.DataFrame({"x": _values(rows, one.x), "y": y, "network": networks(rows)})
    label = _named(rows, one.by) if one.by else labels(rows)
    found = found.assign(panel=_named(rows, one.col) if one.col else "", label=label)
    if found.duplicated(["panel", "label", "x", "network"]).any():
        free = [n for n in ("stage", "implementation", "step", "layer", "tensor", "direction") if _several(rows, n)]
        free = [n for n in free if n not in one.columns()]
        hint = f"; say {' or '.join(free)} in `where`" if free else ""
        raise UsageError(f"a network has several rows at one {one.x}{hint}")
    return found


def _several(rows: pd.DataFrame, name: str) -> bool:
    return name in rows and rows[name].nunique() > 1


def _values(rows: pd.DataFrame, name: str) -> np.ndarray:
    if not name.startswith(LN) and not pd.api.types.is_numeric_dtype(rows[name].dtype):
        return np.asarray(rows[name].astype(str))
    return numbers(rows, name)


def _named(rows: pd.DataFrame, name: str) -> pd.Categorical:
    """Words as they are, in the order in which they come; numbers with their column's name, ascending."""
    column = rows[bare(name)]
    if pd.api.types.is_numeric_dtype(column.dtype):
        values = sorted(column.dropna().unique())
        names = {value: f"{bare(name)} {said}" for value, said in format_numbers(values).items()}
        return pd.Categorical(column.map(names), list(names.values()))
    said = column.astype(str)
    return pd.Categorical(said, list(dict.fromkeys(said)))


def bands(rows: pd.DataFrame) -> pd.DataFrame:
    """Per panel, label and x: `low`, `median`, `high` over the networks; one without a number ranks above all."""
    found = []
    for (panel, label, x), y in rows.groupby(["panel", "label", "x"], observed=True, sort=False)["y"]:
        low, median, high = summary.rank_quantiles(y.to_numpy())
        found.append((panel, label, x, low, median, high))
    band = pd.DataFrame(found, columns=["panel", "label", "x", "low", "median", "high"])
    return band.sort_values("x", kind="stable") if pd.api.types.is_numeric_dtype(band["x"].dtype) else band


def deaths(rows: pd.DataFrame, one: Picture) -> pd.DataFrame:
    """Per panel, label and network the first x at which y is not finite, and on a log axis is 0; nan for none."""
    first = "max" if one.backwards else "min"
    keys = ["panel", "label", "network"]
    everyone = rows[keys].drop_duplicates().set_index(keys).index
    gone = ~np.isfinite(rows["y"])
    zero = (rows["y"] == 0) if one.y_scale == "log" else gone & False
    ends = {
        name: rows[bad].groupby(keys, observed=True)["x"].agg(first)
        for name, bad in (("nonfinite", gone), ("zero", zero))
    }
    return pd.DataFrame(ends).reindex(everyone).astype(float).reset_index()


def predicted(one: Picture, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """What theory says of the same rows: `panel`, `label`, `x`, `predicted`, `low`, `high` of one network."""
    columns = ["panel", "label", "x", "predicted", "low", "high"]
    if "theory" not in tables:
        return pd.DataFrame(columns=columns)
    theory = tables["theory"]
    where = {name: wanted for name, wanted in one.where.items() if name in theory}
    try:
        rows = select(theory, {**where, "statistic": bare(one.y)})
    except NothingFound:
        return pd.DataFrame(columns=columns)
    log = LN if one.y.startswith(LN) else ""
    lines = {"predicted": "predicted", "low": "band_low", "high": "band_high"}
    found = pd.DataFrame({name: numbers(rows, log + column) for name, column in lines.items()})
    label = _named(rows, one.by) if one.by else labels(rows)
    found = found.assign(x=_values(rows, one.x), panel=_named(rows, one.col) if one.col else "", label=label)
    return found.groupby(["panel", "label", "x"], observed=True, sort=False)[list(lines)].median().reset_index()
