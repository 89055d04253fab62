"""Compiled passes or plain PyTorch: the rows of a probe are the same."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import repeat

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import initlab
from initlab.stats.kernels import cpu_backend
from initlab.stats.kernels.cpu import library, plain
from initlab.stats.statistics import STATISTICS
from tests.long import long_except
from tests.stats.exact import SINGLE

pytestmark = pytest.mark.skipif(library() is None, reason="no working C++ compiler: plain PyTorch makes all rows")

STEPS = 4


def deep(relu: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 9), relu(), nn.Linear(9, 9), relu(), nn.Linear(9, 3))


class Steps(nn.Module):
    """A network whose way depends on the step."""

    def __init__(self, way: Callable[["Steps", Tensor, int], Tensor]) -> None:
        super().__init__()
        self.first, self.relu, self.other, self.last = nn.Linear(6, 9), nn.ReLU(), nn.Tanh(), nn.Linear(9, 3)
        self.way, self.step = way, -1

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        return self.last(self.way(self, x, self.step))


def doubled(model: nn.Sequential) -> nn.Sequential:
    model[1].register_forward_hook(lambda module, args, output: 2 * output)
    return model


def replaced(model: nn.Sequential) -> nn.Sequential:
    model[3].forward = lambda x: torch.sin(x)  # type: ignore[method-assign]
    return model


def of_ones(relu: nn.Module, z: Tensor) -> Tensor:
    z.register_hook(lambda grad: 3 * grad)
    return relu(z.add_(1))


class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x / 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad / 2


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Half.apply(x)


def transposed(m: Steps, x: Tensor, step: int) -> Tensor:
    """The weight moves to other memory, with gaps, in the middle of the training."""
    if step == 2:
        m.first.weight.data = m.first.weight.data.t().contiguous().t()
    return m.relu(m.first(x))


def spoilt(m: Steps, x: Tensor, step: int) -> Tensor:
    """Dead at first, then finite, then nan."""
    with torch.no_grad():
        m.first.bias.fill_(-50.0 if step == 0 else 0.1)
        if step == 3:
            m.first.weight[0, 0] = torch.nan
    return m.relu(m.first(x))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "relu": deep,
    "in place": lambda: deep(lambda: nn.ReLU(inplace=True)),
    "one relu": lambda: deep(repeat(nn.ReLU()).__next__),
    "tanh": lambda: deep(nn.Tanh),
    "an output that a hook doubles": lambda: doubled(deep()),
    "another forward": lambda: replaced(deep()),
    "no relu in the end": lambda: Steps(lambda m, x, k: (m.relu if k < 2 else m.other)(m.first(x))),
    "now and then": lambda: Steps(lambda m, x, k: m.relu(m.first(x)) if k % 2 else m.first(x)),
    "between them": lambda: Steps(lambda m, x, k: m.relu(m.first(x)) if k < 2 else of_ones(m.relu, m.first(x))),
    "twice": lambda: Steps(lambda m, x, k: m.relu(m.first(x)) + m.relu(m.first(2 * x))),
    "used again": lambda: Steps(lambda m, x, k: (z := m.first(x)) + m.relu(z)),
    "other batches": lambda: Steps(lambda m, x, k: m.relu(m.first(x[: 3 + k // 2]))),
    "sequences": lambda: Steps(lambda m, x, k: m.relu(m.first(x.view(3, 4, 6))).mean(1)),
    "with gaps": lambda: Steps(lambda m, x, k: m.relu(m.first(x).t().contiguous().t())),
    "other memory": lambda: Steps(transposed),
    "dead and nan": lambda: Steps(spoilt),
    "a rule of one's own": lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), Halved(), nn.Linear(9, 3)),
    "computed anew": lambda: Steps(lambda m, x, k: checkpoint(nn.Sequential(m.first, m.relu), x, use_reentrant=False)),
    "unused": lambda: Steps(lambda m, x, k: m.relu(m.first(x)) if k != 1 else m.other(x.repeat(1, 2)[:, :9])),
}


def watched(build: Callable[[], nn.Module], histograms: bool) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with initlab.probe(model, optimizer=optimizer, histograms=histograms) as p:
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.randn(12, 6)).square().sum().backward()
            optimizer.step()
    return p.frame(), p.histograms() if histograms else None


@pytest.mark.filterwarnings("ignore:probe. never called:UserWarning")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("histograms", long_except([False, True], True), ids=["", "histograms"])
def test_both_backends_give_the_same_rows(name: str, histograms: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To what sums in float32 promise of entries of size 1; a cosine is a difference. Counts are equal."""
    monkeypatch.setattr(cpu_backend, "_WAITING", 7)  # histograms are named in the middle of a step
    found = []
    for backend in (nullcontext, plain):
        with backend():
            found.append(watched(MODELS[name], histograms))
    (ours, octaves), (theirs, expected) = found
    words = [column for column in ours if column not in STATISTICS]
    pd.testing.assert_frame_equal(ours[words], theirs[words], rtol=SINGLE)
    counted = [column for column in STATISTICS if column.startswith(("n_", "count", "frac", "min", "max"))]
    assert ours[counted].equals(theirs[counted])
    pd.testing.assert_frame_equal(ours[[*STATISTICS]], theirs[[*STATISTICS]], rtol=SINGLE, atol=SINGLE)
    if octaves is not None and expected is not None:
        assert octaves.equals(expected) and len(octaves) == len(ours)


def test_gradients_that_are_not_dense_or_not_there() -> None:
    frames = []
    for backend in (nullcontext, plain):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 4), nn.Linear(4, 2))
        model[1].bias.requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with backend(), initlab.probe(model, optimizer=optimizer) as p:
            for _ in range(2):
                optimizer.zero_grad()
                model(torch.tensor([1, 2, 2, 5])).square().sum().backward()
                optimizer.step()
        frames.append(p.frame())
    pd.testing.assert_frame_equal(*frames, rtol=SINGLE, atol=SINGLE)
    gradients = frames[0][(frames[0]["tensor"] == "weight") & (frames[0]["direction"] == "backward")]
    assert list(gradients["count"][:1]) == [28]


class Turning(torch.optim.SGD):
    """Puts the new weights where they have gaps."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.data = (p.data - 0.1 * p.grad).t().contiguous().t()


def test_an_optimizer_that_moves_the_weights() -> None:
    frames = []
    for backend in (nullcontext, plain):
        torch.manual_seed(0)
        model = deep()
        optimizer = Turning(model.parameters(), lr=0.1)
        with backend(), initlab.probe(model, optimizer=optimizer) as p:
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(12, 6)).square().sum().backward()
                optimizer.step()
        frames.append(p.frame())
    pd.testing.assert_frame_equal(*frames, rtol=SINGLE, atol=SINGLE)
    assert (frames[0]["tensor"] == "update").sum() == 9


def test_a_hook_of_the_user_on_a_watched_tensor_stays() -> None:
    torch.manual_seed(0)
    model, seen, outs = deep(), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def keep(module: nn.Module, args: object, output: Tensor) -> None:
        outs.append(output)
        output.register_hook(seen.append)

    with initlab.probe(model, optimizer=optimizer) as p:
        handle = model[2].register_forward_hook(keep)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(12, 6)).square().sum().backward()
            optimizer.step()
        handle.remove()
    assert len(seen) == 3 and [len(out._backward_hooks) for out in outs] == [1, 1, 1]
    assert len(p.frame()) == 3 * (1 + 10 + 6 + 6 + 3 + 1)
