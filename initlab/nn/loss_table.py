"""The table of losses: each with its gradient by hand, both at once, and torch's own function for the same.

Everything carries leading ensemble dimensions: out (..., N, O), targ (..., N); the loss is per network, (...).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from initlab.errors import UsageError


def _refuse_broadcast(out: Tensor, targ: Tensor, units: int | None = None) -> None:
    """One target per row of `out`. Unchecked, (N, 1) - (N,) is an (N, N) matrix whose mean looks like a loss."""
    if out.shape[:-1] != targ.shape or out.shape[-1] != (units or out.shape[-1]):
        wanted = f"(..., N, {units or 'K'})"
        given = f"out {tuple(out.shape)} and targ {tuple(targ.shape)}"
        raise UsageError(f"loss: {given} do not fit; out must be {wanted} and targ (..., N)")


def mse(out: Tensor, targ: Tensor) -> Tensor:
    """Mean over the batch of (out - targ)^2; out (..., N, 1), targ (..., N).

    `squeeze(-1)` names the dimension: a bare `squeeze()` takes the batch away too where the batch is one.
    """
    _refuse_broadcast(out, targ, units=1)
    return (out.squeeze(-1) - targ).square().mean(-1)


def mse_out_grad(out: Tensor, targ: Tensor) -> Tensor:
    """dL/dout = 2 (out - targ) / N."""
    _refuse_broadcast(out, targ, units=1)
    return 2.0 * (out - targ.unsqueeze(-1)) / out.shape[-2]


def cross_entropy(out: Tensor, targ: Tensor) -> Tensor:
    """Mean over the batch of -log softmax(out)[targ]; out (..., N, K), targ (..., N) integers below K."""
    _refuse_broadcast(out, targ)
    return -torch.log_softmax(out, -1).gather(-1, targ.unsqueeze(-1)).mean((-2, -1))


def cross_entropy_out_grad(out: Tensor, targ: Tensor) -> Tensor:
    """dL/dout = (softmax(out) - onehot(targ)) / N."""
    _refuse_broadcast(out, targ)
    share = 1.0 / out.shape[-2]
    g = torch.log_softmax(out, -1).exp() * share
    return g.scatter_add(-1, targ.unsqueeze(-1), torch.full_like(g, -share))


def mse_both(out: Tensor, targ: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and dL/dout, from one difference."""
    _refuse_broadcast(out, targ, units=1)
    error = out - targ.unsqueeze(-1)
    return error.square().mean((-2, -1)), error.mul_(2.0 / out.shape[-2])


def cross_entropy_both(out: Tensor, targ: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and dL/dout, from one softmax."""
    _refuse_broadcast(out, targ)
    share, index = 1.0 / out.shape[-2], targ.unsqueeze(-1)
    log_p = torch.log_softmax(out, -1)
    value = log_p.gather(-1, index).mean((-2, -1)).neg_()
    return value, log_p.exp_().mul_(share).scatter_(-1, index, -share, reduce="add")


class Loss(NamedTuple):
    """A loss, its gradient, both at once, torch's function for the same, and whether its targets are classes.

    `classes` None: as the data have them.
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    grad: Callable[[Tensor, Tensor], Tensor]
    both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    module: Callable[[Tensor, Tensor], Tensor]
    classes: bool | None


LOSSES: dict[str, Loss] = {
    "mse": Loss(
        mse,
        mse_out_grad,
        mse_both,
        lambda out, targ: torch.nn.functional.mse_loss(out.squeeze(-1), targ),
        classes=False,
    ),
    "cross_entropy": Loss(
        cross_entropy, cross_entropy_out_grad, cross_entropy_both, torch.nn.functional.cross_entropy, classes=True
    ),
}
