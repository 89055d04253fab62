"""Parts and tensors of classes that are not torch's plain ones: they have rows, or are named."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import initlab
from tests.probes.by_hand import differences, numbers

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))


class Labelled(Tensor):
    """A tensor as libraries make them, with nothing of its own."""


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(x + F.relu(self.first(x)))
        return out


def test_tensors_of_a_class_of_ones_own_have_the_rows_of_plain_ones() -> None:
    wanted, found = (initlab.measure(Residual(), x) for x in (X, X.as_subclass(Labelled)))
    words = ["layer", "tensor", "direction", "name", "part", "op"]
    assert found[words].astype(str).values.tolist() == wanted[words].astype(str).values.tolist()
    assert found["rms"].tolist() == wanted["rms"].tolist()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_net_with_a_scripted_part_is_watched() -> None:
    """The part's output has a row; what happens inside of it is not seen, which is said."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    model = nn.Sequential(nn.Linear(6, 6), part, nn.Linear(6, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = initlab.measure(model, X)
    said = " ".join(str(one.message) for one in caught if "probe" in str(one.message)).replace(",", " ").split()
    out = model[1](model[0](X)).detach()
    found = rows[rows["name"].astype(str).str.match("1(.1)?$") & rows["direction"].eq("forward") & rows["part"].eq("")]
    named = {"1", "1.0", "1.1"} & set(said)
    assert len(found) or named
    for _, row in found.iterrows():
        assert not differences(row, {k: v for k, v in numbers(out).items() if k in ("rms", "min", "max")})
    assert {"0", "2"} <= set(rows["name"])
