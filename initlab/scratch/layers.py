"""The chapter's layers as functions: each forward with its backward beneath it, in the book's lines and order.

`inp` is what came in, `out` what went out, `g` the gradient of the loss with respect to the tensor that it hangs on:
`out.g` is an attribute that the layer above has set, and torch's own name for it is `.grad`. A backward returns
nothing: it sets `.g` on tensors that its caller holds too, which is how a function changes its argument. No autograd.

Shapes: inp (N, I), w (I, O), b (O,), out (N, O); for `mse` out (N, 1) and targ (N,). What these lines lose, and what
mends them, is `mended_layers.py`; docs/course.md answers what readers ask.
"""

import torch
from torch import Tensor


def lin(inp: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """out = inp @ w + b."""
    return torch.addmm(b, inp, w)  # the two in one call, which is the one that nn.Linear makes: both round alike


def lin_grad(inp: Tensor, out: Tensor, w: Tensor, b: Tensor) -> None:
    """The gradients of a linear layer's input, weights and bias, from that of its output."""
    inp.g = out.g @ w.t()
    w.g = inp.t() @ out.g
    b.g = out.g.sum(0)


def relu(inp: Tensor) -> Tensor:
    """out = max(inp, 0)."""
    return inp.clamp_min(0.0)


def relu_grad(inp: Tensor, out: Tensor) -> None:
    """The gradient passes where inp was above 0."""
    inp.g = (inp > 0).float() * out.g


def mse(out: Tensor, targ: Tensor) -> Tensor:
    """The mean of the squared errors; `squeeze(-1)` makes (N,) of (N, 1)."""
    return (out.squeeze(-1) - targ).pow(2).mean()


def mse_grad(inp: Tensor, targ: Tensor) -> None:
    """The chain begins here: nothing is read, as dL/dL is 1. `unsqueeze(-1)` gives the gradient the shape of inp."""
    inp.g = 2.0 * (inp.squeeze(-1) - targ).unsqueeze(-1) / inp.shape[0]


def forward_and_backward(inp: Tensor, targ: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The book's network, linear, ReLU, linear, mean squared error: the backward is the forward read upwards."""
    # forward pass
    l1 = lin(inp, w1, b1)
    l2 = relu(l1)
    out = lin(l2, w2, b2)
    loss = mse(out, targ)  # no line below reads it

    # backward pass
    mse_grad(out, targ)
    lin_grad(l2, out, w2, b2)
    relu_grad(l1, l2)
    lin_grad(inp, l1, w1, b1)
    return loss
