"""What a layer uses for its weight: computed from other parameters, lent for a call, replaced in a run."""

from collections.abc import Callable

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

import initlab
from tests.probes.by_hand import differences, numbers
from tests.probes.test_functions import one

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


class Operator(nn.Module):
    """A weight of its own, used by an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def _pruned(layer: nn.Module) -> nn.Module:
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


def _symmetric(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 6, bias=False).double(), Operator], ids=["module", "operator"])
@pytest.mark.parametrize(
    "change",
    [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm, nn.utils.spectral_norm,
     _pruned, _symmetric],
)  # fmt: skip
def test_a_computed_weight_has_its_values_gradient_and_update(
    change: Callable[[nn.Module], nn.Module], layer: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(change(layer()), nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    kept: list[tuple[dict[str, float], dict[str, float], Tensor]] = []
    with initlab.probe(model, optimizer=optimizer) as p:
        for _ in range(2):
            optimizer.zero_grad()
            used: list[Tensor] = []
            handle = model[0].register_forward_hook(lambda m, a, out, used=used: used.append(out))
            out = model(X)
            handle.remove()
            out.square().mean().backward()
            # z = x W^T, or x W, so that the gradient of W is that of z times x
            z = used[0].detach().requires_grad_()
            (grad,) = torch.autograd.grad(z.tanh().square().mean(), z)
            of_weight = X.T @ grad if layer is Operator else grad.T @ X
            weight = torch.linalg.lstsq(X, z.detach()).solution
            weight = weight if layer is Operator else weight.T
            kept.append((numbers(weight), numbers(of_weight), weight))
            optimizer.step()
    rows = p.frame()
    assert not rows.duplicated(["step", "layer", "tensor", "direction", "name", "part", "op", "call", "pass"]).any()
    for step, (values, gradient, _) in enumerate(kept):
        words = {"step": step, "name": "0", "part": "weight", "layer": 1}
        for direction, wanted in (("forward", values), ("backward", gradient)):
            row = one(rows, **words, tensor="weight", direction=direction)
            # the weight is found by solving z = x W^T: float64 times the condition of x
            assert row["rms"] == pytest.approx(wanted["rms"], rel=1e-9)
            assert row["max"] == pytest.approx(wanted["max"], rel=1e-9)
    if change not in (parametrizations.spectral_norm, nn.utils.spectral_norm):  # which go on with their iteration
        update = one(rows, step=0, tensor="update", name="0", part="weight")
        assert update["rms"] == pytest.approx(numbers(kept[1][2] - kept[0][2])["rms"], rel=1e-8)
        assert update["update_ratio"] == pytest.approx(update["rms"] / kept[0][0]["rms"], rel=1e-9)
    hidden = rows[rows["tensor"] == "parameter"]
    assert len(hidden) and (hidden["layer"] == 1).all()
    assert set(rows.loc[rows["tensor"] == "weight", "part"]) == {"weight"}


@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 6, bias=False).double(), Operator], ids=["module", "operator"])
def test_weights_that_are_lent_for_a_call_are_those_that_are_shown(layer: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer(), nn.Tanh())
    lent = {name: (3 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    with initlab.probe(model) as p:
        loss = functional_call(model, lent, (X,)).square().mean()
        loss.backward()
    rows = p.frame()
    (weight,) = lent.values()
    assert weight.grad is not None
    assert not differences(one(rows, tensor="weight", direction="forward"), numbers(weight))
    assert not differences(one(rows, tensor="weight", direction="backward"), numbers(weight.grad))


def test_one_step_inside_of_another_has_both_weights() -> None:
    """As in learning to learn: the gradient of the parameters goes through weights that are none."""
    torch.manual_seed(0)
    model = nn.Linear(6, 2, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with initlab.probe(model, optimizer=optimizer) as p:
        (grad,) = torch.autograd.grad(model(X).square().mean(), model.weight, create_graph=True)
        fast = model.weight - 0.5 * grad
        functional_call(model, {"weight": fast}, (X,)).square().mean().backward()
        before = model.weight.detach().clone()
        optimizer.step()
    rows = p.frame()
    words = {"tensor": "weight", "direction": "forward"}
    assert not differences(one(rows, **words, op=""), numbers(before))
    assert not differences(one(rows, **words, op="replaced", call=1), numbers(fast))


def test_a_parameter_that_is_replaced_is_forgotten() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    values: list[dict[str, float]] = []
    with initlab.probe(model, optimizer=torch.optim.SGD(model.parameters(), 0.1)) as p:
        for step in range(3):
            if step == 2:
                model[2].weight = nn.Parameter(10 * model[2].weight.detach())
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            values.append(numbers(model[2].weight))
            model(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    rows = p.frame()
    for step, wanted in enumerate(values):
        found = one(rows, step=step, name="2", tensor="weight", direction="forward", op="")
        assert not differences(found, wanted)


def complex_rows(loop: bool) -> tuple[pd.DataFrame, nn.Module]:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(6, 4, dtype=torch.complex128)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x.to(torch.complex128)).abs()
            return out

    model = Model()
    if not loop:
        return initlab.measure(model, X, loss=torch.sum), model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with initlab.probe(model, optimizer=optimizer) as p:
        model(X).sum().backward()
        optimizer.step()
    return p.frame(), Model()


@pytest.mark.parametrize("loop", [True, False])
def test_complex_numbers_are_measured_as_two(loop: bool) -> None:
    """Units are real and imaginary parts."""
    rows, model = complex_rows(loop)
    layer = model.get_submodule("layer")
    z = layer(X.to(torch.complex128))
    z.retain_grad()
    z.abs().sum().backward()
    assert z.grad is not None and isinstance(layer.weight, Tensor) and layer.weight.grad is not None
    for words, tensor in (
        ({"tensor": "preactivation", "direction": "forward"}, z),
        ({"tensor": "preactivation", "direction": "backward"}, z.grad),
        ({"tensor": "weight", "direction": "forward"}, layer.weight),
        ({"tensor": "weight", "direction": "backward"}, layer.weight.grad),
    ):
        wanted = numbers(torch.view_as_real(tensor.detach()).flatten(-2))
        assert not differences(one(rows, name="layer", **words), {k: wanted[k] for k in ("count", "rms", "min", "max")})
