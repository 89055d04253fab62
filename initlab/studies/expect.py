"""Expectations: what a study says that its tables will show, and whether it does. Typed fields, no evaluated Python.

An expectation selects rows of the joined tables, reduces one statistic to a number and compares it. `parse_expectation`
checks its form before anything is measured, `judge` asks the tables. One that selects no rows is a mistake, no pass.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from initlab.errors import UsageError, choose, nearest, not_one_of
from initlab.runs.schema import STATS, THEORY
from initlab.runs.select import (
    NothingFound,
    bare,
    codes,
    format_condition,
    meets,
    networks,
    numbers,
    refuse_columns,
    refuse_condition,
    select,
)
from initlab.studies import reductions
from initlab.studies.reductions import REDUCTIONS, Measured, reduce_rows

# What `reduce` may say: the reductions of rows, and those that make a number of each network first.
PER_NETWORK = ("share", "first_layer", "slope")
REDUCES = (*REDUCTIONS, *PER_NETWORK)
BAND = "band"
_WITH_BAND = ("mean", "median", "min", "max")  # a number that has a band of its own

# name -> f(measured, numbers, relative tolerance); any comparison with nan fails.
COMPARISONS: dict[str, Callable[[float, Sequence[float], float], bool]] = {
    "below": lambda x, v, tolerance: x < v[0],
    "above": lambda x, v, tolerance: x > v[0],
    "between": lambda x, v, tolerance: v[0] <= x <= v[1],
    "equals": lambda x, v, tolerance: abs(x - v[0]) <= tolerance * abs(v[0]) or x == v[0],
}
_NUMBERS = {"between": 2}
_TEXTS = ("say", "table", "statistic", "reduce", "over", "by", "is")
_NEEDED = ("say", "where", "statistic", "reduce", "is", "value")
FIELDS = ("say", "table", "where", "statistic", "reduce", "over", "by", "when", "is", "value", "tolerance")


@dataclass(frozen=True)
class Expectation:
    """One sentence and how it is judged.

    `statistic` (a column, or `ln COLUMN`) of the rows of `table` that meet `where` is reduced to a number: `mean`,
    `median`, `min`, `max`, `variance`, `nans` (how many) of the rows; `share` of the rows whose statistic lies in
    `when`; `first_layer`, per network the smallest `over` (layer) at which it does, then the median over networks;
    `slope` against `over`, the mean over networks (of the runs of one seed, where `over` varies between runs). Without
    `when` a number other than 0 is asked for, nan included. The number `is` below, above, between or equal to `value`,
    to a relative `tolerance`, or within the `band` that theory predicts for the mean over the networks; or the values
    of the column `by` (or `over`) stand in `order`, ascending in that number.
    """

    say: str
    where: Mapping[str, Any]
    statistic: str
    reduce: str
    how: str
    value: tuple[Any, ...]
    table: str = STATS
    over: str = ""
    by: str = ""
    when: Any = None
    tolerance: float = 0.0
    band: bool = False

    def columns(self) -> list[str]:
        """The columns that it names; with a band the statistic is a row of the table `theory`."""
        return [bare(name) for name in (*self.where, "" if self.band else self.statistic, self.over, self.by) if name]


@dataclass(frozen=True)
class Answer:
    """What was expected, what was measured and how surely; several numbers where an order is judged."""

    say: str
    holds: bool
    measured: tuple[Measured, ...]
    band: str = ""  # what it was compared with, where the sentence cannot know it

    def __str__(self) -> str:
        numbers = ", ".join(map(str, self.measured))
        return f"{'holds' if self.holds else 'FAILS'}: {self.say} (measured {numbers}{self.band})"


def parse_expectation(given: Any, tables: Mapping[str, Collection[str] | None] | None = None) -> Expectation:
    """The expectation that the fields describe. Raises `UsageError`, one line about what is wrong with its form.

    tables: those that there may be, with their columns where they are known before anything is measured.
    """
    if not isinstance(given, Mapping):
        raise UsageError(f"expect: {given!r} is no expectation; one is {{say: ..., where: ..., statistic: ..., ...}}")
    try:
        one = _parse_fields(given)
        if tables is not None:
            refuse_columns(one.columns(), tables, one.table)
    except UsageError as error:
        raise _name_sentence(given.get("say", "an expectation"), error) from error
    return one


def parse_objective(
    given: Mapping[str, Any], tables: Mapping[str, Collection[str] | None] | None = None
) -> Expectation | None:
    """What a job returns to a sweeper that looks for the smallest or largest value; None for no objective.

    given: the fields `table`, `where`, `statistic`, `reduce`, `over`, `when` of an expectation that compares nothing.
    tables: as in `parse_expectation`. Errors: its form is wrong, or it compares.
    """
    if not given:
        return None
    compares = [name for name in given if name in ("is", "value", "tolerance", "by", "say")]
    if compares:
        raise UsageError(f"objective: is a number that is compared with nothing; leave `{compares[0]}` out")
    try:
        return parse_expectation({"where": {}, **given, "say": "objective", "is": "below", "value": 0}, tables)
    except UsageError as error:
        raise type(error)(f"objective: {str(error).removeprefix(NAMED)}") from error


NAMED = "expect: 'objective': "


def measure_objective(one: Expectation, tables: Mapping[str, pd.DataFrame]) -> Measured:
    """The number that an objective stands for, by the tables. Raises `NothingFound` where they have no such rows."""
    try:
        (found,) = judge(one, tables).measured
    except UsageError as error:
        raise type(error)(f"objective: {str(error).removeprefix(NAMED)}") from error
    return found


def _name_sentence(say: object, error: UsageError) -> UsageError:
    """The same mistake with the sentence that it is in."""
    return type(error)(f"expect: {str(say)!r}: {error}")


def _parse_fields(given: Mapping[str, Any]) -> Expectation:
    for name in given:
        if name not in FIELDS:
            raise UsageError(f"{name}: no such field{nearest(str(name), FIELDS)}; fields are {', '.join(FIELDS)}")
    band = given.get("tolerance") == BAND
    for name in _NEEDED:
        if name not in given and not (band and name == "value"):
            raise UsageError(f"has no `{name}`")
    for name in _TEXTS:
        if name in given and (not isinstance(given[name], str) or not given[name].strip()):
            raise UsageError(f"{name}={given[name]}: must be text")
    if not isinstance(given["where"], Mapping):
        raise UsageError(f"where={given['where']}: must be {{column: value, list of values, or {{min: a, max: b}}}}")
    for name, wanted in given["where"].items():
        refuse_condition(f"where.{name}", wanted)
    reduce, how = given["reduce"], given["is"]
    choose(dict.fromkeys(REDUCES), reduce, "reduce")
    choose(dict.fromkeys([*COMPARISONS, "order"]), how, "is")
    _refuse_unused(given, reduce, how)
    over, by = given.get("over", ""), given.get("by", "")
    if how == "order" and not by:
        over, by = "", over
    if how == "order" and (not by or (reduce == "slope" and not over)):
        raise UsageError("`is: order` needs `by`: the column whose values are ordered (`over`, where nothing else is)")
    over = over or ("layer" if reduce == "first_layer" else "")
    return Expectation(
        given["say"], dict(given["where"]), given["statistic"], reduce, how, () if band else _parse_value(given, how),
        given.get("table", THEORY if band else STATS), over, by, given.get("when"), _parse_tolerance(given, how), band,
    )  # fmt: skip


def _refuse_unused(given: Mapping[str, Any], reduce: str, how: str) -> None:
    """A field that would be passed over in silence is a mistake of whoever wrote it."""
    if "when" in given:
        if reduce not in ("share", "first_layer"):
            raise UsageError(f"`when` is for share and first_layer, not for {reduce}")
        refuse_condition("when", given["when"])
    if reduce == "slope" and "over" not in given:
        raise UsageError("`reduce: slope` needs `over`: the column that it is taken against")
    if "over" in given and reduce not in ("slope", "first_layer") and how != "order":
        raise UsageError(f"`over` is for slope, first_layer and order, not for {reduce}")
    if "by" in given and how != "order":
        raise UsageError(f"`by` is for `is: order`, not for {how}")


def _parse_value(given: Mapping[str, Any], how: str) -> tuple[Any, ...]:
    value = given["value"]
    found = tuple(value) if isinstance(value, list | tuple) else (value,)
    if how == "order":
        if len(found) < 2 or len(set(map(str, found))) < len(found):
            raise UsageError(f"value={value}: an order is of two or more different values")
        return found
    if len(found) != _NUMBERS.get(how, 1):
        raise UsageError(f"`is: {how}` takes {_NUMBERS.get(how, 1)} number(s) as value, not {len(found)}")
    for one in found:
        if isinstance(one, bool) or not isinstance(one, int | float) or math.isnan(one):
            raise UsageError(f"value={one}: must be a number")
    if how == "between" and found[0] > found[1]:
        raise UsageError(f"value={value}: the smaller number comes first")
    return tuple(map(float, found))


def _parse_tolerance(given: Mapping[str, Any], how: str) -> float:
    tolerance = given.get("tolerance", 0.0)
    if "tolerance" in given and how != "equals":
        raise UsageError(f"`tolerance` is for `is: equals`, not for {how}")
    if tolerance == BAND:
        if "value" in given:
            raise UsageError("`tolerance: band` takes no value: theory has it")
        if given["reduce"] not in _WITH_BAND:
            raise not_one_of("with `tolerance: band`, reduce", given["reduce"], _WITH_BAND)
        if given.get("table", THEORY) != THEORY:
            raise UsageError(f"`tolerance: band` is about table: {THEORY}, not {given['table']}")
        return 0.0
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not tolerance >= 0:
        raise UsageError(f"tolerance={tolerance}: must be a number from 0 on, or `band`")
    return float(tolerance)


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
            return Answer(one.say, low <= number <= high, (Measured(number, error),), band)
        rows = select(table, one.where)
        if one.how != "order":
            found = _reduce(one, rows)
            return Answer(one.say, COMPARISONS[one.how](found.number, one.value, one.tolerance), (found,))
        ascending = []  # the values of the column, in the order in which their numbers should ascend
        for value in one.value:
            mine = rows[meets(rows[one.by], value)]
            if not len(mine):
                raise NothingFound(f"selects no rows with {one.by}={format_condition(value)}")
            ascending.append(_reduce(one, mine, str(value)))
        holds = all(a.number < b.number for a, b in pairwise(ascending))
        return Answer(one.say, holds, tuple(sorted(ascending, key=lambda m: (math.isnan(m.number), m.number))))
    except UsageError as error:
        raise _name_sentence(one.say, error) from error


def _reduce(one: Expectation, rows: pd.DataFrame, of: str = "") -> Measured:
    """The statistic of these rows as one number, with its standard error over networks."""
    values, owner = numbers(rows, one.statistic), networks(rows)
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
        found = reductions.slopes(values, over, owner)
    return reduce_rows("mean", found, np.arange(len(found)), of)
