"""Many networks of one architecture in one pass: the sizes of layers and of gradients, by functional_call under vmap.

Every tensor that a function of torch gives is seen. Those that are rows of one network that was measured alone are
found by their sizes, and a 0 is added to each, whose gradient is that of the row. What does not come out as it was
measured alone is not taken: what asks for the value of a tensor, recurrent layers, what is overwritten.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from initlab.probes.snapshot import all_tensors, left_as_it_was, loss_value, run_model
from initlab.verdict.evidence import NetworkEvidence

KEYS = ["tensor", "name", "part", "call"]
SAME, CLOSE = 1e-6, 1e-2  # of a size: of the same tensor, and of one by another kernel, in half precision too
MOST = 2**26  # numbers that are held at once


class RowTensor(NamedTuple):
    """A tensor of the pass that is a row: its number among all that functions give, its units' dimension, its shape."""

    number: int
    axis: int
    zeros: Tensor


class OutputMode(TorchFunctionMode):
    """Gives every floating-point tensor that a function gives, with its number, to `change`, and goes on with that."""

    def __init__(self, change: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        self._change, self._count = change, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        several = func is F.multi_head_attention_forward
        first = output[0] if several else output
        if not isinstance(first, Tensor) or not first.is_floating_point() or not first.ndim:
            return output
        first = self._change(self._count, first)
        self._count += 1
        return (first, *output[1:]) if several else first


def measure_sizes(x: Tensor, axis: int) -> Tensor:
    """rms, and std within the units of a dimension: those of the columns of the same names."""
    rows = x.double().movedim(axis, -1).flatten(0, -2) if x.ndim > 1 else x.double()[None]
    return torch.stack([rows.square().mean(), (rows - rows.mean(0)).square().mean()]).sqrt()


def find_taps(e: NetworkEvidence, rows: pd.DataFrame) -> list[RowTensor]:
    """The tensors of the rows of one network, which the model holds now; ValueError where they are not all found."""
    wanted, found = rows[rows["direction"] == "forward"][["rms", "std_within"]].to_numpy(dtype=float), list[RowTensor]()

    def look(number: int, x: Tensor) -> Tensor:
        if len(found) < len(wanted):
            for axis in (x.ndim - 1, min(1, x.ndim - 1)):
                sizes = torch.as_tensor(wanted[len(found)])
                if torch.allclose(measure_sizes(x.detach(), axis).cpu(), sizes, rtol=SAME, atol=0, equal_nan=True):
                    found.append(RowTensor(number, axis, torch.zeros_like(x, requires_grad=False)))
                    break
        return x

    batch = list(all_tensors(e.x))
    with left_as_it_was(e.model, batch), OutputMode(look):
        run_model(e.model, e.x, batch)
    if len(found) < len(wanted):
        raise ValueError("not all rows are tensors that a function gives")
    return found


def measure_stacked(
    e: NetworkEvidence, rows: pd.DataFrame, taps: Sequence[RowTensor], states: Sequence[Mapping[str, Tensor]]
) -> list[pd.DataFrame]:
    """The rows of each network with its own sizes; ValueError where the first one's are not those measured alone.

    rows: of the first network. states: the parameters and buffers of each by their names.
    """
    by_number = {tap.number: k for k, tap in enumerate(taps)}
    args, kwargs = ((), e.x) if isinstance(e.x, Mapping) else (e.x if isinstance(e.x, tuple) else (e.x,), {})

    def evaluate(added: list[Tensor], state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        sizes = list[Tensor]()

        def add_zero(number: int, x: Tensor) -> Tensor:
            if number in by_number:
                x = x + added[by_number[number]]
                sizes.append(measure_sizes(x, taps[by_number[number]].axis))
            return x

        own = {name: value.clone() for name, value in state.items()}  # buffers may be overwritten
        with OutputMode(add_zero):
            out = functional_call(e.model, own, args, dict(kwargs))
        return loss_value(e.loss, out, e.y).reshape(()), torch.stack(sizes)

    def measure_one(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        gradients, sizes = grad(evaluate, has_aux=True)([one.zeros for one in taps], state)
        return sizes, torch.stack([g.double().square().mean().sqrt() for g in gradients])

    held = sum(value.numel() for value in states[0].values()) + 4 * sum(one.zeros.numel() for one in taps)
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    with left_as_it_was(e.model, list(all_tensors(e.x))):
        together = vmap(measure_one, randomness="same", chunk_size=max(1, min(len(states), MOST // max(held, 1))))
        forward, backward = (one.detach().cpu().numpy() for one in together(stacked))
    place = {key: k for k, key in enumerate(map(tuple, rows[rows["direction"] == "forward"][KEYS].to_numpy()))}
    order = [place[tuple(key)] for key in rows[KEYS].to_numpy()]
    back = (rows["direction"] == "backward").to_numpy()
    frames = []
    for sizes, gradients in zip(forward, backward, strict=True):
        rms = sizes[order, 0].copy()
        rms[back] = gradients[order][back]
        frames.append(rows.assign(rms=rms, std_within=sizes[order, 1]))
    apart = (frames[0]["rms"] / rows["rms"] - 1).abs()
    if not (apart < CLOSE).all():
        raise ValueError("a network gives other numbers when it is stacked")
    return frames
