"""Which rows of a table a study speaks of, and which of its columns: what `expect` and `study.figure` have in common.

A condition is a value, a list of values, or a range {min: ..., max: ...}; null asks for what is missing. A column may
be written `ln COLUMN`: its natural logarithm; or `COLUMN / COLUMN`: their ratio.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from initlab.errors import UsageError, choose, nearest

LN, OVER = "ln ", " / "
BOUNDS = ("min", "max")
# A network is known by these: a run may hold several that share a seed, told apart by what was swept inside it.
NETWORK = ("run", "seed", "init", "activation", "gain", "lr")


class NothingFound(UsageError):
    """The tables are there and the words are right, but no row answers."""


def bare(name: str) -> str:
    """The column behind `ln COLUMN`."""
    return name.removeprefix(LN).strip()


def list_columns(name: str) -> list[str]:
    """The columns behind `COLUMN`, `ln COLUMN` or `COLUMN / COLUMN`."""
    return bare(name).split(OVER)


def refuse_condition(name: str, wanted: Any) -> None:
    """A condition of another form, before there is a table that it could be tried on."""
    if isinstance(wanted, Mapping):
        for bound, number in wanted.items():
            if bound not in BOUNDS:
                raise UsageError(f"{name}: {bound}: a range has min and max{nearest(str(bound), BOUNDS)}")
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise UsageError(f"{name}: {bound}={number}: must be a number")
        if not wanted:
            raise UsageError(f"{name}: a range needs min or max")
    elif isinstance(wanted, list | tuple):
        if not wanted:
            raise UsageError(f"{name}: an empty list of values selects nothing")
        if any(isinstance(one, Mapping | list | tuple) for one in wanted):
            raise UsageError(f"{name}: a list holds values, no ranges and no lists")


def refuse_columns(
    names: Iterable[str], tables: Mapping[str, Collection[str] | pd.DataFrame | None], table: str
) -> None:
    """A table that is not there, or a column that it has not, as far as its columns are known."""
    known = choose(tables, table, "table")
    if known is not None:
        for name in names:
            choose(dict.fromkeys(known), name, f"column of {table}")


def meets(values: pd.Series, wanted: Any) -> np.ndarray:
    """Row by row: does the value lie in the range, or is it (one of) what is wanted? A nan lies in no range."""
    if isinstance(wanted, Mapping):
        if not pd.api.types.is_numeric_dtype(values.dtype):
            raise UsageError(f"{values.name}: holds words, not numbers: a range cannot be asked of it")
        return np.asarray(values.between(wanted.get("min", -math.inf), wanted.get("max", math.inf)))
    if isinstance(wanted, list | tuple):
        return np.asarray(np.logical_or.reduce([meets(values, one) for one in wanted]))
    if wanted is None or (isinstance(wanted, float) and math.isnan(wanted)):
        return np.asarray(values.isna())
    return np.asarray(values == wanted)


def select(frame: pd.DataFrame, where: Mapping[str, Any]) -> pd.DataFrame:
    """The rows that meet all conditions; `NothingFound` names the condition that leaves none.

    Rows with seed -1 are means over the networks: they count only where a condition asks for them.
    """
    chosen = np.ones(len(frame), bool)
    if "seed" not in where and "seed" in frame:
        chosen &= (frame["seed"] >= 0).to_numpy()
    for name, wanted in where.items():
        column = choose(frame, name, "column")
        met = chosen & meets(column, wanted)
        if not met.any():
            there = column[chosen]
            values = ", ".join(sorted(map(str, there.unique()))) or "nothing"
            if pd.api.types.is_numeric_dtype(there.dtype) and there.nunique() > 6:
                values = f"{there.min():.6g} to {there.max():.6g}"
            raise NothingFound(f"selects no rows: {name}={format_condition(wanted)} where there is {values}")
        chosen = met
    if not chosen.any():
        raise NothingFound("selects no rows: the table has none")
    return frame[chosen]


def format_condition(wanted: Any) -> str:
    """A condition in words: `3`, `a or b`, `10 to 20`, `from 10`."""
    if isinstance(wanted, Mapping):
        low, high = (wanted.get(bound) for bound in BOUNDS)
        return f"{low} to {high}" if None not in (low, high) else f"up to {high}" if low is None else f"from {low}"
    return " or ".join(map(str, wanted)) if isinstance(wanted, list | tuple) else str(wanted)


def numbers(frame: pd.DataFrame, name: str) -> np.ndarray:
    """A column as float64, or the natural logarithm of one; ln 0 is -inf, that of a negative number nan."""
    found = []
    for part in list_columns(name):
        column = choose(frame, part, "column")
        if not pd.api.types.is_numeric_dtype(column.dtype):
            raise UsageError(f"{part}: holds words, not numbers")
        found.append(column.to_numpy(float))
    with np.errstate(divide="ignore", invalid="ignore"):
        values: np.ndarray = found[0] if len(found) == 1 else found[0] / found[1]
    if not name.startswith(LN):
        return values
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log(values))


def codes(frame: pd.DataFrame, names: Iterable[str]) -> np.ndarray:
    """Rows -> 0, 1, 2, ...: equal where all the named columns that there are agree; a row each where there is none."""
    there = [name for name in names if name in frame]
    if not there:
        return np.arange(len(frame))
    return np.asarray(frame.groupby(there, observed=True, sort=False, dropna=False).ngroup())


def networks(frame: pd.DataFrame) -> np.ndarray:
    """Which network each row is about, as 0, 1, 2, ..."""
    return codes(frame, NETWORK)
