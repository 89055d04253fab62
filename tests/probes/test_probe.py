"""What the rows say: each against the tensor that it is about, found without any hook."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import initlab
from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS
from initlab.probes import probe_buffer
from initlab.probes.probe import Sink
from initlab.stats import buffer as buffer_module
from initlab.stats.keys import TensorKey
from initlab.stats.statistics import STATISTICS
from initlab.stats.summarize import derive, saturated_share, summarize

KEYS = ["stage", "implementation", "seed", "step", "layer", "tensor", "direction"]


def sum_of_squares(out: Tensor) -> Tensor:
    return out.double().square().sum()


def expected(x: Tensor, batched: bool) -> pd.Series:
    return pd.Series(dict(zip(STATISTICS, derive(summarize(x.detach(), batched)).tolist(), strict=True)))


def one(rows: pd.DataFrame, **words: object) -> pd.Series:
    for column, word in words.items():
        rows = rows[rows[column] == word]
    assert len(rows) == 1, rows
    return rows.iloc[0]


def same(row: pd.Series, x: Tensor, batched: bool) -> None:
    """But for the two that only some rows have. Measured in other company: sums to 1e-12 of float64, counts exactly."""
    wanted = expected(x, batched)
    for name in set(STATISTICS) - {"frac_saturated", "frac_dead"}:
        exact = name.startswith(("n_", "count", "m", "frac"))
        scale = wanted["rms"] if name == "mean" else abs(wanted[name])
        limit = 0 if exact and name != "mean" else 1e-12 * scale
        assert row[name] == pytest.approx(wanted[name], abs=limit, rel=0, nan_ok=True), name


def mlp(activation: nn.Module, width: int = 7) -> nn.Sequential:
    other = copy.deepcopy(activation)
    return nn.Sequential(nn.Linear(5, width), activation, nn.Linear(width, width), other, nn.Linear(width, 3))


def batch(n: int = 16, inputs: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, inputs, generator=generator), torch.randint(0, 3, (n,), generator=generator)


@pytest.mark.parametrize("inplace", [False, True])
def test_every_row_is_about_the_tensor_that_it_names(inplace: bool) -> None:
    """In place too: the preactivation is seen before it is overwritten, and so is its gradient."""
    torch.manual_seed(0)
    model = mlp(nn.ReLU(inplace))
    x, y = batch()
    rows = initlab.measure(model, x, y, cross_entropy)
    seen = [x]
    for k, module in enumerate(model):
        seen.append(module(seen[-1]) if k % 2 == 0 else torch.relu(seen[-1]))
        seen[-1].retain_grad()
    cross_entropy(seen[-1], y).backward()
    for k, tensor in enumerate(seen[1:]):
        kind = "activation" if k % 2 else "preactivation"
        words = {"name": str(k), "layer": k // 2 + 1, "tensor": kind, "part": "", "call": 0}
        same(one(rows, **words, direction="forward"), tensor, True)
        same(one(rows, **words, direction="backward"), tensor.grad, True)
    for name, p in model.named_parameters():
        module, part = name.split(".")
        words = {"name": module, "layer": int(module) // 2 + 1, "tensor": part, "part": part}
        matrix = p if p.ndim == 2 else p[None]
        same(one(rows, **words, direction="forward"), matrix, False)
        same(one(rows, **words, direction="backward"), p.grad.reshape(matrix.shape), False)
    value = cross_entropy(model(x), y)
    same(one(rows, tensor="loss", op="cross_entropy"), value.reshape(1, 1), False)
    assert len(rows) == 1 + 2 * (5 + 6) + 1  # the input before them, the loss behind them
    assert set(rows["stage"]) == {"probe"} and set(rows["implementation"]) == {"module"} and set(rows["step"]) == {0}
    assert list(rows.columns) == [
        *KEYS,
        "name",
        "part",
        "op",
        "call",
        "pass",
        *STATISTICS,
        "update_ratio",
        "loss_scale",
        "chance_loss",
    ]


def test_a_loop_records_updates_of_every_kth_step() -> None:
    torch.manual_seed(0)
    model = mlp(nn.Tanh())
    x, y = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    before: dict[int, Tensor] = {}
    after: dict[int, Tensor] = {}
    with initlab.probe(model, optimizer=optimizer, every=3, seeds=[11]) as p:
        for step in range(7):
            hooked = sum(len(m._forward_hooks) for m in model.modules())
            assert (hooked > 0) == (step % 3 == 0)
            before[step] = model[2].weight.detach().clone()
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            after[step] = model[2].weight.detach().clone()
    rows = p.frame()
    assert set(rows["step"]) == {0, 3, 6} and set(rows["stage"]) == {"train"} and set(rows["seed"]) == {11}
    for step in (0, 3, 6):
        words = {"step": step, "name": "2"}
        same(one(rows, **words, tensor="weight", direction="forward"), before[step], False)
        update = one(rows, **words, tensor="update")
        same(update, after[step] - before[step], False)
        ratio = (after[step] - before[step]).double().norm() / before[step].double().norm()
        assert update["update_ratio"] == pytest.approx(float(ratio), rel=1e-12)
    assert rows.loc[rows["tensor"] != "update", "update_ratio"].isna().all()
    assert not rows.duplicated([*KEYS, "name", "part", "call"]).any()


def test_each_recorded_step_is_the_one_pass_at_its_parameters() -> None:
    """A loop's rows of step k are those of a single call made right before it."""
    torch.manual_seed(0)
    model = mlp(nn.SiLU())
    x, y = batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    singles = []
    for step in range(3):
        singles.append(initlab.measure(model, x, y, cross_entropy).assign(step=step))
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    torch.manual_seed(0)
    model = mlp(nn.SiLU())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with initlab.probe(model, optimizer=optimizer) as p:
        for _ in range(3):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    rows = p.frame()
    keys = ["step", "name", "part", "call", "tensor", "direction"]
    ours = rows[rows["tensor"] != "update"].astype(dict.fromkeys(keys[1:], str)).set_index(keys).sort_index()
    theirs = pd.concat(singles).astype(dict.fromkeys(keys[1:], str)).set_index(keys).sort_index()
    pd.testing.assert_frame_equal(ours[[*STATISTICS]], theirs[[*STATISTICS]], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize("layers", ["*", ["0", "2", "4"]], ids=["all", "without activations"])
def test_saturation_is_that_of_the_preactivation(name: str, layers: str | list[str]) -> None:
    """Also where the activations themselves have no rows; the last layer has none to be saturated by."""
    row = ACTIVATIONS[name]
    torch.manual_seed(0)
    model = mlp(row.module())
    for module in model[::2]:
        nn.init.normal_(module.weight, std=3)  # far out, where phi' is small
    x, _ = batch()
    rows = initlab.measure(model, x, layers=layers)
    for k in (0, 2):
        share = saturated_share(row.slope(model[: k + 1](x)), row.largest_slope)
        found = one(rows, name=str(k), tensor="preactivation", direction="forward")
        assert found["frac_saturated"] == float(share)
    assert rows.loc[(rows["name"] == "4") | (rows["tensor"] != "preactivation"), "frac_saturated"].isna().all()


@pytest.mark.parametrize(
    "other",
    [nn.LeakyReLU(0.01), nn.ELU(2.0), nn.Softplus(beta=2), nn.Hardtanh(), nn.Softsign(), nn.LogSigmoid(), nn.PReLU()],
    ids=repr,
)
def test_saturation_of_an_activation_outside_the_table_is_looked_at(other: nn.Module) -> None:
    """Against autograd's derivative, on a grid for its largest value."""
    torch.manual_seed(0)
    model, x = mlp(other), 4 * batch()[0]

    def slope(z: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        return torch.autograd.grad(other(z).sum(), z)[0].abs()

    largest = float(slope(torch.linspace(-16, 16, 100_001)).max())
    share = (slope(model[0](x)) < 0.05 * largest).double().mean()
    rows = initlab.measure(model, x)
    found = one(rows, name="0", tensor="preactivation", direction="forward")
    assert found["frac_saturated"] == pytest.approx(float(share), abs=0.02)


def test_saturation_of_what_is_no_elementwise_function_is_nan() -> None:
    x, _ = batch()
    for other in (nn.Softmax(-1), nn.RReLU(), nn.Dropout(0.5)):
        rows = initlab.measure(mlp(other), x)
        assert rows["frac_saturated"].isna().all()
    overwritten = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5, inplace=True), nn.ReLU(), nn.Linear(4, 2))
    assert initlab.measure(overwritten, x)["frac_saturated"].isna().all()


def test_a_relu_of_nan_is_saturated_and_nothing_is_lost() -> None:
    """nan and inf are data: counted, and every row is there."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
    x = torch.tensor([[torch.nan, 1, -1, torch.inf]]).repeat(6, 1)
    rows = initlab.measure(model, x, loss=sum_of_squares)
    z = one(rows, name="0", tensor="preactivation", direction="forward")
    assert z["n_nan"] == 6 * 4 and z["frac_saturated"] == 1  # 0 * nan in every product
    assert len(rows) == 8


def test_dead_units_are_units_of_activations() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias.copy_(torch.tensor([9.0, -1, 9, 9]))
    rows = initlab.measure(model, batch()[0] / 10)
    assert one(rows, name="1")["frac_dead"] == 0.25
    assert rows.loc[rows["tensor"] != "activation", "frac_dead"].isna().all()


def test_units_of_a_convolution_are_its_channels() -> None:
    """(N, C, H, W) is (N H W, C), behind the convolution too; a sequence (B, T, C) is (B T, C)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 2)
    )
    with torch.no_grad():
        model[1].bias[:2] = -100
    x = torch.randn(4, 3, 6, 6)
    rows = initlab.measure(model, x)
    flat = [model[:k](x).detach() for k in range(1, 6)]
    for k in range(4):
        same(one(rows, name=str(k), part="", direction="forward"), flat[k].movedim(1, -1).reshape(-1, 6), True)
    assert one(rows, name="2")["frac_dead"] == 2 / 6
    same(one(rows, name="4"), flat[4], True)
    assert list(rows.loc[rows["tensor"] == "preactivation", "layer"]) == [1, 3]
    assert list(rows.loc[rows["tensor"] == "norm", "layer"]) == [2]
    assert list(rows.loc[rows["tensor"] == "other", "name"]) == ["3", "4"]
    assert list(rows.loc[rows["tensor"] == "activation", "layer"]) == [0, 2]
    tokens = nn.Sequential(nn.Embedding(10, 8), nn.LayerNorm(8), nn.Linear(8, 4), nn.Tanh())
    words = torch.randint(0, 10, (3, 7))
    rows = initlab.measure(tokens, words)
    same(one(rows, name="3"), tokens(words).reshape(21, 4), True)


class Nested(nn.Module):
    """Tuples and dicts inside each other, an integer among them, and one module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 6, batch_first=True)
        self.twice = nn.Linear(6, 6)
        self.out = Heads()

    def forward(self, x: Tensor) -> dict[str, object]:
        h, (last, _) = self.rnn(x)
        return self.out(self.twice(torch.tanh(self.twice(h))), last)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, h: Tensor, last: Tensor) -> dict[str, object]:
        return {"mean": h.mean(1) * self.scale, "both": (last * self.scale, h.argmax(-1)), "none": None}


def test_nested_outputs_repeated_calls_and_lone_parameters() -> None:
    torch.manual_seed(0)
    model = Nested()
    x = torch.randn(4, 3, 5)
    rows = initlab.measure(model, x, loss=lambda out: sum_of_squares(out["mean"]) + sum_of_squares(out["both"][0]))
    values = rows[(rows["tensor"] == "preactivation") & (rows["direction"] == "forward")]
    assert list(zip(values["name"], values["part"], values["call"], strict=True)) == [
        ("rnn", "output", 0),
        ("rnn", "h_n", 0),
        ("rnn", "c_n", 0),
        ("twice", "", 0),
        ("twice", "", 1),
        ("out", "mean", 0),
        ("out", "both.0", 0),
    ]
    assert list(values["layer"]) == [1, 1, 1, 2, 2, 3, 3]
    h, (last, _) = model.rnn(x)
    first = model.twice(h)
    same(values.iloc[1], last.reshape(4, 6), True)
    same(values.iloc[3], first.reshape(12, 6), True)
    same(values.iloc[4], model.twice(torch.tanh(first)).reshape(12, 6), True)
    weights = rows[(rows["name"] == "rnn") & (rows["direction"] == "forward") & (rows["part"].str.contains("_l0"))]
    assert dict(zip(weights["part"], weights["tensor"], strict=True)) == {
        "weight_ih_l0": "weight",
        "weight_hh_l0": "weight",
        "bias_ih_l0": "bias",
        "bias_hh_l0": "bias",
    }
    assert one(rows, name="out", part="scale", direction="forward")["count"] == 1


def test_one_activation_behind_every_layer_belongs_to_each() -> None:
    relu = nn.ReLU(inplace=True)
    model = nn.Sequential(nn.Linear(5, 4), relu, nn.Linear(4, 6), relu)
    rows = initlab.measure(model, batch()[0], layers="1")
    assert list(zip(rows["layer"], rows["call"], rows["count"], strict=True)) == [(1, 0, 64), (2, 1, 96)]


def test_what_comes_before_the_first_layer_has_number_0_in_every_pass() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 4), nn.ReLU())
    x = batch()[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with initlab.probe(model, optimizer=optimizer) as p:
        for _ in range(2):
            for _ in range(2):
                sum_of_squares(model(x)).backward()
            optimizer.step()
    rows = p.frame()
    assert set(rows.loc[rows["name"] == "0", "layer"]) == {0} and len(rows[rows["name"] == "0"]) == 4
    assert set(rows.loc[rows["name"] == "2", "layer"]) == {1}


def test_shared_weights_have_one_row() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False))
    model[2].weight = model[0].weight
    words = torch.randint(0, 9, (6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with initlab.probe(model, optimizer=optimizer) as p:
        sum_of_squares(model(words)).backward()
        grad = model[0].weight.grad.clone()
        optimizer.step()
    rows = p.frame()
    assert set(rows.loc[rows["tensor"] == "weight", "name"]) == {"0", "1"}
    same(one(rows, name="0", tensor="weight", direction="backward"), grad, False)
    only = initlab.measure(model, words, layers="2")
    assert set(only["name"]) == {"2"} and set(only["layer"]) == {3} and "weight" in set(only["tensor"])


def test_globs_choose_rows_and_do_not_change_them() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": mlp(nn.ReLU()), "head": nn.Linear(3, 2)})
    whole = nn.Sequential(model["encoder"], model["head"])
    x, _ = batch()
    everything = initlab.measure(whole, x, loss=sum_of_squares)
    for layers, wanted in (
        ("1", {"1"}),
        ("0.*", {"0.0", "0.1", "0.2", "0.3", "0.4"}),
        (["*.3", "0.[02]"], {"0.3", "0.0", "0.2"}),
    ):
        some = initlab.measure(whole, x, loss=sum_of_squares, layers=layers)
        assert set(some["name"]) == wanted
        columns = ["layer", "tensor", "direction", "name", "part", "count", "min", "max", "frac_zero"]
        kept = everything[everything["name"].isin(wanted)]
        as_text = [sorted(frame[columns].astype(str).itertuples(index=False, name=None)) for frame in (some, kept)]
        assert as_text[0] == as_text[1]


def test_statistics_under_autocast_are_those_of_the_number_format_that_is_there() -> None:
    torch.manual_seed(0)
    model = mlp(nn.ReLU())
    x, y = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = initlab.measure(model, x, y, lambda out, y: cross_entropy(out.float(), y))
        z = model[0](x)
    assert z.dtype == torch.bfloat16
    found = one(rows, name="0", tensor="preactivation", direction="forward")
    same(found, z, True)
    assert found["max"] != float(nn.functional.linear(x, model[0].weight, model[0].bias).detach().max())
    assert one(rows, name="0", tensor="weight", direction="forward")["max"] == float(model[0].weight.detach().max())


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_without_autograd_every_pass_is_a_step_with_forward_rows(quiet: Callable[[], object]) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).eval()
    x, _ = batch()
    with initlab.probe(model, every=2) as p, quiet():
        for _ in range(5):
            out = model(x)
    rows = p.frame()
    assert set(rows["step"]) == {0, 2, 4} and set(rows["direction"]) == {"forward"}
    with torch.inference_mode():
        inside = initlab.measure(model, x, loss=sum_of_squares)  # goes backward all the same
    assert set(inside["direction"]) == {"forward", "backward"}
    for step in (0, 2, 4):
        same(one(rows, step=step, name="3", tensor="preactivation"), out.clone(), True)


def test_a_validation_between_two_steps_is_not_part_of_one() -> None:
    model = mlp(nn.ReLU())
    x, y = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    frames = []
    for validate in (False, True):
        torch.manual_seed(0)
        for module in model[::2]:
            module.reset_parameters()
        with initlab.probe(model, optimizer=optimizer) as p:
            for _ in range(2):
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                if validate:
                    with torch.no_grad():
                        model(3 * x)
                optimizer.step()
        frames.append(p.frame())
    pd.testing.assert_frame_equal(*frames)


def test_accumulated_gradients_and_closures() -> None:
    """Two passes in a step are two calls, and one gradient; LBFGS finds its gradients inside of step()."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = batch()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with initlab.probe(model, optimizer=optimizer) as p:
        for half in (slice(0, 8), slice(8, 16)):
            cross_entropy(model(x[half]), y[half]).backward()
        grad = model[0].weight.grad.clone()
        optimizer.step()
    rows = p.frame()
    assert list(rows.loc[(rows["name"] == "1") & (rows["direction"] == "backward"), "call"]) == [0, 1]
    same(one(rows, name="0", tensor="weight", direction="backward"), grad, False)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(model(x), y)
        value.backward()
        return value

    with initlab.probe(model, optimizer=optimizer) as p:
        optimizer.step(closure)
    same(one(p.frame(), name="0", tensor="weight", direction="backward"), model[0].weight.grad, False)


def test_lazy_and_parametrized_modules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
    rows = initlab.measure(model, batch()[0], loss=sum_of_squares)
    parts = rows.loc[(rows["name"] == "2") & (rows["direction"] == "forward"), ["tensor", "part"]]
    assert list(parts.itertuples(index=False, name=None)) == [
        ("preactivation", ""),
        ("weight", "weight"),
        ("parameter", "parametrizations.weight.original0"),
        ("parameter", "parametrizations.weight.original1"),
        ("bias", "bias"),
    ]
    assert one(rows, name="0", tensor="weight", direction="forward")["count"] == 20


def test_a_model_without_parameters() -> None:
    x = batch()[0].requires_grad_()
    rows = initlab.measure(nn.Tanh(), x, loss=sum_of_squares)
    assert list(rows["op"]) == ["input", "Tanh", "Tanh", "input", "sum"] and set(rows["layer"]) == {0}
    assert list(rows["direction"]) == ["forward", "forward", "backward", "backward", "forward"]
    assert x.grad is None


def test_arguments_come_as_a_tuple_or_by_name() -> None:
    model = nn.Bilinear(3, 4, 2)
    a, b = torch.randn(6, 3), torch.randn(6, 4)
    frames = [initlab.measure(model, (a, b)), initlab.measure(model, {"input1": a, "input2": b})]
    pd.testing.assert_frame_equal(*frames)


class Counter(TorchDispatchMode):
    """Names of the operations that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


WAITING = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select")


def test_a_recording_step_waits_for_nothing() -> None:
    """Neither asks for a number on the host; the same counter sees it where somebody does."""
    model = mlp(nn.GELU())
    x, y = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with initlab.probe(model, optimizer=optimizer) as p:
        with Counter() as seen:
            for _ in range(3):
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
        assert not [name for name in seen.names if any(f"aten.{word}." in name for word in WAITING)]
        assert len(p.frame()) == 3 * (1 + 2 * (5 + 6) + 3 + 1)
    with Counter() as seen:
        float(model(x).detach().std())
    assert "aten._local_scalar_dense.default" in seen.names


def test_steps_that_are_not_recorded_cost_no_operation() -> None:
    model = mlp(nn.GELU())
    x, y = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def operations() -> list[str]:
        with Counter() as seen:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        return seen.names

    bare = operations()
    with initlab.probe(model, optimizer=optimizer, every=2):
        counts = [operations() for _ in range(4)]
    assert counts[1] == counts[3] == bare and len(counts[0]) > len(bare) < len(counts[2])


def test_rows_are_handed_over_and_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every k recorded steps or after half a minute, and the rest at the end; together they are the whole."""
    x, y = batch()

    def watched(emit: Callable[[pd.DataFrame], None] | None, flush_steps: int) -> pd.DataFrame:
        torch.manual_seed(0)
        model = mlp(nn.ReLU())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with initlab.probe(model, optimizer=optimizer, emit=emit, flush_steps=flush_steps) as p:
            for _ in range(5):
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
        return p.frame()

    whole, parts = watched(None, 100), []
    left = watched(parts.append, 2)
    assert [sorted(set(part["step"])) for part in parts] == [[0, 1], [2, 3], [4]] and left.empty
    assert list(left.columns) == list(whole.columns)
    pd.testing.assert_frame_equal(pd.concat(parts, ignore_index=True).astype(whole.dtypes.to_dict()), whole)
    monkeypatch.setattr(buffer_module, "FLUSH_SECONDS", -1.0)
    parts.clear()
    watched(parts.append, 100)
    assert len(parts) == 5


def test_histograms_have_the_keys_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """By octave, of closed steps only, each handed over once; and they count what the rows count."""
    monkeypatch.setattr(probe_buffer, "BLOCK_ENTRIES", 1)
    torch.manual_seed(0)
    model, frames, parts = mlp(nn.ReLU()), [], []
    x, y = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def emit(frame: pd.DataFrame) -> None:
        frames.append(frame)
        parts.append(p.histograms())

    with initlab.probe(model, optimizer=optimizer, histograms=True, emit=emit, flush_steps=2) as p:
        for step in range(3):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            if step == 0:
                assert p.histograms().empty  # and what was counted is not lost
            optimizer.step()
    assert len(frames) == 2 and p.histograms().empty
    for frame, part in zip(frames, parts, strict=True):
        words = [*KEYS, "name", "part", "call"]
        pd.testing.assert_frame_equal(frame[words].astype(str), part[words].astype(str))
        counted = [
            int(sum(positive) + sum(negative)) for positive, negative in zip(part.positive, part.negative, strict=True)
        ]
        assert counted == [round(n * (1 - zeros)) for n, zeros in zip(frame["count"], frame["frac_zero"], strict=True)]
        assert (part["first"] + part["positive"].map(len) > np.log2(frame["max"].abs())).all()
        assert (2.0 ** part["first"] <= frame[["min", "max"]].abs().max(axis=1)).all()
    with pytest.raises(UsageError, match="none were recorded"):
        initlab.probe(model).histograms()


@pytest.mark.parametrize("gathered", [1, 40, 2**16])
def test_how_tensors_are_gathered_changes_nothing(gathered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, a few or all of a shape together: the same rows in the same order."""
    x, y = batch()
    frames = []
    for size in (2**16, gathered):
        monkeypatch.setattr(probe_buffer, "BLOCK_ENTRIES", size)
        torch.manual_seed(0)
        frames.append(initlab.measure(mlp(nn.Tanh(), 5), x, y, cross_entropy))
    pd.testing.assert_frame_equal(*frames, rtol=1e-12, atol=1e-15)


def test_a_network_fed_with_ever_new_lengths_has_all_its_rows() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
    with initlab.probe(model) as p:
        for step in range(40):
            with torch.no_grad():
                model(torch.ones(step + 1, 5))
    assert list(p.frame().query("name == '1'")["count"]) == [4 * (step + 1) for step in range(40)]


class ByHand:
    """Two networks at once, a linear layer each; puts its tensors into the sink and overwrites them."""

    def __init__(self, networks: int) -> None:
        self.w = torch.randn(networks, 5, 4)
        self.sink: Sink | None = None

    def watch(self, sink: Sink | None) -> None:
        self.sink = sink

    def step(self, step: int, x: Tensor) -> Tensor:
        z = x @ self.w
        before = z.clone()
        if self.sink is not None and self.sink.due(step):
            share = saturated_share((z > 0).float(), 1.0)
            self.sink.put(TensorKey("train", "scratch", 1, "preactivation", "forward"), z, share)
            z.relu_()
            self.sink.put(TensorKey("train", "scratch", 1, "activation", "forward"), z)
            self.sink.put(TensorKey("train", "scratch", 1, "weight", "forward"), self.w)
            self.sink.put(TensorKey("train", "scratch", 1, "update", "forward"), 0.5 * self.w)
            z.fill_(torch.nan)
            self.sink.end(step)
        return before


@pytest.mark.parametrize("seeds", [[4], [4, 7]])
def test_a_network_by_hand_is_watched_without_hooks(seeds: Sequence[int]) -> None:
    torch.manual_seed(0)
    network = ByHand(len(seeds))
    x, _ = batch()
    with initlab.probe(network, every=2, seeds=seeds) as p:
        seen = {step: network.step(step, (step + 1) * x) for step in range(3)}
    assert network.sink is None
    rows = p.frame()
    assert set(rows["step"]) == {0, 2} and set(rows["seed"]) == set(seeds) and len(rows) == 2 * 4 * len(seeds)
    for step in (0, 2):
        for k, seed in enumerate(seeds):
            words = {"step": step, "seed": seed, "implementation": "scratch", "layer": 1}
            z = one(rows, **words, tensor="preactivation")
            same(z, seen[step][k], True)
            assert z["frac_saturated"] == float((seen[step][k] <= 0).double().mean())
            same(one(rows, **words, tensor="activation"), seen[step][k].relu(), True)
            assert one(rows, **words, tensor="update")["update_ratio"] == 0.5
    with initlab.probe(network, seeds=seeds, layers="2*") as p:
        network.step(0, x)
    assert p.frame().empty
