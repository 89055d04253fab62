import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest

from initlab.errors import UsageError
from initlab.runs.select import NothingFound
from initlab.studies.expect import Answer, judge
from initlab.studies.expectation import parse_expectation
from initlab.studies.reductions import Measured, reduce_rows
from initlab.studies.study import count, prepare

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
        ({"is": "equals", "value": 7.0, "reduce": "variance", "tolerance": 1e-12}, True),  # (4 + 1 + 9) / (3 - 1)
        ({"is": "equals", "value": 4.0, "where": {"init": "a", "layer": {"min": 2}}}, True),
        ({"is": "equals", "value": 1.5, "where": {"layer": {"min": 1, "max": 2}, "init": "a"}}, True),
        ({"is": "equals", "value": 3.5, "where": {"init": "a", "layer": [1, 3]}}, True),
        ({"is": "equals", "value": 1, "where": {"std": None}, "reduce": "nans"}, True),
        ({"is": "below", "value": 1e9, "where": {"init": "b"}}, False),  # nan is a result: it satisfies nothing
        ({"is": "below", "value": 1e9, "where": {"init": ["a", "b"]}, "reduce": "median"}, False),
        ({"is": "below", "value": 1.6, "table": "losses", "where": {}, "statistic": "loss"}, True),
        ({"is": "equals", "value": math.log(12) / 3, "statistic": "ln std", "tolerance": 1e-12}, True),
    ],
)
def test_an_expectation_holds_or_fails(changes: dict[str, Any], holds: bool) -> None:
    assert judge(expectation(**changes), TABLES).holds == holds


def test_reductions_are_numpys() -> None:
    """Sums over networks, weighted, against numpy on the rows themselves."""
    rng = np.random.default_rng(0)
    values, owner = rng.normal(size=(2, 999)), np.arange(999) % 37
    for name, reference in (("mean", np.mean), ("median", np.median), ("min", np.min), ("max", np.max)):
        assert reduce_rows(name, values[0], owner).number == pytest.approx(reference(values[0]), rel=1e-12)
        assert reduce_rows(name, values[0][:998], owner[:998]).number == pytest.approx(
            reference(values[0][:998]), rel=1e-12
        )


@pytest.mark.parametrize(
    ("name", "law"), [("mean", 1.0), ("median", math.sqrt(math.pi / 2)), ("variance", math.sqrt(2))]
)
def test_the_error_is_that_of_networks_not_of_rows(name: str, law: float) -> None:
    """1,000 normal networks: sd / sqrt(1000) times 1, 1.2533 and, for their variance, sqrt(2).

    A bootstrap of 200 draws knows an error to 5 %, that of a median of 1,000 to some 10 % more: 35 % is three of both.
    Repeating every row 9 times says nothing new, and must not make the error smaller.
    """
    values = np.random.default_rng(1).normal(size=1000)
    once = reduce_rows(name, values, np.arange(1000)).error
    assert once == pytest.approx(law / math.sqrt(1000), rel=0.35)
    assert reduce_rows(name, np.repeat(values, 9), np.repeat(np.arange(1000), 9)).error == pytest.approx(once, rel=0.01)
    rows = reduce_rows(name, np.repeat(values, 9), np.arange(9000)).error
    assert rows < 0.5 * once  # rows taken for networks would claim a third of the error


def test_one_network_has_no_error_and_the_draws_are_always_the_same() -> None:
    assert math.isnan(reduce_rows("mean", np.arange(5.0), np.zeros(5, int)).error)
    twice = [reduce_rows("median", np.arange(50.0), np.arange(50)) for _ in range(2)]
    assert twice[0] == twice[1]


def network(seed: int, run: str, std: list[float], **more: Any) -> pd.DataFrame:
    layers = range(1, len(std) + 1)
    return pd.DataFrame({"run": run, "seed": seed, "layer": layers, "std": std, **more})


HALVING = pd.concat([network(s, "r", [0.5**k * (1 + s) for k in range(1, 6)], init="a") for s in range(3)])


def test_slope_is_per_network() -> None:
    """Networks of one slope and of different heights: pooled rows would have errors, each network has none."""
    tables = {"stats": HALVING}
    how = {"where": {}, "statistic": "ln std", "reduce": "slope", "over": "layer", "is": "equals"}
    found = judge(expectation(**how, value=-math.log(2), tolerance=1e-12), tables)
    assert found.holds and found.measured[0].error < 1e-12
    assert not judge(expectation(**how, value=-math.log(2.01), tolerance=1e-3), tables).holds
    dead = pd.concat([HALVING, network(3, "r", [1.0, 0.0, 0.0, 0.0, 0.0], init="a")])
    assert not judge(expectation(**how, value=-math.log(2), tolerance=9e9), {"stats": dead}).holds  # ln 0 has no slope


def test_slope_over_runs_follows_the_seed() -> None:
    """Width differs between runs, never inside one: the runs of a seed are the line. Exponent 2 + seed."""
    runs = [network(s, f"w{w}", [float(w) ** (2 + s)], width=w) for w in (8, 16, 64) for s in range(3)]
    how = {"where": {"layer": 1}, "statistic": "ln std", "reduce": "slope", "over": "ln width"}
    found = judge(expectation(**how, **{"is": "equals", "value": 3.0, "tolerance": 1e-12}), {"stats": pd.concat(runs)})
    assert found.holds and found.measured[0].error == pytest.approx(math.sqrt(2 / 3 / 3), rel=0.3)  # of 3, by 200 draws
    with pytest.raises(NothingFound, match="one value only"):
        judge(expectation(**how, **{"is": "equals", "value": 3.0}), {"stats": runs[0]})


def test_first_layer_and_share() -> None:
    tables = {"stats": HALVING}
    first = {"where": {}, "reduce": "first_layer", "is": "equals"}
    # std < 0.1: 1/16 at layer 4; of the second network 1/16 at 5; of the third 3/32 at 5
    found = judge(expectation(**first, when={"max": 0.1}, value=5), tables)
    assert found.holds and found.measured[0].error > 0
    assert not judge(expectation(**first, when={"max": 0.1}, value=4), tables).holds
    never = judge(expectation(**first, when={"min": 100}, value=5), tables)
    assert not never.holds and str(never) == "FAILS: it is so (measured never)"
    assert judge(expectation(**first | {"is": "above"}, when={"min": 100}, value=9e9), tables).holds
    assert judge(expectation(**first, value=1), tables).holds  # anything but 0
    share = {"where": {}, "reduce": "share", "is": "equals", "tolerance": 1e-12}
    assert judge(expectation(**share, when={"max": 0.1}, value=4 / 15), tables).holds
    assert not judge(expectation(**share, when={"max": 0.1}, value=5 / 15), tables).holds
    losses = pd.DataFrame({"seed": 0, "step": [0, 10, 20], "loss": [2.0, 1.0, 0.5]})
    over = {"table": "losses", "where": {}, "statistic": "loss", "over": "step", "when": {"max": 1}}
    assert judge(expectation(**first | over, value=10), {"losses": losses}).holds


def test_an_order_is_strict_and_shows_its_numbers() -> None:
    frame = pd.concat([network(s, i, [v + s], init=i) for i, v in (("a", 1.0), ("b", 3.0), ("c", 3.0)) for s in (0, 1)])
    how = {"where": {}, "is": "order", "over": "init"}
    found = judge(expectation(**how, value=["a", "b"]), {"stats": frame})
    assert found.holds and [one.of for one in found.measured] == ["a", "b"]
    assert "a: 1.5 +- 0.4, b: 3.5 +- 0.4" in str(found)  # an error of 2 networks 1 apart is sqrt(1/8)
    assert not judge(expectation(**how, value=["b", "a"]), {"stats": frame}).holds
    assert not judge(expectation(**how, value=["a", "b", "c"]), {"stats": frame}).holds  # two are equal
    with pytest.raises(NothingFound, match="init=d"):
        judge(expectation(**how, value=["a", "d"]), {"stats": frame})
    falling = pd.concat([HALVING, HALVING.assign(init="b", run="s", std=HALVING["std"] ** 2)])
    by = {"where": {}, "is": "order", "by": "init", "value": ["b", "a"], "statistic": "ln std"}
    assert judge(expectation(**by, reduce="slope", over="layer"), {"stats": falling}).holds
    assert judge(
        expectation(**by | {"statistic": "std"}, reduce="first_layer", when={"max": 0.1}), {"stats": falling}
    ).holds


def theory(mean: float) -> pd.DataFrame:
    rows = pd.DataFrame({"run": "r", "seed": [-1, 0, 1], "layer": 1, "statistic": "std", "measured": [mean, 0.5, 1.5]})
    return rows.assign(predicted=1.0, band_low=[0.9, 0.1, 0.1], band_high=[1.1, 3.0, 3.0])


def test_the_band_is_that_of_the_mean_over_the_networks() -> None:
    how = {"where": {"layer": 1}, "is": "equals", "tolerance": "band"}
    found = judge(expectation(**how), {"theory": theory(1.05)})
    assert found.holds and str(found) == "holds: it is so (measured 1.05 +- 0.4, band 0.9 to 1.1)"
    assert not judge(expectation(**how), {"theory": theory(1.2)}).holds  # though within the band of one network
    assert not judge(expectation(**how), {"theory": theory(math.nan)}).holds
    z = {"table": "theory", "where": {"statistic": "std"}, "statistic": "measured", "is": "equals", "value": 1.0}
    assert judge(expectation(**z), {"theory": theory(99.0)}).holds  # the mean's row counts only where it is asked for


@pytest.mark.parametrize(("error", "text"), [(8.0, "+- 8)"), (10.3, "+- 10)"), (0.0123, "+- 0.01)"), (math.nan, "5)")])
def test_an_error_has_one_digit_and_no_exponent_where_none_is_needed(error: float, text: str) -> None:
    assert str(Answer("so", True, (Measured(92.5, error),))).endswith(text)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"where": {"init": "c"}}, "selects no rows: init=c where there is a, b"),
        ({"where": {"init": "a", "layer": {"min": 7}}}, "selects no rows: layer=from 7 where there is 1, 2, 3"),
        ({"where": {"inti": "a"}}, "did you mean init"),
        ({"where": {"init": {"min": 1}}}, "holds words, not numbers"),
        ({"where": {"layer": {"mim": 1}}}, "did you mean min"),
        ({"where": {"layer": {"min": "low"}}}, "must be a number"),
        ({"where": {"layer": []}}, "empty list"),
        ({"where": "layer"}, "where=layer"),
        ({"statistic": "stdd"}, "did you mean std"),
        ({"statistic": "init"}, "holds words"),
        ({"statistic": 3}, "must be text"),
        (
            {"reduce": "average"},
            "must be one of argmin, first_layer, max, mean, median, min, nans, share, slope, variance",
        ),
        ({"is": "under"}, "must be one of above, alike, below, between, equals, order"),
        ({"value": [1, 2]}, "takes 1 number"),
        ({"value": "1"}, "value=1: must be a number"),
        ({"is": "equals", "value": "stdd"}, "did you mean std"),
        ({"is": "between"}, "takes 2 number"),
        ({"is": "between", "value": [2, 1]}, "smaller number comes first"),
        ({"tabel": "stats"}, "did you mean table"),
        ({"table": "parity"}, "no job has written a table `parity`"),
        ({"tolerance": 0.1}, "`tolerance` is for `is: equals`"),
        ({"is": "equals", "tolerance": -1}, "tolerance=-1"),
        ({"is": "equals", "tolerance": "band"}, "takes no value"),
        ({"when": {"max": 1}}, "`when` is for share and first_layer"),
        ({"reduce": "slope"}, "needs `over`"),
        ({"over": "layer"}, "`over` is for slope"),
        ({"is": "order", "value": ["a", "b"]}, "needs `by`"),
        ({"is": "order", "over": "init", "value": ["a"]}, "two or more"),
        ({"by": "init"}, "`by` is for `is: order`"),
        ({"machine": "flushes bfloat61"}, "machine=flushes bfloat61: must be one of .* did you mean flushes bfloat16"),
    ],
)
def test_an_expectation_that_cannot_be_judged_is_a_mistake(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        judge(expectation(**{"is": "below", "value": 1.0} | changes), TABLES)
    assert "'it is so'" in str(caught.value) and "\n" not in str(caught.value)


def test_an_expectation_must_be_complete() -> None:
    with pytest.raises(UsageError, match="has no `is`"):
        judge(expectation(value=1), TABLES)
    with pytest.raises(UsageError, match="is no expectation"):
        parse_expectation("it grows")


def test_a_column_that_is_known_beforehand_is_missed_beforehand() -> None:
    one, known = expectation(**{"is": "below", "value": 1.0}), {"stats": {"init", "std"}, "losses": None}
    assert parse_expectation(one, known).statistic == "std"
    with pytest.raises(UsageError, match=r"'it is so': column of stats=stdd: .*did you mean std"):
        parse_expectation(one | {"statistic": "stdd"}, known)
    assert parse_expectation(one | {"table": "losses", "statistic": "stdd"}, known)  # not known: asked later
    with pytest.raises(UsageError, match="table=lossses"):
        parse_expectation(one | {"table": "lossses"}, known)


def draw_networks(**means: float) -> dict[str, pd.DataFrame]:
    """Tables of 16 normal networks of unit spread for each init: the standard error of a mean is near 0.25."""
    rng = np.random.default_rng(2)
    parts = [
        pd.DataFrame({"init": name, "seed": range(16), "std": mean + rng.normal(size=16), "law": mean, "lr": 1.0})
        for name, mean in means.items()
    ]
    return {"stats": pd.concat(parts, ignore_index=True)}


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({"is": "equals", "value": 2.0, "tolerance": "5 standard errors"}, True),
        ({"is": "equals", "value": 4.0, "tolerance": "5 standard errors"}, False),
        ({"is": "equals", "value": 0.0, "tolerance": "5 standard errors"}, False),  # two-sided
        ({"is": "equals", "value": "law", "tolerance": "5 standard errors"}, True),
        ({"is": "between", "value": [2.5, 3.0], "tolerance": "5 standard errors"}, True),
        ({"is": "between", "value": [4.0, 5.0], "tolerance": "5 standard errors"}, False),
        ({"is": "above", "value": 0.0, "margin": "5 standard errors"}, True),
        ({"is": "above", "value": 1.5, "margin": "5 standard errors"}, False),
        ({"is": "below", "value": 2.5, "margin": "5 standard errors"}, False),
        ({"is": "below", "value": 4.0, "margin": "5 standard errors"}, True),
    ],
)
def test_a_distance_in_standard_errors_is_that_of_the_networks(changes: dict[str, Any], holds: bool) -> None:
    assert judge(expectation(**changes), draw_networks(a=2.0)).holds == holds


def test_groups_are_alike_or_in_order_by_their_standard_errors() -> None:
    tables = draw_networks(a=2.0, b=2.0, c=9.0)
    asked = {"where": {}, "by": "init", "value": ["a", "b", "c"]}
    alike = {"is": "alike", "tolerance": "5 standard errors"}
    assert not judge(expectation(**asked, **alike), tables).holds
    assert judge(expectation(**asked | {"value": ["a", "b"]}, **alike), tables).holds
    order = {"is": "order", "margin": "5 standard errors"}
    assert judge(expectation(**asked | {"value": ["b", "c"]}, **order), tables).holds
    for value in (["a", "b"], ["b", "a"]):
        assert not judge(expectation(**asked | {"value": value}, **order), tables).holds


def test_what_never_comes_is_later_than_anything_and_like_nothing() -> None:
    frame = pd.DataFrame([(i, s, k, float(k >= 3 and i == "a")) for i in "ab" for s in range(4) for k in range(6)])
    frame.columns = pd.Index(["init", "seed", "layer", "std"])
    asked = {"where": {}, "reduce": "first_layer", "by": "init", "value": ["a", "b"]}
    assert judge(expectation(**asked, **{"is": "order", "margin": "5 standard errors"}), {"stats": frame}).holds
    assert not judge(expectation(**asked, **{"is": "alike", "tolerance": "5 standard errors"}), {"stats": frame}).holds


def test_one_network_has_no_standard_error_to_judge_by() -> None:
    tables = {"stats": draw_networks(a=2.0)["stats"].iloc[:1]}
    with pytest.raises(NothingFound, match="no standard error"):
        judge(expectation(**{"is": "equals", "value": 2.0, "tolerance": "5 standard errors"}), tables)


def test_the_place_of_the_smallest_value_is_found_for_each_network() -> None:
    """A parabola in ln lr around ln lr = seed; where runs differ in lr, those of one seed are one line."""
    rows = [(seed, lr, (math.log(lr) - seed) ** 2) for seed in range(3) for lr in np.exp(np.arange(-1.0, 4.0))]
    frame = pd.DataFrame(rows, columns=["seed", "lr", "loss"]).assign(run=lambda rows: rows["lr"].astype(str))
    asked = {"where": {}, "statistic": "loss", "reduce": "argmin", "over": "ln lr", "is": "equals", "value": 1.0}
    assert judge(expectation(**asked), {"stats": frame}).holds
    frame.loc[(frame["lr"] == 1.0), "loss"] = math.nan  # of the others the best is taken
    found = judge(expectation(**asked | {"where": {"seed": 0}}), {"stats": frame})
    assert abs(found.measured[0].number) == pytest.approx(1.0)
    frame.loc[frame["seed"] == 2, "loss"] = math.nan  # a network that diverges everywhere has no best rate
    assert math.isnan(judge(expectation(**asked), {"stats": frame}).measured[0].number)


def test_what_is_known_to_fail_is_reported_as_failing_and_news_if_it_holds() -> None:
    fails = {"is": "above", "value": 3.0, "fails": "the net is too small"}
    answer = judge(expectation(**fails), TABLES)
    assert answer.as_said and not answer.holds
    assert str(answer) == "does not reproduce: it is so (measured 3): the net is too small"
    other = judge(expectation(**fails | {"value": 2.0}), TABLES)
    assert other.holds and not other.as_said and str(other).startswith("HOLDS AFTER ALL: it is so")
    assert count([answer, other], 2) == "1 of 2 expectations hold, 1 does not reproduce"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"is": "below", "value": 1, "tolerance": "5 standard errors"}, "`tolerance` is for `is: equals`"),
        ({"is": "equals", "value": 1, "margin": "5 standard errors"}, "`margin` is for `is: below`"),
        ({"is": "above", "value": 1, "margin": 0.1}, "margin=0.1: must be `5 standard errors`"),
        ({"is": "equals", "value": 1, "tolerance": "five"}, "tolerance=five: must be a number from 0 on"),
        ({"is": "between", "value": [1, 2], "tolerance": 0.1}, "tolerance=0.1: must be `5 standard errors`"),
        ({"is": "equals", "value": 1, "fails": ""}, "must be text"),
        ({"is": "equals", "value": 1, "reduce": "argmin"}, "needs `over`"),
        ({"is": "alike", "value": [1, 2]}, "needs `by`"),
    ],
)
def test_mistakes_of_the_form_are_one_line(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text)):
        parse_expectation(expectation(**changes))


@pytest.mark.parametrize("flushes", [True, False])
def test_a_sentence_about_another_machine_is_left_out(flushes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("initlab.studies.expectation.drops_subnormals", lambda dtype: flushes)
    one = expectation(**{"is": "below", "value": 1.0})
    about = {"question": "", "source": "", "cost": {}, "figure": {}}
    asked = [one, one | {"machine": "flushes bfloat16"}, one | {"machine": "keeps bfloat16"}]
    kept = [found.machine for found in prepare("x", about, asked, []).expect]
    assert kept == ["", "flushes bfloat16" if flushes else "keeps bfloat16"]
