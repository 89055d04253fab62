"""Statistics of the user: the column is the function of exactly the tensors that have rows, in every door."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import initlab
from initlab.engine import mlp
from initlab.engine.fast_network import Engine
from initlab.errors import UsageError
from initlab.job.options import statistics_of
from initlab.job.settings import Config
from initlab.stats.backend import measure_custom
from initlab.stats.buffer import Item, StatsBuffer
from initlab.stats.kernels.cpu import plain
from initlab.stats.keys import TensorKey
from initlab.stats.measure import backend_for
from initlab.stats.statistics import STATISTICS, checked_statistics
from initlab.tasks.data import load
from initlab.tasks.stack import stack
from initlab.tasks.train import train
from tests.stats.exact import SINGLE

BACKENDS = pytest.mark.parametrize("backend", [nullcontext, plain], ids=["fastest", "plain"])
KEY = TensorKey("train", "scratch", 1, "activation", "forward")


def kurtosis(x: Tensor) -> Tensor:
    """Fourth moment over the square of the second, both centred."""
    wide = x.double()
    away = wide - wide.mean((-2, -1), keepdim=True)
    return away.pow(4).mean((-2, -1)) / away.square().mean((-2, -1)).square()


def by_numpy(x: Tensor) -> float:
    away = x.double().numpy() - x.double().numpy().mean()
    return float((away**4).mean() / (away**2).mean() ** 2)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_buffer(backend: type, dtype: torch.dtype) -> None:
    """Behind the built-in ones, for ensembles, with a batch and without, and in tensors measured together."""
    x, w = torch.randn(3, 2, 9, 4).to(dtype), torch.randn(2, 5, 6)
    with backend():
        rows = StatsBuffer([0, 1], backend_for("cpu", {"kurtosis": kurtosis, "twice": lambda x: 2 * kurtosis(x)}))
    items = [Item(KEY._replace(layer=k), one) for k, one in enumerate(x)]
    rows.add([*items, Item(KEY._replace(tensor="weight"), w)], 0)
    frame = rows.take()
    assert list(frame.columns)[-2:] == ["kurtosis", "twice"] and list(frame.columns)[7:-2] == list(STATISTICS)
    expected = [by_numpy(one) for tensor in (*x, w) for one in tensor]
    np.testing.assert_allclose(frame["kurtosis"], expected, rtol=1e-12)
    assert (frame["twice"] == 2 * frame["kurtosis"]).all()


@BACKENDS
def test_one_pass_of_a_module(backend: type) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(7, 6)
    with backend():
        frame = initlab.measure(model, x, loss=lambda out: out.square().sum(), statistics={"kurtosis": kurtosis})
        bare = initlab.measure(model, x, loss=lambda out: out.square().sum())
    z = model[0](x).detach()
    found = frame[frame["direction"] == "forward"].set_index(["layer", "tensor"])["kurtosis"]
    assert found[1, "preactivation"] == pytest.approx(by_numpy(z), rel=1e-12)
    assert found[1, "activation"] == pytest.approx(by_numpy(z.relu()), rel=1e-12)
    assert found[1, "weight"] == pytest.approx(by_numpy(model[0].weight.detach()), rel=1e-12)
    pd.testing.assert_frame_equal(frame.drop(columns="kurtosis"), bare, rtol=1e-12)


@BACKENDS
def test_a_training_loop_of_a_module(backend: type) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer, kept = torch.optim.SGD(model.parameters(), lr=0.1), []
    with backend(), initlab.probe(model, optimizer=optimizer, statistics={"kurtosis": kurtosis}) as p:
        for _ in range(3):
            x = torch.randn(7, 6)
            kept.append(by_numpy(model[0](x).detach()))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    rows = p.frame()
    # The module is called twice in each step: once for the expected number.
    found = rows[(rows["name"] == "0") & (rows["tensor"] == "preactivation") & (rows["direction"] == "forward")]
    np.testing.assert_allclose(found["kurtosis"], np.repeat(kept, 2), rtol=1e-12)


@BACKENDS
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("activation", ["relu", "linear", "gelu"])
def test_a_stack(activation: str, seeds: int, backend: type) -> None:
    """Every row is of one tensor: its kurtosis and its std tell that they saw the same one."""
    shape = {"depth": 3, "width": 12, "batch": 8, "seeds": seeds}
    seen: list[Tensor] = []

    def looking(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return kurtosis(x)

    with backend():
        frame = stack("kaiming", activation, statistics={"kurtosis": looking}, **shape)  # type: ignore[arg-type]
        bare = stack("kaiming", activation, **shape)  # type: ignore[arg-type]
    tensors = [one for x in seen for one in x.reshape(-1, seeds, *x.shape[-2:])]
    if activation != "linear":  # there preactivation and activation are one tensor, measured once
        expected = [(by_numpy(one), float(one.double().std(correction=0))) for x in tensors for one in x]
        np.testing.assert_allclose(frame["kurtosis"], [one for one, _ in expected], rtol=1e-9)
        np.testing.assert_allclose(frame["std"], [one for _, one in expected], rtol=SINGLE)
    assert frame["kurtosis"].notna().all()
    columns = [*frame.columns]
    assert columns.index("kurtosis") == columns.index("cosine") + 1
    pd.testing.assert_frame_equal(frame.drop(columns="kurtosis"), bare, rtol=1e-9, atol=1e-9)


@BACKENDS
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_a_training(activation: str, backend: type) -> None:
    """By hand and as a module; the rows of step 0 are those of a training without it."""
    shape = {"depth": 2, "width": 6, "batch": 8, "steps": 2, "seeds": 2, "activation": activation}
    with backend():
        tables = train(load("digits"), statistics={"kurtosis": kurtosis}, histograms=True, **shape)  # type: ignore[arg-type]
        bare = train(load("digits"), **shape)["stats"]  # type: ignore[arg-type]
    frame = tables["stats"]
    assert "kurtosis" not in tables["histograms"] and len(frame) == len(bare)
    constant = (frame["tensor"] == "bias") & (frame["direction"] == "forward") & (frame["step"] == 0)  # all 0: 0/0
    assert frame["kurtosis"].isna().equals(constant)
    keys = ["seed", "step", "layer", "tensor", "direction"]
    by_hand, module = (
        frame[(frame["implementation"] == name) & (frame["step"] == 0)].set_index(keys).sort_index()
        for name in ("scratch", "module")
    )
    np.testing.assert_allclose(by_hand["kurtosis"], module["kurtosis"], rtol=1e-3)
    first = bare[bare["step"] == 0]["rms"].to_numpy()
    np.testing.assert_allclose(frame[frame["step"] == 0]["rms"], first, rtol=1e-4)


def test_an_engine_under_the_probe() -> None:
    torch.manual_seed(0)
    parameters = [(torch.randn(2, 5, 4), torch.zeros(2, 4)), (torch.randn(2, 4, 3), torch.zeros(2, 3))]
    x, y = torch.randn(2, 7, 5), torch.randint(3, (2, 7))
    with initlab.probe(engine := Engine(parameters), seeds=[0, 1], statistics={"kurtosis": kurtosis}) as p:
        engine.step(x, y)
    rows = p.frame()
    z = mlp.forward(parameters, x, engine.networks[0].activation)[0][0]
    found = rows[(rows["layer"] == 1) & (rows["tensor"] == "preactivation") & (rows["direction"] == "forward")]
    np.testing.assert_allclose(found["kurtosis"], [by_numpy(one) for one in z], rtol=1e-12)


def test_nan_and_inf_are_data() -> None:
    x = torch.tensor([[[1.0, torch.nan], [torch.inf, 2.0]], [[1.0, 2.0], [3.0, 4.0]]])
    found = measure_custom({"holes": lambda x: (~x.isfinite()).sum((-2, -1)), "top": lambda x: x.amax((-2, -1))}, x)
    assert found.dtype == torch.float64 and found[0].tolist() == [2, 0]
    assert found[1, 0].isnan() and found[1, 1] == 4


def test_mistakes_are_one_line() -> None:
    x = torch.ones(2, 4, 3)
    shape = r"^statistics.f: gives \(2, 4\), must give \(2,\) for a tensor \(2, 4, 3\), one number for each \(N, C\)$"
    with pytest.raises(UsageError, match=shape):
        measure_custom({"f": lambda x: x.mean(-1)}, x)
    with pytest.raises(UsageError, match=r"^statistics.f: gives float, must give"):
        measure_custom({"f": lambda x: 1.0}, x)  # type: ignore[dict-item, return-value]
    with pytest.raises(UsageError, match=r"^statistics.f: fails for a tensor \(2, 4, 3\): ZeroDivisionError: division"):
        measure_custom({"f": lambda x: 1 / 0}, x)  # type: ignore[dict-item, return-value]
    for name in ("std", "layer", "call", "update_ratio", "log2_rms_true"):
        with pytest.raises(UsageError, match=f"^statistics.{name}: the tables have a column of this name"):
            stack(depth=1, width=2, batch=2, seeds=1, statistics={name: kurtosis})
    with pytest.raises(UsageError, match=r"^statistics.a b: the name of a column must be"):
        checked_statistics({"a b": kurtosis})
    with pytest.raises(UsageError, match=r"^statistics.f=3: must be a function"):
        checked_statistics({"f": 3})  # type: ignore[dict-item]
    with pytest.raises(UsageError, match=r"^statistics.f: fails for a tensor"):
        initlab.measure(nn.Linear(2, 2), torch.ones(3, 2), statistics={"f": lambda x: x.no_such_thing})


def test_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_statistics.py").write_text(
        "def top(x):\n    return x.amax((-2, -1))\n\n\nclass Top:\n    __call__ = staticmethod(top)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    x = torch.randn(2, 4, 3)
    for path in ("my_statistics.top", "my_statistics.Top", "torch.amax"):
        config = Config(statistics={"top": path})
        assert callable(statistics_of(config)["top"])
    assert torch.equal(statistics_of(Config(statistics={"top": "my_statistics.Top"}))["top"](x), x.amax((-2, -1)))
    for name, path, line in (
        ("top", "my_statistics.tip", r"^statistics.top=my_statistics.tip: cannot be had .* - did you mean top\?$"),
        ("top", "no_such_module.f", r"^statistics.top=no_such_module.f: cannot be had \(No module named"),
    ):
        with pytest.raises(UsageError, match=line):
            statistics_of(Config(statistics={name: path}))


def test_a_statistic_that_changes_its_argument_changes_nothing_else() -> None:
    def spoil(x: Tensor) -> Tensor:
        return x.zero_().mean((-2, -1))

    shape = {"depth": 3, "width": 8, "batch": 4, "seeds": 2}
    spoiled, bare = initlab.stack(**shape, statistics={"spoil": spoil}), initlab.stack(**shape)
    pd.testing.assert_frame_equal(spoiled.drop(columns="spoil"), bare)
    training = {"depth": 1, "width": 4, "batch": 4, "steps": 3, "seeds": 1}
    losses = [initlab.train("digits", **training, **own)["losses"] for own in ({"statistics": {"spoil": spoil}}, {})]
    assert np.allclose(losses[0]["loss"], losses[1]["loss"], rtol=1e-6)  # recorded by another backend: rounding


@pytest.mark.parametrize("name", ["gain", "init", "lr", "run", "std", "layer"])
def test_a_statistic_takes_no_column_of_the_tables(name: str) -> None:
    with pytest.raises(initlab.UsageError, match="a column of this name"):
        initlab.stack(depth=1, width=2, batch=2, seeds=1, statistics={name: lambda x: x.mean((-2, -1))})
