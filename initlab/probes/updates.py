"""What happens to a watched model in a loop: backward passes, optimizers that step, a gradient scaler that skips one.

A listener hears of all of these in the process while it is added, also of optimizers made in the middle of a loop.
Nothing of the user's is changed.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.checkpoint import CheckpointFunction

from initlab.errors import UsageError, show
from initlab.probes.torch_private import is_differentiating


class Listener(Protocol):
    """Who hears of the backward passes and updates of the process."""

    def before_backward(self, roots: Sequence[Tensor]) -> None:
        """A backward pass begins at these losses, inside of no other."""

    def after_backward(self) -> None:
        """It is over."""

    def begin_recomputation(self, function: Any) -> None:
        """A backward pass is about to run a function anew, whose first run autograd did not follow."""

    def end_recomputation(self) -> None:
        """It has run, and so have the gradients inside of it."""

    def before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer is about to step."""

    def after_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """It has stepped."""

    def see_scale(self, optimizer: Optimizer, scale: float) -> None:
        """A gradient scaler, which multiplied the loss by so much, is about to let an optimizer step."""

    def skip_update(self, optimizer: Optimizer) -> None:
        """A gradient scaler did not let an optimizer step."""


_LISTENERS: list[Listener] = []
_HEARD: dict[str, Any] = {}  # the functions that are heard while there are listeners, as they were before


def list_optimizers(model: nn.Module, given: object) -> list[Optimizer]:
    """The optimizers that a user names, one or several, without what wraps them; one line for anything else."""
    several = given if isinstance(given, Iterable) and not isinstance(given, str | Optimizer) else [given]
    found = [find_optimizer(one) for one in several]
    if not found:
        raise UsageError("optimizer=[]: give one, several, or None")
    for one in found:
        if not any(True for _ in find_held(model, one)):
            raise UsageError(f"optimizer={type(one).__name__}: holds none of the model's parameters")
    return found


def find_optimizer(given: Any) -> Optimizer:
    """The optimizer itself where another object wraps it under the name `optimizer`."""
    one = given
    while isinstance(inner := getattr(one, "optimizer", None), Optimizer):
        one = inner
    if not isinstance(one, Optimizer) or isinstance(one, type):
        raise UsageError(f"optimizer={show(given)}: must be a torch.optim.Optimizer, or several")
    return one


def find_held(model: nn.Module, optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """The model's parameters that an optimizer holds."""
    own = {id(p) for p in model.parameters()}
    return (p for group in optimizer.param_groups for p in group["params"] if id(p) in own)


def add_listener(listener: Listener, updates: bool) -> ExitStack:
    """Report every backward pass and, with `updates`, every step of an optimizer; closing what is returned ends it."""
    stack = ExitStack()
    if not _LISTENERS:
        for name, (owner, place, function) in _OURS.items():
            _HEARD[name] = vars(owner)[place]
            setattr(owner, place, function)
    _LISTENERS.append(listener)
    stack.callback(_remove_listener, listener)
    if updates:
        stack.callback(register_optimizer_step_pre_hook(listener.before_update).remove)
        stack.callback(register_optimizer_step_post_hook(listener.after_update).remove)
    return stack


def _remove_listener(listener: Listener) -> None:
    _LISTENERS.remove(listener)
    for name, (owner, place, function) in _OURS.items() if not _LISTENERS else ():
        if vars(owner)[place] is function:  # else somebody has put another one around it, which stays
            setattr(owner, place, _HEARD[name])


@wraps(torch.autograd.backward)
def _run_backward(tensors: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
    """torch.autograd.backward, which Tensor.backward calls; one inside of another is none of its own."""
    listeners = [] if is_compiling() or is_differentiating() else list(_LISTENERS)
    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors) if listeners else []
    for listener in listeners:
        listener.before_backward(roots)
    try:
        _HEARD["backward"](tensors, *args, **kwargs)
    finally:
        for listener in listeners:
            listener.after_backward()


def _run_recomputation(ctx: Any, *gradients: Any) -> Any:
    """CheckpointFunction.backward, of checkpoints with use_reentrant=True."""
    listeners = list(_LISTENERS)
    for listener in listeners:
        listener.begin_recomputation(ctx.run_function)
    try:
        return _HEARD["recomputation"].__func__(ctx, *gradients)
    finally:
        for listener in listeners:
            listener.end_recomputation()


def _run_scaler_step(scaler: torch.amp.GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
    """GradScaler.step, which calls the optimizer only where all gradients are finite."""
    try:
        inner = find_optimizer(optimizer)
    except UsageError:  # an object of another kind, whose steps are not heard
        return _HEARD["scaler"](scaler, optimizer, *args, **kwargs)
    for listener in _LISTENERS:
        listener.see_scale(inner, float(scaler.get_scale()))
    stepped: list[Optimizer] = []
    handle = inner.register_step_post_hook(lambda one, *_: stepped.append(one))
    try:
        value = _HEARD["scaler"](scaler, optimizer, *args, **kwargs)
    finally:
        handle.remove()
    if not stepped:
        for listener in _LISTENERS:
            listener.skip_update(inner)
    return value


# Who holds each function, under which name, and what stands there while there are listeners.
_OURS: dict[str, tuple[Any, str, Any]] = {
    "backward": (torch.autograd, "backward", _run_backward),
    "recomputation": (CheckpointFunction, "backward", staticmethod(_run_recomputation)),
    "scaler": (torch.amp.GradScaler, "step", _run_scaler_step),
}
