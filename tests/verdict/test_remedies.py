"""What a remedy names can be changed: parameters, also behind a computed weight, and the group of an optimizer."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import initlab
from benchmarks.faults import mlp, normed

RELU = 2**0.5
X, Y = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 10


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("fault", ["one magnitude x100", "magnitudes x0.3", "magnitude 0", "direction nan"])
def test_a_remedy_of_a_computed_weight_names_parameters(old: bool, fault: str) -> None:
    torch.manual_seed(0)
    model = mlp(8, 64, nn.ReLU, RELU)
    norm = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    layers = [norm(layer) for layer in model if isinstance(layer, nn.Linear)]
    home = "parametrizations.weight.original"
    ends = ("weight_g", "weight_v") if old else (f"{home}0", f"{home}1")
    parameters = dict(model.named_parameters())
    magnitudes = [p for name, p in parameters.items() if name.endswith(ends[0])]
    assert len(layers) == len(magnitudes) == 9
    with torch.no_grad():
        if fault == "direction nan":
            parameters[f"6.{ends[1]}"][0] = torch.nan
        for p in {"one magnitude x100": magnitudes[3:4], "magnitudes x0.3": magnitudes}.get(fault, []):
            p.mul_(100 if fault == "one magnitude x100" else 0.3)
        if fault == "magnitude 0":
            magnitudes[3].zero_()
    verdict = initlab.diagnose(model, X)
    (error,) = verdict.errors
    assert {*error.factors, *error.redraw} <= parameters.keys() and (error.factors or error.redraw), str(verdict)
    if error.redraw:
        assert error.redraw == (f"6.{ends[0]}", f"6.{ends[1]}") and "initlab.init_" in error.remedy
        initlab.init_(model, "kaiming", seed=0)
    with torch.no_grad():
        for name, factor in error.factors.items():
            parameters[name].mul_(factor)
    assert initlab.diagnose(model, X).ok


@pytest.mark.parametrize(("good", "bad", "rule"), [(1e-3, 1.0, "update-too-large"), (1e-3, 1e-9, "update-too-small")])
@pytest.mark.parametrize("several", [False, True])
def test_the_group_that_learns_wrongly_is_named(good: float, bad: float, rule: str, several: bool) -> None:
    torch.manual_seed(0)
    model = mlp(4, 64, nn.ReLU, RELU)
    first = {"params": list(model[0].parameters()) + list(model[2].parameters()), "lr": good}
    second = {"params": list(model[4:].parameters()), "lr": bad}  # type: ignore[union-attr,index]
    groups = [[first], [second]] if several else [[first, second]]
    optimizers = [torch.optim.Adam(group) for group in groups]
    verdict = initlab.diagnose(model, X, Y, cross_entropy, optimizers, steps=2)
    (error,) = verdict.errors
    group = "optimizer[1].param_groups[0]" if several else "param_groups[1]"
    assert error.rule == rule and set(error.factors) == {f"{group}.lr"} and group in error.cause, str(verdict)
    optimizers[-1].param_groups[-1]["lr"] *= error.factors[f"{group}.lr"]
    assert initlab.diagnose(model, X, Y, cross_entropy, optimizers, steps=2).ok
    alike = torch.optim.Adam([{**first, "lr": bad}, {**second, "lr": bad}])
    assert set(initlab.diagnose(model, X, Y, cross_entropy, alike, steps=2).errors[0].factors) == {"lr"}


class Chosen(nn.Module):
    """A root that is not taken where it has no slope; its gradient is nan all the same."""

    def __init__(self, safe: bool) -> None:
        super().__init__()
        self.a, self.b, self.safe = nn.Linear(64, 64), nn.Linear(64, 4), safe

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        given = torch.where(h > 0, h, torch.ones_like(h)) if self.safe else h
        return self.b(torch.where(h > 0, given.sqrt(), torch.zeros_like(h)))  # type: ignore[no-any-return]


def test_the_function_whose_gradient_is_nan_is_named_though_another_is_called_later() -> None:
    torch.manual_seed(0)
    (error,) = initlab.diagnose(Chosen(False), X).errors
    assert error.evidence["op"] == "sqrt" and error.direction == "backward"
    assert initlab.diagnose(Chosen(True), X).ok


@pytest.mark.parametrize(
    ("layer", "rule"),
    [
        (nn.ConvTranspose2d(8, 32, 3), "torch's default"),
        (nn.ConvTranspose1d(16, 16, 5, groups=4), "torch's default"),
        (nn.Bilinear(16, 9, 20), "torch's default"),
        (nn.Conv2d(16, 64, 3, groups=4), "torch's default"),
        (nn.Conv2d(16, 64, 3, groups=4), "xavier_uniform_(linear) by torch's count of fans"),
    ],
)
def test_rules_that_count_fans_as_torch_does_have_their_name(layer: nn.Module, rule: str) -> None:
    torch.manual_seed(0)
    layer.reset_parameters()  # type: ignore[operator]
    if rule != "torch's default":
        nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
    rules = initlab.audit(layer).frame["rules"].iloc[0].split(", ")
    assert rule in rules and len([one for one in rules if one == "torch's default"]) == (rule == "torch's default")
    nn.init.normal_(layer.weight, 0, 0.3)  # type: ignore[arg-type]
    assert rule not in initlab.audit(layer).frame["rules"].iloc[0]


@pytest.mark.parametrize(
    ("entries", "rule"),
    [("ten alike", "symmetric"), ("half 0", "symmetric"), ("one 1e30", "stray-entries"), ("one 1e3", "stray-entries")],
)
def test_a_part_of_a_weight_is_off(entries: str, rule: str) -> None:
    """Not taken for a size or for dead units; drawn anew it is healthy, and so are meant ones: an identity, ICNR."""
    torch.manual_seed(0)
    model = mlp(6, 64, nn.ReLU, RELU)
    weight = model[4].weight
    with torch.no_grad():
        if entries == "ten alike":
            weight[:10] = weight[0]
        elif entries == "half 0":
            weight[32:] = 0
        else:
            weight[5, 7] = float(entries.removeprefix("one "))
    (error,) = initlab.diagnose(model, X).errors
    assert (error.rule, error.name, error.redraw, error.layer) == (rule, "4.weight", ("4.weight",), 3)
    nn.init.kaiming_normal_(weight)  # type: ignore[arg-type]
    assert initlab.diagnose(model, X).findings == ()
    kernel = nn.init.kaiming_normal_(torch.empty(4, 8, 3, 3)).repeat_interleave(4, 0)
    upsample = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(4, 4, 3))
    upsample[0].weight.data.copy_(kernel)  # type: ignore[union-attr,operator]
    assert initlab.diagnose(upsample, torch.randn(2, 8, 6, 6)).ok


@pytest.mark.parametrize("factor", [6.0, 1 / 6])
def test_one_layer_that_is_somewhat_off_is_a_warning(factor: float) -> None:
    torch.manual_seed(0)
    model = mlp(10, 64, nn.ReLU, RELU)
    with torch.no_grad():
        model[6].weight.mul_(factor)  # type: ignore[operator,union-attr]
    verdict = initlab.diagnose(model, X)
    assert verdict.ok and [(one.name, one.severity) for one in verdict] == [("6.weight", "warning")]
    assert verdict.findings[0].factors["6.weight"] * factor == pytest.approx(1, rel=0.1)
    absorbed = normed(5, 64)
    with torch.no_grad():
        absorbed[6].weight.mul_(factor)  # type: ignore[operator,index]
    assert initlab.diagnose(absorbed, X).findings == ()
