"""What rows are called and which share is saturated, where functions have arguments or are written out."""

import warnings
from collections.abc import Callable

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import initlab
from initlab.errors import UsageError
from tests.probes.by_hand import differences, numbers

X = 3 * torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.function = nn.Linear(8, 8), nn.Linear(8, 2), function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.function(self.first(x)))
        return out


def row_of(rows: pd.DataFrame, **words: object) -> pd.Series:
    for column, word in {"direction": "forward", **words}.items():
        rows = rows[rows[column] == word]
    assert len(rows) == 1, rows[["layer", "tensor", "name", "part", "op"]]
    return rows.iloc[0]


def rows_of(model: nn.Module) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return initlab.measure(model, X)


FUNCTIONS = [
    ("relu", F.relu),
    ("relu6", F.relu6),
    ("gelu", F.gelu),
    ("leaky_relu", F.leaky_relu),
    ("leaky 0.001", lambda z: F.leaky_relu(z, 0.001)),
    ("gelu by tanh", lambda z: F.gelu(z, approximate="tanh")),
    ("clamp", lambda z: z.clamp(min=0)),
    ("leaky 0.2", lambda z: F.leaky_relu(z, 0.2)),
    ("softplus 5", lambda z: F.softplus(z, beta=5)),
    ("elu 30", lambda z: F.elu(z, 30.0)),
    ("hardtanh 2", lambda z: F.hardtanh(z, -2, 2)),
    ("celu 2", lambda z: F.celu(z, 2.0)),
    ("logsigmoid", F.logsigmoid),
    ("sin", torch.sin),
    ("threshold", lambda z: F.threshold(z, 0.0, 0.0)),
    ("where", lambda z: torch.where(z > 0, z, 0.0)),
    ("maximum", lambda z: torch.maximum(z, torch.zeros(()).to(z))),
]


@pytest.mark.parametrize(("name", "function"), FUNCTIONS)
def test_functions_with_arguments_say_their_own_saturated_share(
    name: str, function: Callable[[Tensor], Tensor]
) -> None:
    """|phi'| below 5 % of its largest value, by torch.autograd on the preactivations and on a grid."""
    model = Between(function)
    z = model.first(X).detach().double().requires_grad_()
    grid = torch.linspace(-20, 20, 400001, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(function(z).sum(), z)
    (largest,) = torch.autograd.grad(function(grid).sum(), grid)
    share = float((slope.abs() < 0.05 * largest.abs().max()).double().mean())
    row = row_of(rows_of(model), name="first", part="")
    # a share of 512 entries, of which one at the very edge may fall on either side in float32
    assert row["frac_saturated"] == pytest.approx(share, abs=1.5 / z.numel())


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu_", lambda z: z.clone().relu_()),
        ("clamp_min", lambda z: z.clamp_min(0)),
        ("where", lambda z: torch.where(z > 0, z, 0.0)),
        ("maximum", lambda z: torch.maximum(z, torch.zeros(()))),
        ("threshold", lambda z: F.threshold(z, 0.0, 0.0)),
        ("product", lambda z: z * (z > 0)),
    ],
)
def test_a_relu_written_out_has_a_row(name: str, function: Callable[[Tensor], Tensor]) -> None:
    """Two of its eight units are dead."""
    model = Between(function)
    with torch.no_grad():
        model.first.bias[:2] = -100.0
    rows = rows_of(model)
    found = rows[(rows["tensor"] == "activation") & (rows["layer"] == 1) & (rows["direction"] == "forward")]
    assert len(found) == 1 and found["frac_dead"].iloc[0] == 0.25
    assert not differences(found.iloc[0], numbers(function(model.first(X)), 1))


def test_an_error_in_the_backward_pass_is_one_line() -> None:
    """What exp needs for its gradient has been overwritten: a mistake of the model."""
    with pytest.raises(UsageError) as caught:
        initlab.measure(Between(lambda z: z.exp().add_(1)), X, None, lambda out: out.sum())
    assert "\n" not in str(caught.value)


def test_the_loss_inside_of_a_model_is_called_so() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.loss = nn.Linear(8, 3), nn.CrossEntropyLoss()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.loss(self.head(x), torch.arange(64) % 3)}

    assert row_of(rows_of(Model()), name="loss")["tensor"] == "loss"


def test_softmax_is_one_thing_as_a_module_and_as_a_function() -> None:
    by_function, by_module = rows_of(Between(lambda z: z.softmax(-1))), rows_of(Between(nn.Softmax(-1)))
    for tensor in ("logits", "attention"):
        wanted, found = row_of(by_function, tensor=tensor), row_of(by_module, tensor=tensor)
        assert wanted["rms"] == found["rms"] and wanted["layer"] == found["layer"]


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal", "prune"])
def test_the_weight_that_a_layer_uses_has_a_row(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    if kind == "prune":
        prune.random_unstructured(layer, "weight", 0.5)
    else:
        getattr(parametrizations, kind)(layer)
    model = nn.Sequential(layer, nn.ReLU()).eval()
    with torch.no_grad():
        model(X)
    wanted = numbers(model[0].weight)
    rows = rows_of(model)
    assert not differences(row_of(rows, name="0", part="weight", tensor="weight"), wanted)


def test_functions_that_another_library_has_wrapped_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tracers do, which never unwrap them."""
    wanted = rows_of(Between(lambda z: (z + z.flip(0)).relu()))
    for name in ("add", "relu"):
        inner = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda x, *args, inner=inner, **words: inner(x, *args, **words))
        getattr(Tensor, name).__name__ = name
    found = rows_of(Between(lambda z: (z + z.flip(0)).relu()))
    assert found["op"].tolist() == wanted["op"].tolist()
