"""Who updates a watched model: every optimizer that holds its parameters, and a gradient scaler that skips one.

`add_listener` hears all optimizers of the process while it is open, those made in the middle of a loop too, and every
`torch.amp.GradScaler`. Nothing of the user's is changed; optimizers that hold none of the parameters are not reported.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from initlab.errors import UsageError, show

Skip = Callable[[Optimizer], None]
Scale = Callable[[float], None]

_SCALERS: list[tuple[Scale, Skip]] = []  # who hears of gradient scalers
_SCALER_STEP = torch.amp.GradScaler.step


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


def add_listener(
    before: Callable[[Optimizer, Any, Any], None],
    after: Callable[[Optimizer, Any, Any], None],
    scale: Scale,
    skip: Skip,
) -> ExitStack:
    """Report every optimizer's step before and after it, the scale of the loss, and a step that a scaler skips.

    Closing what is returned ends it.
    """
    stack = ExitStack()
    stack.callback(register_optimizer_step_pre_hook(before).remove)
    stack.callback(register_optimizer_step_post_hook(after).remove)
    entry = (scale, skip)
    _SCALERS.append(entry)
    torch.amp.GradScaler.step = _run_scaler_step  # type: ignore[method-assign, assignment]
    stack.callback(_remove_listener, entry)
    return stack


def _remove_listener(entry: tuple[Scale, Skip]) -> None:
    _SCALERS.remove(entry)
    if not _SCALERS:
        torch.amp.GradScaler.step = _SCALER_STEP  # type: ignore[method-assign]


def _run_scaler_step(scaler: torch.amp.GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
    """GradScaler.step, which calls the optimizer only where all gradients are finite."""
    inner = find_optimizer(optimizer)
    for scale, _ in _SCALERS:
        scale(float(scaler.get_scale()))
    stepped: list[Optimizer] = []
    handle = inner.register_step_post_hook(lambda one, *_: stepped.append(one))
    try:
        value = _SCALER_STEP(scaler, optimizer, *args, **kwargs)
    finally:
        handle.remove()
    if not stepped:
        for _, skip in _SCALERS:
            skip(inner)
    return value
