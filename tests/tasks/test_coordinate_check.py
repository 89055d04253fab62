"""Coordinate checks of one's own models: the standard parametrization goes with the width, maximal-update does not."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from initlab.errors import UsageError
from initlab.tasks.coordinate_check import coordinate_check, fit_slope, judge_exponent

WIDTHS = [64, 128, 256, 512]
LOSS = nn.functional.cross_entropy


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(32, 16, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4


def mlp(width: int, head: float = 1.0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    with torch.no_grad():
        model[4].weight.mul_(head)
    return model


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 1e-2)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


def mup_adam(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Table 3 of Tensor Programs V: what has a fan_in of the width learns with 1/width, the head is 1/width in size."""
    ratio = 64 / width
    model = mlp(width, ratio**0.5)
    narrow = [*model[0].parameters(), model[2].bias, model[4].bias]
    wide = [model[2].weight, model[4].weight]
    return model, torch.optim.Adam([{"params": narrow, "lr": 1e-2}, {"params": wide, "lr": 1e-2 * ratio}])


def mup_sgd(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    ratio = width / 64
    model = mlp(width, ratio**-0.5)
    rates = [(model[0].parameters(), ratio), ([model[2].bias], ratio), ([model[2].weight, model[4].bias], 1.0)]
    rates.append(([model[4].weight], 1 / ratio))
    return model, torch.optim.SGD([{"params": list(given), "lr": 0.1 * rate} for given, rate in rates])


def exponents(frame: pd.DataFrame, tensor: str, step: int) -> dict[str, float]:
    rows = frame[(frame["tensor"] == tensor) & (frame["step"] == step)]
    return dict(zip(rows["name"], rows["exponent"], strict=True))


@pytest.mark.parametrize(("make", "optimizer"), [(mlp, adam), (mlp, sgd)], ids=["adam", "sgd"])
def test_the_standard_parametrization_goes_with_the_width(make: Any, optimizer: Any) -> None:
    """Adam's first update of n inputs that point the same way moves a unit by n; the logits grow in both."""
    found = coordinate_check(make, WIDTHS, *batch(), LOSS, optimizer=optimizer)
    assert not found.ok
    moved = exponents(found.frame, "change", 1)
    assert moved["4"] > 0.6
    if optimizer is adam:
        assert 0.7 < moved["2"] < 1.2 and abs(moved["0"]) < 0.1  # n^1, and an input layer of 16 inputs at every width
    else:
        assert -0.8 < moved["0"] < -0.3  # n^-1/2, see the study mup
        assert "0 Linear: its change vanishes" in str(found)
    grown = found.findings[found.findings["verdict"] == "grows"]
    assert {"2", "4"} <= set(grown["name"]) and (grown["since"] >= 1).all()
    assert str(found).startswith("not ok: ") and "4 Linear: its change grows as width^" in str(found)


@pytest.mark.parametrize("make", [mup_adam, mup_sgd])
def test_the_maximal_update_parametrization_stays_level(make: Any) -> None:
    found = coordinate_check(make, WIDTHS, *batch(), LOSS)
    assert found.ok, str(found)
    assert str(found).startswith("ok: no module grows or vanishes with the width (widths 64 to 512, 3 seeds, 4 steps)")
    for step in (1, 4):
        assert max(exponents(found.frame, "change", step).values()) < 0.1
        assert max(exponents(found.frame, "output", step).values()) < 0.1


@pytest.mark.parametrize(("power", "verdict"), [(0.5, "grows"), (-0.5, "vanishes")])
def test_the_size_at_the_start_is_told_from_what_training_changes(power: float, verdict: str) -> None:
    """Weights of n^(p - 1/2) give outputs of n^p before any step; at a learning rate of 0 nothing changes."""

    def make(width: int) -> nn.Module:
        model = mlp(width)
        with torch.no_grad():
            model[2].weight.mul_(width**power)
        return model

    still = lambda model: torch.optim.SGD(model.parameters(), 0.0)  # noqa: E731
    found = coordinate_check(make, WIDTHS, *batch(), LOSS, optimizer=still, steps=1)
    assert exponents(found.frame, "output", 0)["2"] == pytest.approx(power, abs=0.1)
    rows = found.findings.set_index("name")
    assert rows.loc["2", "verdict"] == verdict and rows.loc["2", "since"] == 0 and rows.loc["2", "tensor"] == "output"
    assert (found.frame.loc[found.frame["tensor"] == "change", "verdict"] == "zero").all()


def test_what_is_not_finite_in_a_wide_net_is_a_finding() -> None:
    huge = lambda model: torch.optim.SGD(model.parameters(), 1e30)  # noqa: E731
    found = coordinate_check(mlp, [8, 16], *batch(), LOSS, optimizer=huge, steps=2, seeds=1)
    assert not found.ok and "not finite at some widths since step" in str(found)


def test_two_points_have_no_error_and_decide_nothing() -> None:
    found = coordinate_check(mlp, [64, 512], *batch(), LOSS, optimizer=adam, steps=1, seeds=1)
    assert np.isinf(found.frame["error"].dropna()).all()
    assert "undecided, for lack of seeds or widths: " in str(found) and "grows as" not in str(found)


class Block(nn.Module):
    """Attention, a function, dropout, a layer that is called twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.again = nn.Linear(16, width), nn.Linear(width, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.again(torch.relu(self.again(self.enter(x)))).unsqueeze(1)
        return self.head(self.drop(self.attention(z, z, z)[0]).squeeze(1))


def test_any_module_has_its_rows_and_dropout_is_no_change() -> None:
    before = torch.get_rng_state()
    still = lambda model: torch.optim.SGD(model.parameters(), 0.0)  # noqa: E731
    found = coordinate_check(Block, [8, 16, 32], *batch(), LOSS, optimizer=still, steps=2, seeds=2)
    assert torch.equal(before, torch.get_rng_state())
    changed = found.frame[found.frame["tensor"] == "change"]
    assert (changed["verdict"] == "zero").all()
    assert set(zip(changed["name"], changed["call"], strict=True)) >= {("again", 0), ("again", 1), ("attention", 0)}
    assert "relu" in set(found.frame["op"])


def test_seeds_and_order_of_widths_change_nothing() -> None:
    a = coordinate_check(mlp, [8, 16, 32], *batch(), LOSS, optimizer=adam, steps=1, seeds=2)
    b = coordinate_check(mlp, (32, 8, 16), *batch(), LOSS, optimizer=adam, steps=1, seeds=[0, 1])
    pd.testing.assert_frame_equal(a.frame, b.frame)


def test_slopes_and_verdicts() -> None:
    x = np.repeat(np.arange(4.0), 3)
    noise = np.random.default_rng(0).normal(size=12)
    slope, error = fit_slope(x, 0.5 * x + 0.1 * noise)
    design = np.stack([x, np.ones(12)], 1)
    (expected, _), residual, *_ = np.linalg.lstsq(design, 0.5 * x + 0.1 * noise, rcond=None)
    spread = np.sqrt(residual[0] / 10 * np.linalg.inv(design.T @ design)[0, 0])
    assert slope == pytest.approx(expected, rel=1e-12) and error == pytest.approx(spread, rel=1e-9)
    one = np.ones(3)
    assert judge_exponent(one, 1.0, 0.1) == "grows" and judge_exponent(one, 1.0, 0.4) == "undecided"
    assert judge_exponent(one, -0.5, 0.05) == "vanishes" and judge_exponent(one, 0.0, 9.0) == "level"
    assert judge_exponent(0 * one, np.nan, np.nan) == "zero"
    assert judge_exponent(np.nan * one, np.nan, np.nan) == "not finite"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"widths": [64]}, "widths=[64]: must be two different widths at least"),
        ({"widths": 64}, "widths=64: must be two different widths at least"),
        ({"widths": [8, "x"]}, "width='x': must be a whole number"),
        ({"optimizer": None}, "optimizer: give one, such as optimizer=lambda model"),
        ({"make_model": lambda width: 3}, "make_model(8): gives 3: must give an nn.Module"),
        ({"make_model": lambda width: 1 / 0}, "make_model(8): ZeroDivisionError"),
        ({"make_model": None}, "give make_model, a function of the width, and loss"),
        ({"loss": None}, "give make_model, a function of the width, and loss"),
        ({"loss": lambda out, y: out}, "loss: gives a tensor (32, 4): must give a tensor of one number"),
        ({"x": torch.randn(3, 5)}, "x=float32 (3, 5): does not fit"),
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"sedes": 3}, "did you mean seeds?"),
    ],
)
def test_bad_input_is_one_line(given: dict[str, Any], text: str) -> None:
    x, y = batch()
    options = {"make_model": mlp, "widths": [8, 16], "x": x, "y": y, "loss": LOSS, "optimizer": sgd} | given
    with pytest.raises(UsageError) as error:
        coordinate_check(**options)
    assert text in str(error.value) and "\n" not in str(error.value)
