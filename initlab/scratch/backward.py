"""Every version of the backward pass behind one signature, with the input checked once for all.

A row of VERSIONS is called `row(parameters, xb, yb, activation="relu", loss="mse") -> (loss, gradients)`: parameters
and gradients are `[(w, b), ...]`, w (I, O), b (O,), xb (N, I); the activation stands after every layer but the last;
the input gets no gradient. No row changes its arguments. All rows take the same forward steps, so that a ReLU's mask
cannot differ by a rounding. `task=backward` times them, beside the engine that initlab trains with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from initlab.errors import UsageError, choose
from initlab.nn.activations import ACTIVATIONS, Activation
from initlab.nn.loss_table import LOSSES, Loss
from initlab.scratch.checks import refuse_bad_problem
from initlab.scratch.classes import LOSS_LAYERS, Act, FirstLin, Layer, Lin, Model, Relu
from initlab.scratch.layer_function import ActFunction, LinFunction, LossFunction
from initlab.scratch.layers import forward_and_backward, lin
from initlab.scratch.mended_layers import WEIGHT_GRADS, WeightGrad, g_of, run_forward_and_backward
from initlab.scratch.modules import loss_by_functions, sequential

Gradients = list[tuple[Tensor, Tensor]]
Parameters = Sequence[tuple[Tensor, Tensor]]
Result = tuple[Tensor, Gradients]
Step = Callable[[Tensor, Tensor], Result]
Build = Callable[[Gradients, str, str], Step]
BOOK_DTYPES = (torch.float32, torch.float64)  # `(inp > 0).float()` makes float32 of a mask, which float16 cannot meet


# --- how each version is built: the parameters once, then a step for each batch --------------------------------------


def _bind_book(parameters: Gradients, activation: str, loss: str) -> Step:
    """The chapter's own lines, which know one network."""
    given = f"{activation}, {loss}, {len(parameters) - 1} hidden layers of {parameters[0][0].dtype}"

    def step(xb: Tensor, yb: Tensor) -> Result:
        if (activation, loss, len(parameters)) != ("relu", "mse", 2) or xb.dtype not in BOOK_DTYPES:
            fits = "relu, mse and 1 hidden layer, of float32 or float64"
            raise UsageError(f"version=book: the chapter's lines are for {fits}; not for {given}")
        own = _aliases(parameters)
        value = forward_and_backward(xb.detach(), yb, *own[0], *own[1])
        return value, _gs(own)

    return step


def _functions(weight_grad: WeightGrad, parameters: Gradients, activation: str, loss: str) -> Step:
    row, objective = ACTIVATIONS[activation], LOSSES[loss]

    def step(xb: Tensor, yb: Tensor) -> Result:
        own = _aliases(parameters)
        value = run_forward_and_backward(xb, yb, own, row, objective, weight_grad)
        return value, _gs(own)

    return step


def _classes(parameters: Gradients, activation: str, loss: str) -> Step:
    by_book = activation == "relu" and parameters[0][0].dtype in BOOK_DTYPES

    def step(xb: Tensor, yb: Tensor) -> Result:
        own = _aliases(parameters)
        lins = [FirstLin(*own[0]), *(Lin(w, b) for w, b in own[1:])]
        acts = [Relu() if by_book else Act(ACTIVATIONS[activation]) for _ in own[1:]]
        model = Model(_alternate(lins, acts), LOSS_LAYERS[loss]())
        value = model(xb, yb)
        model.backward()
        return value, _gs(own)

    return step


def _layer_function(parameters: Gradients, activation: str, loss: str) -> Step:
    def step(xb: Tensor, yb: Tensor) -> Result:
        own = _aliases(parameters)
        lins = [LinFunction(w, b, inp_grad=k > 0) for k, (w, b) in enumerate(own)]
        acts = [ActFunction(ACTIVATIONS[activation]) for _ in own[1:]]
        model = Model(_alternate(lins, acts), LossFunction(LOSSES[loss]))
        value = model(xb, yb)
        model.backward()
        return value, _gs(own)

    return step


LossOf = Callable[[Parameters, Tensor, Tensor, Activation, Loss], Tensor]


def plain_loss(parameters: Parameters, xb: Tensor, yb: Tensor, activation: Activation, loss: Loss) -> Tensor:
    """The forward pass alone, in plain tensor operations."""
    out = lin(xb, *parameters[0])
    for w, b in parameters[1:]:
        out = lin(activation.phi(out), w, b)
    return loss.forward(out, yb)


def _autograd(loss_of: LossOf, parameters: Gradients, activation: str, loss: str) -> Step:
    leaves = [p.detach().requires_grad_() for pair in parameters for p in pair]
    pairs, row, objective = list(zip(leaves[0::2], leaves[1::2], strict=True)), ACTIVATIONS[activation], LOSSES[loss]

    @torch.enable_grad()
    def step(xb: Tensor, yb: Tensor) -> Result:
        value = loss_of(pairs, xb, yb, row, objective)
        found = torch.autograd.grad(value, leaves)
        return value.detach(), list(zip(found[0::2], found[1::2], strict=True))

    return step


def _func_grad(parameters: Gradients, activation: str, loss: str) -> Step:
    row, objective = ACTIVATIONS[activation], LOSSES[loss]
    transformed = torch.func.grad_and_value(plain_loss)

    def step(xb: Tensor, yb: Tensor) -> Result:
        found, value = transformed(parameters, xb, yb, row, objective)
        return value, found

    return step


def _module(parameters: Gradients, activation: str, loss: str) -> Step:
    model, objective = sequential(parameters, ACTIVATIONS[activation]), LOSSES[loss].module

    @torch.enable_grad()
    def step(xb: Tensor, yb: Tensor) -> Result:
        model.zero_grad(set_to_none=True)
        value = objective(model(xb), yb)
        value.backward()  # type: ignore[no-untyped-call]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return value.detach(), list(zip(grads[0::2], grads[1::2], strict=True))

    return step


def _aliases(parameters: Parameters) -> Gradients:
    """The same memory under new tensor objects: what is left on them does not reach the caller's."""
    return [(w.detach(), b.detach()) for w, b in parameters]


def _gs(parameters: Parameters) -> Gradients:
    return [(g_of(w), g_of(b)) for w, b in parameters]


def _alternate(lins: Sequence[Layer], acts: Sequence[Layer]) -> list[Layer]:
    """lin, act, lin, act, ..., lin."""
    return [lins[0], *(layer for pair in zip(acts, lins[1:], strict=True) for layer in pair)]


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    """One way to the same gradients: `summary` in words, `build(parameters, activation, loss) -> step(xb, yb)`."""

    name: str
    summary: str
    build: Build
    outer: bool = False  # holds every outer product of a layer at once
    missing: Callable[[str], str | None] = lambda device: None  # why it cannot run on a kind of device

    def __call__(
        self, parameters: Parameters, xb: Tensor, yb: Tensor, activation: str = "relu", loss: str = "mse"
    ) -> Result:
        """The loss (a number) and [(dL/dw, dL/db), ...]; a mistake in the arguments raises UsageError."""
        yb = refuse_bad_problem(parameters, xb, yb, activation, loss)
        return self.bind(parameters, activation, loss)(xb.detach(), yb.detach())

    def bind(self, parameters: Parameters, activation: str = "relu", loss: str = "mse") -> Step:
        """The step alone, without checks: what a stopwatch should hold. It sees in-place changes of the parameters."""
        choose(ACTIVATIONS, activation, "activation")
        choose(LOSSES, loss, "loss")
        return self.build(_aliases(parameters), activation, loss)

    def unavailable(self, device: str = "cpu") -> str | None:
        """Why the version cannot run on this kind of device, in one line; None where it can."""
        return self.missing(device)

    def memory(self, sizes: Sequence[int], batch: int, itemsize: int = 4) -> int:
        """Estimated peak in bytes beside parameters and batch, sizes = [I, hidden, ..., O].

        Counted: every layer's values forward and backward, twice (z and phi), the gradients, and for the sum of outer
        products its N I O numbers. A lower bound within a factor of about two, made for deciding what to skip.
        """
        kept = 4 * batch * sum(sizes[1:]) + sum(i * o + o for i, o in pairwise(sizes))
        largest = max(i * o for i, o in pairwise(sizes))
        return itemsize * (kept + (batch * largest if self.outer else 0))


_ROWS = (
    Version("book", "the chapter's functions, line by line", _bind_book),
    Version("outer", "functions with .g, weight gradient as sum of outer products",
            partial(_functions, WEIGHT_GRADS["outer"]), outer=True),
    Version("einsum", "functions with .g, weight gradient as einsum", partial(_functions, WEIGHT_GRADS["einsum"])),
    Version("matmul", "functions with .g, weight gradient as matrix product",
            partial(_functions, WEIGHT_GRADS["matmul"])),
    Version("classes", "Lin, Relu, Mse and Model as the book writes them, each remembering its call", _classes),
    Version("layer_function", "LayerFunction with forward and bwd", _layer_function),
    Version("autograd", "autograd on raw tensors", partial(_autograd, plain_loss)),
    Version("autograd_function", "our rules as torch.autograd.Function", partial(_autograd, loss_by_functions)),
    Version("func_grad", "torch.func.grad_and_value of the loss", _func_grad),
    Version("module", "LinearLayer in nn.Sequential, loss.backward()", _module),
)  # fmt: skip
VERSIONS: dict[str, Version] = {row.name: row for row in _ROWS}
