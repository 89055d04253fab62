"""Rows -> does a study's expected answer hold? A small typed vocabulary, not evaluated Python.

An expectation selects rows of the joined tables, reduces one statistic to a number and compares it. One that selects no
rows is a mistake, never a pass.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from initlab.errors import UsageError, choose

Numbers = np.ndarray


def _error_of_mean(values: Numbers) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


# name -> (number, its standard error); nan is a result and is not skipped.
REDUCTIONS: dict[str, tuple[Callable[[Numbers], float], Callable[[Numbers], float]]] = {
    "mean": (lambda v: float(v.mean()), _error_of_mean),
    "median": (lambda v: float(np.median(v)), lambda v: 1.2533 * _error_of_mean(v)),  # of a normal law
    "min": (lambda v: float(v.min()), lambda v: math.nan),
    "max": (lambda v: float(v.max()), lambda v: math.nan),
    "nans": (lambda v: float(np.isnan(v).sum()), lambda v: math.nan),  # how many there are
}

# name -> f(measured, numbers, relative tolerance); any comparison with nan fails.
COMPARISONS: dict[str, Callable[[float, Sequence[float], float], bool]] = {
    "below": lambda x, v, tolerance: x < v[0],
    "above": lambda x, v, tolerance: x > v[0],
    "between": lambda x, v, tolerance: v[0] <= x <= v[1],
    "equals": lambda x, v, tolerance: abs(x - v[0]) <= tolerance * abs(v[0]),
}
_NUMBERS = {"between": 2}
_FIELDS = {"say", "table", "where", "statistic", "reduce", "is", "value", "tolerance"}


@dataclass(frozen=True)
class Verdict:
    """What was expected, what was measured and how surely."""

    say: str
    holds: bool
    measured: float
    error: float

    def __str__(self) -> str:
        spread = f" +- {self.error:.1g}" if math.isfinite(self.error) else ""
        return f"{'holds' if self.holds else 'FAILS'}: {self.say} (measured {self.measured:.6g}{spread})"


def judge(expectation: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> Verdict:
    """One expectation: `say, where, statistic, reduce, is, value`, `tolerance` for `equals`, `table` if not `stats`."""
    for name in expectation:
        choose(dict.fromkeys(_FIELDS), name, "expect")
    for name in sorted(_FIELDS - {"table", "tolerance", *expectation}):
        raise UsageError(f"expect: {expectation.get('say', 'an expectation')!r} has no `{name}`")
    rows = _selected(choose(tables, expectation.get("table", "stats"), "table"), expectation["where"])
    if not len(rows):
        raise UsageError(f"expect: {expectation['say']!r} selects no rows")
    values = choose(rows, expectation["statistic"], "statistic").to_numpy(float)
    number, error = choose(REDUCTIONS, expectation["reduce"], "reduce")
    how, compared = expectation["is"], np.atleast_1d(expectation["value"]).astype(float).tolist()
    holds = choose(COMPARISONS, how, "is")
    if len(compared) != _NUMBERS.get(how, 1):
        raise UsageError(f"expect: `is: {how}` takes {_NUMBERS.get(how, 1)} number(s) as value, not {len(compared)}")
    measured = number(values)
    verdict = holds(measured, compared, float(expectation.get("tolerance", 0)))
    return Verdict(str(expectation["say"]), bool(verdict), measured, error(values))


def _selected(frame: pd.DataFrame, where: Mapping[str, Any]) -> pd.DataFrame:
    """Rows whose columns equal a value, or lie in a range {min: ..., max: ...}."""
    chosen = np.ones(len(frame), bool)
    for name, wanted in where.items():
        column = choose(frame, name, "column")
        if isinstance(wanted, Mapping):
            chosen &= column.between(wanted.get("min", -math.inf), wanted.get("max", math.inf)).to_numpy()
        else:
            chosen &= (column == wanted).to_numpy()
    return frame[chosen]
