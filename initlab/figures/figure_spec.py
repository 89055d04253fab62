"""What a study's figure shows: its fields, checked before anything is measured, and the rows and bands to draw."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from initlab.errors import UsageError, choose
from initlab.runs import summary
from initlab.runs.labels import format_numbers, labels
from initlab.runs.schema import STATS, TABLES, THEORY
from initlab.runs.select import (
    LN,
    NothingFound,
    bare,
    list_columns,
    networks,
    numbers,
    refuse_columns,
    refuse_condition,
    select,
)
from initlab.stats.statistics import STATISTICS

SCALES = {"linear": "", "log": ""}
EXPECTED = {"x": "", "y": "", "panel": "", "label": "", "text": ""}  # fields of a row of `expected`
# Statistics of the finite entries: where some entries are not finite the signal has ended, whatever the rest say.
OF_FINITE = {name for name, row in STATISTICS.items() if not row.is_count and not row.is_share}


@dataclass(frozen=True)
class FigureSpec:
    """`y` over `x` in `table` where `where` holds: median and 16-84 % of networks, a line per value of `by`.

    Without `by` a line per setting, as in the short table; a panel per value of `col`; `theory` adds what is predicted.
    `whole` shows the whole way of what dies, to the ends of the number format; `expected` are points and lines that a
    source gives, rows of `x`, `y`, `panel`, `label` and `text`: an x alone is an upright line, a y alone a level one.
    """

    x: str
    y: str
    table: str = STATS
    where: Mapping[str, Any] = field(default_factory=dict)
    by: str = ""
    col: str = ""
    x_scale: str = "linear"
    y_scale: str = "linear"
    theory: bool = False
    whole: bool = False
    expected: Sequence[Mapping[str, Any]] = ()

    def columns(self) -> list[str]:
        return [
            part for name in (*self.where, self.x, self.y, self.by, self.col) if name for part in list_columns(name)
        ]

    def tables(self) -> set[str]:
        return {self.table, THEORY} if self.theory else {self.table}

    @property
    def backwards(self) -> bool:
        """Does the signal travel from the last layer to the first?"""
        return self.x == "layer" and self.where.get("direction") == "backward"


def parse_figure(given: Mapping[str, Any], tables: Mapping[str, Collection[str] | None]) -> FigureSpec | None:
    """The figure that the fields of `study.figure` describe, None for none.

    tables: the tables that there may be, with their columns where they are known. Raises `UsageError`, in one line.
    """
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
        for row in fields.get("expected", ()):
            for name in row:
                choose(EXPECTED, name, "expected")
        spec = FigureSpec(**fields)
        refuse_columns(spec.columns(), tables, spec.table)
        if spec.theory and (spec.table != STATS or bare(spec.y) not in STATISTICS):
            raise UsageError(f"theory=true: theory knows statistics of the table {STATS} only")
    except UsageError as error:
        raise UsageError(f"study.figure: {error}") from error
    return spec


def select_rows(one: FigureSpec, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """A row per network and point: `panel`, `label`, `x`, `y`, `network`; a y that is not finite is nan or inf."""
    refuse_columns(one.columns(), tables, one.table)
    rows = select(tables[one.table], one.where)
    y = numbers(rows, one.y)
    if bare(one.y) in OF_FINITE and {"n_nan", "n_inf"} <= set(rows):
        y = np.where(rows["n_nan"] + rows["n_inf"] > 0, np.nan, y)
    found = _place(one, rows, {"y": y, "network": networks(rows)})
    if found.duplicated(["panel", "label", "x", "network"]).any():
        keys = [n for n in TABLES[STATS].keys if n in rows and n not in one.columns()]
        free = [n for n in keys if rows[n].nunique() > 1]
        hint = f"; say {' or '.join(free)} in `where`" if free else ""
        raise UsageError(f"a network has several rows at one {one.x}{hint}")
    return found


def _place(one: FigureSpec, rows: pd.DataFrame, values: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """The values with the panel, the label and the x of their rows."""
    column = rows[list_columns(one.x)[0]]
    is_text = one.x == bare(one.x) and not pd.api.types.is_numeric_dtype(column.dtype)
    label = _label(rows, one.by) if one.by else labels(rows)
    x = np.asarray(column.astype(str)) if is_text else numbers(rows, one.x)
    return pd.DataFrame({"x": x, **values}).assign(panel=_label(rows, one.col) if one.col else "", label=label)


def _label(rows: pd.DataFrame, name: str) -> pd.Categorical:
    """Text as it is, in the order in which it comes; numbers with their column's name, ascending."""
    column = rows[bare(name)]
    if pd.api.types.is_numeric_dtype(column.dtype):
        values = sorted(column.dropna().unique())
        names = {value: f"{bare(name)} {text}" for value, text in format_numbers(values).items()}
        return pd.Categorical(column.map(names), list(names.values()))
    texts = column.astype(str)
    return pd.Categorical(texts, list(dict.fromkeys(texts)))


def bands(rows: pd.DataFrame) -> pd.DataFrame:
    """Per panel, label and x: `low`, `median`, `high` over the networks; one without a number ranks above all."""
    found = []
    for (panel, label, x), y in rows.groupby(["panel", "label", "x"], observed=True, sort=False)["y"]:
        low, median, high = summary.rank_quantiles(y.to_numpy())
        found.append((panel, label, x, low, median, high))
    band = pd.DataFrame(found, columns=["panel", "label", "x", "low", "median", "high"])
    return band.sort_values("x", kind="stable") if pd.api.types.is_numeric_dtype(band["x"].dtype) else band


def first_dead(rows: pd.DataFrame, one: FigureSpec) -> pd.DataFrame:
    """Per panel, label and network the first x at which y is not finite, and on a log axis is 0; nan for none."""
    gone = ~np.isfinite(rows["y"])
    zero = (rows["y"] == 0) & (one.y_scale == "log")
    first = "max" if one.backwards else "min"
    return summary.first_dead(rows, ["panel", "label", "network"], "x", first, gone, zero)


def find_predictions(one: FigureSpec, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """What theory says of the same rows: `panel`, `label`, `x`, `predicted`, `low`, `high` of one network."""
    lines = {"predicted": "predicted", "low": "band_low", "high": "band_high"}
    theory = tables.get(THEORY, pd.DataFrame(columns=["statistic"]))
    where = {name: wanted for name, wanted in one.where.items() if name in theory}
    try:
        rows = select(theory, {**where, "statistic": bare(one.y)})
    except NothingFound:
        return pd.DataFrame(columns=["panel", "label", "x", *lines])
    log = LN if one.y.startswith(LN) else ""
    found = _place(one, rows, {name: numbers(rows, log + column) for name, column in lines.items()})
    return found.groupby(["panel", "label", "x"], observed=True, sort=False)[list(lines)].median().reset_index()
