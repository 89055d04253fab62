"""The table of rules: its page, its numbers; each row is found in some network, and each finding has a row."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import initlab
from benchmarks.faults import encoder, mlp
from initlab.verdict import rules
from initlab.verdict.finding import Finding
from initlab.verdict.rules import ERROR, RULES, TABLE_OF_RULES, Threshold, describe_rules
from initlab.verdict.table_rules import judge_tables

RELU = 2**0.5
ROOM = Path(rules.__file__).parent
X, Y = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 10


def test_the_page_is_the_table() -> None:
    """Made by `python -c "from initlab.verdict.rules import *; print(describe_rules(), end='')" > docs/rules.md`."""
    assert (ROOM.parent.parent / "docs" / "rules.md").read_text(encoding="utf-8") == describe_rules()
    frame = initlab.diagnose(nn.Linear(64, 10), X).rules
    assert set(frame["id"]) == set(RULES) and len(RULES) == len(TABLE_OF_RULES)
    assert len(frame) == sum(max(1, len(rule.thresholds)) for rule in TABLE_OF_RULES)


def test_every_number_stands_in_the_table_and_in_a_rule() -> None:
    named = {name: value for name, value in vars(rules).items() if isinstance(value, Threshold)}
    shown = {id(one) for rule in TABLE_OF_RULES for one in rule.thresholds}
    sources = "".join(p.read_text(encoding="utf-8") for p in ROOM.glob("*.py") if p.name != "rules.py")
    assert [name for name, value in named.items() if id(value) not in shown] == []
    assert [name for name in named if len(re.findall(rf"\b{name}\b", sources)) < 2] == []  # imported, and used
    assert all(value.of and value.source for value in named.values())


def changed(change: Callable[[Any], Any], depth: int = 6) -> Iterable[Finding]:
    """What is said of a healthy network with one change."""
    model = mlp(depth, 64, nn.ReLU, RELU)
    with torch.no_grad():
        change(model)
    return initlab.diagnose(model, X)


def trained(lr: float) -> Iterable[Finding]:
    model = mlp(3, 64, nn.ReLU, RELU)
    return initlab.diagnose(model, X, Y, cross_entropy, torch.optim.SGD(model.parameters(), lr=lr), steps=2)


def table(values: list[float]) -> Iterable[Finding]:
    row = {"stage": "train", "step": 99, "tensor": "activation", "layer": 1, "frac_dead": 0.1, "direction": "forward"}
    losses = {"implementation": "scratch", "seed": 0, "step": range(len(values)), "loss": values}
    stats = pd.DataFrame([{**row, "seed": 0, "init": "kaiming", "gain": 1.4}])
    return judge_tables({"stats": stats, "losses": pd.DataFrame(losses)}) or ()


class Raw(nn.Module):
    """A matrix kept as (inputs, outputs), set by its inputs' number or by its outputs'."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(nn.init.kaiming_normal_(torch.empty(64, 512)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.w)


def stale() -> nn.Module:
    layers = [nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)) for _ in range(4)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.parametrizations.weight.original1)  # type: ignore[union-attr,arg-type]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())])


def audited(model: nn.Module, change: Callable[[Any], Any]) -> Iterable[Finding]:
    with torch.no_grad():
        change(model)
    return initlab.audit(model).findings


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    return model


def unused() -> nn.Module:
    model = nn.ModuleDict({"used": nn.Linear(64, 4), "left": nn.Linear(4, 4)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    return model


CASES: dict[str, Callable[[], Iterable[Finding]]] = {
    "non-finite": lambda: changed(lambda m: m[2].weight[0].fill_(torch.nan)),
    "frozen": lambda: changed(lambda m: m.requires_grad_(False)),
    "no-gradient": lambda: initlab.diagnose(nn.Sequential(nn.Linear(64, 4), Argmax()), X),
    "input-scale": lambda: initlab.diagnose(mlp(3, 64, nn.ReLU, RELU), 100 * X),
    "input-equal": lambda: initlab.diagnose(mlp(3, 64, nn.ReLU, RELU), X[:1].expand(64, 64)),
    "input-mean": lambda: initlab.diagnose(mlp(3, 64, nn.ReLU, RELU), X + 5),
    "symmetric": lambda: changed(lambda m: m[4].weight[:10].copy_(m[4].weight[0].expand(10, 64))),
    "stray-entries": lambda: changed(lambda m: m[4].weight[3, 5].fill_(1e30)),
    "weights-with-a-mean": lambda: changed(lambda m: m[4].weight.abs_().neg_()),
    "lost-variance": lambda: initlab.diagnose(mlp(10, 64, nn.ReLU, RELU, "cut"), X),
    "fans-swapped": lambda: initlab.diagnose(Raw(), X),
    "init-lost": lambda: initlab.diagnose(stale(), X),
    "bias-too-large": lambda: changed(lambda m: m[4].bias.fill_(1e3)),
    "dead": lambda: changed(lambda m: m[4].bias.fill_(-50)),
    "saturated": lambda: initlab.diagnose(mlp(6, 64, nn.Tanh, 4), X),
    "exploding": lambda: initlab.diagnose(mlp(10, 64, nn.ReLU, 8), X),
    "vanishing": lambda: initlab.diagnose(mlp(10, 64, nn.ReLU, 0.5), X),
    "gradient-exploding": lambda: initlab.diagnose(mlp(40, 64, nn.Hardtanh, 1.7), X),
    "gradient-vanishing": lambda: initlab.diagnose(mlp(20, 64, nn.ReLU, 1, "torch"), X[:1]),
    "post-norm": lambda: initlab.diagnose(encoder(18, 16, False), torch.randn(2, 4, 16)),
    "output-scale": lambda: initlab.diagnose(mlp(3, 64, nn.ReLU, RELU), 10 * X, Y, cross_entropy),
    "loss-scale": lambda: initlab.diagnose(nn.Linear(64, 4), X, loss=lambda out: 1e6 * out.square().mean()),
    "correlation-collapse": lambda: initlab.diagnose(mlp(50, 64, nn.ReLU, RELU), X),
    "finite-width": lambda: initlab.diagnose(mlp(50, 64, nn.ReLU, RELU), X),
    "norm-never-updated": lambda: initlab.diagnose(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)).eval(), X),
    "update-too-large": lambda: trained(5.0),
    "update-too-small": lambda: trained(5e-8),
    "number-format": lambda: initlab.diagnose(nn.Linear(64, 4), X, loss=lambda o: 1e-8 * o.sum(), formats=["float16"]),
    "unmeasured": lambda: initlab.diagnose(unused(), X),
    "diverged": lambda: table([2.3] * 99 + [float("nan")]),
    "not-learning": lambda: table([2.3] * 100),
    "never-set": lambda: audited(nn.Linear(8, 8), lambda m: m.weight.fill_(1e-42)),
    "zero": lambda: audited(nn.Linear(8, 8), lambda m: m.weight.zero_()),
    "xavier-stacked": lambda: initlab.audit(nn.MultiheadAttention(256, 4)).findings,
    "shared": lambda: initlab.audit(tied()).findings,
    "different": lambda: initlab.audit(nn.Linear(8, 8), nn.Linear(8, 8, bias=False)).findings,
}


class Argmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(-1)


@pytest.mark.parametrize("name", [*RULES, *(name for name in CASES if name not in RULES)])
def test_each_row_is_found_and_each_finding_has_its_row(name: str) -> None:
    torch.manual_seed(0)
    found = list(CASES[name]())
    assert {one.rule for one in found} <= RULES.keys()
    mine = [one for one in found if one.rule == name]
    assert mine, "\n".join(map(str, found))
    assert RULES[name].severity == ERROR or all(one.severity != ERROR for one in mine)
