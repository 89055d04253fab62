"""Nets whose control flow, weights or modules change while they are watched: nothing is lost and nothing invented."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import initlab
from tests.probes.by_hand import differences, numbers
from tests.probes.test_functions import one

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


CHANGES: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]] = {
    "nothing, then pruned": (lambda m: None, lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "pruned, then not": (lambda m: prune.l1_unstructured(m, "weight", 0.5), lambda m: prune.remove(m, "weight")),
    "nothing, then parametrized": (
        lambda m: None, lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
    ),
    "weight_norm, then not": (
        parametrizations.weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight"),
    ),
    "older weight_norm, then not": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_what_computes_a_weight_may_change_in_mid_run(name: str) -> None:
    """Each step has one row of the weight that is used, under the layer's own number."""
    first, then = CHANGES[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    first(model[2])
    used: list[dict[str, float]] = []
    with initlab.probe(model, optimizer=torch.optim.SGD(model.parameters(), 0.1)) as p:
        for step in range(4):
            if step == 2:
                then(model[2])
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            optimizer.zero_grad()
            out = model(X)
            weight = model[2].weight
            assert isinstance(weight, Tensor)
            used.append(numbers(weight.detach()))
            out.square().mean().backward()
            optimizer.step()
    rows = p.frame()
    for step, wanted in enumerate(used):
        row = one(rows, step=step, name="2", tensor="weight", part="weight", direction="forward")
        assert not differences(row, wanted) and row["layer"] == 2
        assert len(rows.query(f"step == {step} and name == '2' and tensor == 'update'")) == 1


class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad / 2


class Odd(nn.Module):
    """Two layers between which a case does something odd."""

    def __init__(self, case: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.case = case
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.store = Store()

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        h = F.relu(self.first(x))
        if self.case == "a rule of one's own behind":
            h = Half.apply(h)  # type: ignore[no-untyped-call]
        elif self.case == "a module without output":
            self.store(self.second(h))
            h = self.store.kept
        elif self.case == "a product after a ReLU by product":
            z = self.second(h)
            z = self.second(z * (z > 0))
            h = z * torch.full_like(z, 0.5)
        elif self.case == "an error that is caught":
            try:
                h = self.second(h[:, :5])
            except RuntimeError:
                h = F.relu(self.second(h))
        elif self.case == "scaled in place":
            h = self.second(h)
            h = h.mul_(3)
        elif self.case == "calls itself" and depth:
            return F.relu(self.forward_again(h, depth - 1)) + x[:, :2]
        out: Tensor = self.last(h)
        return out

    def forward_again(self, h: Tensor, depth: int) -> Tensor:
        out: Tensor = self(h, depth)
        return out


class Store(nn.Module):
    def forward(self, x: Tensor) -> None:
        self.kept = F.relu(x)


WANTED = {
    "a rule of one's own behind": {("", "relu"): 1},
    "a module without output": {("", "relu"): 1, ("store", "relu"): 1},
    "a product after a ReLU by product": {("", "relu"): 1, ("", "mul"): 1},
    "an error that is caught": {("", "relu"): 2},
    "scaled in place": {("", "relu"): 1},
    "calls itself": {("", "relu"): 5, ("", "add"): 2},
}


@pytest.mark.filterwarnings("ignore:probe. (never called|ran, but what came out):UserWarning")
@pytest.mark.parametrize("case", WANTED)
@pytest.mark.parametrize("loop", [True, False], ids=["loop", "pass"])
def test_functions_around_odd_control_flow_have_their_rows(case: str, loop: bool) -> None:
    model = Odd(case).double()
    if loop:
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        with initlab.probe(model, optimizer=optimizer) as p:
            model(X).square().mean().backward()
            optimizer.step()
        rows = p.frame()
    else:
        rows = initlab.measure(model, X, loss=lambda out: out.square().mean())
    functions = rows[rows["direction"].eq("forward") & rows["op"].isin(["relu", "add", "mul"])]
    assert functions.groupby(["name", "op"], observed=True).size().to_dict() == WANTED[case]
    assert not rows.duplicated(["layer", "tensor", "direction", "name", "part", "call", "op", "pass"]).any()
    if case == "calls itself":
        assert sorted(functions.query("op == 'add'")["call"]) == [0, 1]
        assert set(functions.query("part == 'relu'")["call"]) == {0, 1, 2}


def test_what_a_block_writes_into_its_output_has_a_row() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.inner(x)
            return h.mul_(3)

    torch.manual_seed(0)
    model = nn.Sequential(Scaled(), nn.Linear(6, 2)).double()
    rows = initlab.measure(model, X)
    inner = model[0].inner(X).detach()
    assert not differences(one(rows, name="0.inner", part="", direction="forward"), numbers(inner, 1))
    assert not differences(one(rows, name="0", part="", direction="forward"), numbers(3 * inner, 1))


class Annealed(nn.Module):
    """An activation of one's own whose slope grows with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = 0.0

    def forward(self, z: Tensor) -> Tensor:
        self.slope += 1
        return torch.tanh(z * self.slope)


def test_an_activation_that_changes_is_looked_at_anew() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Annealed(), nn.Linear(6, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with initlab.probe(model, optimizer=optimizer) as p:
        for _ in range(4):
            model(X).square().mean().backward()
            optimizer.step()
    z = model[0](X).detach()
    rows = p.frame()
    for step, slope in enumerate([1.0, 2, 3, 4]):
        share = float((1 - torch.tanh(z * slope) ** 2 < 0.05).double().mean())
        row = one(rows, step=step, name="0", tensor="preactivation", direction="forward")
        assert row["frac_saturated"] == pytest.approx(share, abs=1.5 / z.numel())  # an entry at the very edge


def test_modules_called_by_name_and_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.act, self.last = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.act(input=self.inner(input=x))
            out: Tensor = self.last(F.linear(h, self.inner.weight.t()))
            return out

    torch.manual_seed(0)
    model = Tied().double()
    rows = initlab.measure(model, X, loss=torch.sum)
    share = float((1 - torch.tanh(model.inner(X)) ** 2 < 0.05).double().mean())
    assert one(rows, name="inner", part="", direction="forward")["frac_saturated"] == share
    assert set(rows.loc[(rows["name"] == "inner") & rows["part"].ne(""), "layer"]) == {1}
    assert one(rows, part="linear", direction="forward")["layer"] == 2


def test_a_parametrized_weight_that_only_functions_use_has_its_rows() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = parametrizations.weight_norm(nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.inner.weight).tanh(), self.inner.weight)

    torch.manual_seed(0)
    model = Shared().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with initlab.probe(model, optimizer=optimizer) as p:
        before = model.inner.weight.detach().clone()
        model(X).square().mean().backward()
        optimizer.step()
    rows = p.frame()
    assert not differences(one(rows, name="inner", tensor="weight", direction="forward"), numbers(before))
    moved = numbers(model.inner.weight.detach() - before)
    assert one(rows, name="inner", tensor="update")["rms"] == pytest.approx(moved["rms"], rel=1e-9)


def test_a_weight_that_grows_in_place() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with initlab.probe(model, optimizer=optimizer) as p:
        for step in range(3):
            if step == 2:
                model[1].weight.data = torch.randn(5, 4).double()
                model[1].bias.data = torch.zeros(5).double()
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
    counts = p.frame().query("name == '1' and tensor == 'update'").set_index("step")["count"].to_dict()
    assert counts == {0: 8, 1: 8, 2: 20}


class Mapped(nn.Module):
    """A part that is called by vmap inside of the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.func.vmap(lambda row: torch.tanh(self.inner(row)))(x))
        return out


@pytest.mark.parametrize("loop", [True, False], ids=["loop", "pass"])
def test_a_part_under_vmap_is_named(loop: bool) -> None:
    model = Mapped().double()
    with pytest.warns(UserWarning, match="inside of a transform only, so outside of every step: inner"):
        if loop:
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            with initlab.probe(model, optimizer=optimizer) as p:
                model(X).square().mean().backward()
                optimizer.step()
            rows = p.frame()
        else:
            rows = initlab.measure(model, X, loss=torch.sum)
    assert one(rows, name="inner", tensor="weight", direction="forward")["count"] == 36
    assert len(rows.query("name == 'last' and tensor == 'preactivation' and direction == 'forward'")) == 1


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_hooks_of_the_user_on_gradients_of_modules_change_no_share() -> None:
    """torch then hands on other tensors than the layers have put out."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU()).double()
    wanted = initlab.measure(model, X, loss=torch.sum)["frac_saturated"]
    for module in model:
        module.register_full_backward_hook(lambda *_: None)
    found = initlab.measure(model, X, loss=torch.sum)["frac_saturated"]
    assert found.tolist() == pytest.approx(wanted.tolist(), nan_ok=True) and found.notna().sum() == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:probe. the model was called 4 times")
def test_an_optimizer_that_is_compiled_ends_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    before = model[0].weight.detach().clone()
    with initlab.probe(model, optimizer=optimizer, every=2):
        for _ in range(4):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            step()
    assert not torch.equal(model[0].weight, before)


class OwnSequential(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = x + F.gelu(layer(x))
        return x


class OwnDict(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.values():
            x = x + F.gelu(layer(x))
        return x


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    "kind", [lambda *m: OwnSequential(*m), lambda *m: OwnDict({str(k): one for k, one in enumerate(m)})]
)
def test_a_container_with_a_forward_of_its_own_is_a_block(kind: Callable[..., nn.Module], inside: bool) -> None:
    torch.manual_seed(0)
    block = kind(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    model = nn.Sequential(block, nn.Linear(6, 2).double()) if inside else block
    rows = initlab.measure(model, X, loss=torch.sum)
    forward = rows[rows["direction"] == "forward"]
    assert forward["op"].value_counts()[["gelu", "add"]].tolist() == [2, 2]
    assert set(forward.loc[forward["tensor"] == "stream", "name"]) == {"0" if inside else ""}


@pytest.mark.parametrize("make", [lambda x: (x * (x > 0)).to_sparse(), lambda x: x.to(torch.float8_e4m3fn)])
def test_a_module_that_makes_tensors_of_another_kind_is_named(make: Callable[[Tensor], Tensor]) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return make(x)

    model = nn.Sequential(nn.Linear(6, 6), Odd()).double()
    with pytest.warns(UserWarning, match=r"1 \((sparse_coo|float8_e4m3fn)\)"):
        rows = initlab.measure(model, X)
    assert {"0"} <= set(rows["name"])


def test_the_default_device_and_memory_that_is_taken_away() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    optimizer = torch.optim.SGD(model[2].parameters(), 0.1)
    with initlab.probe(model, optimizer=optimizer) as p:
        loss = model(X).square().mean()
        kept = model[0].weight.detach().clone()
        with torch.device("meta"):
            loss.backward()
            model[0].weight.untyped_storage().resize_(0)
            optimizer.step()
    model[0].weight.untyped_storage().resize_(kept.untyped_storage().nbytes())
    rows = p.frame()
    assert len(rows.query("name == '2' and tensor == 'update'")) == 1
    assert not len(rows.query("name == '0' and tensor == 'weight' and direction == 'forward'"))


def test_a_model_whose_forward_is_bypassed_is_said_to_be() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)

        def training_step(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(F.relu(self.first(x)))
            return out.square().mean()

    torch.manual_seed(0)
    model = Loop().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watched = initlab.probe(model, optimizer=optimizer)
    with pytest.warns(UserWarning, match="functions between the modules have no rows: "), watched as p:
        model.training_step(X).backward()
        before = numbers(model.first.weight.grad if model.first.weight.grad is not None else X)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
    row = one(p.frame(), name="first", part="weight", direction="backward", op="backward")
    assert not differences(row, before)
