"""The layers as the book writes them; what its lines lose, and the same mended."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.loss_table import LOSSES
from initlab.scratch import classes, layer_function, layers, mended_layers, modules
from initlab.scratch.mended_layers import WEIGHT_GRADS, add_g, clear_g, g_of, run_forward_and_backward


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, wanted: Tensor, limit: float = 1e-13) -> bool:
    """Relative in norm; shapes must be equal."""
    return found.shape == wanted.shape and bool((found - wanted).norm() <= limit * wanted.norm())


def by_autograd(f: Callable[..., Tensor], *values: Tensor) -> tuple[Tensor, ...]:
    leaves = [value.detach().clone().requires_grad_() for value in values]
    return torch.autograd.grad(f(*leaves), leaves)


# --- functions with .g ---


@pytest.mark.parametrize("grad", [layers.lin_grad, mended_layers.add_lin_grad])
def test_lin_grad_sets_all_three(grad: Callable[..., None]) -> None:
    inp, w, b, g = gaussian(4, 3), gaussian(3, 2, seed=1), gaussian(2, seed=2), gaussian(4, 2, seed=3)
    out = layers.lin(inp, w, b)
    out.g = g
    grad(inp, out, w, b)
    wanted = by_autograd(lambda *values: (layers.lin(*values) * g).sum(), inp, w, b)
    assert all(close(g_of(value), grad) for value, grad in zip((inp, w, b), wanted, strict=True))


@pytest.mark.parametrize("form", WEIGHT_GRADS)
def test_weight_gradients_have_one_value(form: str) -> None:
    """The sum of an outer product for each row; a batch of one is a single one."""
    inp, g = gaussian(4, 3), gaussian(4, 2, seed=1)
    assert close(
        WEIGHT_GRADS[form](inp, g), torch.stack([torch.outer(i, o) for i, o in zip(inp, g, strict=True)]).sum(0)
    )
    assert close(WEIGHT_GRADS[form](inp[:1], g[:1]), torch.outer(inp[0], g[0]))


def test_relu_keeps_zero_times_inf_at_zero() -> None:
    """At 0 the gradient is 0 as in autograd; a mask lets no inf through, the book's product makes nan of 0 * inf."""
    inp = torch.tensor([[-1.0, 0.0, 2.0]])
    out = layers.relu(inp)
    out.g = torch.tensor([[torch.inf, torch.inf, 3.0]])
    layers.relu_grad(inp, out)
    assert inp.g.isnan().tolist() == [[True, True, False]]
    clear_g(inp)
    mended_layers.add_act_grad(inp, out, ACTIVATIONS["relu"])
    assert g_of(inp).tolist() == [[0.0, 0.0, 3.0]]


def test_the_books_relu_is_autograds() -> None:
    inp, g = gaussian(4, 3), gaussian(4, 3, seed=1)
    out = layers.relu(inp)
    out.g = g
    layers.relu_grad(inp, out)
    assert close(g_of(inp), by_autograd(lambda z: (torch.relu(z) * g).sum(), inp)[0])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_act_grad_is_autograds(name: str) -> None:
    row, inp, g = ACTIVATIONS[name], gaussian(4, 3), gaussian(4, 3, seed=1)
    out = mended_layers.act(inp, row)
    assert out is not inp
    out.g = g
    mended_layers.add_act_grad(inp, out, row)
    assert close(g_of(inp), by_autograd(lambda z: (row.module()(z) * g).sum(), inp)[0])


@pytest.mark.parametrize("name", LOSSES)
def test_loss_grads_are_autograds(name: str) -> None:
    """By the class, by the mended layer, and for mse by the book's function."""
    classes_ = LOSSES[name].classes
    inp = gaussian(6, 3 if classes_ else 1)
    targ = torch.tensor([0, 2, 1, 1, 0, 2]) if classes_ else gaussian(6, seed=1)
    wanted = by_autograd(lambda out: LOSSES[name].module(out, targ), inp)[0]
    for layer in (classes.LOSS_LAYERS[name](), layer_function.LossFunction(LOSSES[name])):
        layer(inp, targ)
        layer.backward()
        assert close(g_of(inp), wanted)
        clear_g(inp)
    if name == "mse":
        layers.mse_grad(inp, targ)
        assert close(g_of(inp), wanted)


def network() -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    parameters = [(gaussian(3, 4, seed=1), gaussian(4, seed=2)), (gaussian(4, 1, seed=3), gaussian(1, seed=4))]
    return gaussian(5, 3), gaussian(5, seed=5), parameters


def test_forward_and_backward_leaves_g_and_no_gradient_of_the_data() -> None:
    inp, targ, parameters = network()
    loss = run_forward_and_backward(inp, targ, parameters)

    def value(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return ((torch.relu(inp @ w1 + b1) @ w2 + b2).squeeze(-1) - targ).square().mean()

    flat = [p for pair in parameters for p in pair]
    assert close(loss, value(*flat))
    assert all(close(g_of(p), g) for p, g in zip(flat, by_autograd(value, *flat), strict=True))
    assert not hasattr(inp, "g")
    clear_g(*flat)
    assert close(layers.forward_and_backward(inp, targ, *flat), loss)
    assert all(close(g_of(p), g) for p, g in zip(flat, by_autograd(value, *flat), strict=True))
    assert inp.g.shape == inp.shape  # which the book computes and nobody reads


def test_g_accumulates_until_it_is_cleared() -> None:
    inp, targ, parameters = network()
    w = parameters[0][0]
    run_forward_and_backward(inp, targ, parameters)
    once = g_of(w)
    run_forward_and_backward(inp, targ, parameters)
    assert close(g_of(w), 2 * once)
    clear_g(*(p for pair in parameters for p in pair))
    run_forward_and_backward(inp, targ, parameters)
    assert torch.equal(g_of(w), once)


# --- the pitfalls ---


def test_a_value_used_twice_accumulates() -> None:
    """L = mean((z + relu(z)) w - targ)^2: z has two readers, and each adds its term. To overwrite loses one."""
    z, w, b, targ = gaussian(5, 3), gaussian(3, 1, seed=1), gaussian(1, seed=2), gaussian(5, seed=3)
    a = layers.relu(z)
    total = z + a
    out = layers.lin(total, w, b)
    layers.mse_grad(out, targ)
    layers.lin_grad(total, out, w, b)
    add_g(z, g_of(total))
    add_g(a, g_of(total))
    mended_layers.add_act_grad(z, a, ACTIVATIONS["relu"])
    found = g_of(z)
    layers.relu_grad(z, a)  # the book's line overwrites what the other reader left
    one_term = g_of(z)
    wanted = by_autograd(lambda z: layers.mse(layers.lin(z + torch.relu(z), w, b), targ), z)[0]
    assert close(found, wanted)
    assert not close(one_term, wanted, 1e-2)


@pytest.mark.parametrize(("kind", "adds"), [(classes.Lin, False), (layer_function.LinFunction, True)])
def test_weights_used_twice_accumulate(kind: type, adds: bool) -> None:
    """Two layers share w and b; the loss is that of relu(inp w + b) w + b. The book's line keeps the last term."""
    inp, w, b = gaussian(4, 3), gaussian(3, 3, seed=1), gaussian(3, seed=2)
    targ = torch.tensor([0, 2, 1, 1])
    model = classes.Model([kind(w, b), classes.Relu(), kind(w, b)], classes.CrossEntropy())
    model(inp, targ)
    model.backward()
    wanted = by_autograd(
        lambda w, b: torch.nn.functional.cross_entropy(torch.relu(inp @ w + b) @ w + b, targ), w, b
    )  # fmt: skip
    assert close(g_of(w), wanted[0]) == close(g_of(b), wanted[1]) == adds
    assert adds or not close(g_of(w), wanted[0], 1e-2)


def test_one_object_in_two_places_is_refused() -> None:
    lin = classes.Lin(gaussian(3, 3), gaussian(3))
    with pytest.raises(UsageError, match="stands in two places"):
        classes.Model([lin, classes.Relu(), lin], classes.Mse())


@pytest.mark.parametrize("n", [1, 2])
def test_a_batch_of_one_is_a_batch(n: int) -> None:
    """A bare squeeze() would turn out (1, 1) into a number, and its gradient with it."""
    inp, targ, parameters = network()
    parameters = [(w.clone(), b.clone()) for w, b in parameters]
    loss = run_forward_and_backward(inp[:n], targ[:n], parameters)
    assert loss.shape == () and g_of(parameters[0][0]).shape == (3, 4)
    assert g_of(parameters[1][1]).shape == (1,)


@pytest.mark.parametrize("wrong", [(5, 1), (1, 5), (1,), (), (4,)])
@pytest.mark.parametrize("name", LOSSES)
def test_targets_that_would_broadcast_are_refused(name: str, wrong: tuple[int, ...]) -> None:
    out, loss = gaussian(5, 1), layer_function.LossFunction(LOSSES[name])
    with pytest.raises(UsageError, match="do not fit") as caught:
        loss(out, torch.zeros(wrong, dtype=torch.int64))
    assert "\n" not in str(caught.value)
    assert loss(out, torch.zeros(5, dtype=torch.int64)).shape == ()


def test_without_the_squeeze_a_loss_is_a_mean_over_all_pairs() -> None:
    """(N, 1) - (N,) is (N, N): a number comes out, and it is another one. The book's `squeeze` is for that."""
    out, targ = gaussian(5, 1), gaussian(5, seed=1)
    pairs = out - targ
    assert pairs.shape == (5, 5)
    assert not close(pairs.square().mean(), layers.mse(out, targ), 1e-2)
    assert close(layers.mse(out, targ[:, None]), pairs.square().mean())  # the book's mse takes a column, in silence


def test_mse_of_several_units_is_refused() -> None:
    with pytest.raises(UsageError, match=r"out must be \(..., N, 1\)"):
        LOSSES["mse"].forward(gaussian(3, 3), gaussian(3))
    with pytest.raises(UsageError, match=r"out must be \(..., N, 1\)"):
        LOSSES["mse"].grad(gaussian(3, 3), gaussian(3))


def test_a_backward_before_its_time_says_so() -> None:
    lin = layer_function.LinFunction(gaussian(3, 2), gaussian(2))
    lin(gaussian(4, 3))
    with pytest.raises(UsageError, match=r"\(4, 2\) has no \.g"):
        lin.backward()
    with pytest.raises(UsageError, match="must be the same"):
        add_g(gaussian(4, 2), gaussian(4, 1))


def test_layer_function_wants_both_of_its_methods() -> None:
    class Half(layer_function.LayerFunction):
        def forward(self, inp: Tensor) -> Tensor:
            return inp / 2

    layer = Half()
    assert layer(torch.ones(2)).tolist() == [0.5, 0.5]
    with pytest.raises(NotImplementedError, match="Half has no bwd"):
        layer.backward()
    with pytest.raises(NotImplementedError, match="no forward"):
        layer_function.LayerFunction()(torch.ones(2))


# --- handed to torch ---


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_our_functions_pass_torchs_own_check(name: str) -> None:
    """`gradcheck` asks for every gradient, the data's too; its points are away from the kinks."""
    inp = gaussian(3, 2).requires_grad_()
    assert (inp.abs() > 1e-3).all()
    row = ACTIVATIONS[name]
    assert torch.autograd.gradcheck(lambda z: modules.ActAutograd.apply(z, row), (inp,))
    w, b = gaussian(2, 4, seed=1).requires_grad_(), gaussian(4, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(modules.LinAutograd.apply, (inp, w, b))
    targ = torch.tensor([1, 0, 1])
    scaled = lambda z: 3 * modules.LossAutograd.apply(z, targ, LOSSES["cross_entropy"])  # noqa: E731
    assert torch.autograd.gradcheck(scaled, (inp,))


def test_linear_layer_is_nn_linear_transposed() -> None:
    w, b, inp = gaussian(3, 2), gaussian(2, seed=1), gaussian(4, 3, seed=2)
    layer, theirs = modules.LinearLayer(w, b), torch.nn.Linear(3, 2, dtype=torch.float64)
    theirs.load_state_dict({"weight": w.mT, "bias": b})
    assert close(layer(inp), theirs(inp))
    assert [name for name, _ in layer.named_parameters()] == ["w", "b"]
    assert layer.w.data_ptr() == w.data_ptr() and not w.requires_grad
    model = modules.sequential([(w, b), (gaussian(2, 1), gaussian(1))], ACTIVATIONS["tanh"])
    assert [type(part).__name__ for part in model] == ["LinearLayer", "ActLayer", "LinearLayer"]


def test_the_first_layer_may_leave_out_the_gradient_of_the_data() -> None:
    w, b = torch.randn(3, 2), torch.randn(2)
    made = (classes.Lin(w, b), classes.FirstLin(w, b), layer_function.LinFunction(w, b, inp_grad=False))
    for layer, wanted in zip(made, (True, False, False), strict=True):
        inp = torch.randn(4, 3)
        layer(inp).g = torch.randn(4, 2)  # type: ignore[attr-defined]
        layer.backward()
        assert hasattr(inp, "g") == wanted and hasattr(layer.w, "g")
