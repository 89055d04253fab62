"""Layer-sequential unit variance: the variance that it promises, what it keeps, and when it says that it gives up."""

import logging
from collections.abc import Sequence

import pandas as pd
import pytest
import torch
from torch import Tensor

from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import Rule, draw, rule
from initlab.nn.lsuv import GIVEN_UP, Fit, fit
from initlab.nn.network import PLAIN, dense
from initlab.tasks.data import load
from initlab.tasks.ensemble.networks import draw_trained
from initlab.tasks.stack import stack
from initlab.tasks.train import train

SIZES = [13, 40, 25, 40, 7]
DIGITS = load("digits")


def inputs(networks: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(networks, 60, SIZES[0], generator=generator, dtype=torch.float64) + 1


def variances(parameters: Sequence[tuple[Tensor, Tensor]], x: Tensor, activation: str) -> Tensor:
    """Of every layer's preactivations, (L, E)."""
    found = []
    for w, b in parameters:
        z = PLAIN.linear(x, w, b)
        found.append(z.var((-2, -1), correction=0))
        x = ACTIVATIONS[activation].phi(z)
    return torch.stack(found)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_layer_has_unit_variance(activation: str) -> None:
    """To rounding where a first scaling was due, within the tolerance else; the isometry stays one."""
    x, strict = inputs(3), rule("lsuv", tolerance=1e-9)
    parameters, found = draw_trained([strict] * 3, activation, SIZES, [0, 1, 5], x)
    assert (variances(parameters, x, activation) - 1).abs().max() < 1e-9
    loose = draw_trained([rule("lsuv")] * 3, activation, SIZES, [0, 1, 5], x).parameters
    assert (variances(loose, x, activation) - 1).abs().max() < 0.1
    plain = draw_trained([rule("orthogonal", gain=1.0)] * 3, activation, SIZES, [0, 1, 5], x).parameters
    assert (variances(plain, x, activation) - 1).abs().max(0).values.min() > 0.1
    w = parameters[0][0]
    gram = w @ w.mT
    torch.testing.assert_close(gram / gram[:, :1, :1], torch.eye(13).double().expand_as(gram), rtol=0, atol=1e-6)
    assert found is not None


def test_what_the_attempts_did_is_told() -> None:
    """Without biases one scaling is enough: attempt 0 is what was drawn, attempt 1 fits."""
    found = draw_trained([rule("lsuv", tolerance=1e-6)] * 2, "relu", SIZES, [4, 9], inputs(2)).fit
    assert found is not None
    frame = found.frame()
    assert list(frame) == ["layer", "attempt", "std", "factor", "outcome", "seed"]
    assert frame.groupby(["seed", "layer"])["outcome"].agg(list).map(tuple).unique().tolist() == [("scaled", "fits")]
    first = frame[frame["attempt"] == 0]
    assert (first["factor"] * first["std"]).to_numpy() == pytest.approx(1, rel=1e-12)
    assert frame[frame["attempt"] == 1]["std"].to_numpy() == pytest.approx(1, rel=1e-6)
    biased = draw_trained([rule("lsuv", tolerance=1e-6, bias=2.0)], "relu", SIZES, [4], inputs(1, 0.5)).fit
    assert biased is not None and biased.frame()["attempt"].max() > 1


@pytest.mark.parametrize(
    ("given", "attempts", "reason"),
    [(0.0, 10, "zero"), (float("inf"), 10, "not finite"), (float("nan"), 10, "not finite"), (2.0, 2, "attempts")],
)
def test_it_says_when_it_gives_up(given: float, attempts: int, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """A layer that is zero, one that is not finite, and attempts that do not suffice: nothing raises, one line."""
    x = torch.full((1, 4, 13), given, dtype=torch.float64)
    if reason == "attempts":
        x = inputs(1, 0.1)
    own = rule("lsuv", tolerance=1e-12, attempts=attempts, bias=3.0 if reason == "attempts" else 0.0)
    with caplog.at_level(logging.WARNING):
        parameters, found = draw_trained([own], "relu", SIZES, [3], x)
    assert found is not None and reason in set(found.frame()["outcome"])
    assert caplog.messages[0] == f"lsuv gives up at layer 1: {GIVEN_UP[reason]}; so in 1 of 1 networks, first seed 3"
    assert all(bool(w.isfinite().all()) for w, _ in parameters)
    caplog.clear()
    draw_trained([rule("lsuv")], "relu", SIZES, [3], inputs(1))
    assert not caplog.messages


def test_the_pass_that_fits_by_hand() -> None:
    """Biases count from the start, each network has its own attempts, and every layer its own factors."""
    x, generator = inputs(2), torch.Generator().manual_seed(2)
    w = torch.randn(2, 13, 5, generator=generator, dtype=torch.float64)
    b = 20 * torch.randn(2, 5, generator=generator, dtype=torch.float64)
    found = Fit([rule("lsuv", attempts=k, tolerance=1e-12) for k in (1, 2)], [7, 8], x.device)
    z = found.linear(x, w, b)
    frame = found.frame()
    drawn = PLAIN.linear(x, w, b).std((-2, -1), correction=0)
    assert frame.query("attempt == 0")["std"].tolist() == pytest.approx(drawn.tolist(), rel=1e-12)
    told = frame.groupby("seed")["outcome"].agg(list).to_dict()
    assert told == {7: ["scaled", "attempts"], 8: ["scaled", "scaled", "attempts"]}
    assert str(frame["outcome"].dtype) == "category"
    assert torch.equal(z, PLAIN.linear(x, found.scale(1, w), b))
    found.linear(z, w[:, :5])
    for layer, k in ((1, 0), (1, 1), (2, 0), (2, 1)):
        assert torch.equal(found.scale(layer, w[[k]], [k]), found.scale(layer, w)[[k]])
    assert len({float(factor) for layer in found.factors for factor in layer}) == 4


def test_one_preactivation_that_is_not_finite_is_enough() -> None:
    x = inputs(1)
    x[0, 7, 3] = float("nan")
    found = Fit([rule("lsuv")], [0], x.device)
    found.linear(x, torch.ones(1, 13, 1, dtype=torch.float64))
    assert found.frame()["outcome"].tolist() == ["not finite"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_single_entry_that_is_not_finite_ends_the_fit(bad: float) -> None:
    """The std of the finite entries is a number, and must scale nothing; the network beside it is fitted."""
    x = inputs(2)
    x[0, 7, 3] = bad
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("initlab.nn.lsuv.Fit.warn", lambda self: None)
        parameters, found = draw_trained([rule("lsuv")] * 2, "linear", SIZES, [0, 1], x)
    assert found is not None
    first = found.frame().query("layer == 1").set_index("seed")
    assert first.loc[0, "outcome"] == "not finite" and first.loc[0, "factor"] == 1
    assert "fits" in set(first.loc[1, "outcome"])
    drawn = draw_trained([rule("orthogonal", gain=1.0)] * 2, "linear", SIZES, [0, 1], x).parameters
    assert torch.equal(parameters[0][0][0], drawn[0][0][0]) and not torch.equal(parameters[0][0][1], drawn[0][0][1])


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_member_is_the_single_network(dtype: torch.dtype, activation: str) -> None:
    """Among networks of other rules, to 4 eps a layer: kernels round these odd shapes by where they lie in memory."""
    x = inputs(3).to(dtype)
    rules = [rule("kaiming"), rule("lsuv", tolerance=1e-4), rule("lsuv")]
    together = draw_trained(rules, activation, SIZES, [0, 1, 2], x)
    for k, own in enumerate(rules):
        alone = draw_trained([own], activation, SIZES, [k], x[k : k + 1]).parameters
        for (w, b), (one, other) in zip(together.parameters, alone, strict=True):
            assert (w[k] - one[0]).norm() <= 16 * torch.finfo(dtype).eps * one[0].norm()
            assert torch.equal(b[k], other[0])
    assert together.fit is not None and set(together.fit.frame()["seed"]) == {1, 2}
    assert fit([rule("kaiming")], [0], dense([13, 4], ACTIVATIONS["relu"]), lambda layer: (x, None), x) is None


def test_a_stack_is_fitted_to_its_own_input() -> None:
    """Every layer's variance, as the table measures it; kaiming's wanders by far more."""
    frames: list[dict[str, pd.DataFrame]] = []
    stack("lsuv", depth=20, width=50, inputs=30, batch=40, seeds=[0, 3], emit=frames.append)
    stats = pd.concat([frame["stats"] for frame in frames if "stats" in frame])
    z = stats[(stats["tensor"] == "preactivation") & (stats["direction"] == "forward")]
    assert (z["std"] ** 2 - 1).abs().max() < 0.1
    (told,) = [frame["lsuv"] for frame in frames if "lsuv" in frame]
    assert set(told["layer"]) == set(range(1, 21)) and set(told["stage"]) == {"stack"}
    kaiming = stack("kaiming", depth=20, width=50, inputs=30, batch=40, seeds=[0, 3])
    other = kaiming[(kaiming["tensor"] == "preactivation") & (kaiming["direction"] == "forward")]
    assert (other["std"] ** 2 - 1).abs().max() > 0.3


def test_a_training_starts_with_unit_variance_on_its_first_batch() -> None:
    frames = train(DIGITS, "lsuv", depth=3, steps=2, seeds=[0, 2])
    start = frames["stats"].query("step == 0 and tensor == 'preactivation' and direction == 'forward'")
    assert (start["std"] ** 2 - 1).abs().max() < 0.1
    assert set(frames["lsuv"]["stage"]) == {"train"} and set(frames["lsuv"]["layer"]) == {1, 2, 3, 4}
    alone = train(DIGITS, "lsuv", depth=3, steps=1, seeds=[2])["stats"].query("implementation == 'scratch'")
    member = frames["stats"].query("implementation == 'scratch' and step == 0 and seed == 2")
    # a batched product and a single one round differently
    assert member["rms"].to_numpy() == pytest.approx(alone["rms"].to_numpy(), rel=1e-5)


def test_networks_of_several_rules_are_named() -> None:
    """Two rules that share a seed: the table tells them apart, in stack and training; one rule needs no name."""
    gentle = rule("kaiming", attempts=1)
    frames: list[dict[str, pd.DataFrame]] = []
    stack(["lsuv", gentle, "kaiming"], depth=3, width=20, batch=10, seeds=[4, 4, 4], emit=frames.append)
    (told,) = [frame["lsuv"] for frame in frames if "lsuv" in frame]
    trained = train(DIGITS, ["lsuv", gentle, "kaiming"], depth=2, steps=1, seeds=[4, 4, 4])["lsuv"]
    for table in (told, trained):
        assert set(table["seed"]) == {4} and table["init"].nunique() == 2 and "kaiming" not in set(table["init"])
        most = table.groupby(table["init"].astype(str))["attempt"].max()
        assert most["lsuv"] >= 1 and most.drop("lsuv").item() == 1
        assert set(table.groupby(table["init"].astype(str))["gain"].nunique()) == {1}
    alone: list[dict[str, pd.DataFrame]] = []
    stack("lsuv", depth=3, width=20, batch=10, seeds=[4], emit=alone.append)
    assert "init" not in next(frame["lsuv"] for frame in alone if "lsuv" in frame)


def test_its_start_is_the_orthogonal_one() -> None:
    drawn_by = [draw(own, "relu", (6, 4), [1], 2)[0] for own in (rule("lsuv"), Rule(1.0, distribution="orthogonal"))]
    assert torch.equal(*drawn_by)


@pytest.mark.parametrize(("field", "value"), [("attempts", -1), ("tolerance", 0), ("tolerance", float("nan"))])
def test_a_mistake_is_one_line(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"init.{field}={value}: must be"):
        rule("lsuv", **{field: value})
