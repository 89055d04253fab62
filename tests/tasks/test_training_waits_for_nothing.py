"""A recorded step of a training reads nothing back from its device: on tensors without values, which cannot be read.

Meta tensors stand in for a GPU's: whoever reads or copies one to the host gets an error, as he would wait for a GPU.
"""

from collections import Counter
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import rule
from initlab.stats.backend import Backend
from initlab.tasks.ensemble.networks import Ensemble
from initlab.tasks.ensemble.training import Training
from initlab.tasks.twins import Records, TwinTraining
from tests.long import long_except

META = torch.device("meta")


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the stand-in does not know."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


class Launches(TorchDispatchMode):
    """Counts torch's operations that are no views and no allocations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not func.overloadpacket.__name__.startswith(("empty", "new_empty", "detach")):
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def trained(depth: int, activation: str, **options: Any) -> tuple[TwinTraining, Tensor, Tensor]:
    """Two networks of 20 units on the stand-in, with a batch of 16."""
    sizes = [12, *[20] * depth, 10]
    parameters = [(torch.empty(2, i, o, device=META), torch.empty(2, o, device=META)) for i, o in pairwise(sizes)]
    training = Training(depth, 20, 16, 4, **options)
    records = Records(Ensemble([rule("kaiming")] * 2, range(2)), Backend(), lambda frames: None, training.histograms)
    twins = TwinTraining(parameters, ACTIVATIONS[activation], training, 0.1, records)
    return twins, torch.empty(2, 16, 12, device=META), torch.empty(2, 16, dtype=torch.int64, device=META)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("relu", {}),
    "another activation": ("tanh", {}),
    "histograms": ("relu", {"histograms": True}),
    "an optimizer of torch": ("relu", {"optimizer": "adam"}),
    "drift": ("gelu", {"drift": True}),
    "all modules at once": ("relu", {"modules": "vmap"}),
}


@pytest.mark.parametrize("case", long_except(CASES, "histograms", "all modules at once"))
def test_a_step_reads_nothing_back(case: str) -> None:
    """Recorded or not, of both trainings, rows and parity."""
    activation, options = CASES[case]
    twins, xb, yb = trained(3, activation, **options)
    for step in range(4):
        twins.step(step, xb, yb, record=step % 2 == 0)
    with pytest.raises((RuntimeError, NotImplementedError)):  # what is handed over is read
        twins.flush()


def test_a_further_layer_starts_its_own_operations_alone() -> None:
    """Products, activations, masks, sums, updates of two networks. Rows and parity are made of all layers at once."""
    found = []
    for depth in (2, 22):
        twins, xb, yb = trained(depth, "relu")
        twins.step(0, xb, yb, record=True)
        with Launches() as launches:
            twins.step(1, xb, yb, record=True)
        found.append(launches.found)
    assert (found[1] - found[0]).total() <= 50 * 20, found[1] - found[0]
