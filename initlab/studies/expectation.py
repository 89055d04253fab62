"""What a study expects, as it is written: typed fields, no evaluated Python; every mistake of form is one line.

How far a measured number may be from what is expected is said beforehand: by the spread over networks (`5 standard
errors`), by theory (`band`), or as a share of it, which number formats need.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from initlab.errors import UsageError, choose, nearest, not_one_of
from initlab.runs.schema import STATS, THEORY
from initlab.runs.select import NothingFound, bare, refuse_columns, refuse_condition
from initlab.studies.reductions import REDUCTIONS, Measured
from initlab.tasks.ensemble.device import drops_subnormals

# What `reduce` may say: the reductions of rows, and those that make a number of each network first.
PER_NETWORK = ("share", "first_layer", "slope", "argmin")
REDUCES = (*REDUCTIONS, *PER_NETWORK)
BAND = "band"
_AGAINST = ("slope", "argmin")  # reductions along a column
_WITH_BAND = ("mean", "median", "min", "max")  # a number that has a band of its own

# name -> f(measured, numbers, distance): the distance that is allowed, or of `below` and `above` needed; nan fails.
COMPARISONS: dict[str, Callable[[float, Sequence[float], float], bool]] = {
    "below": lambda x, v, distance: x < v[0] - distance,
    "above": lambda x, v, distance: x > v[0] + distance,
    "between": lambda x, v, distance: v[0] - distance <= x <= v[1] + distance,
    "equals": lambda x, v, distance: abs(x - v[0]) <= distance or x == v[0],
}
# name -> f(a number, the next one, distance), where the values of a column are compared with each other.
AMONG: dict[str, Callable[[float, float, float], bool]] = {
    "order": lambda a, b, distance: b - a > distance,
    "alike": lambda a, b, distance: abs(b - a) <= distance,
}
ALLOWED, NEEDED_BY = (
    ("equals", "between", "alike"),
    ("below", "above", "order"),
)  # what `tolerance` and `margin` are for
ERRORS = re.compile(r"(\d+(?:\.\d+)?) standard errors?")
_NUMBERS = {"between": 2}
_TEXTS = ("say", "table", "statistic", "reduce", "over", "by", "is", "fails", "machine")
_NEEDED = ("say", "where", "statistic", "reduce", "is", "value")
FIELDS = (
    "say",
    "table",
    "where",
    "statistic",
    "reduce",
    "over",
    "by",
    "when",
    "is",
    "value",
    "tolerance",
    "margin",
    "fails",
    "machine",
)
# What a sentence may ask of the processor: on another one it is not judged.
MACHINES: dict[str, Callable[[], bool]] = {
    "flushes bfloat16": lambda: drops_subnormals("bfloat16"),
    "keeps bfloat16": lambda: not drops_subnormals("bfloat16"),
}


@dataclass(frozen=True)
class Expectation:
    """One sentence and how it is judged.

    `statistic` (a column, or `ln COLUMN`) of the rows of `table` that meet `where` is reduced to a number: `mean`,
    `median`, `min`, `max`, `variance`, `nans` (how many) of the rows; `share` of the rows whose statistic lies in
    `when`; `first_layer`, per network the smallest `over` (layer) at which it does, then the median over networks;
    `slope` against `over`, and `argmin`, the `over` at which it is smallest, the mean over networks (of the runs of one
    seed, where `over` varies between runs). Without `when` a number other than 0 is asked for, nan included.

    The number `is` below, above, between or equal to `value`, which may be another column of the table, reduced alike;
    or the values of the column `by` (or `over`) stand in `order`, ascending in that number, or are `alike`. The
    `tolerance` is relative, or so many of the number's standard `errors`, or the `band` that theory predicts for the
    mean over the networks. Of what is below, above or in order the errors are a margin: it is so surely. `fails`
    says why a claim is known not to come out; it is judged all the same. `machine`, a name of MACHINES, says on which
    processors it is judged at all.
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
    errors: float = 0.0
    column: str = ""
    fails: str = ""
    machine: str = ""

    def columns(self) -> list[str]:
        """The columns that it names; with a band the statistic is a row of the table `theory`."""
        names = (*self.where, "" if self.band else self.statistic, self.over, self.by, self.column)
        return [bare(name) for name in names if name]

    def distance(self, value: float, *measured: Measured) -> float:
        """How far a number may be from the value, or has to be; `NothingFound` where one network has no error."""
        found = self.tolerance * abs(value)
        if not self.errors:
            return found
        error = math.hypot(*(one.error for one in measured if math.isfinite(one.number)))  # never has none
        if math.isnan(error):
            raise NothingFound("has no standard error: it is about one network alone")
        return found + self.errors * error


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
        raise name_sentence(given.get("say", "an expectation"), error) from error
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
    compares = [name for name in given if name in ("is", "value", "tolerance", "margin", "by", "say", "fails")]
    if compares:
        raise UsageError(f"objective: is a number that is compared with nothing; leave `{compares[0]}` out")
    try:
        return parse_expectation({"where": {}, **given, "say": "objective", "is": "below", "value": 0}, tables)
    except UsageError as error:
        raise type(error)(f"objective: {str(error).removeprefix(NAMED)}") from error


NAMED = "expect: 'objective': "


def name_sentence(say: object, error: UsageError) -> UsageError:
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
    choose(dict.fromkeys([*COMPARISONS, *AMONG]), how, "is")
    if "machine" in given:
        choose(MACHINES, given["machine"], "machine")
    _refuse_unused(given, reduce, how)
    over, by = given.get("over", ""), given.get("by", "")
    if how in AMONG and not by:
        over, by = "", over
    if how in AMONG and (not by or (reduce in _AGAINST and not over)):
        raise UsageError(
            f"`is: {how}` needs `by`: the column whose values are compared (`over`, where nothing else is)"
        )
    over = over or ("layer" if reduce == "first_layer" else "")
    column = given["value"] if how == "equals" and isinstance(given.get("value"), str) else ""
    value = () if band or column else _parse_value(given, how)
    relative, errors = (0.0, 0.0) if band else _parse_tolerance(given, how)
    _refuse_band(given)
    return Expectation(
        given["say"], dict(given["where"]), given["statistic"], reduce, how, value,
        given.get("table", THEORY if band else STATS), over, by, given.get("when"), relative, band, errors, column,
        given.get("fails", ""), given.get("machine", ""),
    )  # fmt: skip


def _refuse_unused(given: Mapping[str, Any], reduce: str, how: str) -> None:
    """A field that would be passed over in silence is a mistake of whoever wrote it."""
    if "when" in given:
        if reduce not in ("share", "first_layer"):
            raise UsageError(f"`when` is for share and first_layer, not for {reduce}")
        refuse_condition("when", given["when"])
    if reduce in _AGAINST and "over" not in given:
        raise UsageError(f"`reduce: {reduce}` needs `over`: the column that it is taken against")
    if "over" in given and reduce not in (*_AGAINST, "first_layer") and how not in AMONG:
        raise UsageError(f"`over` is for slope, argmin, first_layer and order, not for {reduce}")
    if "by" in given and how not in AMONG:
        raise UsageError(f"`by` is for `is: order` and `is: alike`, not for {how}")
    for name, kinds in (("tolerance", ALLOWED), ("margin", NEEDED_BY)):
        if name in given and how not in kinds:
            raise UsageError(f"`{name}` is for {', '.join(f'`is: {kind}`' for kind in kinds)}, not for {how}")


def _parse_value(given: Mapping[str, Any], how: str) -> tuple[Any, ...]:
    value = given["value"]
    found = tuple(value) if isinstance(value, list | tuple) else (value,)
    if how in AMONG:
        if len(found) < 2 or len(set(map(str, found))) < len(found):
            raise UsageError(f"value={value}: `is: {how}` compares two or more different values")
        return found
    if len(found) != _NUMBERS.get(how, 1):
        raise UsageError(f"`is: {how}` takes {_NUMBERS.get(how, 1)} number(s) as value, not {len(found)}")
    for one in found:
        if isinstance(one, bool) or not isinstance(one, int | float) or math.isnan(one):
            raise UsageError(f"value={one}: must be a number")
    if how == "between" and found[0] > found[1]:
        raise UsageError(f"value={value}: the smaller number comes first")
    return tuple(map(float, found))


def _refuse_band(given: Mapping[str, Any]) -> None:
    """What does not go with `tolerance: band`."""
    if given.get("tolerance") != BAND:
        return
    if "value" in given:
        raise UsageError("`tolerance: band` takes no value: theory has it")
    if given["reduce"] not in _WITH_BAND:
        raise not_one_of("with `tolerance: band`, reduce", given["reduce"], _WITH_BAND)
    if given.get("table", THEORY) != THEORY:
        raise UsageError(f"`tolerance: band` is about table: {THEORY}, not {given['table']}")


def _parse_tolerance(given: Mapping[str, Any], how: str) -> tuple[float, float]:
    """The relative tolerance, and the number of standard errors, that `tolerance` or `margin` says."""
    name = "tolerance" if how in ALLOWED else "margin"
    said = given.get(name, 0.0)
    if isinstance(said, str) and (found := ERRORS.fullmatch(said)):
        return 0.0, float(found[1])
    number = isinstance(said, int | float) and not isinstance(said, bool) and said >= 0
    if not number or (said and how != "equals"):
        also = "a number from 0 on, `band`, or " if how == "equals" else ""
        raise UsageError(f"{name}={said}: must be {also}`5 standard errors`")
    return float(said), 0.0
