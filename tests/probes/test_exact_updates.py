"""Updates of weights in few digits: the difference of two bfloat16 numbers is none, and is taken in float64."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

import initlab
from tests.probes.by_hand import X, mlp, numbers, once


def loss_of(model: nn.Module) -> torch.Tensor:
    out: torch.Tensor = model(X.to(next(model.parameters()).dtype))
    return 30 * out.float().square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_updates_are_differences_of_values(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    optimizer = SGD(model.parameters(), 0.3)
    weight = model.get_parameter("0.weight")
    with initlab.probe(model, optimizer=optimizer) as p:
        before = weight.detach().double()
        once(model, [optimizer], loss_of)
        moved = numbers(weight.detach().double() - before)
    rows = p.frame()
    row = rows[rows["tensor"].eq("update") & rows["name"].eq("0")].iloc[0]
    # A difference of half precision numbers fits into float32; one of float32 numbers is rounded to its last digit.
    relative = 2.0**-23 if dtype == torch.float32 else 1e-12
    assert row["rms"] == pytest.approx(moved["rms"], rel=relative)
    assert row["max"] == pytest.approx(moved["max"], rel=relative)
