"""Layers written by hand: each forward with its backward beneath it, in the book's words and in the book's order.

`inp` is what came in, `out` what went out, `g` the gradient of the loss with respect to `out`. No autograd anywhere.
First functions from tensors to tensors, which is what the training engine uses; then functions that leave each gradient
on its tensor as `.g`. `classes.py` lets layers remember their call, `modules.py` hands the same rules to torch.

Everything carries leading ensemble dimensions: inp (..., N, I), w (..., I, O), b (..., O), out (..., N, O); the loss
and its gradient are per network, (...). The activations and their derivatives are rows of `nn.activations`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS, Activation

# --- functions from tensors to tensors -----------------------------------------------------------------------------


def lin(inp: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """out = inp w + b; for a single network in one call, the same that `nn.Linear` makes, so that both round alike."""
    return torch.addmm(b, inp, w) if inp.ndim == 2 else inp @ w + b.unsqueeze(-2)


def lin_param_grads(g: Tensor, inp: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dw = inp^T g and dL/db = sum of g over the batch."""
    return inp.mT @ g, g.sum(-2)


def lin_inp_grad(g: Tensor, w: Tensor) -> Tensor:
    """dL/dinp = g w^T; the first layer never needs it."""
    return g @ w.mT


def _refuse_broadcast(out: Tensor, targ: Tensor, units: int | None = None) -> None:
    """One target per row of `out`. Unchecked, (N, 1) - (N,) is an (N, N) matrix whose mean looks like a loss."""
    if out.shape[:-1] != targ.shape or out.shape[-1] != (units or out.shape[-1]):
        wanted = f"(..., N, {units or 'K'})"
        given = f"out {tuple(out.shape)} and targ {tuple(targ.shape)}"
        raise UsageError(f"loss: {given} do not fit; out must be {wanted} and targ (..., N)")


def mse(out: Tensor, targ: Tensor) -> Tensor:
    """Mean over the batch of (out - targ)^2; out (..., N, 1), targ (..., N).

    `squeeze(-1)` names the dimension: a bare `squeeze()` takes the batch away too where the batch is one.
    """
    _refuse_broadcast(out, targ, units=1)
    return (out.squeeze(-1) - targ).square().mean(-1)


def mse_out_grad(out: Tensor, targ: Tensor) -> Tensor:
    """dL/dout = 2 (out - targ) / N."""
    _refuse_broadcast(out, targ, units=1)
    return 2.0 * (out - targ.unsqueeze(-1)) / out.shape[-2]


def cross_entropy(out: Tensor, targ: Tensor) -> Tensor:
    """Mean over the batch of -log softmax(out)[targ]; out (..., N, K), targ (..., N) integers below K."""
    _refuse_broadcast(out, targ)
    return -torch.log_softmax(out, -1).gather(-1, targ.unsqueeze(-1)).mean((-2, -1))


def cross_entropy_out_grad(out: Tensor, targ: Tensor) -> Tensor:
    """dL/dout = (softmax(out) - onehot(targ)) / N."""
    _refuse_broadcast(out, targ)
    share = 1.0 / out.shape[-2]
    g = torch.log_softmax(out, -1).exp() * share
    return g.scatter_add(-1, targ.unsqueeze(-1), torch.full_like(g, -share))


def mse_both(out: Tensor, targ: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and dL/dout, from one difference."""
    _refuse_broadcast(out, targ, units=1)
    error = out - targ.unsqueeze(-1)
    return error.square().mean((-2, -1)), error.mul_(2.0 / out.shape[-2])


def cross_entropy_both(out: Tensor, targ: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and dL/dout, from one softmax."""
    _refuse_broadcast(out, targ)
    share, index = 1.0 / out.shape[-2], targ.unsqueeze(-1)
    log_p = torch.log_softmax(out, -1)
    value = log_p.gather(-1, index).mean((-2, -1)).neg_()
    return value, log_p.exp_().mul_(share).scatter_(-1, index, -share, reduce="add")


class Loss(NamedTuple):
    """A loss, its gradient, both at once, torch's function for the same, and whether its targets are classes."""

    forward: Callable[[Tensor, Tensor], Tensor]
    grad: Callable[[Tensor, Tensor], Tensor]
    both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    module: Callable[[Tensor, Tensor], Tensor]
    classes: bool


LOSSES: dict[str, Loss] = {
    "mse": Loss(
        mse,
        mse_out_grad,
        mse_both,
        lambda out, targ: torch.nn.functional.mse_loss(out.squeeze(-1), targ),
        classes=False,
    ),
    "cross_entropy": Loss(
        cross_entropy, cross_entropy_out_grad, cross_entropy_both, torch.nn.functional.cross_entropy, classes=True
    ),
}

WeightGrad = Callable[[Tensor, Tensor], Tensor]

# dL/dw = sum over the batch of inp_n g_n^T, written three ways: f(inp, g) -> (..., I, O).
WEIGHT_GRADS: dict[str, WeightGrad] = {
    "outer": lambda inp, g: (inp.unsqueeze(-1) * g.unsqueeze(-2)).sum(-3),  # holds all N outer products, N I O numbers
    "einsum": lambda inp, g: torch.einsum("...ni,...no->...io", inp, g),
    "matmul": lambda inp, g: inp.mT @ g,
}
MATMUL = WEIGHT_GRADS["matmul"]


# --- functions that leave `.g` on their tensors --------------------------------------------------------------------


def g_of(out: Tensor) -> Tensor:
    """`out.g`, the gradient that whoever came after `out` has left on it."""
    g: Tensor | None = getattr(out, "g", None)
    if g is None:
        raise UsageError(f"tensor of shape {tuple(out.shape)} has no .g: run the backward of what comes after it first")
    return g


def add_g(value: Tensor, g: Tensor) -> None:
    """value.g += g. To overwrite it, as `inp.g = ...` does, loses a term wherever a value is used twice."""
    if value.shape != g.shape:
        raise UsageError(f".g of shape {tuple(g.shape)} for a tensor of shape {tuple(value.shape)}: must be the same")
    before: Tensor | None = getattr(value, "g", None)
    value.g = g if before is None else before + g  # type: ignore[attr-defined]


def clear_g(*values: Tensor) -> None:
    """Forget `.g`: what accumulates has to be cleared before the next pass."""
    for value in values:
        vars(value).pop("g", None)


def lin_grad(
    inp: Tensor, out: Tensor, w: Tensor, b: Tensor, inp_grad: bool = True, weight_grad: WeightGrad = MATMUL
) -> None:
    """inp.g += out.g w^T, w.g += inp^T out.g, b.g += sum of out.g over the batch.

    A first layer goes without `inp.g`: nobody reads the gradient of the data.
    """
    g = g_of(out)
    if inp_grad:
        add_g(inp, lin_inp_grad(g, w))
    add_g(w, weight_grad(inp, g))
    add_g(b, g.sum(-2))


def act(inp: Tensor, row: Activation) -> Tensor:
    """out = phi(inp), always a tensor of its own: `linear` returns inp itself, which cannot hold two gradients."""
    return row.phi(inp).view_as(inp)


def act_grad(inp: Tensor, out: Tensor, row: Activation) -> None:
    """inp.g += out.g * phi'(inp)."""
    add_g(inp, row.pull_back(g_of(out), inp))


def relu(inp: Tensor) -> Tensor:
    """out = max(inp, 0)."""
    return inp.clamp_min(0)


def relu_grad(inp: Tensor, out: Tensor) -> None:
    """inp.g += out.g where inp > 0, else 0. A mask and no product: 0 * inf would be nan."""
    add_g(inp, g_of(out).masked_fill(inp <= 0, 0))


def mse_grad(inp: Tensor, targ: Tensor) -> None:
    """inp.g += 2 (inp - targ) / N. Nothing is read: dL/dL is 1, and here the chain begins."""
    add_g(inp, mse_out_grad(inp, targ))


def cross_entropy_grad(inp: Tensor, targ: Tensor) -> None:
    """inp.g += (softmax(inp) - onehot(targ)) / N."""
    add_g(inp, cross_entropy_out_grad(inp, targ))


def forward_and_backward(
    inp: Tensor,
    targ: Tensor,
    parameters: Sequence[tuple[Tensor, Tensor]],
    activation: Activation = ACTIVATIONS["relu"],
    loss: Loss = LOSSES["mse"],
    weight_grad: WeightGrad = MATMUL,
) -> Tensor:
    """The loss; every w and b of [(w, b), ...] has its `.g` afterwards. The backward is the forward read upwards."""
    inps, outs = [inp], [lin(inp, *parameters[0])]
    for w, b in parameters[1:]:
        inps.append(act(outs[-1], activation))
        outs.append(lin(inps[-1], w, b))
    value = loss.forward(outs[-1], targ)

    add_g(outs[-1], loss.grad(outs[-1], targ))
    for k in range(len(parameters) - 1, 0, -1):
        lin_grad(inps[k], outs[k], *parameters[k], weight_grad=weight_grad)
        act_grad(outs[k - 1], inps[k], activation)
    lin_grad(inp, outs[0], *parameters[0], inp_grad=False, weight_grad=weight_grad)
    return value
