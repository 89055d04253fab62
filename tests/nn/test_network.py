"""One pass for all: the executor against autograd, with and without residual connections, in every arithmetic."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import initlab
from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import draw, rule
from initlab.nn.network import PLAIN, Block, Network, backward, dense, forward
from initlab.nn.philox import gaussian
from initlab.nn.unbounded import UNBOUNDED, rescale
from initlab.tasks.stack import stack

RELU = ACTIVATIONS["relu"]


def layers(sizes: list[int], activation: str) -> list[tuple[Tensor, Tensor | None]]:
    scaling = rule("torch_default", gain=1.2)
    shapes = pairwise(sizes)
    return [draw(scaling, activation, shape, [0, 3], k, torch.float64) for k, shape in enumerate(shapes)]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_backward_are_autograds(activation: str, residual: bool) -> None:
    """Two networks at once, with biases; the first layer has another width, so that it has no residual connection."""
    sizes, row = [6, 9, 9, 9, 4], ACTIVATIONS[activation]
    net, weights = dense(sizes, row, residual), layers(sizes, activation)
    x = gaussian((2, 7, 6), [0], "x")[0].double()
    z: dict[int, Tensor] = {}
    a: dict[int, Tensor] = {}
    out = forward(
        net, lambda k: weights[k - 1], x, lambda k, *both: (z.update({k: both[0]}), a.update({k: both[1]})), PLAIN
    )
    own, seen = x, {}
    for k, (w, b) in enumerate(weights, start=1):
        assert b is not None
        seen[k, "z"] = (own @ w + b.unsqueeze(-2)).requires_grad_()
        phi = row.module()(seen[k, "z"])
        own = seen[k, "a"] = own + phi if residual and 1 < k < 4 else phi
        seen[k, "a"].retain_grad()
        seen[k, "z"].retain_grad()
        torch.testing.assert_close(z[k], seen[k, "z"].detach(), rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(a[k], seen[k, "a"].detach(), rtol=1e-13, atol=1e-14)
    assert torch.equal(out, a[4])
    g = gaussian((2, 7, 4), [0], "g")[0].double()
    own.backward(g)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    backward(net, lambda k: weights[k - 1], lambda k: z[k], g, lambda k, *both: found.update({k: both}), PLAIN)
    assert list(found) == [4, 3, 2, 1]
    for k, (dz, da) in found.items():
        torch.testing.assert_close(dz, seen[k, "z"].grad, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(da, seen[k, "a"].grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("residual", [False, True])
def test_a_pass_in_parts_is_the_pass(residual: bool) -> None:
    net, weights = dense([5, 5, 5, 5], RELU, residual), layers([5, 5, 5, 5], "relu")
    x = gaussian((2, 3, 5), [1], "x")[0].double()
    whole = forward(net, lambda k: weights[k - 1], x, lambda *_: None, PLAIN)
    half = forward(net, lambda k: weights[k - 1], x, lambda *_: None, PLAIN, [1, 2])
    assert torch.equal(forward(net, lambda k: weights[k - 1], half, lambda *_: None, PLAIN, [3]), whole)
    scaled = forward(net, lambda k: weights[k - 1], rescale(x), lambda *_: None, UNBOUNDED)
    torch.testing.assert_close(scaled.mantissa * scaled.exponent.exp2()[:, None, None], whole, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("activation", ["relu", "linear", "tanh", "gelu"])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_residual_stack_is_autograds(activation: str, backwards: bool) -> None:
    """Every rms of the table, forward and backward, in float64, from the same numbers."""
    depth, width, batch = 20, 11, 6  # more layers than a window
    frame = stack("kaiming", activation, depth, width, batch=batch, seeds=[3], dtype="float64", residual=True)
    x, tensors = gaussian((batch, width), [3], "input")[0].double(), {}
    for layer in range(1, depth + 1):
        w, _ = draw(rule("kaiming"), activation, (width, width), [3], layer, torch.float64)
        z = (x @ w[0]).requires_grad_()
        x = x + ACTIVATIONS[activation].module()(z)
        tensors[layer] = {"preactivation": z, "activation": x}
        z.retain_grad()
        x.retain_grad()
    x.backward(gaussian((batch, width), [3], "gradient")[0].double())
    direction = "backward" if backwards else "forward"
    rows = frame[(frame["direction"] == direction) & (frame["layer"] > 0)]
    assert len(rows) == 2 * depth
    for row in rows.itertuples():
        tensor = tensors[row.layer][row.tensor]
        value = tensor.grad if backwards else tensor.detach()
        assert row.rms == pytest.approx(float(value.square().mean().sqrt()), rel=1e-12)
        if row.tensor == "preactivation" and not backwards:
            slope = ACTIVATIONS[activation].slope(value).abs()
            share = (slope < 0.05 * ACTIVATIONS[activation].largest_slope).double().mean()
            assert row.frac_saturated == pytest.approx(float(share))
    plain = stack("kaiming", activation, depth, width, batch=batch, seeds=[3], dtype="float64")
    assert not np.allclose(rows["rms"], plain.loc[rows.index, "rms"])


def test_a_residual_stack_is_followed_beyond_its_format() -> None:
    """log2_rms_true of float32 is that of float64 where float32 has ended, up and down."""
    options = {"depth": 60, "width": 10, "batch": 5, "seeds": [0, 1], "residual": True}
    narrow, wide = (stack(rule("naive", gain=3.0), "relu", dtype=name, **options) for name in ("float32", "float64"))
    assert (narrow["n_inf"] + narrow["n_nan"] > 0).any() and wide["rms"].notna().all()
    np.testing.assert_allclose(narrow["log2_rms_true"], wide["log2_rms_true"], atol=1e-4)


def test_a_residual_connection_needs_as_many_units_in_as_out() -> None:
    with pytest.raises(UsageError, match="residual: needs as many units in as out, not 3 and 4"):
        Block(3, 4, RELU, residual=True)
    with pytest.raises(UsageError, match="kind=convolution: must be one of dense"):
        Network((Block(3, 4, RELU, kind="convolution"),))
    with pytest.raises(UsageError, match="residual: theory knows stacks without residual connections only"):
        initlab.predict("kaiming", "relu", residual=True)
