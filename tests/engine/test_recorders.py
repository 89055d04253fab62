"""A recorded step: the rows of the readable pass, whichever recorder makes them, and the same training as without."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from initlab.engine import fast_network as fast
from initlab.engine import mlp, recorders
from initlab.engine.fast_network import KEPT_MEMORIES, Engine
from initlab.engine.mlp import Parameters
from initlab.engine.recorders import Recording
from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.loss_table import LOSSES
from initlab.stats.buffer import StatsBuffer
from initlab.stats.histogram import histogram
from initlab.stats.kernels.cpu import library
from initlab.stats.measure import backend_for, measure
from initlab.stats.statistics import STATISTICS
from initlab.stats.summarize import saturated_share

SIZES = (20, 9, 9, 9, 3)
needs_compiler = pytest.mark.skipif(library() is None, reason="no working C++ compiler")
RECORDERS = [pytest.param(True, marks=needs_compiler, id="fused"), pytest.param(False, id="plain")]


def drawn(count: int, dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = SIZES) -> Parameters:
    return [
        (torch.randn(count, i, o).mul((2 / i) ** 0.5).to(dtype), torch.randn(count, o).mul(0.1).to(dtype))
        for i, o in pairwise(sizes)
    ]


def batch_of(count: int, dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = SIZES) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 12, sizes[0]).to(dtype), torch.randint(sizes[-1], (count, 12))


def buffer_of(count: int, histograms: bool = False, accelerated: bool = True) -> StatsBuffer:
    return StatsBuffer(range(count), backend_for("cpu", accelerated=accelerated), histograms)


def recorded(
    parameters: Parameters, x: Tensor, y: Tensor, activation: str = "relu", accelerated: bool = True, steps: int = 1
) -> tuple[pd.DataFrame, pd.DataFrame, Engine]:
    engine, rows = Engine(parameters, activation, lr=0.1, batch=12), buffer_of(len(x), True, accelerated)
    recording = Recording(engine, rows)
    for step in range(steps):
        recording.step(x, y, step)
    recording.flush()
    tables = rows.take_tables()
    return tables["stats"], tables["histograms"], engine


def tensors_of(parameters: Parameters, x: Tensor, y: Tensor, activation: str) -> dict[tuple[int, str, str], Tensor]:
    """All tensors of the readable pass, (E, N, C)."""
    p = mlp.forward_and_backward(parameters, x, y, ACTIVATIONS[activation], LOSSES["cross_entropy"])
    found = {}
    for way, z, a in (
        ("forward", p.preactivations, p.activations),
        ("backward", p.preactivation_grads, p.activation_grads),
    ):
        found |= {(layer, "preactivation", way): t for layer, t in enumerate(z, start=1)}
        found |= {(layer, "activation", way): t for layer, t in enumerate(a, start=1)}
    for way, pairs in (("forward", parameters), ("backward", p.parameter_grads)):
        for layer, (w, b) in enumerate(pairs, start=1):
            found |= {(layer, "weight", way): w, (layer, "bias", way): b.unsqueeze(-2)}
    for layer, ((w, _), (dw, _)) in enumerate(zip(parameters, p.parameter_grads, strict=True), start=1):
        found[layer, "update", "forward"] = (w - 0.1 * dw) - w
    return found


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("accelerated", RECORDERS)
@pytest.mark.parametrize("activation", ["relu", "tanh", "leaky_relu"])
def test_the_rows_of_the_readable_pass(
    activation: str, accelerated: bool, joint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 gradients of another order of adding differ by their rounding, 1e-5 of the tensor's rms at this size."""
    monkeypatch.setattr(fast, "JOINT_ENTRIES", 10**9 if joint else 0)
    parameters, (x, y) = drawn(2), batch_of(2)
    frame, _, _ = recorded(parameters, x, y, activation, accelerated)
    found = frame.set_index(["layer", "tensor", "direction", "seed"])
    expected = tensors_of(parameters, x, y, activation)
    assert len(frame) == 2 * len(expected)
    for (layer, tensor, way), values in expected.items():
        batched = tensor in ("preactivation", "activation")
        stats = dict(zip(STATISTICS, measure(values, batched), strict=True))
        if (tensor, way) == ("preactivation", "forward") and layer < len(parameters):
            row = ACTIVATIONS[activation]
            stats["frac_saturated"] = saturated_share(row.slope(values), row.largest_slope)
        if (tensor, way) != ("activation", "forward"):
            stats["frac_dead"] = torch.full((2,), torch.nan)
        for name, value in stats.items():
            for seed in (0, 1):
                ours, theirs = float(found.loc[(layer, tensor, way, seed), name]), float(value[seed])
                scale = 1.0 if name in ("cosine",) or name.startswith("frac") else float(stats["rms"][seed])
                scale = abs(theirs) if name in ("norm", "q", "count") else scale
                if tensor == "update":  # a difference of neighbours: right to half a unit of the weights' last place
                    scale = max(scale, 1e-2)
                if np.isnan(theirs):
                    assert np.isnan(ours), (layer, tensor, way, name)
                else:
                    assert abs(ours - theirs) <= 1e-5 * scale, (layer, tensor, way, name, ours, theirs)


@pytest.mark.parametrize("accelerated", RECORDERS)
def test_histograms_count_every_entry(accelerated: bool) -> None:
    parameters, (x, y) = drawn(2), batch_of(2)
    frame, histograms, _ = recorded(parameters, x, y, accelerated=accelerated)
    keys = ["step", "layer", "tensor", "direction", "seed"]
    assert histograms[keys].equals(frame[keys])
    counted = np.array([sum(p) + sum(n) for p, n in zip(histograms["positive"], histograms["negative"], strict=True)])
    finite = frame["count"] - frame["n_nan"] - frame["n_inf"]
    assert np.array_equal(counted, finite - (frame["frac_zero"] * frame["count"]).round())
    z = tensors_of(parameters, x, y, "relu")[1, "preactivation", "forward"]
    row = histograms[(histograms["layer"] == 1) & (histograms["tensor"] == "preactivation")]
    row = row[(row["direction"] == "forward") & (row["seed"] == 1)].iloc[0]
    whole = histogram(z)[1].numpy()
    start = row["first"] + 149
    assert np.array_equal(whole[0, start : start + len(row["positive"])], row["positive"])
    assert np.array_equal(whole[1, start : start + len(row["negative"])], row["negative"])


@pytest.mark.parametrize("accelerated", RECORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recording_changes_nothing_but_rounding(dtype: torch.dtype, accelerated: bool) -> None:
    """Recorded or not, the same training: 12 steps, rounding of the number format a step."""
    parameters, (x, y) = drawn(2, dtype), batch_of(2, dtype)
    _, _, watched = recorded(parameters, x, y, accelerated=accelerated, steps=12)
    plain = Engine(parameters, lr=0.1, batch=12)
    for _ in range(12):
        plain.step(x, y)
    room = 24 * torch.finfo(dtype).eps
    for ours, theirs in zip(watched.parameters, plain.parameters, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.linalg.vector_norm(a - b) <= room * torch.linalg.vector_norm(b)


def test_steps_keep_their_numbers_when_rows_are_handed_over_on_the_way() -> None:
    parameters, (x, y) = drawn(1), batch_of(1)
    rows = StatsBuffer([7], backend_for())
    recording = Recording(Engine(parameters, batch=12), rows)
    steps = list(range(0, 10 * (recorders.MOST_STEPS + 3), 10))
    for step in steps:
        recording.step(x, y, step)
    recording.flush()
    recording.flush()
    frame = rows.frame()
    assert sorted(frame["step"].unique()) == steps and set(frame["seed"]) == {7}
    weights = frame[(frame["tensor"] == "weight") & (frame["direction"] == "forward") & (frame["layer"] == 1)]
    assert weights["std"].nunique() == len(steps)


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations(depth: int, record: bool | None) -> list[str]:
    """Names of what the second step of a network of that depth dispatches; the first one makes its memory."""
    sizes = (20, *[9] * depth, 3)
    parameters, (x, y) = drawn(1, sizes=sizes), batch_of(1, sizes=sizes)
    engine = Engine(parameters, batch=12)
    recording = Recording(engine, buffer_of(1, accelerated=record)) if record is not None else None
    for _ in range(2):
        with Counting() as counting:
            engine.step(x, y) if recording is None else recording.step(x, y, 0)
    return counting.calls


VIEWS = {"select", "view", "unsqueeze", "transpose", "slice", "t", "detach", "expand", "as_strided", "_unsafe_view"}


@needs_compiler
def test_a_recorded_step_dispatches_hardly_more_than_a_bare_one() -> None:
    """At any depth at most twenty operations more, and none that waits for a device."""
    for depth in (2, 10, 40):
        bare, fused = operations(depth, None), operations(depth, True)
        assert len(fused) <= len(bare) + 20
        assert "_local_scalar_dense" not in fused


def test_a_bare_step_takes_four_operations_a_layer() -> None:
    few, many = ([name for name in operations(depth, None) if name not in VIEWS] for depth in (10, 60))
    assert len(many) - len(few) <= 4.5 * 50
    assert len(many) <= 4.5 * 60


@pytest.mark.parametrize("accelerated", RECORDERS)
@pytest.mark.parametrize("stopped", [0, 3, 4, 5])
def test_a_step_that_was_interrupted_leaves_no_row(
    accelerated: bool, stopped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rows were about to be handed over, and the recording can go on."""
    monkeypatch.setattr(recorders, "MOST_STEPS", 4)
    parameters, (x, y) = drawn(2), batch_of(2)
    rows = buffer_of(2, True, accelerated)
    recording = Recording(Engine(parameters, batch=12), rows)
    for step in range(10):
        if step == stopped:
            with pytest.raises(UsageError):
                recording.step(x, y[:, :-1], step)
        else:
            recording.step(x, y, step)
    recording.flush()
    frame, histograms = rows.take_tables().values()
    kept = [step for step in range(10) if step != stopped]
    assert sorted(frame["step"].unique()) == kept and len(frame) % len(kept) == 0
    assert (frame["count"] > 0).all() and frame["rms"].notna().all()
    assert histograms["step"].equals(frame["step"])
    counted = [sum(p) + sum(n) for p, n in zip(histograms["positive"], histograms["negative"], strict=True)]
    assert np.array_equal(counted, frame["count"] - (frame["frac_zero"] * frame["count"]).round())


def test_batch_sizes_that_change_keep_no_memory() -> None:
    engine = Engine(drawn(1), batch=12)
    recording = Recording(engine, buffer_of(1))
    for n in range(2, 40):
        x, y = torch.randn(1, n, SIZES[0]), torch.randint(SIZES[-1], (1, n))
        recording.step(x, y, n)
        engine.step(x, y)
    assert len(engine.networks[0]._memories) <= KEPT_MEMORIES


@pytest.mark.parametrize("accelerated", RECORDERS)
def test_rows_that_take_much_memory_are_handed_over_earlier(accelerated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, (x, y) = drawn(2), batch_of(2)
    tables = []
    for most in (2**14, recorders.MOST_BYTES):
        monkeypatch.setattr(recorders, "MOST_BYTES", most)
        rows = buffer_of(2, True, accelerated)
        recording, handed_over = Recording(Engine(parameters, batch=12), rows), 0
        for step in range(30):
            recording.step(x, y, step)
            handed_over = max(handed_over, len(rows))
        recording.flush()
        assert (handed_over > 0) == (most == 2**14)
        tables.append(rows.take_tables())
    for name, frame in tables[0].items():
        pd.testing.assert_frame_equal(frame, tables[1][name], check_exact=True, check_categorical=False)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("accelerated", RECORDERS)
def test_layers_with_learning_rates_of_their_own_are_recorded_as_they_move(
    accelerated: bool, joint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where neighbours of one shape differ: the same weights as without a record, and updates that say so."""
    monkeypatch.setattr(fast, "JOINT_ENTRIES", 10**9 if joint else 0)
    parameters, (x, y) = drawn(2), batch_of(2)
    factors = [(4.0, 4.0), (1.0, 2.0), (0.5, 2.0), (0.25, 1.0)]
    plain, watched = (Engine(parameters, "relu", lr=0.1, batch=12, factors=[factors] * 2) for _ in range(2))
    rows = buffer_of(2, accelerated=accelerated)
    recording = Recording(watched, rows)
    plain.step(x, y)
    recording.step(x, y, 0)
    recording.flush()
    for ours, theirs in zip(watched.parameters, plain.parameters, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() <= 1e-6 * b.norm()
    frame = rows.frame().set_index(["tensor", "direction", "layer", "seed"])["rms"]
    for layer, (own, _) in enumerate(factors, start=1):
        for seed in range(2):
            ratio = frame["update", "forward", layer, seed] / frame["weight", "backward", layer, seed]
            assert ratio == pytest.approx(0.1 * own, rel=1e-4)  # differences of float32 weights
