import math

import numpy as np
import pandas as pd
import pytest

from initlab.runs import summary
from initlab.runs.labels import add_labels, labels
from initlab.tasks.data import load
from initlab.tasks.stack import stack
from initlab.tasks.train import train


def labelled(init: str, activation: str = "linear", **options: object) -> pd.DataFrame:
    frame = stack(init, activation, **options).assign(init=init, activation=activation)  # type: ignore[arg-type]
    return frame.assign(label=labels(frame))


@pytest.mark.parametrize(
    ("init", "said"),
    [("naive", "not finite from layer 38"), ("small", "exactly 0 from layer 46"), ("lecun", "alive")],
)
def test_the_table_says_from_which_layer_on(init: str, said: str) -> None:
    table = summary.summarize(labelled(init), None, None)
    assert table["signal"].tolist() == [said]
    assert said in summary.as_text(table)


def test_backward_a_gradient_dies_on_its_way_down() -> None:
    frame = labelled("small")
    died = summary.first_dead_layer(frame, "backward")
    assert died["zero"].between(3, 6).all()
    middle = float(np.sort(died["zero"])[::-1][len(died) // 2])
    assert str(summary.find_fate(died, "max")) == f"exactly 0 from layer {middle:.0f}"


def test_the_fate_is_that_of_the_middle_network_and_says_how_many_share_it() -> None:
    died = pd.DataFrame({"nonfinite": [math.nan, 7.0, 5.0], "zero": [math.nan] * 3})
    assert str(summary.find_fate(died)) == "not finite from layer 7 (2 of 3 networks)"
    assert str(summary.find_fate(died, "max")) == "not finite from layer 5 (2 of 3 networks)"
    assert str(summary.find_fate(died.iloc[:1])) == "alive"
    few = pd.DataFrame({"nonfinite": [math.nan] * 5, "zero": [3.0, 9.0, math.nan, math.nan, math.nan]})
    assert str(summary.find_fate(few)) == "alive (2 of 5 exactly 0)"
    both = pd.DataFrame({"nonfinite": [math.nan, 7.0, 8.0], "zero": [4.0, math.nan, math.nan]})
    assert str(summary.find_fate(both)) == "not finite from layer 8 (2 of 3 networks, 1 of 3 exactly 0)"


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8])
def test_the_fate_agrees_with_the_median_that_stands_beside_it(n: int) -> None:
    """For every number of dead networks: a median that is 0 or no number is called so, and no other is."""
    for k in range(n + 1):
        zeros = np.array([0.0] * k + [1.0] * (n - k))
        lost = np.where(zeros == 0, math.nan, zeros)
        dead = np.where(zeros == 0, 5.0, math.nan)
        frame = pd.DataFrame({"nonfinite": math.nan, "zero": dead})
        assert (summary.find_fate(frame).kind == "zero") == (summary.rank_quantiles(zeros)[1] == 0)
        frame = pd.DataFrame({"nonfinite": dead, "zero": math.nan})
        assert (summary.find_fate(frame).kind == "nonfinite") == math.isnan(summary.rank_quantiles(lost)[1])


def test_more_networks_do_not_bring_death_nearer() -> None:
    """The first of many to die says nothing about a network: 197 of 200 live here."""
    frame = labelled("kaiming", "relu", depth=40, width=10, batch=8, seeds=200)
    died = summary.first_dead_layer(frame)
    assert 0 < died["zero"].notna().sum() < 100
    assert summary.summarize(frame, None, None)["signal"].item().startswith("alive (")


def test_a_network_without_a_number_ranks_above_all_others() -> None:
    """Neither dropped, which would flatter the rest, nor a reason to hide them."""
    low, median, high = summary.rank_quantiles(np.array([1.0, 2.0, 3.0, math.nan, math.nan]))
    assert (low, median) == (pytest.approx(1.64), 3)
    assert math.isnan(high)
    assert np.nanmedian([1.0, 2.0, 3.0, math.nan, math.nan]) == 2  # what skipping would say


def test_labels_name_what_differs() -> None:
    frame = pd.DataFrame(
        {
            "init": ["a", "a", "b", "b"],
            "activation": "relu",
            "width": [10, 20, 10, 20],
            "depth": 5,
            "gain": [1, 1, 2, 2],
        }
    )
    assert labels(frame).tolist() == [
        "a, relu, width 10",
        "a, relu, width 20",
        "b, relu, width 10",
        "b, relu, width 20",
    ]
    swept = frame.assign(gain=[1.0, 1.5, 2.0, 2.5], width=10)
    assert labels(swept)[1] == "a, relu, gain 1.5"


def test_runs_of_other_seeds_are_one_ensemble_and_repeated_runs_are_not() -> None:
    frame = pd.DataFrame({"init": "a", "activation": "relu", "seed": [0, 1], "run": ["x/0", "x/1"]})
    assert set(labels(frame)) == {"a, relu"}
    assert set(labels(frame.assign(seed=0))) == {"a, relu, 0", "a, relu, 1"}


def test_no_two_settings_have_one_label() -> None:
    """Numbers and folders are short where that tells them apart, and as long as it takes where it does not."""
    repeated = pd.DataFrame({"init": "a", "activation": "relu", "seed": 0, "run": ["x/one/0", "x/two/0"]})
    assert set(labels(repeated)) == {"a, relu, one/0", "a, relu, two/0"}
    near = [1.41421, 1.41422, math.nan, math.nan]
    frame = pd.DataFrame({"init": "a", "activation": "relu", "gain": near, "width": [5, 5, 5, 6]})
    assert labels(frame).tolist() == [
        "a, relu, gain 1.41421, width 5",
        "a, relu, gain 1.41422, width 5",
        "a, relu, gain nan, width 5",
        "a, relu, gain nan, width 6",
    ]


def test_a_run_has_one_label_in_all_tables() -> None:
    """Also where a table that only some runs have would say less."""
    stats = pd.DataFrame(
        {"init": "a", "activation": "relu", "task": ["stack", "lab"], "seed": 0, "run": ["x/0", "x/1"]}
    )
    labelled_tables = add_labels({"stats": stats, "losses": stats[stats["task"] == "lab"]})
    assert labelled_tables["losses"]["label"].tolist() == ["a, relu, lab"]
    assert labelled_tables["stats"]["label"].tolist() == ["a, relu, stack", "a, relu, lab"]


def test_a_difference_above_the_limit_is_said() -> None:
    frames = train(load("digits"), steps=2, seeds=[0])
    tables = {name: frame.assign(init="kaiming", activation="relu", dtype="float32") for name, frame in frames.items()}
    assert "above" not in summary.as_text(summary.summarize(tables["stats"], tables["losses"], tables["parity"]))
    wrong = tables["parity"].assign(relative_error=3e-5)
    assert "3e-05 (above 1e-05)" in summary.as_text(summary.summarize(tables["stats"], tables["losses"], wrong))


def test_two_right_trainings_that_part_are_said_to() -> None:
    """Losses apart by more than 1 %, gradients equal: chaos. With wrong gradients, or losses that agree, no word."""
    found = train(load("digits"), steps=2, seeds=[0])
    tables = {name: frame.assign(init="kaiming", activation="relu", dtype="float32") for name, frame in found.items()}
    text = {}
    for name, factor, error in (("agree", 1.0, 5e-7), ("chaos", 1.8, 5e-7), ("wrong", 1.8, 1e-2)):
        losses = tables["losses"].copy()
        losses.loc[losses["implementation"] == "scratch", "loss"] *= factor
        parity = tables["parity"].assign(relative_error=error)
        text[name] = summary.describe_parting(summary.summarize(tables["stats"], losses, parity))
    assert text["agree"] == text["wrong"] == "" and text["chaos"].startswith("chaos: the two trainings part")


def test_summary_of_a_whole_run() -> None:
    frames = train(load("digits"), steps=3, seeds=range(3))
    tables = {
        name: frame.assign(init="kaiming", activation="relu")
        for name, frame in (frames | {"stats": pd.concat([frames["stats"], stack(depth=4, seeds=range(3))])}).items()
    }
    table = summary.summarize(tables["stats"], tables["losses"], tables["parity"])
    row = table.iloc[0]
    last = tables["losses"].query("step == 2 and implementation == 'scratch'")["loss"]
    assert row["loss by hand"] == pytest.approx(last.median(), rel=1e-12)
    assert 0 < row["gradient difference"] < 1e-5
    assert row["diverged"] == "0 of 3"
    text = summary.as_text(table)
    assert "diverged" not in text and "gradient difference" in text and "16-84 %" in text


def test_what_was_not_measured_is_blank_and_nan_is_said() -> None:
    text = summary.as_text(summary.summarize(labelled("naive", seeds=[0]), None, None))
    assert "nan" in text
    frames = train(load("digits"), "naive", depth=50, width=100, steps=1, seeds=[0])
    tables = {name: frame.assign(init="naive", activation="relu") for name, frame in frames.items()}
    text = summary.as_text(summary.summarize(tables["stats"], tables["losses"], tables["parity"]))
    assert "1 of 1" in text and "% not finite" in text and "alive" not in text


def test_a_sweep_of_two_hundred_settings_has_a_summary() -> None:
    """Labels are codes of a byte up to 127 of them, and of two beyond."""
    frame = stack("kaiming", depth=2, width=4, batch=4, seeds=2)
    every = pd.concat([frame.assign(gain=float(k), init="kaiming", activation="relu") for k in range(200)])
    table = summary.summarize(every.reset_index(drop=True), None, None)
    assert len(table) == 200 and set(table["signal"]) == {"alive"}
