"""The remembering done once, in a base class: a layer says only its `forward` and its `bwd`.

`self.args` are what the call was given and `self.out` what it returned; `backward` hands both to `bwd`. The layers
below are the mended ones: their `.g` adds up, so that layers may share w and b, and the losses refuse targets that
would broadcast.
"""

from typing import Any

from torch import Tensor

from initlab.nn.activations import Activation
from initlab.nn.loss_table import Loss
from initlab.scratch.layers import lin
from initlab.scratch.mended_layers import MATMUL, WeightGrad, act, add_act_grad, add_g, add_lin_grad


class LayerFunction:
    """A layer says `forward(*args) -> out` and `bwd(out, *args)`: the call keeps them, `backward` hands them on."""

    def __call__(self, *args: Tensor) -> Tensor:
        self.args = args
        self.out = self.forward(*args)
        return self.out

    def backward(self) -> None:
        self.bwd(self.out, *self.args)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def bwd(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no bwd")


class LinFunction(LayerFunction):
    """out = inp @ w + b, its weight gradient in any of the three forms of WEIGHT_GRADS."""

    def __init__(self, w: Tensor, b: Tensor, inp_grad: bool = True, weight_grad: WeightGrad = MATMUL) -> None:
        self.w, self.b, self.inp_grad, self.weight_grad = w, b, inp_grad, weight_grad

    def forward(self, inp: Tensor) -> Tensor:
        return lin(inp, self.w, self.b)

    def bwd(self, out: Tensor, inp: Tensor) -> None:
        add_lin_grad(inp, out, self.w, self.b, self.inp_grad, self.weight_grad)


class ActFunction(LayerFunction):
    """out = phi(inp)."""

    def __init__(self, row: Activation) -> None:
        self.row = row

    def forward(self, inp: Tensor) -> Tensor:
        return act(inp, self.row)

    def bwd(self, out: Tensor, inp: Tensor) -> None:
        add_act_grad(inp, out, self.row)


class LossFunction(LayerFunction):
    """out = loss(inp, targ), any row of LOSSES."""

    def __init__(self, row: Loss) -> None:
        self.row = row

    def forward(self, inp: Tensor, targ: Tensor) -> Tensor:
        return self.row.forward(inp, targ)

    def bwd(self, out: Tensor, inp: Tensor, targ: Tensor) -> None:
        add_g(inp, self.row.grad(inp, targ))
