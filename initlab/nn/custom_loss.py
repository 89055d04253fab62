"""A loss of the user's own as a row of the table of losses: autograd finds its gradient, also for the pass by hand."""

import warnings
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from initlab.errors import UsageError, choose, show
from initlab.nn.loss_table import LOSSES, Loss

GivenLoss: TypeAlias = str | Loss | Callable[[Tensor, Tensor], Tensor]


def as_loss(given: GivenLoss, option: str = "train.loss") -> Loss:
    """The row of a loss, however it is given.

    given: a name of LOSSES, a row of it, or a function of the outputs of one network and their targets that returns one
    number as a tensor: out (N, K) and classes (N,), or for targets that are numbers out (N,) and targets (N,). option:
    what a mistake is called by. Errors: an unknown name; what cannot be called.

    >>> row = as_loss(torch.nn.functional.l1_loss)
    >>> [part.tolist() for part in row.both(torch.tensor([[3.0], [0.0]]), torch.tensor([1.0, 1.0]))]
    [1.5, [[0.5], [-0.5]]]
    """
    if isinstance(given, str):
        return choose(LOSSES, given, option)
    if isinstance(given, Loss):
        return given
    if not callable(given):
        raise UsageError(f"{option}={show(given)}: must be a name or a function (out, target) -> number")
    own = _OwnLoss(given, option)
    return Loss(own.forward, own.grad, own.find_both, own.module, classes=None)


def check_loss(row: Loss, out: Tensor, targ: Tensor) -> None:
    """Refuse a loss that these outputs (N, O) and targets (N,) are nothing for, or that only warns of it."""
    with warnings.catch_warnings(action="error", category=UserWarning):
        grad = row.both(out, targ)[1]
    if grad.shape != out.shape:
        raise UsageError(f"train.loss: its gradient has shape {tuple(grad.shape)}, the outputs {tuple(out.shape)}")


class _OwnLoss:
    """What a row of the table of losses offers, made of one function of one network."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], option: str) -> None:
        self.function = function
        self.name = f"{option}: {getattr(function, '__name__', type(function).__name__)}"

    def module(self, out: Tensor, targ: Tensor) -> Tensor:
        """The loss of one network, out (N, O) and targ (N,), for autograd."""
        given = out.squeeze(-1) if targ.is_floating_point() else out
        try:
            value = self.function(given, targ.clone())
        except (Exception, SystemExit) as error:  # a function of the user's may raise anything
            reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
            if "vmap" in reason:
                raise UsageError(f"{self.name} cannot run under vmap; use train.modules=one_by_one") from error
            shapes = f"outputs {tuple(given.shape)} and targets {tuple(targ.shape)}, {targ.dtype}"
            raise UsageError(f"{self.name} cannot be called with {shapes} ({reason})") from error
        if not isinstance(value, Tensor):
            raise UsageError(f"{self.name} returns {show(value)}; it must return a tensor of one number")
        if value.numel() != 1:
            raise UsageError(f"{self.name} returns a tensor of shape {tuple(value.shape)}; it must return one number")
        return value.reshape(())

    def find_both(self, out: Tensor, targ: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (...) and dL/dout (..., N, O), one network after the other."""
        values, grads = [], []
        rows = targ.reshape(-1, targ.shape[-1])
        for one, targets in zip(out.reshape(-1, *out.shape[-2:]), rows, strict=True):
            with torch.enable_grad():
                leaf = one.detach().clone().requires_grad_()
                value = self.module(leaf, targets)
                if not value.requires_grad:
                    raise UsageError(f"{self.name} has no gradient: it must be made of differentiable tensors")
                (grad,) = torch.autograd.grad(value, leaf, allow_unused=True)
            if grad is None:
                raise UsageError(f"{self.name} has no gradient: it does not depend on the outputs")
            values.append(value.detach().to(out.dtype))
            grads.append(grad)
        return torch.stack(values).reshape(out.shape[:-2]), torch.stack(grads).reshape(out.shape)

    def forward(self, out: Tensor, targ: Tensor) -> Tensor:
        """Losses (...)."""
        return self.find_both(out, targ)[0]

    def grad(self, out: Tensor, targ: Tensor) -> Tensor:
        """dL/dout (..., N, O)."""
        return self.find_both(out, targ)[1]
