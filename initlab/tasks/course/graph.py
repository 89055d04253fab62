"""Autograd's graph of one forward pass of any small model, and the gradients that come out of walking it.

Runs the model once, on the batch that it is given or on Gaussian noise, and leaves it as it was: no `.grad`, no buffer
and no random state is changed. What was decided on the way (which output, which loss) stands in the frame `notes`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor, nn

from initlab.engine import mlp
from initlab.errors import UsageError, check, choose
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import Rule, gaussian, rule
from initlab.nn.loss_table import LOSSES
from initlab.scratch.autograd_graph import gradients, walk
from initlab.tasks.data import Data
from initlab.tasks.ensemble.batches import find_first_step
from initlab.tasks.ensemble.device import Where
from initlab.tasks.ensemble.networks import Frames
from initlab.tasks.ensemble.training import Training

Inputs = Tensor | Sequence[object] | Mapping[str, object]
Objective = Callable[..., Tensor]
Arguments = dict[str | int, object]  # argument of the model, by name or position -> value


def graph(
    model: nn.Module | None = None,
    inputs: Inputs | None = None,
    targets: Tensor | None = None,
    loss: str | Objective | None = None,
    shapes: Sequence[Sequence[int]] | None = None,
    init: str | Rule = "kaiming",
    activation: str = "relu",
    depth: int = 1,
    width: int = 50,
    batch: int = 64,
    seed: int = 0,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    data: Data | str = "digits",
) -> Frames:
    """Walk autograd's graph of one forward pass: the frames `nodes`, `edges` and `notes`.

    model: any nn.Module; None takes the network that `train` trains on `data`, `depth` hidden layers of `width` units
    by the rule `init`, with its first batch. `data="teacher"` and mse make it the book's, 784-50-1.
    inputs: a tensor, several in a sequence, or keyword arguments in a mapping; None draws Gaussian batches of the
    `shapes`, or of what the model's first layer takes, `batch` rows. loss: a name of LOSSES, or a function of the
    output and, if they are given, the `targets`. Without a loss that fits it is the mean of squares of the output, for
    the trained network mse. seed: of all that is drawn. dtype, device: of the trained network, as in `stack`.
    Errors: a model, inputs or targets that do not fit each other; an output that carries no gradient.

    >>> frames = graph(nn.Linear(3, 2), torch.ones(4, 3))
    >>> frames["nodes"]["node"].tolist()[:3]
    ['MeanBackward0', 'PowBackward0', 'AddmmBackward0']
    """
    notes: list[str] = []
    where = Where.resolve(dtype, device)
    check(batch=batch, seed=seed)
    if not isinstance(model, nn.Module | None):
        raise UsageError(f"graph: the model is a {type(model).__name__}; must be an nn.Module")
    if model is None:
        loss = loss or "mse"
        training = Training(depth, width, batch, loss=loss if isinstance(loss, str) else "mse")
        parameters, xb, yb = find_first_step(data, training, rule(init), activation, seed, where)
        row = choose(ACTIVATIONS, activation, "activation")
        model = mlp.twin([(w[None], b[None]) for w, b in parameters], 0, row)
        targets, inputs = yb if targets is None else targets, xb if inputs is None and shapes is None else inputs
    if inputs is None:
        shapes = shapes or [first_shape(model, batch)]
        if any(not shape or min(shape) < 1 for shape in shapes):
            raise UsageError(f"shapes={[list(shape) for shape in shapes]}: every size must be at least 1")
        notes.append(f"inputs: Gaussian noise of shape {' and '.join(str(tuple(shape)) for shape in shapes)}")
        inputs = [gaussian(shape, seed, "input", number) for number, shape in enumerate(shapes)]
    if isinstance(inputs, Mapping):
        arguments: Arguments = {str(name): value for name, value in inputs.items()}
    else:
        arguments = dict(enumerate([inputs] if isinstance(inputs, Tensor) else inputs))
    with restore_after(model, seed):
        out = first_float(run_model(model, move_inputs(arguments, model)), notes)
        value = loss_of(out, targets, loss, notes)
        found = walk(value, tensor_names(model, arguments))
        if found.unreached:
            notes.append(f"no gradient reaches {', '.join(found.unreached)}")
        frames = {"nodes": found.frame(gradients(value, found)), "edges": found.edges()}
    return frames | {"notes": pd.DataFrame({"note": notes})}


def first_shape(model: nn.Module, batch: int) -> tuple[int, ...]:
    """A batch for the model's first layer, if that is a linear one."""
    first = next((layer for layer in model.modules() if next(layer.parameters(recurse=False), None) is not None), None)
    if not isinstance(first, nn.Linear):
        what = "no parameter" if first is None else f"a {type(first).__name__} first"
        raise UsageError(f"shapes: this model has {what}, which does not tell its inputs; give their shapes")
    return batch, first.in_features


def move_inputs(given: Arguments, model: nn.Module) -> Arguments:
    """Noise and data go where the model's parameters are, in their format; empty and non-finite ones are refused."""
    like = next(model.parameters(), None)
    moved: Arguments = {}
    for name, value in given.items():
        if isinstance(value, Tensor):
            if not value.numel():
                raise UsageError(f"graph: input {name} is empty, its shape is {tuple(value.shape)}")
            if value.is_floating_point() and not value.isfinite().all():
                count = int((~value.isfinite()).sum())
                raise UsageError(f"graph: input {name} holds nan or inf, {count} of {value.numel()}")
            if like is not None:
                value = value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
        moved[name] = value
    return moved


@contextmanager
def restore_after(model: nn.Module, seed: int) -> Iterator[None]:
    """Dropout draws from `seed`; running statistics and the caller's random numbers are put back afterwards."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)


def run_model(model: nn.Module, inputs: Arguments) -> object:
    """What the model returns, or one line on why it refused."""
    positional = [value for name, value in inputs.items() if isinstance(name, int)]
    keywords = {name: value for name, value in inputs.items() if isinstance(name, str)}
    try:
        return model(*positional, **keywords)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        given = ", ".join(str(tuple(value.shape)) for value in inputs.values() if isinstance(value, Tensor))
        text = str(error).split("\n")[0]
        raise UsageError(f"graph: {type(model).__name__} refused inputs of shape {given}: {text}") from error


def find_tensors(value: object, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested tuples, lists and dicts, with the way to it."""
    if isinstance(value, Tensor):
        yield where, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from find_tensors(item, f"{where}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            yield from find_tensors(item, f"{where}[{number}]")


def first_float(returned: object, notes: list[str]) -> Tensor:
    """The first floating tensor of what the model returned."""
    found = list(find_tensors(returned))
    where, out = next(((where, t) for where, t in found if t.is_floating_point()), ("", None))
    if out is None:
        what = ", ".join(str(t.dtype).removeprefix("torch.") for _, t in found) or type(returned).__name__
        raise UsageError(f"graph: the model returned no float tensor but {what}; only those carry gradients")
    if not out.requires_grad:
        raise UsageError(
            "graph: the model's output carries no gradient: it was detached, or no parameter requires one; "
            "try model.requires_grad_(True)"
        )
    if where:
        notes.append(f"output: of {len(found)} tensors returned the first float one, output{where}")
    return out


def loss_of(out: Tensor, targets: Tensor | None, loss: str | Objective | None, notes: list[str]) -> Tensor:
    """The number that is differentiated; how it was chosen goes into `notes`."""
    if callable(loss):
        return loss(out) if targets is None else loss(out, targets)
    if loss is not None:
        choose(LOSSES, loss, "train.loss")
    if targets is None:
        if loss is not None:
            raise UsageError(f"train.loss={loss}: needs targets; give them, or leave the loss out")
        if out.ndim == 0:
            notes.append("loss: the output itself, which is one number")
            return out
        notes.append("loss: mean of squares of the output")
        return out.square().mean()
    name = loss or ("mse" if targets.is_floating_point() else "cross_entropy")
    notes.append(f"loss: {name}")
    check_targets(out, targets, name)
    targets = targets.to(out.device, torch.int64 if LOSSES[name].classes else out.dtype)
    return LOSSES[name].module(out, targets)


def check_targets(out: Tensor, targets: Tensor, loss: str) -> None:
    """Targets of a shape that would broadcast in silence, of the wrong kind, or beyond the classes."""
    shape = tuple(out.shape[:1]) if LOSSES[loss].classes else tuple(out.squeeze(-1).shape)
    if tuple(targets.shape) != shape:
        raise UsageError(f"train.loss={loss}: targets have shape {tuple(targets.shape)}; this output needs {shape}")
    if not LOSSES[loss].classes:
        if not targets.isfinite().all():
            raise UsageError("targets hold nan or inf")
        return
    if targets.is_floating_point():
        raise UsageError(f"train.loss={loss}: targets are {str(targets.dtype).removeprefix('torch.')}; must be classes")
    if out.ndim != 2 or targets.min() < 0 or targets.max() >= out.shape[1]:
        classes = math.prod(out.shape[1:2])
        raise UsageError(
            f"train.loss={loss}: targets {targets.min()} to {targets.max()} need classes 0 to {classes - 1}"
        )


def tensor_names(model: nn.Module, inputs: Arguments) -> dict[str, Tensor]:
    """The parameters, under all their names, and the inputs that ask for a gradient themselves."""
    asking = {
        name if isinstance(name, str) else f"input {name}": value
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.requires_grad
    }
    return dict(model.named_parameters(remove_duplicate=False)) | asking
