"""One forward and backward pass of a module that leaves no trace: no gradient, no running statistic, no random number.

What does not fit the model is said in one line.
"""

import random
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from initlab.errors import UsageError, describe_error, library_call, show
from initlab.probes.probe_buffer import ProbeBuffer
from initlab.probes.probed_modules import find_parameter_device, list_patterns, refuse_several
from initlab.probes.steps import StepTracker
from initlab.stats.dtypes import resolve_formats
from initlab.stats.format_shares import spread_formats
from initlab.stats.keys import Seeds, resolve_seeds
from initlab.stats.measure import backend_for
from initlab.stats.statistics import Function


@library_call
def measure(
    model: nn.Module,
    x: Any,
    y: Any = None,
    loss: Callable[..., Tensor] | None = None,
    *,
    layers: str | Iterable[str] = "*",
    seeds: Seeds = 1,
    statistics: Mapping[str, Function] | None = None,
    formats: Sequence[str | torch.dtype] = (),
) -> pd.DataFrame:
    """Take the statistics of every tensor in one forward and backward pass, and leave no trace.

    model: an nn.Module; the pass is the one that would come next, in the mode that the model is in. x: a tensor, a
    tuple of arguments or a dict of named ones. y, loss: `loss(out, y)`, or `loss(out)` without y, gives one number;
    without a loss there are no backward rows. layers: one or several globs on the dotted names of modules. seeds: the
    label of the rows, as [7]. statistics: your functions (..., N, C) -> (...) by the names of their columns.
    formats: number formats, such as ["float16"]; each adds columns with the shares of the entries that it would lose:
    `float16_overflow`, `float16_overflow_most`, `float16_underflow`, `float16_subnormal`, see `Probe.formats`.

    Returns a row per tensor and direction, in the columns of the table `stats` and `name`, `part`, `call`.
    Parameters, `.grad`, buffers (running statistics of BatchNorm) and torch's random numbers are afterwards what they
    were. Raises UsageError for what does not fit the model.

    >>> rows = measure(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(5, 3))
    >>> rows[["layer", "tensor"]].drop_duplicates().values.tolist()
    [[0, 'activation'], [1, 'preactivation'], [1, 'activation'], [1, 'weight'], [1, 'bias']]
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model={type(model).__name__}: must be an nn.Module")
    if x is None:
        raise UsageError("measure: x is missing; give the batch")
    if y is not None and loss is None:
        raise UsageError("measure: y without a loss: give one too, such as loss=torch.nn.functional.cross_entropy")
    if loss is not None and not callable(loss):
        raise UsageError(
            f"loss={show(loss)}: must be a function of (out, y), such as torch.nn.functional.cross_entropy"
        )
    names = resolve_formats(formats) if formats else ()
    backend = backend_for(find_parameter_device(model), statistics)
    buffer = ProbeBuffer(list(resolve_seeds(seeds)), backend, formats=names)
    refuse_several(buffer.seeds)
    patterns = list_patterns(layers)
    tracker = StepTracker(model, [], patterns, 1, buffer)
    batch = list(all_tensors(x))
    with left_as_it_was(model, batch):
        try:
            tracker.open()
            out = run_model(model, x, batch)
            if loss is not None:
                value = loss_value(loss, out, y)
                run_backward(value, [*model.parameters(), *batch])
        finally:
            tracker.close()
    tracker.warn(3)
    return spread_formats(buffer.frame(), buffer.take_bins().shares()) if names else buffer.frame()


def all_tensors(x: Any) -> Iterator[Tensor]:
    """Tensors of any kind in the arguments, integers too."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (Mapping, tuple, list)):
        for part in x.values() if isinstance(x, Mapping) else x:
            yield from all_tensors(part)


def run_model(model: nn.Module, x: Any, batch: list[Tensor]) -> Any:
    """The output of a model for a batch of any form, or one line on what does not fit; `batch`: the tensors of x."""
    _refuse_places(model, batch)
    try:
        if isinstance(x, Mapping):
            return model(**x)
        return model(*x) if isinstance(x, tuple) else model(x)
    except UsageError:  # says itself what is wrong
        raise
    except Exception as error:  # a model of the user's may raise anything
        shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in batch)
        where = _where(model, error)
        raise UsageError(f"x={shapes or type(x).__name__}: does not fit {where}: {describe_error(error)}") from error


def loss_value(loss: Callable[..., Tensor], out: Any, y: Any) -> Tensor:
    """What a loss gives for the output of a model, one number, or one line on what it gives instead."""
    try:
        value = loss(out) if y is None else loss(out, y)
    except Exception as error:  # so may a loss
        raise UsageError(f"loss: does not fit the model's output and y: {describe_error(error)}") from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        given = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(f"loss: gives {given}: must give a tensor of one number")
    return value


def run_backward(value: Tensor, sources: list[Tensor]) -> None:
    """Gradients pass by the hooks and are dropped: `.grad` is not touched and no hook of an optimizer is woken."""
    sources = [source for source in sources if source.requires_grad]
    if value.requires_grad and sources:
        try:
            torch.autograd.grad(value, sources, grad_outputs=torch.ones_like(value), allow_unused=True)
        except UsageError:
            raise
        except Exception as error:  # of a function of the user's, or of one that overwrites what its gradient needs
            if "use_reentrant" in str(error):  # its .backward() would change .grad and wake what listens to it
                text = "loss: a checkpoint has use_reentrant=True, which works by loss.backward() alone"
                raise UsageError(f"{text}; give it use_reentrant=False, or record a step by initlab.probe") from error
            raise UsageError(f"loss: its backward pass fails: {describe_error(error)}") from error


@contextmanager
def left_as_it_was(model: nn.Module, batch: list[Tensor]) -> Iterator[None]:
    """Gradients can be taken within the block; buffers and random numbers, Python's too, are restored after it."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - what a model may draw from
    kept = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    places = {t.device.index for t in [*batch, *model.parameters()] if t.device.type == "cuda"}
    devices = sorted(place for place in places if place is not None)
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            for buffers, name, buffer, value in kept:
                buffers[name] = buffer
                buffer.data.copy_(value)  # a graph that waits for its backward pass does not take this for a change


def _refuse_places(model: nn.Module, batch: list[Tensor]) -> None:
    """A batch that lies where no parameter lies."""
    homes = {str(p.device) for p in model.parameters()}
    for t in batch:
        if homes and str(t.device) not in homes:
            raise UsageError(f"x: is on {t.device}, the model on {', '.join(sorted(homes))}: move one to the other")


def _where(model: nn.Module, error: BaseException) -> str:
    """The innermost module that was at work when the error was raised."""
    names = {module: name for name, module in model.named_modules()}
    found: nn.Module = model
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner in names:
            found = owner
    name = names[found]
    return f"{name} ({type(found).__name__})" if name else f"the model ({type(found).__name__})"
