"""The same rules handed to torch: as `torch.autograd.Function`, then as `nn.Module`.

The three Functions below put our derivatives into autograd's graph: `.g` becomes what `backward` is given and returns,
and autograd does the walking and the accumulating. `LinearLayer` goes the other way: it says only its forward, and
torch finds the derivative. Both work on any batch; neither knows which training it serves.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from initlab.nn.activations import Activation
from initlab.nn.loss_table import Loss
from initlab.scratch.layers import lin

Parameters = Sequence[tuple[Tensor, Tensor]]


class LinAutograd(torch.autograd.Function):
    """out = inp w + b; `ctx` stands where `self` stood, and says which gradients anybody wants."""

    @staticmethod
    def forward(ctx: Any, inp: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(inp, w)
        return lin(inp, w, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        (g,), (inp, w) = grads, ctx.saved_tensors
        inp_g = g @ w.t() if ctx.needs_input_grad[0] else None
        w_g = inp.t() @ g
        b_g = g.sum(0)
        return inp_g, w_g, b_g


class ActAutograd(torch.autograd.Function):
    """out = phi(inp), differentiated by the row's own rule."""

    @staticmethod
    def forward(ctx: Any, inp: Tensor, row: Activation) -> Tensor:
        ctx.save_for_backward(inp)
        ctx.row = row
        return row.phi(inp).view_as(inp)  # `linear` returns inp itself, which autograd takes for an output in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (g,), (inp,) = grads, ctx.saved_tensors
        return ctx.row.pull_back(g, inp), None


class LossAutograd(torch.autograd.Function):
    """out = loss(inp, targ); `g` is dL/dL, the 1 that `loss.backward()` starts from."""

    @staticmethod
    def forward(ctx: Any, inp: Tensor, targ: Tensor, row: Loss) -> Tensor:
        ctx.save_for_backward(inp, targ)
        ctx.row = row
        return row.forward(inp, targ)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (g,), (inp, targ) = grads, ctx.saved_tensors
        return g * ctx.row.grad(inp, targ), None, None


def loss_by_functions(parameters: Parameters, xb: Tensor, yb: Tensor, activation: Activation, loss: Loss) -> Tensor:
    """The network of our three Functions, its loss ready for autograd."""
    out = _apply(LinAutograd, xb, *parameters[0])
    for w, b in parameters[1:]:
        out = _apply(LinAutograd, _apply(ActAutograd, out, activation), w, b)
    return _apply(LossAutograd, out, yb, loss)


def _apply(function: type[torch.autograd.Function], *args: object) -> Tensor:
    """`function.apply(*args)`, which torch leaves untyped."""
    out: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return out


class LinearLayer(nn.Module):
    """out = inp w + b, w (I, O): the transpose of what `nn.Linear` stores. The parameters share the given memory."""

    def __init__(self, w: Tensor, b: Tensor) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(w.detach()), nn.Parameter(b.detach())

    def forward(self, inp: Tensor) -> Tensor:
        return lin(inp, self.w, self.b)


class ActLayer(nn.Module):
    """out = phi(inp), the table's own phi and not torch's module: nn.GELU, nn.SiLU and nn.SELU round differently.

    In deep float32 networks that alone grew to 4e-5 of a gradient (measured, widths 16 to 64), and would hide what is
    compared here, the backward.
    """

    def __init__(self, row: Activation) -> None:
        super().__init__()
        self.row = row

    def forward(self, inp: Tensor) -> Tensor:
        return self.row.phi(inp)


def sequential(parameters: Parameters, activation: Activation) -> nn.Sequential:
    """LinearLayers with the activation after each but the last."""
    layers: list[nn.Module] = []
    for w, b in parameters:
        layers += [LinearLayer(w, b), ActLayer(activation)]
    return nn.Sequential(*layers[:-1])
