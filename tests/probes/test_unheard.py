"""What has no rows and is named once: functions outside of `forward`; and rows that stand where torch hides a layer."""

import warnings
from collections.abc import Callable, Iterator

import pandas as pd
import pytest
import torch
import torch.ao.quantization as quantization
from torch import Tensor, nn
from torch.nn import functional as F

import initlab
from tests.probes.by_hand import WORDS, X, differences, mlp, numbers, once, square

TEXT = "functions between the modules have no rows: Trained"


class Trained(nn.Module):
    """Has a `forward`, a method beside it, and a generator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(F.relu(self.first(x)))
        return out

    def training_step(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(F.relu(self.first(x)))
        return out.square().mean()


class Steps(Trained):
    def forward(self, x: Tensor) -> Iterator[Tensor]:  # type: ignore[override]
        for _ in range(3):
            x = torch.tanh(self.first(x))
            yield self.second(x)


def said(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> tuple[list[str], pd.DataFrame]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with initlab.probe(model, optimizer=optimizer) as p:
            for _ in range(2):
                once(model, [optimizer], loss)
    return [str(one.message) for one in caught if "probe" in str(one.message)], p.frame()


LOSSES: dict[str, Callable[[nn.Module], Tensor]] = {
    "another method": lambda m: m.training_step(X),
    "beside forward": lambda m: m.training_step(X) + m(X).mean(),
    "a part alone": lambda m: m(X).mean() + m.first(X).mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_functions_outside_of_forward_are_named_once(name: str) -> None:
    texts, rows = said(Trained(), LOSSES[name])
    assert len(texts) == 1 and TEXT in texts[0]
    assert {"first", "second"} <= set(rows["name"]) and not rows.duplicated(WORDS).any()
    assert (rows["tensor"] == "loss").sum() == 2


def test_a_forward_that_is_a_generator_is_named_once() -> None:
    texts, rows = said(Steps(), lambda m: torch.stack([one.square().mean() for one in m(X)]).sum())
    assert len(texts) == 1 and TEXT.replace("Trained", "Steps") in texts[0]
    assert set(rows.loc[rows["name"] == "first", "call"]) == {0, 1, 2}


def test_nothing_is_said_where_all_is_heard() -> None:
    texts, rows = said(Trained(), square)
    assert texts == [] and "relu" in set(rows["op"])


class Quantized(nn.Module):
    """For training that rounds to eight bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = quantization.QuantStub(), quantization.DeQuantStub()
        self.first, self.relu, self.second = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.second(self.relu(self.first(self.into(x)))))
        return out


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Please use quant_min")
def test_layers_that_round_their_weights_in_training() -> None:
    """The rounded weight is a weight of its layer, no residual sum; the layer's own rows stand under its name."""
    model = Quantized().train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    model = quantization.prepare_qat(model)
    kept: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("weight_fake_quant"):
            module.register_forward_hook(lambda _, args, out, name=name: kept.setdefault(name, out.detach().clone()))
    texts, rows = said(model, square)
    assert texts == [] and not rows.duplicated(WORDS).any() and not (rows["tensor"] == "stream").any()
    forward = rows[(rows["direction"] == "forward") & (rows["step"] == 0)]
    for layer, name in enumerate(("first", "second"), 1):
        own = forward[forward["name"].isin([name, f"{name}.weight_fake_quant"])]
        assert set(own["layer"]) == {layer}
        assert own["tensor"].astype(str).value_counts().to_dict() == {
            "weight": 2,
            "bias": 1,
            "preactivation": 1,
            "update": 1,
        }
        rounded = own[own["name"] == f"{name}.weight_fake_quant"].iloc[0]
        assert not differences(rounded, numbers(kept[f"{name}.weight_fake_quant"]))


@pytest.mark.parametrize("asked", [True, False])
def test_histograms_that_nobody_asks_for_are_not_kept(asked: bool) -> None:
    """Memory stays as it is however long the loop is, and what has gone is said."""
    model, held = mlp(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def emit(frame: pd.DataFrame) -> None:
        held.append(sum(len(table) for table in p._buffer.bin_tables._tables))
        if asked:
            assert set(p.histograms()["step"]) == set(frame["step"])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with initlab.probe(model, optimizer=optimizer, histograms=True, emit=emit, flush_steps=2) as p:
            for _ in range(10):
                once(model, [optimizer], square)
    assert len(held) == 5 and max(held) == held[0]
    assert [str(one.message)[:17] for one in caught] == ([] if asked else ["probe: histograms"])
