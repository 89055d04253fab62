"""Layers as classes that remember their call, so that `backward` needs no arguments.

First as the book writes them, each doing its own remembering: `Lin`, `Relu`, `Act` for any activation, `Mse`,
`CrossEntropy`, `Model`. Then `LayerFunction`, which does it once for all. The rules are those of `layers.py`; here is
only who keeps what, and who reads `self.out.g`: a layer's `out` is the next layer's `inp`, one tensor with two names.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from initlab.errors import UsageError
from initlab.nn.activations import Activation
from initlab.scratch.layers import (
    MATMUL,
    Loss,
    WeightGrad,
    act,
    act_grad,
    add_g,
    cross_entropy,
    cross_entropy_grad,
    lin,
    lin_grad,
    mse,
    mse_grad,
    relu,
    relu_grad,
)


class Layer(Protocol):
    """What a `Model` is made of: a call that remembers, a backward that reads `self.out.g` and sets `self.inp.g`."""

    def __call__(self, inp: Tensor, /) -> Tensor: ...
    def backward(self) -> None: ...


class LossLayer(Protocol):
    """The last layer: it also takes the targets, and its backward reads no gradient."""

    def __call__(self, inp: Tensor, targ: Tensor, /) -> Tensor: ...
    def backward(self) -> None: ...


class Lin:
    """out = inp w + b."""

    def __init__(self, w: Tensor, b: Tensor, inp_grad: bool = True) -> None:
        self.w, self.b, self.inp_grad = w, b, inp_grad

    def __call__(self, inp: Tensor) -> Tensor:
        self.inp, self.out = inp, lin(inp, self.w, self.b)
        return self.out

    def backward(self) -> None:
        lin_grad(self.inp, self.out, self.w, self.b, self.inp_grad)


class Act:
    """out = phi(inp), any row of the table of activations."""

    def __init__(self, row: Activation) -> None:
        self.row = row

    def __call__(self, inp: Tensor) -> Tensor:
        self.inp, self.out = inp, act(inp, self.row)
        return self.out

    def backward(self) -> None:
        act_grad(self.inp, self.out, self.row)


class Relu:
    """out = max(inp, 0): what `Act` does for the row `relu`, written out."""

    def __call__(self, inp: Tensor) -> Tensor:
        self.inp, self.out = inp, relu(inp)
        return self.out

    def backward(self) -> None:
        relu_grad(self.inp, self.out)


class Mse:
    """out = mean of (inp - targ)^2."""

    def __call__(self, inp: Tensor, targ: Tensor) -> Tensor:
        self.inp, self.targ, self.out = inp, targ, mse(inp, targ)
        return self.out

    def backward(self) -> None:
        mse_grad(self.inp, self.targ)


class CrossEntropy:
    """out = mean of -log softmax(inp)[targ]."""

    def __call__(self, inp: Tensor, targ: Tensor) -> Tensor:
        self.inp, self.targ, self.out = inp, targ, cross_entropy(inp, targ)
        return self.out

    def backward(self) -> None:
        cross_entropy_grad(self.inp, self.targ)


LOSS_LAYERS: dict[str, Callable[[], LossLayer]] = {"mse": Mse, "cross_entropy": CrossEntropy}


class Model:
    """Layers one after the other, then the loss; `backward` is the same walk in reverse.

    Each layer remembers one call, so no object may stand in two places; two that share w and b may: w.g accumulates.
    """

    def __init__(self, layers: Sequence[Layer], loss: LossLayer) -> None:
        if len({id(layer) for layer in layers}) < len(layers):
            raise UsageError("Model: a layer object stands in two places; give each place its own, sharing w and b")
        self.layers, self.loss = list(layers), loss

    def __call__(self, inp: Tensor, targ: Tensor) -> Tensor:
        for layer in self.layers:
            inp = layer(inp)
        return self.loss(inp, targ)

    def backward(self) -> None:
        self.loss.backward()
        for layer in reversed(self.layers):
            layer.backward()


# --- the remembering done once ------------------------------------------------------------------------------------


class LayerFunction:
    """A layer says `forward(*args) -> out` and `bwd(out, *args)`: the call keeps them, `backward` hands them on."""

    def __call__(self, *args: Tensor) -> Tensor:
        self.args, self.out = args, self.forward(*args)
        return self.out

    def backward(self) -> None:
        self.bwd(self.out, *self.args)

    def forward(self, *args: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def bwd(self, out: Tensor, *args: Tensor) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no bwd")


class LinFunction(LayerFunction):
    """out = inp w + b, its weight gradient in any of the three forms of WEIGHT_GRADS."""

    def __init__(self, w: Tensor, b: Tensor, inp_grad: bool = True, weight_grad: WeightGrad = MATMUL) -> None:
        self.w, self.b, self.inp_grad, self.weight_grad = w, b, inp_grad, weight_grad

    def forward(self, *args: Tensor) -> Tensor:
        (inp,) = args
        return lin(inp, self.w, self.b)

    def bwd(self, out: Tensor, *args: Tensor) -> None:
        (inp,) = args
        lin_grad(inp, out, self.w, self.b, self.inp_grad, self.weight_grad)


class ActFunction(LayerFunction):
    """out = phi(inp)."""

    def __init__(self, row: Activation) -> None:
        self.row = row

    def forward(self, *args: Tensor) -> Tensor:
        (inp,) = args
        return act(inp, self.row)

    def bwd(self, out: Tensor, *args: Tensor) -> None:
        (inp,) = args
        act_grad(inp, out, self.row)


class LossFunction(LayerFunction):
    """out = loss(inp, targ), any row of LOSSES."""

    def __init__(self, row: Loss) -> None:
        self.row = row

    def forward(self, *args: Tensor) -> Tensor:
        return self.row.forward(*args)

    def bwd(self, out: Tensor, *args: Tensor) -> None:
        inp, targ = args
        add_g(inp, self.row.grad(inp, targ))
