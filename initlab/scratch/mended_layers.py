"""What the lines of `layers.py` lose, and what mends them, for any activation and any loss.

- `inp.g = ...` overwrites: where a tensor has two readers (a branch, shared weights) one term is lost. Here it adds.
- A `.g` that nobody has set is an AttributeError far from its cause. Here one line says what has to run first.
- `(inp > 0).float() * out.g` is nan where out.g is inf, and float32 where out.g is float16. Here a mask chooses.
- (N, 1) minus (N,) is an (N, N) matrix whose mean looks like a loss. Here the losses refuse it.
- The first layer's `inp.g` is a product that nobody reads. Here it can be left out.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS, Activation
from initlab.nn.loss_table import LOSSES, Loss
from initlab.scratch.layers import lin

WeightGrad = Callable[[Tensor, Tensor], Tensor]

# dL/dw = sum over the batch of inp_n g_n^T, an outer product for each row, written three ways: f(inp, g) -> (I, O).
WEIGHT_GRADS: dict[str, WeightGrad] = {
    "outer": lambda inp, g: (inp.unsqueeze(-1) * g.unsqueeze(1)).sum(0),  # holds all N outer products, N I O numbers
    "einsum": lambda inp, g: torch.einsum("ni,no->io", inp, g),
    "matmul": lambda inp, g: inp.t() @ g,
}
MATMUL = WEIGHT_GRADS["matmul"]


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
    value.g = g if before is None else before + g


def clear_g(*values: Tensor) -> None:
    """Forget `.g`: what accumulates has to be cleared before the next pass."""
    for value in values:
        vars(value).pop("g", None)


def add_lin_grad(
    inp: Tensor, out: Tensor, w: Tensor, b: Tensor, inp_grad: bool = True, weight_grad: WeightGrad = MATMUL
) -> None:
    """`lin_grad`, added to what is there.

    A first layer goes without `inp.g`: nobody reads the gradient of the data.
    """
    g = g_of(out)
    if inp_grad:
        add_g(inp, g @ w.t())
    add_g(w, weight_grad(inp, g))
    add_g(b, g.sum(0))


def act(inp: Tensor, row: Activation) -> Tensor:
    """out = phi(inp), always a tensor of its own: `linear` returns inp itself, which cannot hold two gradients."""
    return row.phi(inp).view_as(inp)


def add_act_grad(inp: Tensor, out: Tensor, row: Activation) -> None:
    """inp.g += out.g * phi'(inp), by the row's own rule: that of `relu` chooses, as 0 * inf would be nan."""
    add_g(inp, row.pull_back(g_of(out), inp))


def run_forward_and_backward(
    inp: Tensor,
    targ: Tensor,
    parameters: Sequence[tuple[Tensor, Tensor]],
    activation: Activation = ACTIVATIONS["relu"],
    loss: Loss = LOSSES["mse"],
    weight_grad: WeightGrad = MATMUL,
) -> Tensor:
    """The loss of a network of any depth; every w and b of [(w, b), ...] has its `.g` afterwards."""
    inps, outs = [inp], [lin(inp, *parameters[0])]
    for w, b in parameters[1:]:
        inps.append(act(outs[-1], activation))
        outs.append(lin(inps[-1], w, b))
    value = loss.forward(outs[-1], targ)

    add_g(outs[-1], loss.grad(outs[-1], targ))
    for k in range(len(parameters) - 1, 0, -1):
        add_lin_grad(inps[k], outs[k], *parameters[k], weight_grad=weight_grad)
        add_act_grad(outs[k - 1], inps[k], activation)
    add_lin_grad(inp, outs[0], *parameters[0], inp_grad=False, weight_grad=weight_grad)
    return value
