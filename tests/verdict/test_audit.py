"""What audit says of parameters whose law, fans and faults are known."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import initlab
from initlab.verdict.finding import Finding


def found(model: nn.Module, x: object = None) -> list[tuple[str, str]]:
    return [(one.rule, one.name) for one in initlab.audit(model, x).findings]


def test_rows_say_law_gain_rule_and_need() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 100), nn.ReLU(), nn.Conv2d(8, 32, 3, groups=4))
    nn.init.kaiming_normal_(model[2].weight)
    nn.init.orthogonal_(model[4].weight, 2.0)
    frame = initlab.audit(model).frame.set_index("name")
    first = frame.loc["0.weight"]
    assert first["law"] == "uniform" and "torch's default" in first["rules"] and first["follower"] == "GELU"
    assert first["gain"] == pytest.approx(3**-0.5, abs=5 * first["gain_error"])
    assert first["gain_error"] == pytest.approx(3**-0.5 * math.sqrt(0.8 / 4 / (256 * 512)), rel=0.1)  # kurtosis 1.8
    assert first["needed"] == pytest.approx(initlab.gain("gelu"))
    second = frame.loc["2.weight"]
    assert second["law"] == "normal" and "kaiming_normal_(fan_in, relu)" in second["rules"]
    assert second["gain"] == pytest.approx(math.sqrt(2), abs=5 * second["gain_error"])
    assert frame.loc["4.weight"]["fan_in"] == 18 and frame.loc["4.weight"]["law"] == "orthogonal"


def cut(weight: torch.Tensor, std: float) -> None:
    nn.init.trunc_normal_(weight, 0, std, -2 * std, 2 * std)


def raw_matrix() -> nn.Module:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.empty(400, 100))
            nn.init.kaiming_normal_(self.w)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x @ self.w)

    return Raw()


def set_under_weight_norm() -> nn.Module:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(128, 128))
    with torch.no_grad():  # the direction alone; the magnitude keeps what torch had drawn
        nn.init.kaiming_normal_(layer.parametrizations.weight.original1)  # type: ignore[union-attr,arg-type]
    return nn.Sequential(layer, nn.ReLU())


def set_under_old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(nn.Linear(64, 64))  # type: ignore[no-untyped-call]
    nn.init.kaiming_normal_(layer.weight)
    return nn.Sequential(layer, nn.ReLU())


def changed(change: Callable[[nn.Linear], object]) -> nn.Module:
    layer = nn.Linear(128, 64)
    nn.init.kaiming_normal_(layer.weight)
    with torch.no_grad():
        change(layer)
    return nn.Sequential(layer, nn.ReLU())


FAULTS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "right": (lambda: changed(lambda m: None), []),
    "nan": (lambda: changed(lambda m: m.weight[3].fill_(torch.nan)), ["non-finite"]),
    "empty memory": (lambda: changed(lambda m: m.weight.fill_(1e-41)), ["never-set"]),
    "zero": (lambda: changed(lambda m: m.weight.zero_()), ["zero"]),
    "equal units": (lambda: changed(lambda m: m.weight.copy_(m.weight[:1].expand(64, -1))), ["symmetric"]),
    "cut": (lambda: changed(lambda m: cut(m.weight, math.sqrt(2 / 128))), ["lost-variance"]),
    "cut and widened": (lambda: changed(lambda m: cut(m.weight, math.sqrt(2 / 128) / 0.8796)), []),
    "fans swapped": (raw_matrix, ["fans-swapped"]),
    "stacked": (lambda: nn.MultiheadAttention(128, 4), ["xavier-stacked"]),
    "lost": (set_under_weight_norm, ["init-lost"]),
    "lost by a hook": (set_under_old_weight_norm, ["init-lost"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(name: str) -> None:
    torch.manual_seed(0)
    make, rules = FAULTS[name]
    assert [rule for rule, _ in found(make())] == rules


def test_shared_parameters_and_models_side_by_side() -> None:
    torch.manual_seed(0)
    embedding, head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
    head.weight = embedding.weight
    assert found(nn.Sequential(embedding, head)) == [("shared", "0.weight")]
    a, b = (nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(2))
    assert initlab.audit(a, b).findings == ()
    nn.init.kaiming_normal_(b[0].weight)
    both = initlab.audit(a, b)
    assert [one.name for one in both.findings] == ["0.weight"] and abs(both.frame["z"][0]) > 100
    more = initlab.audit(a, nn.Sequential(*b, nn.Linear(256, 2)))
    assert "2 parameters are in the second model alone" in str(more)


def test_whatever_a_model_holds_is_said() -> None:
    lazy = initlab.audit(nn.Sequential(nn.LazyLinear(4), nn.Linear(3, 3, device="meta")))
    assert "no numbers yet" in str(lazy) and lazy.ok
    assert len(initlab.audit(nn.Sequential()).frame) == 0
    with pytest.raises(initlab.UsageError, match=r"model=Tensor: must be an nn\.Module"):
        initlab.audit(torch.zeros(3))  # type: ignore[arg-type]
    page = initlab.audit(nn.Linear(3, 3))._repr_html_()
    assert page.startswith("<table") and isinstance(initlab.audit(nn.Linear(3, 3)).findings, tuple)
    assert all(isinstance(one, Finding) for one in initlab.audit(nn.MultiheadAttention(64, 4)).findings)
