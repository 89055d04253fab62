import numpy as np
import pandas as pd
import pytest
import torch

from initlab.errors import UsageError
from initlab.meanfield.gain_table import gain_table
from initlab.nn.activations import ACTIVATIONS
from initlab.tasks.stack import stack
from initlab.theory.format_limits import limits


def layer(frame: pd.DataFrame, name: str, event: str) -> float:
    return float(frame[(frame["format"] == name) & (frame["event"] == event)]["layer"].iloc[0])


@pytest.mark.long
def test_known_ends() -> None:
    """n = 100, B = 200, as measured: float32 naive linear 38, ReLU 45, float16 5, float64 near 308; small ones too."""
    naive = limits("naive", "linear", 330)
    ends = [layer(naive, name, "overflow") for name in ("float64", "float32", "bfloat16", "float16")]
    assert ends == [308, 38, 38, 5]
    assert layer(limits("naive", "relu", 50), "float32", "overflow") == pytest.approx(45, abs=1)
    small = limits("small", "linear", 340)
    found = [layer(small, "float32", event) for event in ("subnormal", "zero", "all_zero")]
    assert found == pytest.approx([34, 41, 46], abs=1)
    assert layer(small, "float16", "all_zero") == 9 and layer(small, "float64", "all_zero") == pytest.approx(324, abs=1)
    assert layer(limits("small", "relu", 50), "float32", "all_zero") == pytest.approx(40, abs=1)


def test_a_stack_that_stays_has_no_end_and_events_come_in_order() -> None:
    lecun = limits("lecun", "linear", 20, formats=["float32", "float64"])
    assert lecun["layer"].isna().all() and (lecun["share"] < 0.01).all()
    small = limits("small", "relu", 60, formats=["float32"])
    assert (small.set_index("event").loc[["subnormal", "zero", "all_zero"], "layer"].diff().dropna() > 0).all()
    for low, high in (("layer_02", "layer"), ("layer", "layer_98")):
        assert (small[low].dropna() <= small[high].dropna()).all()


@pytest.mark.parametrize(("init", "event"), [("naive", "overflow"), ("small", "all_zero")])
def test_float16_ends_where_predicted(init: str, event: str) -> None:
    """40 networks of width 30: the layer of the event in float16 against the predicted distribution over seeds."""
    frame = stack(init, "linear", depth=14, width=30, batch=20, seeds=range(40), dtype="float16")
    z = frame[(frame["tensor"] == "preactivation") & (frame["direction"] == "forward")]
    dead = z["n_nan"] + z["n_inf"] > 0 if event == "overflow" else z["frac_zero"] == 1
    first = z[dead].groupby("seed")["layer"].min()
    assert len(first) == 40
    at = limits(init, "linear", 14, 30, formats=["float16"], batch=20).set_index("event").loc[event]
    assert abs(first.median() - at["layer"]) <= 1
    assert (first.between(at["layer_02"] - 1, at["layer_98"] + 1)).mean() > 0.9


def test_mistakes_of_formats() -> None:
    with pytest.raises(UsageError, match="did you mean float32"):
        limits(formats=["float23"])
    with pytest.raises(UsageError, match="closed laws"):
        limits(method="simulation")


def test_gain_table_says_what_each_gain_leads_to() -> None:
    table = gain_table().set_index(["activation", "kind"])
    assert {name for name, _ in table.index} == set(ACTIVATIONS)
    assert table.loc[("gelu", "rms"), "stability"] == "unstable" == table.loc[("silu", "rms"), "stability"]
    assert table.loc[("tanh", "torch"), "chi_1"] == pytest.approx(1.2098314, abs=1e-6)
    assert table.loc[("tanh", "torch"), "gradient"] == "grows" and table.loc[("tanh", "torch"), "stability"] == "stable"
    assert table.loc[("relu", "chi"), "stability"] == "marginal" and table.loc[("relu", "chi"), "gradient"] == "kept"
    assert table.loc[("relu", "std"), "stability"] == "gone"
    assert table.loc[("selu", "torch"), "chi_1"] == pytest.approx(1, abs=0.005)
    assert np.isnan(table.loc[("gelu", "rms"), "torch"]) and ("gelu", "torch") not in table.index
    assert table["why"].str.len().min() > 10


def test_gain_table_of_a_function_of_ones_own() -> None:
    table = gain_table([torch.nn.functional.elu])
    assert set(table["activation"]) == {"elu"} and set(table["kind"]) == {"chi", "rms", "std"}
