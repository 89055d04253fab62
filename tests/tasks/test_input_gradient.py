"""The gradient at the input of a stack: measured as autograd finds it, and inside the band that theory predicts."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from initlab.errors import UsageError
from initlab.nn.init import RULES
from initlab.stats.statistics import IN_LN
from initlab.tasks.ensemble.device import Where
from initlab.tasks.ensemble.networks import Ensemble, Net, Networks
from initlab.tasks.stack import stack
from initlab.theory.predict import predict
from initlab.theory.z_scores import compare_stack
from tests.conftest import ROWS
from tests.long import long_except


def at_input(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[(frame["layer"] == 0) & (frame["direction"] == "backward")]


def rest(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(at_input(frame).index).reset_index(drop=True)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", long_except(ROWS, "relu", "tanh", "gelu", "selu"))
def test_every_rule_gives_what_autograd_gives(name: str, residual: bool) -> None:
    """In float64, through products of five layers: mean and rms within 1e-12 of the rms."""
    seeds = [3, 8]
    for init in RULES:
        found = at_input(
            stack(
                init, name, 5, 6, None if residual else 9, 4, seeds, "float64", residual=residual, input_gradient=True
            )
        )
        net = Net.resolve(name, 5, 6, None if residual else 9, 4, residual)
        nets = Networks(net, Ensemble.resolve(init, seeds, net.activation), Where(torch.float64))
        start = a = nets.gaussian(net.inputs, "input").requires_grad_()
        for layer in range(1, 6):
            w, b = nets.weights(layer)
            z = a @ w + (0 if b is None else b[:, None])
            a = net.activation.phi(z) + (a if residual else 0)
        own, *_ = torch.autograd.grad(a, start, nets.gaussian(net.sizes[-1], "gradient"))
        rms = own.square().mean((1, 2)).sqrt().numpy()
        np.testing.assert_allclose(found["rms"], rms, rtol=1e-12, err_msg=init)
        assert (np.abs(found["mean"] - own.mean((1, 2)).numpy()) <= 1e-12 * rms).all()
        assert found["tensor"].unique().tolist() == ["activation"] and found["seed"].tolist() == seeds
        assert (found["count"] == own[0].numel()).all()


@pytest.mark.parametrize(
    "shape", [{"depth": 1, "width": 5}, {"depth": 120, "width": 4, "inputs": 900}, {"widths": [7, 3], "inputs": 2}]
)
@pytest.mark.parametrize("init", ["kaiming", "naive"])
def test_all_other_rows_stay_bit_for_bit(init: str, shape: dict[str, Any]) -> None:
    given: dict[str, Any] = {"init": init, "batch": 3, "seeds": 3, **shape}
    plain, more = stack(**given), stack(**given, input_gradient=True)
    pd.testing.assert_frame_equal(plain, rest(more), check_exact=True)
    assert len(at_input(more)) == 3 and not len(at_input(plain))
    assert more.tail(3)["layer"].tolist() == [0, 0, 0]  # the last on the way down


@pytest.mark.parametrize(("init", "name"), [("naive", "relu"), ("small", "linear"), ("small", "tanh")])
def test_beyond_the_number_format_its_true_size_is_told(init: str, name: str) -> None:
    """As float64 says, which still holds it: to 1e-5, what float32 rounds on the way."""
    given: dict[str, Any] = {"depth": 50, "width": 100, "batch": 5, "seeds": 2, "input_gradient": True}
    narrow, wide = (at_input(stack(init, name, **given, dtype=dtype)) for dtype in ("float32", "float64"))
    assert not np.isclose(narrow["rms"], wide["rms"], rtol=1e-3, atol=0).any()
    np.testing.assert_allclose(narrow["log2_rms_true"], np.log2(wide["rms"]), atol=1e-5)


def test_own_statistics_and_tables_that_are_emitted() -> None:
    tables: list[pd.DataFrame] = []
    own = {"largest": lambda x: x.abs().amax((-2, -1))}
    given: dict[str, Any] = {"depth": 4, "width": 6, "batch": 3, "seeds": 2, "input_gradient": True, "statistics": own}
    whole = stack(**given)
    stack(**given, emit=lambda frames: tables.append(frames["stats"]))
    pd.testing.assert_frame_equal(pd.concat(tables, ignore_index=True)[whole.columns], whole)
    found = at_input(whole)
    np.testing.assert_allclose(found["largest"], found[["min", "max"]].abs().max(axis=1), rtol=1e-6)


def test_there_is_none_without_a_backward_pass() -> None:
    with pytest.raises(UsageError, match="input_gradient=true: there is none with backward=false"):
        stack(depth=2, width=3, backward=False, input_gradient=True)
    with pytest.raises(UsageError, match="input_gradient='down': must be True or False"):
        stack(depth=2, width=3, input_gradient="down")  # type: ignore[arg-type]


# What theory says of it


@pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg"])
@pytest.mark.parametrize(("name", "share"), [("linear", 1.0), ("relu", 0.5), ("leaky_relu", (1 + 1e-4) / 2)])
def test_its_limit_is_exact_where_phi_is_a_line_on_either_side(name: str, share: float, mode: str) -> None:
    """q is the product of `share` fan_out Var w over the layers, with mean cosine 0: to 1e-12."""
    sizes = [30, 40, 160, 80]
    found = at_input(
        predict("kaiming", name, widths=sizes[1:], inputs=30, mode=mode, gain=1.3, input_gradient=True)
    ).set_index("statistic")
    fans = [{"fan_in": i, "fan_out": o, "fan_avg": (i + o) / 2}[mode] for i, o in pairwise(sizes)]
    q = math.prod(share * o * 1.3**2 / fan for o, fan in zip(sizes[1:], fans, strict=True))
    assert found.loc["q", "limit"] == pytest.approx(q, rel=1e-12)
    assert found.loc["rms", "limit"] == pytest.approx(math.sqrt(q), rel=1e-12)
    assert found.loc["norm", "limit"] == pytest.approx(math.sqrt(q * 200 * 30), rel=1e-12)
    assert found.loc["cosine", "limit"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["linear", "relu"])
def test_the_mean_of_its_square_over_networks_is_that_limit(name: str) -> None:
    """Exactly so at any width: 4,000 networks, five standard errors; a gain 10 % off would be 20 away."""
    given: dict[str, Any] = {"depth": 3, "width": 20, "inputs": 10, "batch": 5, "input_gradient": True}
    q = at_input(stack("kaiming", name, **given, seeds=4000))["q"]
    limit = at_input(predict("kaiming", name, **given)).set_index("statistic").loc["q", "limit"]
    assert abs(q.mean() - limit) < 5 * q.std() / math.sqrt(len(q))
    assert abs(q.mean() - 1.1**6 * limit) > 5 * q.std() / math.sqrt(len(q))


@pytest.mark.parametrize(
    ("init", "name", "batch"),
    [("kaiming", "relu", 40), ("kaiming", "gelu", 5), ("torch_default", "tanh", 40), ("lsuv", "relu", 1)],
)
def test_other_predictions_stay_what_they_were(init: str, name: str, batch: int) -> None:
    """Simulated rows too: the gradient at the input is drawn from numbers of its own."""
    plain, more = (
        predict(init, name, 8, 30, batch=batch, networks=60, input_gradient=asked) for asked in (False, True)
    )
    pd.testing.assert_frame_equal(plain, rest(more), rtol=1e-12, atol=0)  # numbers of many layers round together
    assert not len(at_input(plain)) and {"q", "rms", "std", "mean"} <= set(at_input(more)["statistic"])


CASES = [(init, "relu", 40) for init in RULES] + [("kaiming", name, 5) for name in ROWS]


@pytest.mark.parametrize(
    ("init", "name", "batch"),
    long_except(CASES, ("kaiming", "relu", 40), ("orthogonal", "relu", 40), ("kaiming", "gelu", 5)),
)
def test_bands_hold_at_the_input(init: str, name: str, batch: int) -> None:
    """400 networks, 12 inputs, 8 layers of 30: of each band 95 % within five standard errors, theory's own too."""
    given: dict[str, Any] = {"depth": 8, "width": 30, "inputs": 12, "batch": batch, "input_gradient": True}
    found = at_input(stack(init, name, **given, seeds=range(7000, 7400), dtype="float64"))
    bands = at_input(predict(init, name, **given))
    bands = bands[bands["sd"] > 0]
    assert {"q", "rms", "std", "std_within", "norm"} <= set(bands["statistic"])
    for band in bands.itertuples():
        values = found[band.statistic].to_numpy()
        inside = ((values >= band.band_low) & (values <= band.band_high)).mean()
        assert inside > 0.95 - 5 * math.sqrt(0.95 * 0.05 * (1 / 400 + 1 / 200)), (band.statistic, inside)
        if band.statistic in IN_LN:  # not too wide either
            assert np.log(values[values > 0]).std() > 0.7 * band.sd


def test_the_table_of_a_run_holds_its_prediction() -> None:
    """And misses it where another rule was measured."""
    shape: dict[str, Any] = {"depth": 6, "width": 50, "inputs": 80, "batch": 20}
    frame = stack("kaiming", "relu", **shape, seeds=32, input_gradient=True)
    for init, most in (("kaiming", 4.5), ("lecun", math.inf)):
        theory = at_input(compare_stack(frame, init, "relu", **shape, input_gradient=True))
        z = theory[theory["seed"] == -1].set_index("statistic")["z"].abs()
        assert (z["rms"] < most) and (z["rms"] > 5) == (init == "lecun")
