"""The book's ladders, timed: every rung at every shape, with those that cannot run or would take too long named."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from initlab.engine import mlp
from initlab.errors import UsageError, check, choose
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import draw, gaussian, rule
from initlab.nn.loss_table import LOSSES
from initlab.scratch.backward import Parameters, Result
from initlab.scratch.rungs import LADDER, Rung, Sizes
from initlab.tasks.course.engine_versions import BACKWARDS
from initlab.tasks.course.rotated_timing import seconds_each
from initlab.tasks.course.timing import agreement as agreement
from initlab.tasks.course.timing import time_ladder
from initlab.tasks.ensemble.device import Where

BOOK_SHAPE: Sizes = (5, 784, 10)
CLASSES = 10  # outputs under a loss over classes
PATIENCE = 2.0  # seconds
TRIES = 3  # of a piece that seems slow: a busy machine, or a first call, says nothing of the rung
SHAPES: tuple[Sizes, ...] = tuple((rows, 784, 10) for rows in (1, 5, 50, 500, 5000))  # the book's among them


def matmul_ladder(
    shapes: Sequence[Sizes] = SHAPES,
    rungs: Sequence[str] = tuple(LADDER),
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    seed: int = 0,
    patience: float | None = None,
    **timing: Any,
) -> pd.DataFrame:
    """Time the rungs of the matmul ladder at each shape (M, K, N): `time_ladder`'s columns, and `rows`, which is M.

    rungs: names of LADDER. dtype, device: as in `stack`. seed: of the matrices. patience: longest call, in seconds; a
    rung of Python loops that would take longer, judged by smaller pieces of the same product, is skipped. None allows 2
    seconds, and at the book's own shape as long as it takes: no rung of the book is missing there. timing:
    `memory_limit`, `rounds`, `seconds`, `progress` of `time_ladder`. The reference is `@` (the rung `matmul`), or the
    last rung that runs where it was not asked for.
    """
    where = Where.resolve(dtype, device)
    table = {name: choose(LADDER, name, "rung") for name in rungs}
    if not len(shapes):
        raise UsageError("shapes: at least one (M, K, N)")
    frames = []
    for shape in shapes:
        if len(shape) != 3 or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise UsageError(f"shape {tuple(shape)}: must be three whole numbers (M, K, N), none below 0")
        m, k, n = shape
        a, b = (gaussian(s, seed, what).to(where.device, where.dtype) for s, what in (((m, k), "a"), ((k, n), "b")))
        longest = (math.inf if shape == BOOK_SHAPE else PATIENCE) if patience is None else patience
        frame = time_ladder(
            {name: partial(rung.f, a, b) for name, rung in table.items()},
            shape=f"{m}x{k} @ {k}x{n}",
            reference="matmul" if "matmul" in table else None,
            skip={name: reason for name, rung in table.items() if (reason := skip_reason(rung, a, b, longest))},
            needs={name: float(rung.entries(m, k, n) * a.element_size()) for name, rung in table.items()},
            device=where.device.type,
            **timing,
        )
        frames.append(frame.assign(rows=m))
    return pd.concat(frames, ignore_index=True)


def backward_ladder(
    batches: Sequence[int] = (64, 50_000),
    depth: int = 1,
    width: int = 50,
    inputs: int = 784,
    activation: str = "relu",
    loss: str = "mse",
    versions: Sequence[str] = tuple(BACKWARDS),
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    seed: int = 0,
    **timing: Any,
) -> pd.DataFrame:
    """Time every version of the backward pass at each batch: `time_ladder`'s columns, and `rows`, which is the batch.

    activation, loss, versions: names of the tables; seed: of weights and batch; the others as in `matmul_ladder`.
    The book's network, `inputs` -> `depth` times `width` -> 1 (10 classes under cross_entropy), kaiming weights, noise
    as data. What is timed is one pass from given parameters to the loss and all gradients of the parameters. The
    reference is `nn.Linear`, torch's own layers and autograd as everybody writes them: a ratio below 1 is faster.
    """
    where = Where.resolve(dtype, device)
    check(train_depth=depth, train_width=width)
    sizes = [inputs, *[width] * depth, CLASSES if choose(LOSSES, loss, "train.loss").classes else 1]
    parameters = [
        (w[0], b[0])
        for layer, shape in enumerate(pairwise(sizes), start=1)
        for w, b in [draw(rule("kaiming"), activation, shape, [seed], layer, where.dtype, where.device)]
    ]
    table = {name: choose(BACKWARDS, name, "version") for name in versions}
    missing = {name: reason for name, row in table.items() if (reason := row.unavailable(where.device.type))}
    frames = []
    for batch in batches:
        check(train_batch=batch)
        xb = gaussian((batch, inputs), seed, "input").to(where.device, where.dtype)
        noise = gaussian((batch,), seed, "target").to(where.device, where.dtype)
        yb = noise if sizes[-1] == 1 else torch.arange(batch, device=where.device).remainder(sizes[-1])
        steps: dict[str, Callable[[], object]] = {
            name: bool if name in missing else partial(row.bind(parameters, activation, loss), xb, yb)  # never called
            for name, row in table.items()
        }
        steps["nn.Linear"] = partial(plain_torch(parameters, activation, loss), xb, yb)
        frame = time_ladder(
            steps,
            shape=f"{batch}x{'-'.join(map(str, sizes))}",
            reference="nn.Linear",
            skip={name: f"unavailable: {reason}" for name, reason in missing.items()},
            needs={name: float(row.memory(sizes, batch, xb.element_size())) for name, row in table.items()},
            device=where.device.type,
            **timing,
        )
        frames.append(frame.assign(rows=batch))
    return pd.concat(frames, ignore_index=True)


def plain_torch(parameters: Parameters, activation: str, loss: str) -> Callable[[Tensor, Tensor], Result]:
    """nn.Linear and torch's modules, `loss.backward()`; the gradients in our layout, w (I, O)."""
    model = mlp.twin([(w.unsqueeze(0), b.unsqueeze(0)) for w, b in parameters], 0, ACTIVATIONS[activation])
    objective = LOSSES[loss].module

    def step(xb: Tensor, yb: Tensor) -> Result:
        model.zero_grad(set_to_none=True)
        value = objective(model(xb), yb)
        value.backward()  # type: ignore[no-untyped-call]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return value.detach(), [(w.mT, b) for w, b in zip(grads[0::2], grads[1::2], strict=True)]

    return step


def skip_reason(rung: Rung, a: Tensor, b: Tensor, patience: float) -> str:
    """Why a rung is not timed on a product: it is unavailable, or a call would take more than `patience` seconds.

    The seconds are extrapolated from the first piece of the product whose eightfold is too long at every try.
    """
    if reason := rung.missing(a.device):
        return f"unavailable: {reason}"
    (m, k), n = a.shape, b.shape[1]
    for rows, middle, columns in pieces((m, k, n), rung.loops):
        piece = partial(rung.f, a[:rows, :middle], b[:middle, :columns])
        each = math.inf
        for _ in range(TRIES):
            each = min(each, seconds_each(piece, 1, a.device))
            if 8 * each <= patience:
                break
        else:
            expected = each * (m * k * n) / (rows * middle * columns)
            return f"skipped: would take about {expected:.2g} s a call" if expected > patience else ""
    return ""


def pieces(sizes: Sizes, loops: int) -> list[Sizes]:
    """Smaller and smaller products, the longest side that is looped over cut to an eighth each time; smallest first."""
    found, left = [], list(sizes)
    looped = [(), (0,), (0, 2), (0, 2, 1)][loops]
    while math.prod(left) > 4096 and any(left[side] > 1 for side in looped):
        longest = max(looped, key=left.__getitem__)
        left[longest] = math.ceil(left[longest] / 8)
        found.append((left[0], left[1], left[2]))
    return found[::-1]
