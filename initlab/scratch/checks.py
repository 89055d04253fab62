"""Checks before a backward pass: parameters, batch and targets that do not fit are refused in one line.

Mistakes that would be silent (targets that broadcast, a wrong class, nan) cost a reader hours. Values that overflow on
the way are no mistake: they are what initlab is about.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from initlab.errors import UsageError, choose
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.loss_table import LOSSES


def refuse_bad_problem(
    parameters: Sequence[tuple[Tensor, Tensor]], xb: Tensor, yb: Tensor, activation: str, loss: str
) -> Tensor:
    """The targets as (N,), or UsageError: [(w (I, O), b (O,)), ...], xb (N, I), yb (N,) or for mse (N, 1)."""
    choose(ACTIVATIONS, activation, "activation")
    classes = choose(LOSSES, loss, "loss").classes
    _refuse_parameters(parameters)
    _refuse_batch(parameters, xb)
    given, n, outputs = _shape(yb, "yb"), xb.shape[0], parameters[-1][0].shape[1]
    if yb.device != xb.device:
        raise UsageError(f"yb is on {yb.device} and xb on {xb.device}: must be on one device")
    if given != (n,) and (classes or given != (n, 1)):
        raise UsageError(
            f"yb: shape {given} does not fit xb of {n} rows; must be ({n},){'' if classes else f' or ({n}, 1)'}"
        )
    if classes:
        _refuse_classes(yb, outputs)
    elif outputs != 1:
        raise UsageError(f"loss=mse: the last layer has {outputs} units; must be 1")
    else:
        _refuse_dtype("yb", yb, xb)
        _refuse_nan("yb", yb)
    return yb.reshape(n)


def _shape(value: object, name: str) -> tuple[int, ...]:
    if not isinstance(value, Tensor):
        raise UsageError(f"{name}: is a {type(value).__name__}; must be a torch.Tensor")
    return tuple(value.shape)


def _refuse_parameters(parameters: Sequence[tuple[Tensor, Tensor]]) -> None:
    if not parameters:
        raise UsageError("parameters: none given; must be [(w, b), ...] with at least one layer")
    first, below = parameters[0][0], None
    for layer, (w, b) in enumerate(parameters, start=1):
        w_shape, b_shape = _shape(w, f"w of layer {layer}"), _shape(b, f"b of layer {layer}")
        if len(w_shape) != 2 or b_shape != w_shape[1:] or 0 in w_shape:
            raise UsageError(
                f"layer {layer}: w {w_shape} and b {b_shape} do not fit; must be (I, O) and (O,), not empty"
            )
        if below is not None and w_shape[0] != below:
            raise UsageError(f"layer {layer}: w {w_shape} does not fit the {below} units of layer {layer - 1}")
        for name, value in (("w", w), ("b", b)):
            _refuse_dtype(f"{name} of layer {layer}", value, first)
        below = w_shape[1]


def _refuse_dtype(name: str, value: Tensor, like: Tensor) -> None:
    if not value.is_floating_point():
        raise UsageError(f"{name}: dtype {_name(value)} where floats are needed; convert it, as in x.float()")
    if value.dtype != like.dtype or value.device != like.device:
        raise UsageError(f"{name}: {_name(value)} on {value.device} beside parameters {_name(like)} on {like.device}")


def _name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _refuse_batch(parameters: Sequence[tuple[Tensor, Tensor]], xb: Tensor) -> None:
    w, given = parameters[0][0], _shape(xb, "xb")
    if len(given) != 2 or given[1] != w.shape[0]:
        raise UsageError(f"xb: shape {given} does not fit w of layer 1 {tuple(w.shape)}; must be (N, {w.shape[0]})")
    if given[0] == 0:
        raise UsageError("xb: the batch is empty; must have at least one row")
    _refuse_dtype("xb", xb, w)
    _refuse_nan("xb", xb)


def _refuse_nan(name: str, value: Tensor) -> None:
    count = int(value.isnan().sum())
    if count:
        raise UsageError(f"{name}: {count} of {value.numel()} entries are nan; remove or replace them first")


def _refuse_classes(yb: Tensor, outputs: int) -> None:
    if yb.dtype != torch.int64:
        raise UsageError(f"loss=cross_entropy: yb is {_name(yb)}; must be int64, the number of each row's class")
    low, high = int(yb.min()), int(yb.max())
    if low < 0 or high >= outputs:
        raise UsageError(f"loss=cross_entropy: yb has classes from {low} to {high}; must be 0 to {outputs - 1}")
