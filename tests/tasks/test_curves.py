import numpy as np
import pandas as pd
import pytest

from initlab.errors import UsageError
from initlab.nn.init import Rule, rule
from initlab.stats.statistics import TRUE_COLUMNS as NUMBERS
from initlab.tasks import curves
from initlab.tasks.curves import SCALINGS, gain_curves
from initlab.tasks.stack import stack

# Of a layer's log2, as the columns themselves are held to.
LIMIT = 1e-6


def furthest(curve: pd.DataFrame, direct: pd.DataFrame) -> float:
    assert curve[["layer", "seed"]].to_numpy().tolist() == direct[["layer", "seed"]].to_numpy().tolist()
    assert (curve["tensor"].astype(str).to_numpy() == direct["tensor"].astype(str).to_numpy()).all()
    return float(np.abs(curve[[*NUMBERS]].to_numpy() - direct[[*NUMBERS]].to_numpy()).max())


@pytest.mark.parametrize("activation", ["relu", "linear", "leaky_relu"])
def test_one_forward_pass_gives_every_gain(activation: str) -> None:
    found = gain_curves(activation=activation, seeds=[0, 1], backward=False)
    (ran,) = found[found["derived_from"] == ""]["init"].unique()
    assert ran in ("kaiming", "xavier", "lecun")  # where all layers are square the first two are equal, linear all
    assert set(found[found["init"] != ran]["derived_from"]) == {ran}
    for init in SCALINGS:
        direct = stack(init, activation, seeds=[0, 1], backward=False)
        assert furthest(found[found["init"] == init], direct) < LIMIT


@pytest.mark.parametrize("activation", ["relu", "linear", "leaky_relu"])
def test_and_every_gradient(activation: str) -> None:
    """So few units and inputs that the rounding of a weight moves none of them over the kink.

    In float64, since so few entries do not average the rounding of float32 either.
    """
    size = {"depth": 30, "width": 30, "inputs": 41, "batch": 20, "seeds": [0, 1], "dtype": "float64"}
    found = gain_curves(activation=activation, **size)
    for init in SCALINGS:
        direct = stack(init, activation, **size)
        assert furthest(found[found["init"] == init], direct) < LIMIT
    naive = found[(found["init"] == "naive") & (found["direction"] == "backward")]
    assert naive["log2_rms_true"].max() > 40  # the derived curves are not all the same one


def test_a_single_layer_of_another_width() -> None:
    size = {"depth": 1, "width": 8, "inputs": 5, "batch": 20, "seeds": [0, 1], "dtype": "float64"}
    found = gain_curves(**size)
    for init in SCALINGS:
        assert furthest(found[found["init"] == init], stack(init, **size)) < LIMIT


def test_only_one_of_those_that_share_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def counted(init: Rule, *what: object, **how: object) -> pd.DataFrame:
        ran.append(init)
        return stack(init, *what, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(curves, "stack", counted)
    inits = ["naive", "torch_default", "small", "orthogonal", rule("orthogonal", gain=3.0), rule("naive", gain=0.0)]
    found = gain_curves(inits, depth=4, width=10, seeds=[0])
    assert set(ran) == {rule("naive"), rule("torch_default"), rule("orthogonal"), rule("naive", gain=0.0)}
    derived = found.groupby(["init", "gain"], observed=True)["derived_from"].first()
    assert derived["orthogonal, fan_in", 3.0] == "orthogonal" and derived["torch_default"].tolist() == [""]
    three = found[found["gain"] == 3.0]
    assert furthest(three, stack(inits[4], depth=4, width=10, seeds=[0])) < LIMIT


def test_an_activation_with_a_scale_of_its_own_is_run_under_every_rule() -> None:
    found = gain_curves(["lecun", "kaiming"], "tanh", depth=3, width=10, seeds=[0])
    assert set(found["derived_from"]) == {""}
    for init in ("lecun", "kaiming"):
        assert furthest(found[found["init"] == init], stack(init, "tanh", depth=3, width=10, seeds=[0])) < 1e-13


def test_a_mistake_is_one_line() -> None:
    with pytest.raises(UsageError, match="init=he"):
        gain_curves(["he"])
    with pytest.raises(UsageError, match="activation=rel"):
        gain_curves(activation="rel")
