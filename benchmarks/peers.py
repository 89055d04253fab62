"""How others watch a network, written as they write it, for a training step and for a stack; how they read many files.

Each peer keeps what its idiom keeps and gives it back: a list of what it saw, first layer first. None of them counts
nan or survives the limits of float32; they are here for what they cost.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pyarrow import dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import bare
from benchmarks.nets import LR, Net, batch
from benchmarks.race import Contestant

Seen = list[Any]
Look = Callable[[Tensor], Any]


def by_item(t: Tensor) -> tuple[float, float]:
    """The chapter: two numbers of every layer, each fetched at once."""
    return t.mean().item(), t.std().item()


def by_histc(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The course's ActivationStats: mean, std and 40 bins of |x| from 0 to 10."""
    return t.mean(), t.std(), t.abs().histc(40, 0, 10)


def by_histogram(t: Tensor) -> tuple[float, float, float, Tensor]:
    """makemore, part 3: mean, std, share beyond 0.97, and the histogram that is plotted."""
    return (
        t.mean().item(),
        t.std().item(),
        (t.abs() > 0.97).float().mean().item() * 100,
        torch.histogram(t, density=True).hist,
    )


# --- a training step --------------------------------------------------------------------------------------------------


def forward_looking(look: Look) -> Callable[[Net], Contestant]:
    """A forward pass unrolled by hand, with a look at every layer's output."""

    def build(net: Net) -> Contestant:
        model, optimizer, xb, yb = _problem(net)

        def step() -> Seen:
            seen, out = [], xb
            optimizer.zero_grad(set_to_none=True)
            for layer in model:
                out = layer(out)
                seen.append(look(out.detach()))
            torch.autograd.backward(cross_entropy(out, yb))
            optimizer.step()
            return seen

        return Contestant(step)

    return build


def course(net: Net) -> Contestant:
    """Forward hooks on every layer."""
    model, optimizer, xb, yb = _problem(net)
    seen: Seen = []
    handles = [layer.register_forward_hook(lambda m, i, out: seen.append(by_histc(out.detach()))) for layer in model]
    bare_step = bare.step_of(model, optimizer, xb, yb)

    def step() -> Seen:
        seen.clear()
        bare_step()
        return list(seen)

    def close() -> None:
        for handle in handles:
            handle.remove()

    return Contestant(step, close=close)


def gradient_looking(look: Look, updates: bool) -> Callable[[Net], Contestant]:
    """`retain_grad` on every layer's output, then a look at the outputs and their gradients.

    With `updates` also log10 of the update:data ratio of every weight matrix, as makemore keeps it.
    """

    def build(net: Net) -> Contestant:
        model, optimizer, xb, yb = _problem(net)

        def step() -> Seen:
            outs = [xb]
            optimizer.zero_grad(set_to_none=True)
            for layer in model:
                outs.append(layer(outs[-1]))
                outs[-1].retain_grad()
            torch.autograd.backward(cross_entropy(outs[-1], yb))
            seen: Seen = [(look(out.detach()), look(out.grad)) for out in outs[1:] if out.grad is not None]
            optimizer.step()
            if updates:
                with torch.no_grad():
                    seen += [
                        ((LR * p.grad).std() / p.data.std()).log10().item()
                        for p in model.parameters()
                        if p.ndim == 2 and p.grad is not None
                    ]
            return seen

        return Contestant(step)

    return build


def _problem(net: Net) -> tuple[nn.Sequential, torch.optim.Optimizer, Tensor, Tensor]:
    model = bare.module(net)
    xb, yb = batch(net)
    return model, bare.sgd(model), xb[0], yb[0]


STEP: dict[str, Callable[[Net], Contestant]] = {
    "chapter": forward_looking(by_item),
    "course": course,
    "makemore": gradient_looking(by_histogram, updates=True),
    "std_mean": forward_looking(torch.std_mean),
    "retain_grad": gradient_looking(torch.std_mean, updates=False),
}


# --- a stack ----------------------------------------------------------------------------------------------------------


def stack_looking(look: Look) -> Callable[[Sequence[Tensor], Tensor], Contestant]:
    """A look at every activation, the weights drawn before."""

    def build(weights: Sequence[Tensor], x: Tensor) -> Contestant:
        matrices, first = [w[0] for w in weights], x[0]

        def forward() -> Seen:
            seen, out = [], first
            for w in matrices:
                out = (out @ w).relu_()
                seen.append(look(out))
            return seen

        return Contestant(forward)

    return build


STACK: dict[str, Callable[[Sequence[Tensor], Tensor], Contestant]] = {
    "chapter": stack_looking(by_item),
    "course": stack_looking(by_histc),
    "makemore": stack_looking(by_histogram),
    "std_mean": stack_looking(torch.std_mean),
}


# --- the chapter's own loop, weights drawn on the way ----------------------------------------------------------------


def chapter_loop(scale: float, relu: bool, depth: int = 50, width: int = 100, rows: int = 200) -> Seen:
    """x = x @ w for 50 layers of fresh weights, mean and std of each."""
    x = torch.randn(rows, width)
    seen = []
    for _ in range(depth):
        x = x @ (torch.randn(width, width) * scale)
        if relu:
            x = x.clamp_min(0.0)
        seen.append((x.mean().item(), x.std().item()))
    return seen


# The chapter's four attempts: too large, too small, 1/sqrt(100), and sqrt(2/100) for ReLU.
SCALINGS: tuple[tuple[float, bool], ...] = ((1.0, False), (0.01, False), (0.1, False), ((2 / 100) ** 0.5, True))


def chapter_four() -> list[Seen]:
    return [chapter_loop(scale, relu) for scale, relu in SCALINGS]


# --- an ensemble ------------------------------------------------------------------------------------------------------


def vmap_step(net: Net, seeds: Sequence[int]) -> Contestant:
    """torch.func: the modules' parameters stacked, one vmapped gradient, one SGD update; gives the losses (E,)."""
    models = [bare.module(net, seed) for seed in seeds]
    stacked, _ = torch.func.stack_module_state(models)
    values = {name: p.detach() for name, p in stacked.items()}
    skeleton = models[0].to("meta")
    xb, yb = batch(net, seeds)

    def loss_of(own: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(skeleton, own, (x,))
        return cross_entropy(out, y)

    gradients = torch.func.vmap(torch.func.grad_and_value(loss_of))

    def step() -> Any:
        grads, losses = gradients(values, xb, yb)
        torch._foreach_add_(list(values.values()), [grads[name] for name in values], alpha=-LR)
        return losses

    return Contestant(step)


# --- many files -------------------------------------------------------------------------------------------------------


def by_dataset(files: Sequence[Path]) -> Contestant:
    """pyarrow's reader of many files."""
    return Contestant(lambda: dataset.dataset([str(file) for file in files]).to_table().to_pandas())


def by_concat(files: Sequence[Path]) -> Contestant:
    """A file at a time with pandas."""
    return Contestant(lambda: pd.concat(map(pd.read_parquet, files), ignore_index=True))


FILES: dict[str, Callable[[Sequence[Path]], Contestant]] = {"dataset": by_dataset, "concat": by_concat}
