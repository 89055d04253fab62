"""Every version of the backward pass behind one signature, with the input checked once for all.

A row of VERSIONS is called `row(parameters, xb, yb, activation="relu", loss="mse") -> (loss, gradients)`: parameters
and gradients are `[(w, b), ...]`, w (I, O), b (O,), xb (N, I); the activation stands after every layer but the last;
the input gets no gradient. No row changes its arguments. All rows take the same forward steps, so that a ReLU's mask
cannot differ by a rounding; `compiled` alone may fuse them. They are timed by `task=backward`.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor

from initlab.errors import UsageError, choose
from initlab.nn.activations import ACTIVATIONS, Activation
from initlab.scratch import mlp
from initlab.scratch.checks import refuse_bad_problem
from initlab.scratch.classes import LOSS_LAYERS, Act, ActFunction, Layer, Lin, LinFunction, LossFunction, Model, Relu
from initlab.scratch.layers import LOSSES, WEIGHT_GRADS, Loss, WeightGrad, forward_and_backward, g_of, lin
from initlab.scratch.modules import loss_by_functions, sequential

Gradients = list[tuple[Tensor, Tensor]]
Parameters = Sequence[tuple[Tensor, Tensor]]
Result = tuple[Tensor, Gradients]
Step = Callable[[Tensor, Tensor], Result]
Build = Callable[[Gradients, str, str], Step]


# --- how each version is built: the parameters once, then a step for each batch --------------------------------------


def _functions(weight_grad: WeightGrad, parameters: Gradients, activation: str, loss: str) -> Step:
    row, objective = ACTIVATIONS[activation], LOSSES[loss]

    def step(xb: Tensor, yb: Tensor) -> Result:
        own = _aliases(parameters)
        value = forward_and_backward(xb, yb, own, row, objective, weight_grad)
        return value, _gs(own)

    return step


def _classes(parameters: Gradients, activation: str, loss: str) -> Step:
    def step(xb: Tensor, yb: Tensor) -> Result:
        own = _aliases(parameters)
        lins = [Lin(w, b, inp_grad=k > 0) for k, (w, b) in enumerate(own)]
        acts = [Relu() if activation == "relu" else Act(ACTIVATIONS[activation]) for _ in own[1:]]
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


def _engine(parameters: Gradients, activation: str, loss: str) -> Step:
    row, objective = ACTIVATIONS[activation], LOSSES[loss]

    def step(xb: Tensor, yb: Tensor) -> Result:
        done = mlp.forward_and_backward(parameters, xb, yb, row, objective)
        return done.loss, done.parameter_grads

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


def _compiled(parameters: Gradients, activation: str, loss: str) -> Step:
    """torch.compile of the engine's pass; the first step for a shape compiles, which takes seconds."""
    reason = why_not_compiled(parameters[0][0].device.type)
    if reason:
        raise UsageError(f"version=compiled: unavailable here: {reason}")
    step = torch.compile(_engine(parameters, activation, loss), fullgraph=True, dynamic=False)
    seen: set[tuple[torch.Size, torch.dtype]] = set()

    def once_per_shape(xb: Tensor, yb: Tensor) -> Result:
        if (xb.shape, xb.dtype) in seen:
            return step(xb, yb)
        try:
            with _compiling():
                result = step(xb, yb)
        except Exception as error:  # a compiler that managed the trial may still fail here
            raise UsageError(f"version=compiled: unavailable here: {_reason(error)}") from error
        seen.add((xb.shape, xb.dtype))
        return result

    return once_per_shape


@contextmanager
def _compiling() -> Iterator[None]:
    """As many shapes as are asked for: above 8 the compiler would give up. Its warnings are about torch's own code."""
    limits = {"recompile_limit": 10_000, "accumulated_recompile_limit": 10_000}
    with torch._dynamo.config.patch(limits), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@lru_cache
def why_not_compiled(device: str = "cpu") -> str | None:
    """One line on why torch.compile does not work on this machine, or None. Tried once, on one multiplication."""
    try:
        with _compiling():
            torch.compile(lambda x: x * 2 + 1, fullgraph=True)(torch.ones(3, device=device))
    except Exception as error:  # compilers fail in ways of their own, and none of them is our fault or the user's
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    """What a compiler's error begins with, as one line; the first line alone often ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = next((k for k, line in enumerate(lines, start=1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:last]) or type(error).__name__


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
        return why_not_compiled(device) if self.build is _compiled else None

    def memory(self, sizes: Sequence[int], batch: int, itemsize: int = 4) -> int:
        """Estimated peak in bytes beside parameters and batch, sizes = [I, hidden, ..., O].

        Counted: every layer's values forward and backward, twice (z and phi), the gradients, and for the sum of outer
        products its N I O numbers. A lower bound within a factor of about two, made for deciding what to skip.
        """
        kept = 4 * batch * sum(sizes[1:]) + sum(i * o + o for i, o in pairwise(sizes))
        largest = max(i * o for i, o in pairwise(sizes))
        return itemsize * (kept + (batch * largest if self.outer else 0))


_ROWS = (
    Version("outer", "functions with .g, weight gradient as sum of outer products",
            partial(_functions, WEIGHT_GRADS["outer"]), outer=True),
    Version("einsum", "functions with .g, weight gradient as einsum", partial(_functions, WEIGHT_GRADS["einsum"])),
    Version("matmul", "functions with .g, weight gradient as matrix product",
            partial(_functions, WEIGHT_GRADS["matmul"])),
    Version("classes", "Lin, Relu, Mse and Model, each remembering its call", _classes),
    Version("layer_function", "LayerFunction with forward and bwd", _layer_function),
    Version("engine", "functions from tensors to tensors", _engine),
    Version("autograd", "autograd on raw tensors", partial(_autograd, plain_loss)),
    Version("autograd_function", "our rules as torch.autograd.Function", partial(_autograd, loss_by_functions)),
    Version("func_grad", "torch.func.grad_and_value of the loss", _func_grad),
    Version("module", "LinearLayer in nn.Sequential, loss.backward()", _module),
    Version("compiled", "torch.compile of the engine's pass", _compiled),
)  # fmt: skip
VERSIONS: dict[str, Version] = {row.name: row for row in _ROWS}
