"""The verdict of a run's own tables, and the tasks audit and diagnose on the command line."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import initlab
from initlab.verdict.table_rules import judge_tables


@pytest.mark.parametrize(
    ("init", "activation", "rule"),
    [
        ("kaiming", "relu", None),
        ("naive", "relu", "exploding"),
        ("small", "relu", "vanishing"),
        ("lecun", "relu", "vanishing"),
        ("lecun", "tanh", None),
        ("orthogonal", "linear", None),
    ],
)
def test_the_stack_of_a_rule(init: str, activation: str, rule: str | None) -> None:
    frame = initlab.stack(init, activation, depth=30, width=100, seeds=4)
    verdict = judge_tables({"stats": frame.assign(init=init, gain=1.0, dtype="float32")})
    assert verdict is not None and [one.rule for one in verdict.errors] == ([] if rule is None else [rule])
    if init == "naive":  # each layer multiplies by sqrt(100/2)
        assert verdict.errors[0].evidence["octaves_a_layer"] == pytest.approx(math.log2(50**0.5), abs=0.05)


def losses(values: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"implementation": "scratch", "seed": 0, "step": range(len(values)), "loss": values})


def stats(dead: float) -> pd.DataFrame:
    row = {"stage": "train", "step": 99, "tensor": "activation", "layer": 1, "frac_dead": dead, "direction": "forward"}
    return pd.DataFrame([{**row, "seed": 0, "init": "kaiming", "gain": 1.4}])


@pytest.mark.parametrize(
    ("values", "dead", "rule"),
    [
        ([2.3 * 0.98**k for k in range(100)], 0.1, None),
        ([2.3] * 99 + [float("nan")], 0.1, "diverged"),
        ([2.3 * 1.1**k for k in range(100)], 0.1, "diverged"),
        ([2.3] * 100, 0.1, "not-learning"),
        ([2.3 * 0.98**k for k in range(100)], 1.0, "dead"),
    ],
)
def test_a_training(values: list[float], dead: float, rule: str | None) -> None:
    verdict = judge_tables({"stats": stats(dead), "losses": losses(values)})
    assert verdict is not None and [one.rule for one in verdict] == ([] if rule is None else [rule])
    if math.isnan(values[-1]):
        assert verdict.findings[0].since == 99
    assert judge_tables({"losses": losses(values)}) is None


def test_a_loss_as_large_as_that_of_a_constant_answer_is_nothing_learned() -> None:
    tables = {"stats": stats(0.1), "losses": losses([27.0] * 10 + [8.3] * 90)}
    found = judge_tables(tables, constant_loss=8.25)
    assert found is not None and [one.rule for one in found] == ["not-learning"] and "has 8.25" in str(found)
    for constant in (math.inf, 20.0):  # not known, or well above
        assert not list(judge_tables(tables, constant) or ())


def test_a_right_gain_is_not_advised_again() -> None:
    """A stack of ten units dies of its width: the remedy is no rule that it has already."""
    frame = initlab.stack("kaiming", "relu", depth=50, width=8, batch=20, seeds=40)
    named = frame.assign(init="kaiming", gain=2**0.5, dtype="float32", activation="relu")
    verdict = judge_tables({"stats": named})
    assert verdict is not None and "init=" not in verdict.errors[0].remedy and "width" in verdict.errors[0].remedy
    other = judge_tables({"stats": named.assign(init="strange", gain=1.0)})
    assert other is not None and "init=kaiming" in other.errors[0].remedy


Lab = Callable[..., tuple[int, str, str]]


def test_diagnose_from_the_command_line(lab: Lab) -> None:
    """Exit code 3, the finding first, and the same in verdict.json; --json prints nothing else."""
    code, said, _ = lab("task=diagnose", "init=naive", "train.depth=8", "device=cpu", "hydra.run.dir=a")
    assert code == 3 and said.startswith("exploding at layer 1 (0): the weights have gain")
    kept = json.loads(Path("a/verdict.json").read_text())
    assert kept["ok"] is False and kept["findings"][0]["rule"] == "exploding"
    model = ("model._target_=torch.nn.Linear", "model.in_features=30", "model.out_features=4", "device=cpu")
    code, said, _ = lab("task=diagnose", "--json", *model)
    assert code == 0 and json.loads(said) == {"ok": True, "layers": 1, "findings": []}


def test_audit_from_the_command_line(lab: Lab) -> None:
    model = ("model._target_=torch.nn.MultiheadAttention", "model.embed_dim=64", "model.num_heads=4")
    code, said, _ = lab("task=audit", *model, "device=cpu", "hydra.run.dir=a")
    assert code == 0 and "in_proj_weight[query]: uniform" in said
    assert initlab.read("a", table="audit")["shape"][0] == "192x64" and "xavier-stacked" in said
    model = ("model._target_=torch.nn.Conv2d", "model.in_channels=3", "model.out_channels=4", "model.kernel_size=3")
    code, _, wrong = lab("task=diagnose", *model, "device=cpu", "hydra.run.dir=c")
    assert code == 2 and "shapes: this model has a Conv2d first" in wrong
    assert not Path("c/findings.parquet").exists()
