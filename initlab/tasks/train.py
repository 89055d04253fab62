"""Two trainings side by side: the MLP by hand and its `nn.Module` twin, from the same weights on the same batches."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from initlab.errors import UsageError, check, choose
from initlab.nn.activations import Activation
from initlab.nn.custom_activation import Given, as_activation
from initlab.nn.init import Rule, permutation
from initlab.nn.mup import learning_rates
from initlab.scratch.layers import LOSSES
from initlab.stats.dtypes import resolve_dtype
from initlab.tasks.data import Data
from initlab.tasks.ensemble.device import find_device
from initlab.tasks.ensemble.memory import free_memory, readable
from initlab.tasks.ensemble.networks import CACHED, name_of, rules_of
from initlab.tasks.ensemble.trained_weights import drawn
from initlab.tasks.twins import ADAPTIVE, OPTIMIZERS, Frames, Pair, Records


def train(
    data: Data,
    init: str | Rule | Sequence[str | Rule] = "kaiming",
    activation: Given = "relu",
    depth: int = 1,
    width: int = 50,
    batch: int = 64,
    steps: int = 200,
    lr: float | Sequence[float] = 0.1,
    optimizer: str = "sgd",
    loss: str = "cross_entropy",
    modules: str = "one_by_one",
    drift: bool = False,
    seeds: Sequence[int] = range(8),
    dtype: str = "float32",
    device: str = "cpu",
    every: int = 1,
    histograms: bool = False,
    generator: str = "torch",
    emit: Callable[[Frames], None] | None = None,
    progress: bool = False,
    tagged: bool = False,
) -> Frames:
    """The tables `stats`, `losses`, `parity` and, if wanted, `histograms` of `depth` hidden layers, a network per seed.

    `init` and `lr` are those of all networks, or a sequence with one for each, which then stand in columns. A rule that
    is fitted to data sees each network's own first batch, and how it went is the table `lsuv`; one with a base width
    has learning rates of its own in every layer, `lr` times `mup.learning_rates`.
    Step k stands for the values and gradients after k updates; the row `update` is W_{k+1} - W_k. With `drift` there
    are rows `drift` too: preactivations at W_k less those at W_0, both of the batch of step 0. With `emit` the rows
    are handed over every 30 seconds and at the end, also when the run is interrupted, and nothing is returned.
    `tagged` adds the column `network`, a network's place in `seeds`.
    """
    check(train_depth=depth, train_width=width, train_batch=batch, train_steps=steps, every=every)
    refuse_mismatch(data, loss, batch)
    rules, rates, collected = rules_of(init, len(seeds)), _rates(lr, len(seeds)), list[Frames]()
    deliver, place = emit or collected.append, find_device(device)
    sizes = [data.x.shape[1], *[width] * depth, outputs_of(data, loss)]
    number, row = resolve_dtype(dtype), as_activation(activation)
    parts = _parts(len(seeds), _together(sizes, batch, len(seeds), number, place))
    choose(OPTIMIZERS, optimizer, "train.optimizer")
    with tqdm(total=steps * len(parts), desc="train", unit="step", disable=None if progress else True) as bar:
        for part in parts:
            group = seeds[part]
            (first, _), *_ = _batches(data, loss, batch, 1, group, number, place)
            parameters, fit = drawn(rules[part], row, sizes, group, first, generator)
            tags = {"network": np.arange(part.start, part.stop)} if tagged else {}
            differing = _differing(init, rules, lr, rates, row, part) | tags
            if fit is not None:
                deliver({"lsuv": fit.frame(differing).assign(stage="train")})
            records = Records(group, deliver, histograms, differing)
            given = rates[part] if isinstance(lr, Sequence) else lr
            factors = [learning_rates(one, sizes, optimizer in ADAPTIVE) for one in rules[part]]
            pair = Pair(parameters, row, loss, optimizer, given, batch, records, modules, factors, drift)
            _all_steps(pair, _batches(data, loss, batch, steps, group, number, place), every, bar)
    return _joined(collected)


def _all_steps(pair: Pair, batches: Iterable[tuple[Tensor, Tensor]], every: int, bar: tqdm) -> None:
    """Every k-th step recorded; what the records have is handed over however the training ends."""
    try:
        for step, (xb, yb) in enumerate(batches):
            pair.step(step, xb, yb, record=step % every == 0)
            if pair.records.due():
                pair.flush()
            bar.update()
    finally:
        pair.flush()


def _joined(parts: Sequence[Frames]) -> Frames:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: pd.concat([part[name] for part in parts if name in part], ignore_index=True) for name in names}


def _together(sizes: Sequence[int], batch: int, networks: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many networks run together: on a CPU what a cache holds, on a GPU all that half of the free memory holds.

    Counted are twelve copies of the parameters (two trainings with gradients, updates and an optimizer's state) and of
    every layer's values (forward and backward, twice, and their float64). Refused: one network that does not fit.
    """
    parameters = sum(i * o + o for i, o in pairwise(sizes))
    needed = 12.0 * dtype.itemsize * (parameters + batch * sum(sizes))
    free = free_memory(device)
    if needed > free:
        raise UsageError(
            f"train.depth={len(sizes) - 2} train.width={sizes[1]} train.batch={batch}: one network works on about "
            f"{readable(needed)} and {readable(free)} are free; make it smaller"
        )
    most = min(networks, CACHED) if device.type == "cpu" else networks
    return max(1, int(min(most, free / 2 / needed)))


def _parts(networks: int, together: int) -> list[slice]:
    return [slice(start, min(start + together, networks)) for start in range(0, networks, together)]


def _rates(lr: float | Sequence[float], networks: int) -> list[float]:
    rates = [float(rate) for rate in lr] if isinstance(lr, Sequence) else [float(lr)] * networks
    if len(rates) != networks:
        raise UsageError(
            f"train.lr: {len(rates)} learning rates for {networks} networks; give one, or one for each seed"
        )
    for rate in rates:
        check(train_lr=rate)
    return rates


def _differing(
    init: str | Rule | Sequence[str | Rule],
    rules: Sequence[Rule],
    lr: float | Sequence[float],
    rates: Sequence[float],
    activation: Activation,
    part: slice,
) -> dict[str, pd.Categorical | np.ndarray]:
    """The columns in which the networks of an ensemble differ, a value for each."""
    found: dict[str, pd.Categorical | np.ndarray] = {}
    if not isinstance(init, str | Rule):
        names = pd.Categorical([name_of(one) for one in init])
        found["init"] = names[part]
        found["gain"] = np.array([one.gain_for(activation) for one in rules[part]])
    if isinstance(lr, Sequence):
        found["lr"] = np.array(rates[part])
    return found


def outputs_of(data: Data, loss: str) -> int:
    """Units of the last layer: one for each class, or one number."""
    return data.classes if LOSSES[loss].classes and data.classes else 1


def refuse_mismatch(data: Data, loss: str, batch: int) -> None:
    """A loss that does not fit the targets, or a batch larger than the data: one line."""
    if choose(LOSSES, loss, "train.loss").classes and data.classes is None:
        raise UsageError(f"train.loss={loss}: data={data.name} has no classes; use train.loss=mse")
    if batch > len(data.x):
        raise UsageError(f"train.batch={batch}: data={data.name} has {len(data.x)} training rows; use at most as many")


def _batches(
    data: Data, loss: str, batch: int, steps: int, seeds: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Iterable[tuple[Tensor, Tensor]]:
    """xb (E, N, I) and yb (E, N), each network in its own order, reshuffled every epoch; short batches are left out."""
    x = data.x.to(device, dtype)
    y = data.y.to(device, torch.int64 if LOSSES[loss].classes else dtype)
    per_epoch = len(x) // batch
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = torch.stack([permutation(len(x), seed, "order", epoch) for seed in seeds]).to(device)
        chosen = order[:, place * batch : (place + 1) * batch]
        yield x[chosen], y[chosen]
