"""Recorded steps of modules that torch trains: rows and parity are those of the tensors one by one."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from initlab.engine import mlp
from initlab.engine.mlp import Parameters
from initlab.engine.module_recorder import ModuleRecorder
from initlab.engine.named_tensors import change_items, items_of, module_keys, sort_by_shape
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import draw, rule
from initlab.nn.loss_table import LOSSES
from initlab.stats.backend import Backend
from initlab.stats.buffer import RowBuffer, StatsBuffer
from initlab.stats.keys import PARITY_COLUMNS
from initlab.stats.measure import backend_for
from initlab.stats.statistics import NONFINITE
from initlab.stats.summarize import relative_error

SIZES, SEEDS = (7, 5, 5, 3), (0, 4)
BACKENDS = {
    "accelerated": backend_for,
    "plain": Backend,
    "custom": lambda: Backend({"corner": lambda x: x[..., 0, -1]}),
}


def network(dtype: torch.dtype = torch.float32) -> Parameters:
    shapes = enumerate(pairwise(SIZES), start=1)
    return [draw(rule("torch_default"), "relu", shape, SEEDS, layer, dtype) for layer, shape in shapes]


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 6, SIZES[0], generator=generator).to(dtype), torch.randint(3, (2, 6), generator=generator)


@pytest.mark.parametrize("activation", ["relu", "tanh", "linear"])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_rows_of_a_step_are_those_of_its_tensors(name: str, activation: str) -> None:
    """In the order and to the rounding of the same tensors measured one after the other; histograms are equal."""
    phi, loss, (xb, yb) = ACTIVATIONS[activation], LOSSES["cross_entropy"], batch()
    backend, parameters = BACKENDS[name](), network()
    ours, theirs = (StatsBuffer(SEEDS, backend, histograms=True) for _ in range(2))
    parity = RowBuffer(SEEDS, PARITY_COLUMNS, ("relative_error", NONFINITE))
    twins = [mlp.twin(parameters, k, phi) for k in range(2)]
    recorder = ModuleRecorder(twins, phi, loss, ours, parity)
    for step in range(2):
        before = mlp.twin_parameters(twins)
        seen = mlp.forward_and_backward(before, xb, yb, phi, loss)
        losses, out = recorder.look(xb, yb, step)
        torch.testing.assert_close(losses, seen.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(out, seen.out, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            for model in twins:
                for p in model.parameters():
                    assert p.grad is not None
                    p -= 0.1 * p.grad
                    p.grad = None
        recorder.finish(step)
        theirs.add(items_of("module", seen, before, phi), step)
        old, new = ([w for w, _ in pairs] for pairs in (before, mlp.twin_parameters(twins)))
        theirs.add(change_items("module", "update", old, new), step)
    tables, wanted = ours.take_tables(), theirs.take_tables()
    keys = ["seed", "step", "layer", "tensor", "direction"]
    found, rows = tables["stats"].set_index(keys), wanted["stats"].set_index(keys)
    assert list(found.index) == list(rows.index)
    for column in ("std", "rms", "frac_saturated", "min", *(["corner"] if name == "custom" else [])):
        scale = rows["rms"] if column in ("min", "corner") else 1.0
        assert ((found[column] - rows[column]).abs().fillna(0) <= 2e-5 * scale).all(), column
        assert (found[column].isna() == rows[column].isna()).all()
    counts, same = (one["histograms"].set_index(keys) for one in (tables, wanted))
    weights = counts.index[counts.index.get_level_values("tensor") == "weight"]
    weights = weights[weights.get_level_values("direction") == "forward"]
    for side in ("positive", "negative"):
        assert all((a == b).all() for a, b in zip(counts.loc[weights, side], same.loc[weights, side], strict=True))


@pytest.mark.parametrize("name", ["accelerated", "plain"])
def test_parity_is_the_distance_of_every_tensor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of parameters that are off by 1 % in one weight, and of gradients that are wrong by 1 % by hand."""
    phi, loss, (xb, yb) = ACTIVATIONS["relu"], LOSSES["cross_entropy"], batch()
    parameters = network()
    twins = [mlp.twin(parameters, k, phi) for k in range(2)]
    parity = RowBuffer(SEEDS, PARITY_COLUMNS, ("relative_error", NONFINITE))
    recorder = ModuleRecorder(twins, phi, loss, StatsBuffer(SEEDS, BACKENDS[name]()), parity)
    members = [[one[k] for pair in parameters for one in pair] for k in range(2)]
    members[1][2] = members[1][2] * 1.01
    recorder.compare(members, 0)
    right = mlp.lin_param_grads
    monkeypatch.setattr(mlp, "lin_param_grads", lambda g, inp: (right(g, inp)[0] * 1.01, right(g, inp)[1]))
    recorder.look(xb, yb, 0)
    frame = parity.take()
    forward, backward = (frame[frame["direction"] == way] for way in ("forward", "backward"))
    off = (forward["tensor"] == "weight") & (forward["layer"] == 2) & (forward["seed"] == SEEDS[1])
    assert forward[off]["relative_error"].to_numpy() == pytest.approx(0.01, rel=1e-4)
    assert off.sum() == 1 and forward[~off]["relative_error"].max() == 0
    weights = backward["tensor"] == "weight"
    assert backward[weights]["relative_error"].to_numpy() == pytest.approx(0.01, rel=1e-3)
    assert backward[~weights]["relative_error"].max() < 1e-6
    assert len(forward) == 2 * 6 and len(backward) == 2 * (3 + 2 + 6)


def test_memory_that_an_optimizer_exchanges_is_followed() -> None:
    """An optimizer may put new memory in the place of a parameter's; the rows are those of the new values."""
    phi, loss, (xb, yb) = ACTIVATIONS["relu"], LOSSES["cross_entropy"], batch()
    twins = [mlp.twin(network(), k, phi) for k in range(2)]
    rows, parity = StatsBuffer(SEEDS, backend_for()), RowBuffer(SEEDS, PARITY_COLUMNS, ("relative_error", NONFINITE))
    recorder = ModuleRecorder(twins, phi, loss, rows, parity)
    for step in range(2):
        recorder.look(xb, yb, step)
        for model in twins:
            for p in model.parameters():
                p.data = 2 * p.data
        recorder.finish(step)
    frame = rows.take_tables()["stats"].query("direction == 'forward'")

    def rms(tensor: str, step: int) -> np.ndarray:
        return frame[(frame["tensor"] == tensor) & (frame["step"] == step)]["rms"].to_numpy()

    assert rms("weight", 1) == pytest.approx(2 * rms("weight", 0), rel=1e-6)
    assert rms("update", 0) == pytest.approx(rms("weight", 0), rel=1e-6)


@pytest.mark.parametrize("name", ["accelerated", "plain"])
@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (16, 16), (37, 53), (100, 32)])
def test_tensors_are_compared_wherever_they_lie(name: str, shape: tuple[int, int]) -> None:
    """Also with what lies in memory as a transpose, beside zeros and with entries that are not finite."""
    generator = torch.Generator().manual_seed(shape[0])
    tensors = [torch.randn(*shape, generator=generator) for _ in range(5)]
    partners = [x * 1.001 + 1e-4 * torch.randn(*shape, generator=generator) for x in tensors]
    tensors[1][0, 0], partners[1][0, 0], partners[1][-1, -1] = torch.nan, torch.inf, -torch.inf
    partners[2], tensors[3], partners[3] = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    tensors[4] = partners[4]
    wanted = torch.tensor(
        [[float(one) for one in relative_error(a, b)] for a, b in zip(tensors, partners, strict=True)]
    ).T.double()
    across = [b.mT.contiguous().mT for b in partners]
    for references in (partners, across):
        found = BACKENDS[name]().compare_each(tensors, references)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0, equal_nan=True)
    assert wanted[1].tolist() == [0, len({(0, 0), (shape[0] - 1, shape[1] - 1)}), 0, 0, 0]
    assert wanted[0, 2] == torch.inf and wanted[0, 3] == wanted[0, 4] == 0


def test_keys_of_tensors_of_one_shape_stand_together() -> None:
    keys = module_keys([4, 3, 3])
    names = [keys[k] for k in sort_by_shape(keys, [4, 3, 3])]
    assert sorted(names) == sorted(keys) and names[:5] == keys[:5]
    assert [key.tensor for key in names[-2:]] == ["update", "update"]
