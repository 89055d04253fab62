import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import pytest

from initlab.errors import UsageError
from initlab.output.expect import judge

TABLES = {
    "stats": pd.DataFrame({"init": ["a", "a", "a", "b"], "layer": [1, 2, 3, 1], "std": [1.0, 2.0, 6.0, math.nan]}),
    "losses": pd.DataFrame({"step": [0, 1], "loss": [2.0, 1.0]}),
}


def expectation(**changes: Any) -> Mapping[str, Any]:
    return {"say": "it is so", "where": {"init": "a"}, "statistic": "std", "reduce": "mean"} | changes


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({"is": "equals", "value": 3.0}, True),
        ({"is": "equals", "value": 3.2, "tolerance": 0.1}, True),
        ({"is": "equals", "value": 3.2, "tolerance": 0.01}, False),
        ({"is": "below", "value": 3.0}, False),
        ({"is": "above", "value": 2.9}, True),
        ({"is": "between", "value": [2.9, 3.1]}, True),
        ({"is": "equals", "value": 2.0, "reduce": "median"}, True),
        ({"is": "equals", "value": 6.0, "reduce": "max"}, True),
        ({"is": "equals", "value": 1.0, "reduce": "min"}, True),
        ({"is": "equals", "value": 4.0, "where": {"init": "a", "layer": {"min": 2}}}, True),
        ({"is": "equals", "value": 1.5, "where": {"layer": {"min": 1, "max": 2}, "init": "a"}}, True),
        ({"is": "below", "value": 1e9, "where": {"init": "b"}}, False),  # nan is a result: it satisfies nothing
        ({"is": "below", "value": 1.6, "table": "losses", "where": {}, "statistic": "loss"}, True),
    ],
)
def test_an_expectation_holds_or_fails(changes: dict[str, Any], holds: bool) -> None:
    assert judge(expectation(**changes), TABLES).holds == holds


def test_a_verdict_says_what_was_measured_and_how_surely() -> None:
    verdict = judge(expectation(**{"is": "above", "value": 1}), TABLES)
    error = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2 / 3)
    assert verdict.error == pytest.approx(error)
    assert str(verdict) == "holds: it is so (measured 3 +- 2)"
    assert str(judge(expectation(**{"is": "below", "value": 1}), TABLES)).startswith("FAILS: it is so")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"where": {"init": "c"}}, "selects no rows"),
        ({"where": {"inti": "a"}}, "did you mean init"),
        ({"statistic": "stdd"}, "did you mean std"),
        ({"reduce": "average"}, "must be one of max, mean, median, min"),
        ({"is": "under"}, "must be one of above, below, between, equals"),
        ({"value": [1, 2]}, "takes 1 number"),
        ({"is": "between"}, "takes 2 number"),
        ({"tabel": "stats"}, "did you mean table"),
        ({"table": "parity"}, "table=parity"),
    ],
)
def test_an_expectation_that_cannot_be_judged_is_a_mistake(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        judge(expectation(**{"is": "below", "value": 1.0} | changes), TABLES)


def test_an_expectation_must_be_complete() -> None:
    with pytest.raises(UsageError, match="has no `is`"):
        judge(expectation(value=1), TABLES)
