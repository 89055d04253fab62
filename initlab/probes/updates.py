"""What happens to a watched model in a loop: backward passes, optimizers that step, a gradient scaler that skips one.

A listener hears of all of these in the process while it is added, also of optimizers made in the middle of a loop.
Nothing of the user's is changed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial, partialmethod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.checkpoint import CheckpointFunction

from initlab.errors import UsageError, show
from initlab.probes.losses import mark_scale
from initlab.probes.torch_private import ENGINE, has_no_values, ignore_functions, is_batched, is_differentiating

Heard = Callable[..., Any]
Scaler = torch.amp.GradScaler


class Listener(Protocol):
    """Who hears of the backward passes and updates of the process."""

    @property
    def is_recording(self) -> bool:
        """Whether the step under way has rows."""

    def before_backward(self, roots: Sequence[Tensor], sources: Sequence[Tensor] | None) -> None:
        """A backward pass begins at these losses, inside of no other.

        sources: the tensors whose gradients are asked for; None where all parameters keep theirs.
        """

    def after_backward(self, gradients: Sequence[Tensor | None]) -> None:
        """It is over: the gradients that were asked for."""

    def begin_recomputation(self, function: Any) -> None:
        """A backward pass is about to run a function anew, whose first run autograd did not follow."""

    def end_recomputation(self) -> None:
        """It has run, and so have the gradients inside of it."""

    def before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer is about to step."""

    def after_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """It has stepped."""

    def end_unscaling(self, optimizer: Optimizer) -> None:
        """A gradient scaler has divided the gradients that an optimizer holds."""

    def skip_update(self, optimizer: Optimizer) -> None:
        """A gradient scaler did not let an optimizer step."""


_LISTENERS: list[Listener] = []
# What stands in the place of a function while there are listeners: who holds it, its name, this, and what was there.
_HEARD: list[tuple[Any, str, Any, Any]] = []


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
        _HEARD[:] = _list_heard()
        for owner, place, ours, _ in _HEARD:
            setattr(owner, place, ours)
    _LISTENERS.append(listener)
    stack.callback(_remove_listener, listener)
    if updates:
        stack.callback(register_optimizer_step_pre_hook(listener.before_update).remove)
        stack.callback(register_optimizer_step_post_hook(listener.after_update).remove)
    return stack


def _remove_listener(listener: Listener) -> None:
    _LISTENERS.remove(listener)
    for owner, place, ours, before in _HEARD if not _LISTENERS else ():
        if vars(owner)[place] is ours:  # else somebody has put another one around it, which stays
            setattr(owner, place, before)


def _list_heard() -> Iterator[tuple[Any, str, Any, Any]]:
    """The functions to be heard, as `_HEARD` has them; those of scalers in every class that has its own."""
    engine, recomputation = vars(torch.autograd)[ENGINE], vars(CheckpointFunction)["backward"]
    yield torch.autograd, ENGINE, partial(_run_engine, engine), engine
    ours = staticmethod(partial(_run_recomputation, recomputation.__func__))
    yield CheckpointFunction, "backward", ours, recomputation
    kinds: list[type] = [torch.amp.GradScaler]
    for kind in kinds:
        kinds += kind.__subclasses__()
        for name, method in (("scale", _scale_loss), ("unscale_", _unscale_gradients), ("step", _run_scaler_step)):
            if name in vars(kind) and (name != "step" or kind is torch.amp.GradScaler):  # whom the others call
                yield kind, name, partialmethod(method, vars(kind)[name]), vars(kind)[name]


def _run_engine(original: Heard, roots: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
    """What torch.autograd.backward and torch.autograd.grad both call; one inside of another is none of its own."""
    unheard = is_compiling() or is_differentiating() or has_no_values()
    if unheard or any(isinstance(given, Tensor) and is_batched(given) for given in args[0]):
        return original(roots, *args, **kwargs)
    listeners, found = list(_LISTENERS), ()
    sources = None if kwargs.get("accumulate_grad") else args[3]
    with ignore_functions():
        for listener in listeners:
            listener.before_backward(roots, sources)
    try:
        found = original(roots, *args, **kwargs)
    finally:
        with ignore_functions():
            for listener in listeners:
                listener.after_backward(found or ())
    return found


def _run_recomputation(original: Heard, ctx: Any, *gradients: Any) -> Any:
    """CheckpointFunction.backward, of checkpoints with use_reentrant=True."""
    listeners = list(_LISTENERS)
    for listener in listeners:
        listener.begin_recomputation(ctx.run_function)
    try:
        return original(ctx, *gradients)
    finally:
        for listener in listeners:
            listener.end_recomputation()


def _run_scaler_step(scaler: Scaler, original: Heard, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
    """GradScaler.step, which calls the optimizer only where all gradients are finite."""
    try:
        inner = find_optimizer(optimizer)
    except UsageError:  # an object of another kind, whose steps are not heard
        return original(scaler, optimizer, *args, **kwargs)
    stepped: list[Optimizer] = []
    handle = inner.register_step_post_hook(lambda one, *_: stepped.append(one))
    try:
        value = original(scaler, optimizer, *args, **kwargs)
    finally:
        handle.remove()
    with ignore_functions():
        for listener in _LISTENERS if not stepped else ():
            listener.skip_update(inner)
    return value


def _scale_loss(scaler: Scaler, original: Heard, outputs: Any) -> Any:
    """GradScaler.scale."""
    scaled = original(scaler, outputs)
    if scaled is not outputs and any(listener.is_recording for listener in _LISTENERS):
        with ignore_functions():
            mark_scale(scaled, float(scaler.get_scale()))
    return scaled


def _unscale_gradients(scaler: Scaler, original: Heard, optimizer: Optimizer) -> None:
    """GradScaler.unscale_, which writes to gradients without counting it in their version."""
    original(scaler, optimizer)
    for listener in _LISTENERS:
        listener.end_unscaling(optimizer)
