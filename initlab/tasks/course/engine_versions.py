"""The backward passes that initlab itself trains with, as versions beside those of the course, and the table of all."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from initlab.engine import mlp
from initlab.engine.fast_network import Engine
from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.loss_table import LOSSES
from initlab.scratch.backward import VERSIONS, Gradients, Result, Step, Version


def bind_functions(parameters: Gradients, activation: str, loss: str) -> Step:
    row, objective = ACTIVATIONS[activation], LOSSES[loss]

    def step(xb: Tensor, yb: Tensor) -> Result:
        done = mlp.forward_and_backward(parameters, xb, yb, row, objective)
        return done.loss, done.parameter_grads

    return step


def bind_engine(parameters: Gradients, activation: str, loss: str) -> Step:
    """The engine has memory of its own: the parameters are copied in before each pass, as they may have changed."""
    engine = Engine([(w.unsqueeze(0), b.unsqueeze(0)) for w, b in parameters], activation, loss)

    def step(xb: Tensor, yb: Tensor) -> Result:
        engine.load(parameters)
        losses, found = engine.gradients(xb.unsqueeze(0), yb.unsqueeze(0))
        return losses[0], [(w[0], b[0]) for w, b in found]

    return step


def bind_compiled(parameters: Gradients, activation: str, loss: str) -> Step:
    """torch.compile of the engine's pass; the first step for a shape compiles, which takes seconds."""
    reason = why_not_compiled(parameters[0][0].device.type)
    if reason:
        raise UsageError(f"version=compiled: unavailable here: {reason}")
    step = torch.compile(bind_functions(parameters, activation, loss), fullgraph=True, dynamic=False)
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


_OF_THE_ENGINE = (
    Version("engine", "functions from tensors to tensors", bind_functions),
    Version("fast", "the engine that initlab trains with: memory allocated once, overwritten in place", bind_engine),
)
_COMPILED = Version("compiled", "torch.compile of the engine's pass", bind_compiled, missing=why_not_compiled)
# By hand from the chapter's lines to the engine, then autograd's.
BACKWARDS: dict[str, Version] = {
    row.name: row
    for version in [*VERSIONS.values(), _COMPILED]
    for row in ([*_OF_THE_ENGINE, version] if version.name == "autograd" else [version])
}
