"""The loss of a loop: its row, its value at chance, targets that broadcast; gradients before and after clipping."""

import math
import warnings
from collections.abc import Callable

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import backward
from torch.nn import functional as F

import initlab
from tests.probes.by_hand import differences, numbers
from tests.probes.test_functions import one

N, C = 24, 5
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(N) % C
WEIGHTS = torch.linspace(0.5, 2, C, dtype=torch.float64)


def net(out: int = C) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, out)).double()


CROSS_ENTROPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda z: F.cross_entropy(z, Y),
    "sum": lambda z: F.cross_entropy(z, Y, reduction="sum"),
    "none": lambda z: F.cross_entropy(z, Y, reduction="none").mean(),
    "a third": lambda z: F.cross_entropy(z, Y) / 3,
    "smoothed": lambda z: F.cross_entropy(z, Y, label_smoothing=0.2),
    "weighted": lambda z: F.cross_entropy(z, Y, weight=WEIGHTS),
    "ignored": lambda z: F.cross_entropy(z, Y.where(Y > 1, -100)),
    "probabilities": lambda z: F.cross_entropy(z, F.one_hot(Y, C).double() * 0.8 + 0.2 / C),
    "written out": lambda z: -z.log_softmax(-1)[torch.arange(N), Y].mean(),
    "nll_loss": lambda z: F.nll_loss(z.log_softmax(1), Y),
    "two": lambda z: F.cross_entropy(z, Y) + 2 * F.cross_entropy(z[:, :3], Y.clamp(max=2)),
    "images": lambda z: F.cross_entropy(z.reshape(2, 12, C).mT, Y.reshape(2, 12)),
    "binary": lambda z: F.binary_cross_entropy_with_logits(z, (Y[:, None] > 2).double().expand(N, C)),
    "binary sum": lambda z: F.binary_cross_entropy_with_logits(z, torch.rand_like(z).detach(), reduction="sum"),
}


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
@pytest.mark.parametrize("loop", [True, False], ids=["loop", "pass"])
def test_a_cross_entropy_stands_beside_its_value_at_chance(name: str, loop: bool) -> None:
    """That is what the same loss gives for equal logits."""
    model, loss = net(), CROSS_ENTROPIES[name]
    if loop:
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        with initlab.probe(model, optimizer=optimizer) as p:
            loss(model(X)).backward()
            optimizer.step()
        rows = p.frame()
    else:
        rows = initlab.measure(model, X, loss=loss)
    row = one(rows, tensor="loss")
    if "binary sum" not in name:  # its targets are drawn anew
        assert row["mean"] == pytest.approx(float(loss(model(X)).detach()), rel=1e-12)
    assert row["chance_loss"] == pytest.approx(float(loss(torch.zeros(N, C, dtype=torch.float64))), rel=1e-12)
    assert row["op"] == "cross_entropy" and row["layer"] == 2 and row["name"] == ""


@pytest.mark.parametrize(
    ("op", "loss"),
    [
        ("mse_loss", lambda z: F.mse_loss(z, torch.zeros_like(z))),
        ("add", lambda z: F.cross_entropy(z, Y) + z.square().mean()),
        ("mean", lambda z: ((1 - z.softmax(-1)) ** 2 * -z.log_softmax(-1))[torch.arange(N), Y].mean()),
        ("mean", lambda z: F.kl_div(z.log_softmax(-1), torch.full((N, C), 1 / C, dtype=torch.float64))),
    ],
)
def test_other_losses_have_no_value_at_chance(op: str, loss: Callable[[Tensor], Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = one(initlab.measure(net(), X, loss=loss), tensor="loss")
    assert row["op"] == op and math.isnan(row["chance_loss"])


@pytest.mark.parametrize("scale", [1024.0, 1000.0])
@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_loss_is_the_loss(scale: float, fused: bool) -> None:
    """The loss, its value at chance and all gradients in one unit, also where a fused optimizer divides by itself."""
    model = net().float()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    value = F.cross_entropy(model(X.float()), Y)
    gradients = torch.autograd.grad(value, list(model.parameters()))
    with initlab.probe(model, optimizer=optimizer) as p:
        scaler.scale(F.cross_entropy(model(X.float()), Y)).backward()
        scaler.step(optimizer)
    rows = p.frame()
    row = one(rows, tensor="loss")
    assert row["mean"] == pytest.approx(float(value.detach()), rel=1e-6)  # float32
    assert row["chance_loss"] == pytest.approx(math.log(C), rel=1e-6)
    for (name, _), grad in zip(model.named_parameters(), gradients, strict=True):
        module, part = name.split(".")
        found = one(rows, name=module, part=part, direction="backward")  # one row: dividing it is no clipping
        assert found["rms"] == pytest.approx(numbers(grad)["rms"], rel=1e-5)


def test_a_fused_step_that_is_skipped_has_no_update() -> None:
    model = net().float()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with initlab.probe(model, optimizer=optimizer) as p:
        for k in range(2):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(X.float()), Y) * (math.inf if k == 0 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert set(p.frame().query("tensor == 'update'")["step"]) == {1}


CLIPS: dict[str, Callable[[nn.Module], object]] = {
    "norm": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.01),
    "value": lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.001),
    "by hand": lambda m: [p.grad.data.mul_(0.5) for p in m.parameters() if p.grad is not None],
    "another": lambda m: [setattr(p, "grad", p.grad.sign()) for p in m.parameters() if p.grad is not None],
}


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_gradients_before_and_after_clipping(name: str, accumulated: int) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    kept: list[list[dict[str, float]]] = []
    with initlab.probe(model, optimizer=optimizer) as p:
        for _ in range(2):
            optimizer.zero_grad()
            for part in range(accumulated):
                F.cross_entropy(model(X + part), Y).backward()
            kept.append([numbers(w.grad) for w in model.parameters() if w.grad is not None])
            CLIPS[name](model)
            kept[-1] += [numbers(w.grad) for w in model.parameters() if w.grad is not None]
            optimizer.step()
    rows = p.frame()
    for step, found in enumerate(kept):
        for k, (parameter, _) in enumerate(model.named_parameters()):
            module, part = parameter.split(".")
            words = {"step": step, "name": module, "part": part, "direction": "backward"}
            assert not differences(one(rows, **words, op="backward"), found[k])
            assert not differences(one(rows, **words, op=""), found[k + 4])


def test_gradients_that_nobody_changes_have_one_row() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with initlab.probe(model, optimizer=optimizer) as p:
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
    assert not (p.frame()["op"] == "backward").any()


@pytest.mark.parametrize(("out", "target"), [((N, 1), (N,)), ((N,), (N, 1))])
@pytest.mark.parametrize("loss", [lambda z, y: (z - y).square().mean(), lambda z, y: (y - z).abs().sum()])
def test_a_prediction_and_a_target_that_broadcast_are_named(
    out: tuple[int, ...], target: tuple[int, ...], loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    model, y = net(1), torch.randn(N, dtype=torch.float64).reshape(target)
    says = rf"the loss compares a prediction \({N}.*\) with a target .* they broadcast to \({N}, {N}\)"
    with pytest.warns(UserWarning, match=says):
        initlab.measure(model, X, y, lambda z, y: loss(z.reshape(out), y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        initlab.measure(model, X, y.reshape(out), lambda z, y: loss(z.reshape(out), y))


def test_a_scaled_loss_without_an_optimizer() -> None:
    model = net().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    value = F.cross_entropy(model(X.float()), Y)
    gradients = torch.autograd.grad(value, list(model.parameters()))
    with initlab.probe(model) as p:
        scaler.scale(F.cross_entropy(model(X.float()), Y)).backward()
        scaler.step(optimizer)
    rows = p.frame()
    assert one(rows, tensor="loss")["mean"] == pytest.approx(float(value.detach()), rel=1e-6)
    assert set(rows["loss_scale"]) == {1024.0}
    found = one(rows, name="2", tensor="weight", direction="backward")
    assert found["rms"] == pytest.approx(numbers(gradients[2])["rms"], rel=1e-6)


def test_a_backward_pass_that_begins_with_another_number_than_1() -> None:
    model = net()
    with initlab.probe(model) as p:
        F.cross_entropy(model(X), Y).backward(torch.tensor(0.5, dtype=torch.float64))
    assert one(p.frame(), tensor="loss")["chance_loss"] == pytest.approx(math.log(C), rel=1e-12)
    with initlab.probe(model) as p:
        losses = [F.cross_entropy(model(X), Y) / k for k in (1, 2)]
        torch.autograd.backward(losses, [torch.tensor(k, dtype=torch.float64) for k in (0.5, 2.0)])
    found = p.frame().query("tensor == 'loss'")["chance_loss"].tolist()
    assert found == pytest.approx([math.log(C), math.log(C) / 2], rel=1e-12)


def test_what_others_put_around_torchs_functions_stays() -> None:
    heard: list[int] = []
    inner = torch.autograd.backward

    def outer(*args: object, **words: object) -> None:
        heard.append(1)
        inner(*args, **words)  # type: ignore[arg-type]

    torch.autograd.backward = outer  # type: ignore[assignment]
    try:
        model = net()
        for _ in range(2):
            with initlab.probe(model) as p:
                F.cross_entropy(model(X), Y).backward()
            assert len(p.frame().query("tensor == 'loss'")) == 1
        assert len(heard) == 2 and torch.autograd.backward is outer
    finally:
        torch.autograd.backward = inner


def test_a_scaler_with_an_object_of_another_kind_goes_on() -> None:
    class Duck:
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            self.param_groups = [{"params": parameters}]
            self.steps = 0

        def step(self) -> None:
            self.steps += 1

    model, other = net().float(), nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    duck, scaler = Duck(list(other.parameters())), torch.amp.GradScaler("cpu", init_scale=4.0)
    with initlab.probe(model, optimizer=optimizer):
        scaler.scale(F.cross_entropy(model(X.float()), Y) + other(X.float()).sum()).backward()
        scaler.step(duck)  # type: ignore[arg-type]
        scaler.step(optimizer)
    assert duck.steps == 1


def test_a_long_sum_of_cross_entropies_is_one() -> None:
    def loss(z: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(z[k : k + 1], Y[k : k + 1]) for k in range(N)]).sum()

    row = one(initlab.measure(net(), X, loss=loss), tensor="loss")
    assert row["chance_loss"] == pytest.approx(N * math.log(C), rel=1e-12) and row["op"] == "cross_entropy"
    squared = one(initlab.measure(net(), X, loss=lambda z: F.cross_entropy(z, Y) ** 2), tensor="loss")
    assert math.isnan(squared["chance_loss"])


def ask(loss: Tensor, parameters: list[nn.Parameter]) -> None:
    for p, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.grad = grad


WAYS: dict[str, Callable[[Tensor, list[nn.Parameter]], None]] = {
    "method": lambda loss, parameters: loss.backward(),
    "kept": lambda loss, parameters: backward(loss),
    "inputs": lambda loss, parameters: backward(loss, inputs=parameters),
    "grad": ask,
}


def test_a_loss_has_a_row_whichever_way_it_is_differentiated() -> None:
    """With the gradients before they were clipped; `backward` was taken from torch before a probe opened."""
    found = {}
    for name, way in WAYS.items():
        model = net(3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with initlab.probe(model, optimizer=optimizer) as p:
            for _ in range(2):
                optimizer.zero_grad()
                way(model(X).square().mean(), list(model.parameters()))
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
                optimizer.step()
        found[name] = p.frame()
        pd.testing.assert_frame_equal(found[name], found["method"])
    rows = found["method"]
    assert (rows["tensor"] == "loss").sum() == 2 and (rows["op"] == "backward").sum() == 8


def test_a_gradient_penalty_begins_at_no_loss() -> None:
    """The inner pass asks for gradients of the input alone; one of many at once has no rows at all."""
    model = net(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = X.clone().requires_grad_()
    with initlab.probe(model, optimizer=optimizer) as p:
        out = model(x)
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        each = torch.eye(3, dtype=torch.float64)[:, None].expand(3, N, 3)
        torch.autograd.grad(out, list(model.parameters()), each, is_grads_batched=True, retain_graph=True)
        (out.square().mean() + grad.square().mean()).backward()
        optimizer.step()
    rows = p.frame()
    assert rows.loc[rows["tensor"] == "loss", "op"].tolist() == ["add"]
    assert rows.loc[rows["tensor"] == "loss", "rms"].item() == pytest.approx(
        float((out.square().mean() + grad.square().mean()).detach()), rel=1e-12
    )
    assert not (rows["op"] == "backward").any()
