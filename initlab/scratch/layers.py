"""Layers written by hand: each forward with its backward beneath it, in the book's words.

`inp` is what came in, `out` what went out, `g` the gradient of the loss with respect to `out`. No autograd anywhere.
Everything carries leading ensemble dimensions: inp (..., N, I), w (..., I, O), b (..., O), out (..., N, O); a loss is
per network, (...). The activations and their derivatives are rows of `signal.activations`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def lin(inp: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """out = inp w + b."""
    return inp @ w + b.unsqueeze(-2)


def lin_param_grads(g: Tensor, inp: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dw = inp^T g and dL/db = sum of g over the batch."""
    return inp.mT @ g, g.sum(-2)


def lin_inp_grad(g: Tensor, w: Tensor) -> Tensor:
    """dL/dinp = g w^T; the first layer never needs it."""
    return g @ w.mT


def mse(out: Tensor, targ: Tensor) -> Tensor:
    """Mean over the batch of (out - targ)^2; out (..., N, 1), targ (..., N)."""
    return (out.squeeze(-1) - targ).square().mean(-1)


def mse_out_grad(out: Tensor, targ: Tensor) -> Tensor:
    """dL/dout = 2 (out - targ) / N."""
    return 2.0 * (out - targ.unsqueeze(-1)) / out.shape[-2]


def cross_entropy(out: Tensor, targ: Tensor) -> Tensor:
    """Mean over the batch of -log softmax(out)[targ]; out (..., N, K), targ (..., N) integers below K."""
    return -torch.log_softmax(out, -1).gather(-1, targ.unsqueeze(-1)).mean((-2, -1))


def cross_entropy_out_grad(out: Tensor, targ: Tensor) -> Tensor:
    """dL/dout = (softmax(out) - onehot(targ)) / N."""
    share = 1.0 / out.shape[-2]
    g = torch.log_softmax(out, -1).exp() * share
    return g.scatter_add(-1, targ.unsqueeze(-1), torch.full_like(g, -share))


class Loss(NamedTuple):
    """A loss, its gradient, torch's function for the same thing, and whether its targets are classes."""

    forward: Callable[[Tensor, Tensor], Tensor]
    grad: Callable[[Tensor, Tensor], Tensor]
    module: Callable[[Tensor, Tensor], Tensor]
    classes: bool


LOSSES: dict[str, Loss] = {
    "mse": Loss(
        mse,
        mse_out_grad,
        lambda out, targ: torch.nn.functional.mse_loss(out.squeeze(-1), targ),
        classes=False,
    ),
    "cross_entropy": Loss(cross_entropy, cross_entropy_out_grad, torch.nn.functional.cross_entropy, classes=True),
}
