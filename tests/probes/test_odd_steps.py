"""Steps as no tutorial has them: every row against hooks by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer
from torch.utils.checkpoint import checkpoint

import initlab
from tests.probes.by_hand import Trace, X, faults, mlp, numbers, once, square, watch


def test_sharpness_aware_minimization() -> None:
    """Two passes a step, the second at weights moved uphill, which are moved back before the optimizer steps."""

    def step(model: nn.Module, optimizers: list[Optimizer]) -> Tensor:
        optimizers[0].zero_grad()
        square(model).backward()
        moves = []
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
            for p in model.parameters():
                assert p.grad is not None
                moves.append(0.05 * p.grad / norm)
                p.add_(moves[-1])
        optimizers[0].zero_grad()
        loss = square(model)
        loss.backward()
        with torch.no_grad():
            for p, move in zip(model.parameters(), moves, strict=True):
                p.sub_(move)
        optimizers[0].step()
        return loss

    seen = watch(mlp(), step)
    seen.check()
    assert set(seen.rows.loc[seen.rows["name"] == "4", "call"]) == {0, 1}


def test_two_losses_one_after_the_other_through_one_graph() -> None:
    """Both backward passes have rows of their own; weights the sum."""

    def step(model: nn.Module, optimizers: list[Optimizer]) -> Tensor:
        optimizers[0].zero_grad()
        out = model(X)
        first, second = out[:, 0].square().mean(), out[:, 1:].abs().mean()
        first.backward(retain_graph=True)
        second.backward()
        optimizers[0].step()
        return first + second

    watch(mlp(), step).check()


def test_learning_to_learn() -> None:
    """An inner step by hand with a graph, a pass at the weights that it gives, and a gradient through both."""

    def step(model: nn.Module, optimizers: list[Optimizer]) -> Tensor:
        optimizers[0].zero_grad()
        weights = dict(model.named_parameters())
        grads = torch.autograd.grad(square(model), list(weights.values()), create_graph=True)
        fast = {name: p - 0.1 * g for (name, p), g in zip(weights.items(), grads, strict=True)}
        loss: Tensor = functional_call(model, fast, (X.flip(1),)).square().mean()
        loss.backward()
        optimizers[0].step()
        return loss

    watch(mlp(), step).check()


def test_a_step_is_left_out_where_the_loss_is_not_finite() -> None:
    """As loops do that guard themselves: what was computed for nothing belongs to the step that comes."""
    turn = [0]

    def make(model: nn.Module) -> list[Optimizer]:
        turn[0] = 0
        return [Adam(model.parameters(), 0.01)]

    def step(model: nn.Module, optimizers: list[Optimizer]) -> Tensor:
        optimizers[0].zero_grad()
        first = square(model)
        first.backward()
        turn[0] += 1
        if turn[0] == 2:
            optimizers[0].zero_grad()
            square(model).backward()
        optimizers[0].step()
        return first

    watch(mlp(), step, make, steps=3).check()


def test_layers_thaw_one_after_the_other() -> None:
    """`requires_grad` and a further group of parameters in mid-run."""
    turn = [0]

    def make(model: nn.Module) -> list[Optimizer]:
        turn[0] = 0
        model[:4].requires_grad_(False)
        return [SGD(model[4].parameters(), 0.1)]

    def step(model: nn.Module, optimizers: list[Optimizer]) -> Tensor:
        turn[0] += 1
        if turn[0] == 3:
            model[2].requires_grad_(True)
            optimizers[0].add_param_group({"params": list(model[2].parameters())})
        return once(model, optimizers, square)

    seen = watch(mlp(), step, make, steps=4)
    seen.trace.values = {k: v for k, v in seen.trace.values.items() if not k.word or k.name == "4"}
    seen.check()
    update = seen.rows[seen.rows["tensor"] == "update"].groupby("name", observed=True)["step"].agg(list).to_dict()
    assert update == {"2": [2, 3], "4": [0, 1, 2, 3]}


@pytest.mark.parametrize("every", [2, 3])
def test_every_kth_step_of_accumulated_gradients(every: int) -> None:
    """Two batches a step and clipped gradients: recorded steps are those of the trace."""
    rows, trace = None, Trace()
    for watched in (False, True):
        model = mlp()
        optimizer = SGD(model.parameters(), 0.1)
        probe = initlab.probe(model, optimizer=optimizer, every=every)
        if watched:
            probe.__enter__()
        else:
            trace.follow(model, [optimizer])
        for _ in range(5):
            optimizer.zero_grad()
            for part in X.chunk(2):
                (model(part).square().mean() / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            trace.end_step()
        if watched:
            probe.__exit__(None, None, None)
            rows = probe.frame()
        trace.step = 0 if watched else trace.step
    assert rows is not None and set(rows["step"]) == set(range(0, 5, every))
    trace.values = {place: found for place, found in trace.values.items() if place.step % every == 0}
    found = faults(rows, trace, "")
    assert not found, "\n".join(found[:20])


@pytest.mark.parametrize("scale", [2.0**10, 2.0**16])
def test_a_scaled_loss_over_several_batches_and_two_optimizers(scale: float) -> None:
    """Gradients of the loss, whatever multiplied it, in float32: powers of two change no digit."""
    frames = []
    for factor in (1.0, scale):
        model = mlp()
        optimizers = [SGD(model[:2].parameters(), 0.1), Adam(model[2:].parameters(), 0.01)]
        scaler = torch.amp.GradScaler("cpu", init_scale=factor, growth_interval=10**6)
        with initlab.probe(model, optimizer=optimizers) as p:
            for _ in range(3):
                model.zero_grad()
                for part in X.chunk(2):
                    scaler.scale(model(part).square().mean() / 2).backward()
                for optimizer in optimizers:
                    scaler.step(optimizer)
                scaler.update()
        frames.append(p.frame())
    plain, scaled = frames
    assert (scaled["loss_scale"] == scale).all()
    words = ["layer", "tensor", "direction", "name", "part", "call", "pass", "step"]
    assert plain[words].astype(str).values.tolist() == scaled[words].astype(str).values.tolist()
    for column in ("rms", "min", "max"):  # Adam's epsilon and a sum in another order: float32's last digits
        assert scaled[column].tolist() == pytest.approx(plain[column].tolist(), rel=1e-5, abs=1e-12)


def test_a_head_that_is_replaced_in_mid_run() -> None:
    """From then on the new one has the rows: what ran is what is shown."""
    model = mlp()
    heads: list[nn.Linear] = []
    with initlab.probe(model, optimizer=SGD(model.parameters(), 0.1)) as p:
        for turn in range(4):
            if turn == 2:
                model[4] = nn.Linear(8, 5)
            optimizer = SGD(model.parameters(), 0.1)
            heads.append(nn.Linear(8, model[4].out_features))
            heads[-1].load_state_dict(model[4].state_dict())
            once(model, [optimizer], square)
    rows = p.frame()
    own = rows[rows["name"].eq("4") & rows["direction"].eq("forward")]
    for turn, head in enumerate(heads):
        weight = own[own["step"].eq(turn) & own["tensor"].eq("weight")]
        out = own[own["step"].eq(turn) & own["tensor"].eq("preactivation")]
        assert len(weight) == len(out) == 1
        assert weight["count"].iloc[0] == head.weight.numel() and out["count"].iloc[0] == 12 * head.out_features
        assert weight["rms"].iloc[0] == pytest.approx(numbers(head.weight)["rms"], rel=1e-12)


def test_a_loop_over_time_with_a_cell() -> None:
    """A cell called seven times: each call has its rows, and the gradients of each."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.cell, self.head = nn.GRUCell(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(12, 8)
            for _ in range(7):
                h = self.cell(x, h)
            out: Tensor = self.head(h)
            return out

    seen = watch(Reader(), lambda m, o: once(m, o, square))
    seen.check()
    assert set(seen.rows.loc[seen.rows["name"] == "cell", "call"]) == set(range(7)) | {0}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_inside_of_checkpoints(reentrant: bool) -> None:
    """Every number is that of the plain net; what is computed three times has further calls."""

    class Nested(nn.Module):
        def __init__(self, checked: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.checked = checked

        def inner(self, x: Tensor) -> Tensor:
            return F.relu(self.second(x)) + x

        def outer(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return checkpoint(self.inner, h, use_reentrant=reentrant) if self.checked else self.inner(h)

        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(self.outer, x, use_reentrant=reentrant) if self.checked else self.outer(x)
            out: Tensor = self.head(h)
            return out

    x = X.clone().requires_grad_()
    frames = []
    for checked in (False, True):
        seen = watch(Nested(checked), lambda m, o: once(m, o, lambda net: net(x).square().mean()))
        rows = seen.rows[seen.rows["op"] != "input"]
        frames.append(
            rows.groupby(["step", "name", "tensor", "direction", "op"], observed=True)[["rms", "layer"]].agg(set)
        )
    plain, other = frames
    differing = [key for key in plain.index if key not in other.index or not (plain.loc[key] == other.loc[key]).all()]
    assert not differing


def test_a_validation_with_dropout_off_between_steps() -> None:
    """Under inference mode, and under no_grad: neither is a call of a step."""

    def step(model: nn.Module, optimizers: list[Optimizer]) -> Tensor:
        loss = once(model, optimizers, square)
        model.eval()
        with torch.inference_mode():
            model(X)
        with torch.no_grad():
            model(X)
        model.train()
        return loss

    model = mlp()
    model[3] = nn.Dropout(0.3)
    seen = watch(model, step, steps=3)
    seen.check()
    assert set(seen.rows["call"]) == {0}


def penalty(model: nn.Module, optimizers: list[Optimizer]) -> Tensor:
    """The norm of the gradient is all of the loss."""
    optimizers[0].zero_grad()
    grads = torch.autograd.grad(square(model), list(model.parameters()), create_graph=True)
    loss = torch.stack([g.square().sum() for g in grads]).sum()
    torch.autograd.backward(loss)
    optimizers[0].step()
    return loss


def halved(model: nn.Module, optimizers: list[Optimizer]) -> Tensor:
    """The user's hooks on parameters."""
    handles = [p.register_hook(lambda g: 0.5 * g) for p in model.parameters()]
    loss = once(model, optimizers, square)
    for handle in handles:
        handle.remove()
    return loss


def noisy(model: nn.Module, optimizers: list[Optimizer]) -> Tensor:
    """Gradients are changed after the backward pass."""
    optimizers[0].zero_grad()
    loss = square(model)
    loss.backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    for p in model.parameters():
        assert p.grad is not None
        p.grad.add_(torch.randn_like(p) * 0.01)
    optimizers[0].step()
    return loss


def rebound(model: nn.Module, optimizers: list[Optimizer]) -> Tensor:
    """The values of parameters get other memory."""
    loss = once(model, optimizers, square)
    for p in model.parameters():
        p.data = p.data.clone()
    return loss


@pytest.mark.parametrize("step", [penalty, halved, noisy, rebound])
def test_what_users_do_to_gradients_and_weights(step: Callable[[nn.Module, list[Optimizer]], Tensor]) -> None:
    model = mlp()
    model[1] = nn.Tanh()
    watch(model, step).check()
