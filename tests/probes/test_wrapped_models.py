"""Models inside of others: DistributedDataParallel on CPUs, torch.compile. Rows are those of the bare model."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import initlab
from tests.probes.by_hand import Trace, count_hooks, faults, once

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 3


class Net(nn.Module):
    """A residual block with a function of torch, so that sums and activations are seen as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x + F.relu(self.second(self.first(x).tanh())))
        return out


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int = 2) -> pd.DataFrame:
    optimizer = SGD(model.parameters(), 0.1)
    with initlab.probe(model, optimizer=optimizer) as p:
        for _ in range(steps):
            once(model, [optimizer], lambda net: F.cross_entropy(net(x), y))
    return p.frame()


def trace_of(parts: int, rank: int) -> Trace:
    """The loop of one process of several by hand: own activations, the mean of all gradients of the weights."""
    model, trace = Net(), Trace()
    others = [Net() for _ in range(parts)]
    optimizer = SGD(model.parameters(), 0.1)
    trace.follow(model, [optimizer])
    x, y = X.chunk(parts), Y.chunk(parts)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rank]), y[rank]).backward()
        grads = []
        for k, other in enumerate(others):
            other.load_state_dict(model.state_dict())
            grads.append(torch.autograd.grad(F.cross_entropy(other(x[k]), y[k]), list(other.parameters())))
        if parts > 1:  # as DistributedDataParallel averages: each process divides, then they are summed
            for p, several in zip(model.parameters(), zip(*grads, strict=True), strict=True):
                p.grad = torch.stack([g / parts for g in several]).sum(0)
        optimizer.step()
        trace.end_step()
    return trace


def work(rank: int, parts: int, folder: str, words: dict[str, Any]) -> None:
    """One process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=parts)
    try:
        model = DistributedDataParallel(Net(), **words)
        rows = train(model, X.chunk(parts)[rank], Y.chunk(parts)[rank])
        assert count_hooks(model) == 0
        rows.to_pickle(f"{folder}/{rank}.pkl")
        torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def unwrap(rows: pd.DataFrame) -> pd.DataFrame:
    """Without `module.` in front of the names, which is where DistributedDataParallel holds the model."""
    names = rows["name"].astype(str)
    kept = rows[names != ""].copy()
    kept["name"] = names[names != ""].str.removeprefix("module").str.removeprefix(".")
    return kept


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="gloo meets in a file")
@pytest.mark.parametrize(
    ("parts", "words"),
    [
        pytest.param(1, {}, marks=pytest.mark.slow),
        pytest.param(2, {}, marks=pytest.mark.slow),
        (2, {"static_graph": True, "gradient_as_bucket_view": True}),
    ],
    ids=str,
)
def test_distributed_data_parallel(parts: int, words: dict[str, Any], tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(work, (parts, str(tmp_path), words), nprocs=parts)
    kept = [torch.load(tmp_path / f"{rank}.pt") for rank in range(parts)]
    for rank in range(parts):
        rows = unwrap(pd.read_pickle(tmp_path / f"{rank}.pkl"))
        found = faults(rows, trace_of(parts, rank), "")
        assert not found, "\n".join(found[:20])
        assert all(torch.equal(kept[0][name], kept[rank][name]) for name in kept[0])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", ["function", "method"])
def test_compiled_models(backend: str, how: str) -> None:
    """Rows are those of the plain model, under its names; afterwards the model is compiled as it was."""
    torch._dynamo.reset()
    plain, model = Net(), Net()
    compiled: Any = torch.compile(model, backend=backend) if how == "function" else model
    if how == "method":
        model.compile(backend=backend)
    wanted, found = train(plain, X, Y), train(compiled, X, Y)
    assert not found["name"].astype(str).str.contains("_orig_mod").any()
    keys = ["stage", "layer", "tensor", "direction", "name", "part", "op", "call", "step"]
    assert found[keys].astype(str).values.tolist() == wanted[keys].astype(str).values.tolist()
    for column in ("rms", "std", "cosine", "frac_dead", "frac_saturated", "update_ratio"):
        pd.testing.assert_series_equal(found[column], wanted[column], rtol=1e-6)
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled(X.repeat(3, 1)[:11])
    assert torch._dynamo.utils.counters["frames"]["ok"] > frames
    rows = initlab.measure(compiled, X, Y, F.cross_entropy)
    base = initlab.measure(plain, X, Y, F.cross_entropy)
    assert rows["name"].tolist() == base["name"].tolist() and count_hooks(model) == 0
    pd.testing.assert_series_equal(rows["rms"], base["rms"], rtol=1e-6)
