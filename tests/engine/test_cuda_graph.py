"""A step is a step, replayed or not; rows leave in order and none is lost. What only a GPU can show is marked so."""

from itertools import pairwise

import pytest
import torch

from initlab.engine.cuda_graph import Beside, Outbox, captured, refuse_other
from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import draw, gaussian, rule
from initlab.scratch import mlp
from initlab.scratch.layers import LOSSES
from initlab.stats.summarize import FIELDS, summarize

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
COUNT, M2 = list(FIELDS).index("count"), list(FIELDS).index("m2")
DEVICES = pytest.mark.parametrize("device", [CPU, pytest.param(CUDA, marks=pytest.mark.gpu)], ids=["cpu", "cuda"])


class Training:
    """Four hidden layers trained by hand; a step leaves the rows of the preactivations in an outbox."""

    def __init__(self, device: torch.device, k: int) -> None:
        sizes = [20, *[30] * 4, 5]
        self.parameters = [
            draw(rule("kaiming"), "relu", shape, [0, 1, 2], layer, device=device)
            for layer, shape in enumerate(pairwise(sizes), start=1)
        ]
        self.beside, self.box = Beside(device), Outbox(k, (len(FIELDS), 4, 3), device)

    def step(self, xb: torch.Tensor, yb: torch.Tensor) -> torch.Tensor:
        seen = mlp.forward_and_backward(self.parameters, xb, yb, ACTIVATIONS["relu"], LOSSES["cross_entropy"])
        self.beside(self.record, *seen.preactivations[:-1])
        for pair, grads in zip(self.parameters, seen.parameter_grads, strict=True):
            for p, g in zip(pair, grads, strict=True):
                p.sub_(g, alpha=0.1)
        self.beside.join()
        return seen.loss

    def record(self, *z: torch.Tensor) -> None:
        self.box.put(summarize(torch.stack(z)))


def batches(steps: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = []
    for step in range(steps):
        xb = torch.stack([gaussian((16, 20), seed, "batch", step) for seed in range(3)])
        found.append((xb.to(device), (xb[..., 0] > 0).long().to(device)))
    return found


@DEVICES
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_captured_or_not_every_call_is_one_step(warmup, device):
    """Losses, rows and weights; within rounding, since a GPU's kernels may be chosen anew for a graph."""
    plain, replayed = Training(device, 10), Training(device, 10)
    step = captured(replayed.step, device, warmup)
    for xb, yb in batches(8, device):
        torch.testing.assert_close(step(xb, yb).clone(), plain.step(xb, yb), rtol=1e-4, atol=0)
    rows, reference = replayed.box.drain(), plain.box.drain()
    assert rows.shape == (8, len(FIELDS), 4, 3)
    torch.testing.assert_close(rows[:, M2], reference[:, M2], rtol=1e-3, atol=0)
    assert not torch.equal(rows[0], rows[1])
    for (w, _), (other, _) in zip(replayed.parameters, plain.parameters, strict=True):
        assert float((w - other).norm() / other.norm()) < 1e-4


def test_on_a_cpu_the_step_is_itself():
    def step(x):
        return x + 1

    assert captured(step, CPU) is step


@DEVICES
def test_beside_gives_what_it_is_given_and_may_be_joined_at_any_time(device):
    beside = Beside(device)
    beside.join()
    x = torch.arange(4.0, device=device)
    found = beside(lambda a, b: a + b, x, x)
    beside.join()
    beside.join()
    assert found.tolist() == [0.0, 2.0, 4.0, 6.0]


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32], ids=str)
def test_rows_leave_in_order_one_flush_late_and_none_is_lost(dtype, device):
    box, given = Outbox(4, (2, 3), device, dtype), []
    rows = [torch.full((2, 3), k, dtype=dtype, device=device) for k in range(11)]
    for k, row in enumerate(rows):
        box.put(row)
        if k in (3, 4, 8):
            given.append(box.flush())
    given.append(box.drain())
    assert [len(part) for part in given] == [0, 4, 1, 6]
    assert torch.equal(torch.cat(given), torch.stack(rows).cpu())
    assert box.drain().shape == (0, 2, 3)
    assert all(part.device.type == "cpu" for part in given)


def test_rows_given_out_stay_what_they_were():
    box = Outbox(2, (1,), CPU)
    box.put(torch.ones(1, dtype=torch.float64))
    box.flush()
    first = box.flush()
    box.put(torch.full((1,), 7.0, dtype=torch.float64))
    box.drain()
    assert first.tolist() == [[1.0]]


def test_a_box_that_overflowed_says_so():
    box = Outbox(2, (1,), CPU)
    for _ in range(3):
        box.put(torch.zeros(1, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="3 rows were put between two flushes of a box for 2"):
        box.drain()


def test_nan_and_inf_are_rows_too():
    box = Outbox(1, (3,), CPU)
    row = torch.tensor([torch.nan, torch.inf, -0.0], dtype=torch.float64)
    box.put(row)
    assert torch.equal(box.drain()[0].view(torch.int64), row.view(torch.int64))


def test_what_a_recorded_step_cannot_see_is_refused():
    x = torch.ones(2, 3)
    refuse_other([x], [x + 1])
    with pytest.raises(UsageError, match=r"tensors alone, not 0\.1"):
        refuse_other([x], [0.1])
    with pytest.raises(UsageError, match=r"recorded for \(2, 3\) torch\.float32; it was given \(2, 2\) torch\.float32"):
        refuse_other([x], [torch.ones(2, 2)])
    with pytest.raises(UsageError, match="given"):
        refuse_other([x], [x, x])
    with pytest.raises(UsageError, match="float64"):
        refuse_other([x], [x.double()])


@pytest.mark.gpu
@pytest.mark.parametrize("replayed", [True, False], ids=["replayed", "eager"])
def test_the_loop_never_waits_for_the_gpu(replayed):
    training, given = Training(CUDA, 5), []
    step = captured(training.step, CUDA) if replayed else training.step
    data = batches(24, CUDA)
    for xb, yb in data[:4]:  # warm-up and the recording itself may wait
        step(xb, yb)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        given.append(training.box.flush())
        for k, (xb, yb) in enumerate(data[4:]):
            step(xb, yb)
            if k % 5 == 4:
                given.append(training.box.flush())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rows = torch.cat([*given, training.box.drain()])
    assert rows.shape[0] == 24 and rows.isfinite().logical_or(rows.isnan()).all()
    assert (rows[:, COUNT] == 16 * 30).all()


@pytest.mark.gpu
def test_a_module_with_autograd_is_replayed_too():
    def training() -> tuple[torch.nn.Module, object]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 2)).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(xb: torch.Tensor, yb: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(xb), yb)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return model, step

    (one, eager), (other, step) = training(), training()
    step = captured(step, CUDA)
    for xb, yb in batches(8, CUDA):
        torch.testing.assert_close(step(xb[0], yb[0]).clone(), eager(xb[0], yb[0]), rtol=1e-4, atol=0)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-6)
