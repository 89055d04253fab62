"""Whether the tables show what a study expects: rows are selected, reduced to a number and compared.

An expectation that selects no rows is a mistake, no pass.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd

from initlab.errors import UsageError
from initlab.runs.select import NothingFound, codes, format_condition, meets, networks, numbers, refuse_columns, select
from initlab.studies import reductions
from initlab.studies.expectation import AMONG, COMPARISONS, NAMED, Expectation, name_sentence, parse_expectation
from initlab.studies.reductions import REDUCTIONS, Measured, reduce_rows


@dataclass(frozen=True)
class Answer:
    """What was expected, what was measured and how surely; several numbers where an order is judged.

    fails: why the study says that it does not come out.
    """

    say: str
    holds: bool
    measured: tuple[Measured, ...]
    band: str = ""  # what it was compared with, where the sentence cannot know it
    fails: str = ""

    @property
    def as_said(self) -> bool:
        """Whether it holds, or fails as the study says: a claim that comes out after all is news as well."""
        return self.holds != bool(self.fails)

    @property
    def kind(self) -> str:
        if self.fails:
            return "HOLDS AFTER ALL" if self.holds else "does not reproduce"
        return "holds" if self.holds else "FAILS"

    def __str__(self) -> str:
        numbers = ", ".join(map(str, self.measured))
        why = f": {self.fails}" if self.fails and not self.holds else ""
        return f"{self.kind}: {self.say} (measured {numbers}{self.band}){why}"


def measure_objective(one: Expectation, tables: Mapping[str, pd.DataFrame]) -> Measured:
    """The number that an objective stands for, by the tables. Raises `NothingFound` where they have no such rows."""
    try:
        (found,) = judge(one, tables).measured
    except UsageError as error:
        raise type(error)(f"objective: {str(error).removeprefix(NAMED)}") from error
    return found


def judge(expectation: Expectation | Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> Answer:
    """Whether one expectation holds, by the tables. Raises `NothingFound` where they have no such rows."""
    one = expectation if isinstance(expectation, Expectation) else parse_expectation(expectation)
    try:
        if one.table not in tables:
            raise NothingFound(f"no job has written a table `{one.table}`")
        refuse_columns(one.columns(), tables, one.table)
        table = tables[one.table]
        if one.band:  # the mean over the networks, measured (seed -1), within its band; several rows are reduced alike
            where = {**one.where, "statistic": one.statistic}
            whole, each = select(table, {**where, "seed": -1}), select(table, where)
            number, low, high = (
                reduce_rows(one.reduce, numbers(whole, name), np.zeros(len(whole), int)).number
                for name in ("measured", "band_low", "band_high")
            )
            error = reduce_rows(one.reduce, numbers(each, "measured"), networks(each)).error
            band = f", band {low:.3g} to {high:.3g}"
            return Answer(one.say, low <= number <= high, (Measured(number, error),), band, one.fails)
        rows = select(table, one.where)
        if one.how not in AMONG:
            found, value, beside = _reduce(one, rows, one.statistic), one.value, ""
            if one.column:
                value = (_reduce(one, rows, one.column).number,)
                beside = f", {one.column} {value[0]:.3g}"
            holds = COMPARISONS[one.how](found.number, value, one.distance(value[0], found))
            return Answer(one.say, holds, (found,), beside, one.fails)
        several = []  # of the values of the column, in the order in which they are given
        for value in one.value:
            mine = rows[meets(rows[one.by], value)]
            if not len(mine):
                raise NothingFound(f"selects no rows with {one.by}={format_condition(value)}")
            several.append(_reduce(one, mine, one.statistic, str(value)))
        pairs = pairwise(several) if one.how == "order" else combinations(several, 2)
        holds = all(AMONG[one.how](a.number, b.number, one.distance(0, a, b)) for a, b in pairs)
        ascending = sorted(several, key=lambda m: (math.isnan(m.number), m.number))
        return Answer(one.say, holds, tuple(ascending), "", one.fails)
    except UsageError as error:
        raise name_sentence(one.say, error) from error


def _reduce(one: Expectation, rows: pd.DataFrame, statistic: str, of: str = "") -> Measured:
    """A statistic of these rows as one number, with its standard error over networks."""
    values, owner = numbers(rows, statistic), networks(rows)
    if one.reduce in REDUCTIONS:
        return reduce_rows(one.reduce, values, owner, of)
    met = values != 0 if one.when is None else meets(pd.Series(values, name="when"), one.when)
    if one.reduce == "share":
        return reduce_rows("mean", met.astype(float), owner, of)
    over = numbers(rows, one.over)
    if not reductions.varies_inside(over, owner):
        owner = codes(rows, ("seed",))  # the runs of one seed are one line
    if one.reduce == "first_layer":
        found = reductions.first(met, over, owner)
        return reduce_rows("median", found, np.arange(len(found)), of)
    with np.errstate(all="ignore"):
        found = (reductions.slopes if one.reduce == "slope" else reductions.find_lowest)(values, over, owner)
    return reduce_rows("mean", found, np.arange(len(found)), of)
