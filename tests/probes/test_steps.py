"""What a step is, in loops as people write them: several optimizers, scalers, optimizers made anew or in the backward.

Every value is held against the tensor itself, caught in the loop without any hook of initlab's.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer

import initlab
from initlab.errors import UsageError
from tests.probes.by_hand import differences, numbers
from tests.probes.test_functions import one

X, Y = torch.randn(16, 8, generator=torch.Generator().manual_seed(3)), torch.arange(16) % 2


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def loss_of(model: nn.Module) -> Tensor:
    return cross_entropy(model(X), Y)


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def values(rows: pd.DataFrame, tensor: str, name: str, direction: str = "forward") -> dict[int, float]:
    """rms by step; a step with two such rows is a mistake."""
    found = rows[(rows["tensor"] == tensor) & (rows["name"] == name) & (rows["direction"] == direction)]
    assert not found["step"].duplicated().any()
    return dict(zip(found["step"].tolist(), found["rms"].tolist(), strict=True))


def close(found: dict[int, float], wanted: dict[int, float]) -> None:
    assert found == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("given", ["both", "first", "last"])
@pytest.mark.parametrize("every", [1, 2])
def test_two_optimizers_make_one_step(given: str, every: int) -> None:
    """Also of one that was not named: it holds parameters of the model, and what happened counts."""
    model = net()
    first, last = SGD(model[0].parameters(), 0.1), Adam(model[2].parameters(), 0.01)
    named: dict[str, Optimizer | list[Optimizer]] = {"both": [first, last], "first": first, "last": last}
    weights: dict[str, dict[int, float]] = {"0": {}, "2": {}}
    moved: dict[str, dict[int, float]] = {"0": {}, "2": {}}
    gradients: dict[str, dict[int, float]] = {"0": {}, "2": {}}
    with initlab.probe(model, optimizer=named[given], every=every) as p:
        for step in range(5):
            first.zero_grad(), last.zero_grad()
            loss_of(model).backward()
            before = {name: model[int(name)].weight.detach().clone() for name in weights}
            if step % every == 0:
                for name in weights:
                    weights[name][step] = rms(before[name])
                    gradients[name][step] = rms(model[int(name)].weight.grad)
            first.step()
            last.step()
            if step % every == 0:
                for name in weights:
                    moved[name][step] = rms(model[int(name)].weight - before[name])
    rows = p.frame()
    for name in weights:
        close(values(rows, "weight", name), weights[name])
        close(values(rows, "update", name), moved[name])
        close(values(rows, "weight", name, "backward"), gradients[name])
    assert not rows.duplicated([*rows.columns[:7], "name", "part", "call"]).any()
    assert (rows["loss_scale"] == 1).all()


def test_an_update_has_only_what_is_held() -> None:
    """A part that no optimizer holds keeps its gradients from step to step; its values have rows, updates none."""
    model = net()
    optimizer = SGD(model[2].parameters(), 0.1)
    seen: dict[int, float] = {}
    with initlab.probe(model, optimizer=optimizer) as p:
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            seen[step] = rms(model[0].weight.grad)
            optimizer.step()
    rows = p.frame()
    assert values(rows, "update", "0") == {} and set(values(rows, "update", "2")) == {0, 1, 2}
    close(values(rows, "weight", "0", "backward"), seen)
    close(values(rows, "weight", "0"), dict.fromkeys(range(3), rms(model[0].weight)))
    preactivations = rows[(rows["tensor"] == "preactivation") & (rows["direction"] == "forward")]
    assert preactivations.groupby("step").size().tolist() == [2, 2, 2] and set(preactivations["call"]) == {0}


def test_an_optimizer_made_anew_in_the_middle_of_a_loop() -> None:
    """After a warm-up the whole network is trained, by an optimizer that the probe has never been told of."""
    model = net()
    optimizer: Optimizer = SGD(model[2].parameters(), 0.1)
    moved: dict[int, float] = {}
    with initlab.probe(model, optimizer=optimizer) as p:
        for step in range(4):
            if step == 2:
                optimizer = Adam(model.parameters(), 0.01)
            model.zero_grad()
            loss_of(model).backward()
            before = model[0].weight.detach().clone()
            optimizer.step()
            if step >= 2:
                moved[step] = rms(model[0].weight - before)
    rows = p.frame()
    close(values(rows, "update", "0"), moved)
    assert set(rows["step"]) == {0, 1, 2, 3}


def test_the_two_phases_of_an_adversarial_pair() -> None:
    """Each phase is a step with its own passes and updates; the optimizer of the other network is none of this one."""
    torch.manual_seed(0)
    maker, judge = nn.Linear(4, 8), net()
    first, second = SGD(judge.parameters(), 0.1), SGD(maker.parameters(), 0.1)
    seen: dict[int, list[float]] = {}
    with initlab.probe(nn.ModuleList([maker, judge]), optimizer=[first, second], layers="*") as p:
        for step in range(0, 6, 2):
            noise = torch.randn(16, 4)
            judge.zero_grad(), maker.zero_grad()
            fake = maker(noise)
            cross_entropy(judge(fake.detach()), Y).backward()
            first.step()
            judge.zero_grad(), maker.zero_grad()
            (-cross_entropy(judge(maker(noise)), Y)).backward()
            seen[step] = [rms(maker.weight.grad)]
            second.step()
    rows = p.frame()
    update = rows[rows["tensor"] == "update"]
    by_step = update.groupby("step")["name"].agg(sorted).to_dict()
    assert by_step == {0: ["1.0", "1.2"], 1: ["0"], 2: ["1.0", "1.2"], 3: ["0"], 4: ["1.0", "1.2"], 5: ["0"]}
    found = values(rows, "weight", "0", "backward")
    assert [found[k] for k in (1, 3, 5)] == pytest.approx([seen[k][0] for k in (0, 2, 4)], rel=1e-12)


def test_optimizers_that_live_in_the_backward_pass() -> None:
    """Each parameter is updated as soon as its gradient is there; all of that is one step."""
    model = net()
    own = {p: SGD([p], 0.1) for p in model.parameters()}

    def update(p: nn.Parameter) -> None:
        own[p].step()
        own[p].zero_grad()

    handles = [p.register_post_accumulate_grad_hook(update) for p in model.parameters()]
    moved: dict[int, float] = {}
    with initlab.probe(model, optimizer=list(own.values())) as p:
        for step in range(3):
            before = model[0].weight.detach().clone()
            loss_of(model).backward()
            moved[step] = rms(model[0].weight - before)
    for handle in handles:
        handle.remove()
    rows = p.frame()
    close(values(rows, "update", "0"), moved)
    assert set(values(rows, "update", "2")) == {0, 1, 2} and set(values(rows, "weight", "2", "backward")) == {0, 1, 2}
    assert (
        rows[rows["tensor"] == "preactivation"].groupby(["step", "name", "direction"], observed=True).size().eq(1).all()
    )


@pytest.mark.parametrize("clip", [False, True])
def test_a_scaled_loss_has_gradients_of_the_loss(clip: bool) -> None:
    """With GradScaler(init_scale=1024): activations and parameters in one unit, the scale in its column."""
    plain, scaled = net(), net()
    frames, histograms = [], list[pd.DataFrame]()
    for model, scale in ((plain, 1.0), (scaled, 1024.0)):
        optimizer = SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=True, growth_interval=10**6)
        with initlab.probe(model, optimizer=optimizer, histograms=True) as p:
            for _ in range(3):
                optimizer.zero_grad()
                scaler.scale(loss_of(model)).backward()
                if clip:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
                scaler.step(optimizer)
                scaler.update()
        frames.append(p.frame())
        assert (frames[-1]["loss_scale"] == scale).all()
        histograms.append(p.histograms().query("direction == 'backward' and tensor != 'weight' and tensor != 'bias'"))
    numbers = ["mean", "std", "rms", "q", "norm", "min", "max", "std_within", "cosine", "frac_zero"]
    pd.testing.assert_frame_equal(frames[0][numbers], frames[1][numbers], check_exact=False, rtol=1e-5, atol=1e-9)
    first, other = (found["first"].tolist() for found in histograms)
    assert first == other and len(first) == 3 * 3
    assert torch.amp.GradScaler.step.__module__ == "torch.amp.grad_scaler"


def test_a_step_that_the_scaler_skips_is_a_step_without_updates() -> None:
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with initlab.probe(model, optimizer=optimizer) as p:
        for step in range(4):
            optimizer.zero_grad()
            loss = loss_of(model) * (torch.inf if step == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    rows = p.frame()
    assert set(values(rows, "update", "0")) == {0, 2, 3}
    skipped = rows[(rows["step"] == 1) & (rows["direction"] == "backward") & (rows["tensor"] == "weight")]
    assert len(skipped) == 2 and (skipped["n_nan"] + skipped["n_inf"] > 0).all()
    scales = rows.groupby("step")["loss_scale"].first()
    assert scales.to_dict() == {0: 1024, 1: 1024, 2: 512, 3: 512}
    assert rows[rows["tensor"] == "preactivation"].groupby(["step", "direction"], observed=True).size().eq(2).all()


class Wrapper(Optimizer):
    """An optimizer around another, as libraries make them: it is none of torch's own and was never initialized."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.optimizer.step()


def test_an_optimizer_that_wraps_another() -> None:
    model = net()
    wrapped = Wrapper(SGD(model.parameters(), 0.1))
    with initlab.probe(model, optimizer=wrapped) as p:
        for _ in range(2):
            model.zero_grad()
            loss_of(model).backward()
            wrapped.step()
    assert set(values(p.frame(), "update", "2")) == {0, 1}


@pytest.mark.parametrize(
    ("loop", "text"),
    [
        ("nothing", "the model was never called while it was watched"),
        ("without autograd", "the model was called 3 times, always without autograd"),
        ("without a step", "the model was called 3 times, but no optimizer that holds its parameters has stepped"),
    ],
)
def test_what_did_not_happen_is_what_is_said(loop: str, text: str) -> None:
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with initlab.probe(model, optimizer=optimizer) as p:
            for _ in range(0 if loop == "nothing" else 3):
                if loop == "without autograd":
                    with torch.no_grad():
                        model(X)
                else:
                    loss_of(model).backward()
    assert len(caught) == 1 and text in str(caught[0].message)
    assert (len(p.frame()) > 0) == (loop == "without a step")


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        ([], "optimizer=[]: give one"),
        ("sgd", "optimizer='sgd': must be a torch.optim.Optimizer, or several"),
        ([SGD(net().parameters(), 0.1)], "SGD: holds none of the model's parameters"),
        ([3], "optimizer=3: must be"),
        (SGD, "must be a torch.optim.Optimizer"),
    ],
)
def test_what_is_no_optimizer_of_the_model_is_one_line(optimizer: object, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        initlab.probe(net(), optimizer=optimizer)  # type: ignore[arg-type]
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_kept_weights_are_let_go_where_the_next_recorded_step_is_far() -> None:
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    with initlab.probe(model, optimizer=optimizer, every=3) as p:
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            parameters = p._network._parameters  # type: ignore[union-attr]
            assert parameters is not None and parameters._before == []
    assert set(values(p.frame(), "update", "0")) == {0, 3}


class Centred(SGD):
    """Changes gradients, and calls the step that it inherits."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad -= p.grad.mean()
        return super().step(closure)


class Chained(Optimizer):
    """Made of two others, one for weights and one for biases."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        given = list(parameters)
        super().__init__(given, {})
        self.parts = [SGD([p for p in given if p.ndim == 2], 0.1), SGD([p for p in given if p.ndim == 1], 0.2)]

    def step(self, closure: Any = None) -> Any:
        for part in self.parts:
            part.step()


class Lookahead(Optimizer):
    """Every second step goes half of the way back."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        given = list(parameters)
        super().__init__(given, {})
        self.optimizer, self.n = SGD(given, 0.1), 0
        self.slow = [p.detach().clone() for p in given]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.optimizer.step()
        self.n += 1
        for p, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
            if self.n % 2 == 0:
                p.copy_(slow.add_(p - slow, alpha=0.5))


@pytest.mark.parametrize("kind", [Centred, Chained, Lookahead])
def test_an_optimizer_made_of_others_makes_one_step(kind: type[Optimizer]) -> None:
    model = net()
    SGD(model.parameters(), 0.1)  # torch hears the steps of a class from its first object on
    optimizer = kind(model.parameters(), lr=0.1) if kind is Centred else kind(model.parameters())  # type: ignore[call-arg]
    moved = []
    with initlab.probe(model, optimizer=optimizer) as p:
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model).backward()
            before = model[0].weight.detach().clone()
            optimizer.step()
            moved.append(model[0].weight.detach() - before)
    rows = p.frame()
    assert set(rows["step"]) == {0, 1, 2, 3}
    for step, wanted in enumerate(moved):
        assert not differences(one(rows, step=step, name="0", tensor="update"), numbers(wanted))
        assert len(rows.query(f"step == {step} and name == '0' and part == 'bias' and op == ''")) == 2


def test_a_step_that_fails_is_not_under_way_for_ever() -> None:
    class Failing(SGD):
        fails = True

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise ArithmeticError
            return super().step(closure)

    model = net()
    optimizer = Failing(model.parameters(), lr=0.1)
    with initlab.probe(model, optimizer=optimizer) as p:
        for k in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.fails = k == 0
            if k == 0:
                with pytest.raises(ArithmeticError):
                    optimizer.step()
            else:
                optimizer.step()
    assert len(p.frame().query("tensor == 'update' and name == '0'")) == 2


def test_the_scaler_of_another_model_scales_nothing_here() -> None:
    ours, theirs = net(), net()
    first, second = SGD(ours.parameters(), 0.1), SGD(theirs.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    with initlab.probe(ours, optimizer=first) as p:
        for _ in range(20):
            first.zero_grad()
            loss = loss_of(ours)
            loss.backward()
            second.zero_grad()
            scaler.scale(loss_of(theirs)).backward()
            scaler.step(second)
            scaler.update()
            first.step()
    rows = p.frame()
    assert (rows["loss_scale"] == 1).all() and not (rows["op"] == "backward").any()
    last = rows.query("tensor == 'loss' and step == 19")["mean"].item()
    assert last == pytest.approx(float(loss.detach()), rel=1e-6)


def test_gradients_of_a_pass_that_was_dropped_are_no_gradients_before_clipping() -> None:
    model = net()
    optimizer = SGD(model.parameters(), 0.01)
    with initlab.probe(model, optimizer=optimizer) as p:
        for _ in range(50):
            (100 * loss_of(model)).backward()
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not (p.frame()["op"] == "backward").any()
