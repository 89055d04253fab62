"""What users bring themselves: data, losses, optimizers, functions that fill weights, and a width for each layer."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from initlab.errors import UsageError
from initlab.nn.custom_init import make_rule
from initlab.nn.init import rule
from initlab.tasks.data import Data, as_data, load
from initlab.tasks.ensemble.training import as_optimizer, default_rate
from initlab.tasks.stack import stack
from initlab.tasks.train import train
from initlab.theory.z_scores import compare_stack

SMALL: dict[str, Any] = {"depth": 2, "width": 12, "batch": 16, "steps": 6, "seeds": 2, "dtype": "float64"}
PARITY = 1e-9  # float64 rounding through three layers and six steps, and room


def worst(frames: dict[str, pd.DataFrame]) -> float:
    return float(frames["parity"]["relative_error"].max())


def losses(frames: dict[str, pd.DataFrame]) -> np.ndarray:
    return frames["losses"].query("implementation == 'scratch'")["loss"].to_numpy()


# Losses


def by_hand_cross_entropy(out: Tensor, target: Tensor) -> Tensor:
    return -out.log_softmax(-1)[torch.arange(len(target)), target].mean()


@pytest.mark.parametrize("modules", ["one_by_one", "vmap"])
def test_a_loss_of_ones_own_is_the_same_loss(modules: str) -> None:
    """The gradient that autograd finds is the one by hand: all six steps agree, and with another loss they do not."""
    known = train(**SMALL, modules=modules, lr=0.1)
    own = train(**SMALL, modules=modules, lr=0.1, loss=by_hand_cross_entropy)
    np.testing.assert_allclose(losses(own), losses(known), rtol=1e-12)
    assert own["losses"]["accuracy"].equals(known["losses"]["accuracy"])
    assert worst(own) < PARITY
    other = train(**SMALL, modules=modules, lr=0.1, loss=nn.CrossEntropyLoss(label_smoothing=0.2))
    assert worst(other) < PARITY and np.abs(losses(other) / losses(known) - 1).min() > 1e-6


def test_a_regression_gets_outputs_of_the_shape_of_its_targets() -> None:
    """(N, 1) less (N,) would be a matrix: torch's own mse_loss gives what the table's gives."""
    rows = load("digits")
    data = Data("numbers", rows.x, rows.y.float(), None)
    known, own = (train(data, **SMALL, lr=0.01, loss=one) for one in ("mse", nn.functional.mse_loss))
    np.testing.assert_allclose(losses(own), losses(known), rtol=1e-12)
    assert own["losses"]["accuracy"].isna().all()


def test_an_own_loss_with_every_optimizer_and_batch_size() -> None:
    """One row in a batch, one network; the engine, and optimizers of torch's."""
    for optimizer in ("sgd", "adam"):
        one = train(**{**SMALL, "batch": 1, "seeds": 1}, optimizer=optimizer, loss=by_hand_cross_entropy)
        assert worst(one) < PARITY


def fail(out: Tensor, target: Tensor) -> Tensor:
    raise RuntimeError("no such thing")


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (3, "loss=3: must be a name or a function"),
        (
            fail,
            "loss: fail cannot be called with outputs (16, 10) and targets (16,), torch.int64 (RuntimeError: no",
        ),
        (lambda out, target: None, "returns None; it must return a tensor of one number"),
        (lambda out, target: 1.5, "returns 1.5; it must return a tensor of one number"),
        (lambda out, target: out.sum(-1), "returns a tensor of shape (16,); it must return one number"),
        (lambda out, target: (out.argmax(-1) == target).double().mean(), "has no gradient"),
        (lambda out, target: torch.ones((), requires_grad=True), "it does not depend on the outputs"),
        (lambda out: out.sum(), "cannot be called"),
        (nn.functional.l1_loss, "that is different to the input size"),  # and would be broadcast
        ("mea", "must be one of cross_entropy, mse - did you mean mse?"),
    ],
)
def test_a_wrong_loss_is_one_line(loss: Any, text: str) -> None:
    with pytest.raises(UsageError) as error:
        train(**SMALL, loss=loss)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_loss_that_asks_for_numbers_is_no_loss_for_vmap() -> None:
    """It trains one by one, and says so where it cannot be one program."""

    def halves(out: Tensor, target: Tensor) -> Tensor:
        return out.square().mean() if out.mean() > 0 else out.abs().mean()

    assert worst(train(**SMALL, loss=halves)) < PARITY
    with pytest.raises(UsageError, match=r"halves cannot run under vmap; use modules=one_by_one"):
        train(**SMALL, loss=halves, modules="vmap", every=2)


def test_a_loss_that_is_nan_is_data() -> None:
    frames = train(**SMALL, loss=lambda out, target: (out * torch.nan).sum())
    assert frames["losses"]["loss"].isna().all()


# Optimizers


@pytest.mark.parametrize(("name", "own"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_an_optimizer_of_ones_own_is_the_same_optimizer(name: str, own: type[torch.optim.Optimizer]) -> None:
    known, mine = (train(**SMALL, lr=0.02, optimizer=one) for one in (name, own))
    np.testing.assert_allclose(losses(mine), losses(known), rtol=1e-10)
    assert worst(mine) < PARITY
    other = train(**SMALL, lr=0.02, optimizer=torch.optim.Adagrad)
    assert worst(other) < PARITY and np.abs(losses(other)[4:] / losses(known)[4:] - 1).min() > 1e-4


class WholeGradient(torch.optim.Optimizer):
    """Steps of one length along the gradient of all parameters together: not elementwise."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        every = [p for group in self.param_groups for p in group["params"]]
        length = math.sqrt(sum(float(p.grad.square().sum()) for p in every))
        for p in every:
            p -= self.param_groups[0]["lr"] * p.grad / length


class FirstAxis(WholeGradient):
    """Steps that differ between the rows of a weight: torch's rows, (out, in)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad * torch.arange(len(p)).reshape(-1, *[1] * (p.ndim - 1)) / len(p)


@pytest.mark.parametrize("optimizer", [WholeGradient, FirstAxis])
def test_each_network_has_its_own_optimizer_on_torchs_tensors(optimizer: Any) -> None:
    """An ensemble equals its members, and the network by hand the module, where every weight is rectangular."""
    both = train(**SMALL, lr=0.1, optimizer=optimizer)
    single = train(**{**SMALL, "seeds": [1]}, lr=0.1, optimizer=optimizer)
    mine = both["losses"].query("seed == 1")["loss"].to_numpy()
    np.testing.assert_allclose(mine, single["losses"]["loss"].to_numpy(), rtol=1e-12)
    assert worst(both) < PARITY


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (torch.optim.LBFGS, "LBFGS cannot train a weight (2, 3) and a bias (2,) with lr=0.001"),  # wants a closure
        (torch.optim.SparseAdam, "cannot train"),
        (lambda params: None, "cannot train"),
        (lambda params, lr: None, "makes a NoneType; it must be a torch.optim.Optimizer"),
        (nn.Linear, "cannot train"),
        (5, "optimizer=5: must be a name or a class of torch.optim.Optimizer"),
        ("adma", "did you mean adam?"),
    ],
)
def test_a_wrong_optimizer_is_one_line(optimizer: Any, text: str) -> None:
    with pytest.raises(UsageError) as error:
        train(**SMALL, optimizer=optimizer)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_rates_where_none_is_given() -> None:
    assert default_rate(nn.functional.l1_loss, "sgd") == 0.01 and default_rate("cross_entropy", "sgd") == 0.1
    assert default_rate("cross_entropy", torch.optim.SGD) == 0.001
    assert issubclass(as_optimizer("sgd"), torch.optim.SGD)


def test_how_rates_follow_the_width_is_not_guessed() -> None:
    with pytest.raises(UsageError, match=r"base_width: how learning rates follow the width is known of named"):
        train(**SMALL, init="mup", optimizer=torch.optim.Adam)


# Functions that fill weights


@pytest.mark.parametrize(
    ("fill", "known"),
    [
        (nn.init.kaiming_uniform_, {"gain": math.sqrt(2), "distribution": "uniform"}),
        (nn.init.xavier_normal_, {"gain": 1.0, "mode": "fan_avg"}),
        (lambda w: nn.init.kaiming_normal_(w, mode="fan_out"), {"gain": math.sqrt(2), "mode": "fan_out"}),
    ],
    ids=["kaiming_uniform_", "xavier_normal_", "fan_out"],
)
def test_torchs_functions_see_torchs_orientation(fill: Callable[[Tensor], Tensor], known: dict[str, Any]) -> None:
    """300 inputs, 40 units: the std is that of the rule of this fan, and not of the other one, to 5 standard errors.

    The relative error of a std of n normal entries is 1 / sqrt(2 n), of uniform ones less.
    """
    options: dict[str, Any] = {"depth": 1, "width": 40, "inputs": 300, "batch": 8, "seeds": 4}
    rows = train(**{**SMALL, "width": 40, "depth": 1, "steps": 1}, init=make_rule(fill))["stats"]
    weight = rows.query("tensor == 'weight' and direction == 'forward' and implementation == 'scratch'")
    for layer, shape in ((1, (64, 40)), (2, (40, 10))):
        std = weight[weight["layer"] == layer]["std"].to_numpy()
        expected, other = (rule("kaiming", **known).std_for("relu", one) for one in (shape, shape[::-1]))
        error = 5 / math.sqrt(2 * shape[0] * shape[1])
        assert np.abs(std / expected - 1).max() < error
        if known.get("mode") != "fan_avg":
            assert np.abs(std / other - 1).min() > error
    signal = stack(make_rule(fill), **options), stack("kaiming", **options, **known)
    a, b = (one.query("layer == 1 and tensor == 'preactivation' and direction == 'forward'")["std"] for one in signal)
    assert abs(a.mean() / b.mean() - 1) < 0.2  # 4 networks of 320 values, whose weights they share: 5 x 0.04


def test_order_does_not_count_and_a_gain_multiplies() -> None:
    one = make_rule(nn.init.xavier_uniform_)
    options: dict[str, Any] = {"depth": 3, "width": 10, "batch": 4}
    both, single = stack(one, **options, seeds=[3, 5]), stack(one, **options, seeds=[5])
    pd.testing.assert_frame_equal(both.query("seed == 5").reset_index(drop=True), single, check_exact=True)
    deep = stack(one, **{**options, "depth": 5}, seeds=[5]).query("direction == 'forward' and layer <= 3")
    pd.testing.assert_series_equal(
        deep["std"].reset_index(drop=True), single.query("direction == 'forward'")["std"].reset_index(drop=True)
    )
    doubled = stack(one, **options, seeds=[5], activation="linear", gain=2.0)
    plain = stack(one, **options, seeds=[5], activation="linear")
    ratio = (doubled["std"] / plain["std"]).to_numpy()[plain["direction"] == "forward"]
    np.testing.assert_allclose(ratio, np.repeat(2.0 ** np.arange(4), [1, 2, 2, 2]), rtol=1e-6)
    state = torch.random.get_rng_state()
    stack(one, **options, seeds=1)
    assert torch.equal(state, torch.random.get_rng_state())  # the user's own numbers are not touched


def test_a_function_may_return_its_weights() -> None:
    options: dict[str, Any] = {"depth": 2, "width": 6, "batch": 4, "seeds": 2}
    written, returned = (
        make_rule(lambda w: w.normal_(0, 0.5), "a.b"),
        make_rule(lambda w: torch.randn(w.shape) / 2, "a.c"),
    )
    np.testing.assert_allclose(stack(written, **options)["std"], stack(returned, **options)["std"], rtol=1e-5)
    constant = stack(make_rule(lambda w: np.full(w.shape, 0.25), "a.d"), **options)
    assert constant["n_nan"].sum() == 0
    lost = stack(make_rule(lambda w: w.fill_(torch.nan), "a.e"), **options)  # data, as every nan
    assert (lost.query("layer > 0 and direction == 'forward'")["n_nan"] == 24).all()


@pytest.mark.parametrize(
    ("fill", "text"),
    [
        (3, "init=3: must be a function that fills a tensor"),
        (lambda w: None, "leaves entries unwritten"),
        (lambda w: w[0].zero_() and None, "leaves entries unwritten|cannot fill"),
        (lambda w: w.mul_(2), "leaves entries unwritten"),
        (
            lambda w: w.T.clone().zero_(),
            r"returns \(4, 6\); it must fill the tensor \(6, 4\)|init: .* returns \(4, 6\)",
        ),
        (lambda w: "zeros", "returns 'zeros'"),
        (lambda w: w.to(torch.complex64), "returns"),
        (lambda w: np.random.default_rng().normal(size=w.shape), "gives other numbers with the same torch.manual_seed"),
        (nn.init.dirac_, r"cannot fill a weight \(6, 4\) \(Only tensors with 3"),
        (nn.init.constant_, "cannot fill a weight"),
    ],
)
def test_a_wrong_function_is_one_line(fill: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text) as error:
        make_rule(fill)
    assert "\n" not in str(error.value)


def test_theory_has_no_law_of_what_it_does_not_know() -> None:
    from initlab.theory.predict import predict

    with pytest.raises(UsageError, match=r"theory has no law of weights that torch.nn.init.eye_ writes"):
        predict(make_rule(nn.init.eye_), depth=2, width=4)


# Data


def test_pairs_become_data() -> None:
    x = np.arange(24.0).reshape(4, 2, 3)
    classes = as_data((x, np.array([0, 2, 1, 2])), "mine")
    assert tuple(classes.x.shape) == (4, 6) and classes.x.dtype == torch.float32 and classes.classes == 3
    assert classes.x[1, 0] == 6  # as they are, not standardized
    assert as_data((torch.tensor(x), torch.tensor([True, False, True, True])), "mine").classes == 2
    numbers = as_data([x, [[0.5], [1.0], [2.0], [3.0]]], "mine")
    assert numbers.classes is None and tuple(numbers.y.shape) == (4,)
    assert as_data(load("digits"), "mine").name == "mine"
    frames = train((x, np.array([0, 2, 1, 2])), depth=1, width=5, batch=4, steps=3, seeds=1)
    assert len(frames["losses"]) == 6


def test_data_that_are_not_finite_are_data() -> None:
    x = np.random.default_rng(0).normal(size=(40, 3))
    x[3, 1], x[7, 0] = np.nan, np.inf
    frames = train((x, x[:, 2]), depth=1, width=5, batch=40, steps=2, seeds=1, loss="mse")
    assert frames["losses"]["loss"].isna().all()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (None, "mine returns None; it must return x, y"),
        (np.zeros((3, 2)), "it must return x, y"),
        ((np.zeros((3, 2)),), "it must return x, y"),
        ((np.zeros((3, 2)), np.zeros(4)), r"x \(3, 2\) and y \(4,\)"),
        ((np.zeros((0, 2)), np.zeros(0)), r"x \(0, 2\)"),
        ((np.zeros((3, 2)), np.zeros((3, 2))), r"y \(3, 2\)"),
        ((np.zeros((3, 2)), np.array([-1, 0, 1])), "the class -1"),
        ((np.array(["a", "b"]), np.zeros(2)), "no arrays of numbers"),
        ((np.zeros((2, 2), complex), np.zeros(2)), "complex"),
    ],
)
def test_wrong_data_are_one_line(given: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        as_data(given, "mine")


# A width for each layer

WIDTHS = [300, 40, 120, 20]


@pytest.mark.parametrize("init", ["kaiming", "orthogonal", "naive"])
def test_widths_are_what_theory_predicts(init: str) -> None:
    """z of the mean over 64 networks, all statistics that have one: one in 5,000 of a right law is above 4.

    The bands of the same stack with the widths in another order are missed by many.
    """
    given: dict[str, Any] = {"inputs": 60, "batch": 50}
    frame = stack(init, "relu", widths=WIDTHS, seeds=64, **given)
    assert frame.query("tensor == 'activation'").groupby("layer")["count"].first().tolist() == [
        50 * n for n in (60, *WIDTHS)
    ]
    right, wrong = (
        compare_stack(frame, init, "relu", 0, 0, **given, widths=one, method="closed") for one in (WIDTHS, WIDTHS[::-1])
    )
    sizes = [one[(one["seed"] == -1) & one["statistic"].isin(["rms", "std"])]["z"].abs() for one in (right, wrong)]
    assert sizes[0].median() < 1.5 and (sizes[0] > 4).mean() < 0.05
    assert (sizes[1] > 4).mean() > 0.3


def test_equal_widths_are_a_width() -> None:
    """To the bit, on the way back and beyond the range of the format too."""
    given: dict[str, Any] = {"init": "naive", "batch": 6, "seeds": 3, "dtype": "float16"}
    pd.testing.assert_frame_equal(
        stack(**given, depth=9, width=20), stack(**given, widths=[20] * 9, inputs=20), check_exact=True
    )


def test_widths_and_residual_connections() -> None:
    frame = stack("kaiming", "tanh", widths=[20, 20, 9, 9], seeds=2, batch=5, residual=True)
    assert np.isfinite(frame["std"]).all() and len(frame) == 2 * (1 + 4 * 4)


@pytest.mark.parametrize(
    ("widths", "text"),
    [
        ([], r"widths=\[\]: must be a list"),
        ([4, 0], "widths=0: must be at least 1"),
        ([4, 1.5], "widths=1.5: must be a whole number"),
        ("44", "widths='44': must be a list"),
        (7, "widths=7: must be a list"),
    ],
)
def test_wrong_widths_are_one_line(widths: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        stack(widths=widths)
    with pytest.raises(UsageError, match="leave depth and width out"):
        stack(depth=3, widths=[4, 4])
