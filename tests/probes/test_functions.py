"""Layers, activations and sums that a network computes by functions: each row against the tensor itself."""

from collections.abc import Callable

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import initlab
from initlab.stats.statistics import STATISTICS
from initlab.stats.summarize import derive, summarize

KEYS = ["layer", "tensor", "direction", "name", "part", "call", "pass"]


def one(rows: pd.DataFrame, **words: object) -> pd.Series:
    for column, word in words.items():
        rows = rows[rows[column] == word]
    assert len(rows) == 1, rows[KEYS]
    return rows.iloc[0]


def same(row: pd.Series, x: Tensor) -> None:
    """x (N, C): all that does not hang on what lies above it."""
    wanted = dict(zip(STATISTICS, derive(summarize(x.detach(), True)).tolist(), strict=True))
    for name in ("count", "mean", "std", "rms", "min", "max", "std_within", "cosine", "frac_zero"):
        assert row[name] == pytest.approx(wanted[name], rel=1e-12, abs=1e-15, nan_ok=True), name


def square_loss(out: Tensor) -> Tensor:
    return out.double().square().sum()


class ByHand(nn.Module):
    """A convolution whose weight is its own, and a ReLU by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3) / 5)
        self.bias = nn.Parameter(torch.tensor([9.0, -9, 0, 0, 0, 0, 0, -9]))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.weight, self.bias, padding=1))


def test_a_convolution_by_hand_is_measured_over_its_channels() -> None:
    torch.manual_seed(0)
    model, x = ByHand(), torch.randn(4, 3, 6, 6)
    rows = initlab.measure(model, x, loss=square_loss)
    z = F.conv2d(x, model.weight, model.bias, padding=1).detach().requires_grad_()
    a = F.relu(z)
    square_loss(a).backward()
    assert z.grad is not None

    def flat(t: Tensor) -> Tensor:
        return t.movedim(1, -1).reshape(-1, 8)

    forward = {"name": "", "direction": "forward"}
    same(one(rows, **forward, tensor="preactivation", op="conv2d", layer=1), flat(z))
    same(one(rows, **forward, tensor="activation", op="relu", layer=1), flat(a))
    same(one(rows, name="", direction="backward", tensor="preactivation"), flat(z.grad))
    assert one(rows, **forward, op="relu")["frac_dead"] == 0.25
    share = float((z <= 0).double().mean())
    assert one(rows, **forward, op="conv2d")["frac_saturated"] == pytest.approx(share, rel=1e-12)
    assert one(rows, part="weight", direction="forward")["layer"] == 1


class Block(nn.Module):
    """A residual block with functional ReLUs, one of them in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(self.norm(x)))
        h = self.second(h).relu_()
        return x + h


@pytest.mark.parametrize("training", [True, False])
def test_the_stream_of_a_residual_network_is_seen(training: bool) -> None:
    """Every sum under the name of its block, with its gradient; both ReLUs with their dead units."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(6) for _ in range(4)], nn.Linear(6, 2))
    x = torch.randn(32, 6)
    if training:
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        with initlab.probe(model, optimizer=optimizer) as p:
            for _ in range(2):
                optimizer.zero_grad()
                square_loss(model(x)).backward()
                optimizer.step()
        rows = p.frame()
        assert not rows.duplicated(["step", *KEYS]).any()
        rows = rows[rows["step"] == 1]
    else:
        rows = initlab.measure(model, x, loss=square_loss)
    stream = x.clone()
    kept = []
    for block in model[:4]:
        h = F.relu(block.first(block.norm(stream)))
        a = F.relu(block.second(h))
        stream = stream + a
        kept.append((h, a, stream))
        stream.retain_grad()
    square_loss(model[4](stream)).backward()
    for k, (h, a, total) in enumerate(kept):
        words = {"name": str(k), "direction": "forward"}
        same(one(rows, **words, tensor="stream", part="add"), total)
        same(one(rows, **words, part="relu"), h)
        same(one(rows, **words, part="relu.1"), a)
        assert one(rows, **words, part="relu")["frac_dead"] == float((h == 0).all(0).double().mean())
        assert total.grad is not None
        same(one(rows, name=str(k), direction="backward", tensor="stream"), total.grad)
        for name in ("first", "second"):
            z = one(rows, name=f"{k}.{name}", part="", direction="forward")
            assert z["frac_saturated"] == pytest.approx(float(((h if name == "first" else a) == 0).double().mean()))
    streams = rows[(rows["tensor"] == "stream") & (rows["direction"] == "forward")]
    assert list(streams["name"]) == ["0", "1", "2", "3"] and list(streams["op"].unique()) == ["add"]
    values = rows[(rows["op"] == "Linear") & (rows["direction"] == "forward")]
    assert list(values["layer"]) == [2, 3, 5, 6, 8, 9, 11, 12, 13]


@pytest.mark.parametrize("module", [nn.Tanh(), nn.GELU(), nn.SiLU(), nn.Softplus(beta=2), nn.Mish()], ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_what_the_probe_computes_itself_has_no_rows(module: nn.Module, training: bool) -> None:
    """The slopes behind `frac_saturated` are made of the same functions as networks; the block calls none of them."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.last = nn.Linear(4, 4), module, nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.act(self.first(x)))

    model, x = Plain(), torch.randn(8, 4)
    if training:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with initlab.probe(model, optimizer=optimizer) as p:
            square_loss(model(x)).backward()
            optimizer.step()
        rows = p.frame()
    else:
        rows = initlab.measure(model, x)
    outputs = rows[(rows["direction"] == "forward") & ~rows["tensor"].isin(["weight", "bias", "update", "loss"])]
    assert list(outputs["op"]) == ["input", "Linear", type(module).__name__, "Linear"]
    assert one(rows, name="first", part="", direction="forward")["frac_saturated"] >= 0


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.fused = nn.Linear(8, 24), nn.Linear(8, 8), fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused:
            return self.out(F.scaled_dot_product_attention(q, k, v)) + x
        weights = (q @ k.mT / 8**0.5).softmax(-1)
        return self.out(weights @ v) + x


def test_attention_has_its_logits_and_weights() -> None:
    torch.manual_seed(0)
    model, x = Attention(fused=False), torch.randn(4, 5, 8)
    rows = initlab.measure(model, x)
    q, k, _ = model.qkv(x).chunk(3, -1)
    logits = q @ k.mT / 8**0.5
    same(one(rows, tensor="logits", op="softmax"), logits.reshape(-1, 5))
    same(one(rows, tensor="attention", op="softmax"), logits.softmax(-1).reshape(-1, 5))
    fused = initlab.measure(Attention(fused=True), x)
    assert list(fused.loc[fused["tensor"] == "attention", "op"]) == ["scaled_dot_product_attention"]
    assert {"stream", "preactivation"} <= set(fused["tensor"])
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, dropout=0.0)
    seen = initlab.measure(encoder, x)
    assert list(seen.loc[seen["tensor"] == "stream", "part"]) == ["add", "add.1"]
    assert "relu" in set(seen["op"])


class Products(nn.Module):
    """Weights used by operators; a bias by a sum; the chapter's clamp as ReLU; numbers that are no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(3, 7))
        self.b1 = nn.Parameter(torch.zeros(7))

    def forward(self, x: Tensor) -> Tensor:
        z = x @ self.w1 + self.b1
        a = z.clamp_min(0.0)
        correlations = a.T @ a
        return a @ self.w2.T + 0 * correlations.sum()


def test_products_with_parameters_are_layers_and_others_are_not() -> None:
    torch.manual_seed(0)
    model, x = Products(), torch.randn(16, 5)
    rows = initlab.measure(model, x)
    forward = rows[(rows["direction"] == "forward") & rows["op"].isin(["matmul", "clamp_min", "add", "input"])]
    found = list(zip(forward["op"], forward["layer"], forward["tensor"], strict=True))
    assert found == [
        ("input", 0, "activation"), ("matmul", 1, "preactivation"), ("clamp_min", 1, "activation"),
        ("matmul", 2, "preactivation"),
    ]  # fmt: skip
    same(one(rows, part="matmul"), x @ model.w1)
    same(one(rows, part="clamp_min"), (x @ model.w1 + model.b1).clamp_min(0))
    weights = rows[rows["tensor"].isin(["weight", "bias"])]
    assert dict(zip(weights["part"], weights["layer"], strict=True)) == {"w1": 1, "w2": 2, "b1": 1}


@pytest.mark.filterwarnings("ignore:probe. forward was bypassed")
def test_a_root_whose_forward_is_never_called_is_watched() -> None:
    """As in frameworks whose loops call a method of the model instead."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(Block(6), nn.Linear(6, 2))

        def training_step(self, x: Tensor) -> Tensor:
            return square_loss(self.body(x))

    model = Loop()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with initlab.probe(model, optimizer=optimizer) as p:
        for _ in range(2):
            optimizer.zero_grad()
            model.training_step(torch.randn(8, 6)).backward()
            optimizer.step()
    rows = p.frame()
    assert {"body.0.first", "body.0", "body.1"} <= set(rows["name"]) and "stream" in set(rows["tensor"])
    assert not rows.duplicated(["step", *KEYS]).any()


@pytest.mark.parametrize("glob", ["0", "1", "0.first"])
def test_blocks_match_the_globs(glob: str) -> None:
    model = nn.Sequential(Block(6), Block(6))
    rows = initlab.measure(model, torch.randn(4, 6), layers=glob)
    assert set(rows["name"]) == {glob}
    assert ("stream" in set(rows["tensor"])) == (glob != "0.first")


def test_an_exception_inside_a_block_leaves_no_mode() -> None:
    class Broken(Block):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("of the user")

    model = nn.Sequential(Block(6), Broken(6))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watched = initlab.probe(model, optimizer=optimizer)
    with watched as p:
        with pytest.raises(KeyError):
            model(torch.randn(4, 6))
        assert torch.overrides._get_current_function_mode() is None
        model[1] = nn.Identity()
        model(torch.randn(4, 6)).sum().backward()
        optimizer.step()
    assert torch.overrides._get_current_function_mode() is None
    assert "stream" in set(p.frame()["tensor"])


@pytest.mark.parametrize(
    "function", [torch.sqrt, torch.log, lambda z: 1 / z, lambda z: z**-1.5, lambda z: (9e3 * z).exp()]
)
def test_a_function_that_bears_nan_or_inf_has_a_row(function: Callable[[Tensor], Tensor]) -> None:
    """And one that gives finite numbers has none."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            out: Tensor = self.last(function(h).sqrt() * 0 + function(1 + h.sigmoid() * 1e-3))
            return out

    torch.manual_seed(0)
    model, x = Net(), torch.randn(32, 4)
    with torch.no_grad():
        model.first.weight[0] = model.first.bias[0] = 0
    rows = initlab.measure(model, x)
    born = rows[(rows["tensor"] == "other") & (rows["direction"] == "forward")]
    wanted = function(model.first(x))
    assert (born["n_nan"] + born["n_inf"] > 0).all()
    assert int((~wanted.isfinite()).sum()) == born.iloc[0][["n_nan", "n_inf"]].sum() and born.iloc[0]["layer"] == 1
