"""Layers as classes that remember their call, so that `backward` needs no arguments.

As the book writes them, each doing its own remembering: `Lin`, `Relu`, `Mse` and `Model`; beside them `Act` for any
activation and `CrossEntropy`. A layer reads `self.out.g`, which it never sets: its `out` is the next layer's `inp`, one
tensor with two names, and the next layer has set `self.inp.g`. What `.g =` loses is mended in `layer_function.py`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from initlab.errors import UsageError
from initlab.nn.activations import Activation
from initlab.nn.loss_table import LOSSES
from initlab.scratch.layers import lin, mse, relu


class Layer(Protocol):
    """What a `Model` is made of: a call that remembers, a backward that reads `self.out.g` and sets `self.inp.g`."""

    def __call__(self, inp: Tensor, /) -> Tensor: ...
    def backward(self) -> None: ...


class LossLayer(Protocol):
    """The last layer: it also takes the targets, and its backward reads no gradient."""

    def __call__(self, inp: Tensor, targ: Tensor, /) -> Tensor: ...
    def backward(self) -> None: ...


class Relu:
    """out = max(inp, 0)."""

    def __call__(self, inp: Tensor) -> Tensor:
        self.inp = inp
        self.out = relu(inp)
        return self.out

    def backward(self) -> None:
        self.inp.g = (self.inp > 0).float() * self.out.g


class Lin:
    """out = inp @ w + b."""

    def __init__(self, w: Tensor, b: Tensor) -> None:
        self.w, self.b = w, b

    def __call__(self, inp: Tensor) -> Tensor:
        self.inp = inp
        self.out = lin(inp, self.w, self.b)
        return self.out

    def backward(self) -> None:
        self.inp.g = self.out.g @ self.w.t()
        self.w.g = self.inp.t() @ self.out.g
        self.b.g = self.out.g.sum(0)


class FirstLin(Lin):
    """The first layer: without `inp.g`, a product as large as the forward pass, which nobody reads."""

    def backward(self) -> None:
        self.w.g = self.inp.t() @ self.out.g
        self.b.g = self.out.g.sum(0)


class Mse:
    """out = mean of (inp - targ)^2. Nothing comes after it: its backward reads no `.g`, and not its `out` either."""

    def __call__(self, inp: Tensor, targ: Tensor) -> Tensor:
        self.inp, self.targ = inp, targ
        self.out = mse(inp, targ)
        return self.out

    def backward(self) -> None:
        self.inp.g = 2.0 * (self.inp.squeeze(-1) - self.targ).unsqueeze(-1) / self.inp.shape[0]


class Act:
    """out = phi(inp), any row of the table of activations."""

    def __init__(self, row: Activation) -> None:
        self.row = row

    def __call__(self, inp: Tensor) -> Tensor:
        self.inp = inp
        self.out = self.row.phi(inp).view_as(inp)  # `linear` returns inp itself, which cannot hold two gradients
        return self.out

    def backward(self) -> None:
        self.inp.g = self.row.pull_back(self.out.g, self.inp)


class CrossEntropy:
    """out = mean of -log softmax(inp)[targ]."""

    def __call__(self, inp: Tensor, targ: Tensor) -> Tensor:
        self.inp, self.targ = inp, targ
        self.out = LOSSES["cross_entropy"].forward(inp, targ)
        return self.out

    def backward(self) -> None:
        self.inp.g = LOSSES["cross_entropy"].grad(self.inp, self.targ)


LOSS_LAYERS: dict[str, Callable[[], LossLayer]] = {"mse": Mse, "cross_entropy": CrossEntropy}


class Model:
    """Layers one after the other, then the loss; `backward` is the same walk in reverse.

    Each layer remembers one call, so no object may stand in two places.
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
