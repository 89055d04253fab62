"""Two trainings side by side: the MLP by hand and its `nn.Module` twin, from the same weights on the same batches."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from initlab.errors import UsageError, check, choose
from initlab.scratch.layers import LOSSES
from initlab.signal.activations import ACTIVATIONS
from initlab.signal.init import Rule, permutation
from initlab.signal.mup import learning_rates
from initlab.tasks.data import Data
from initlab.tasks.networks import name_of, rules_of
from initlab.tasks.pair import ADAPTIVE, OPTIMIZERS, Frames, Pair, Records
from initlab.tasks.place import DTYPES, chunks, find_device
from initlab.tasks.weights import drawn


def train(
    data: Data,
    init: str | Rule | Sequence[str | Rule] = "kaiming",
    activation: str = "relu",
    depth: int = 1,
    width: int = 50,
    batch: int = 64,
    steps: int = 200,
    lr: float | Sequence[float] = 0.1,
    optimizer: str = "sgd",
    loss: str = "cross_entropy",
    modules: str = "one_by_one",
    seeds: Sequence[int] = range(8),
    dtype: str = "float32",
    device: str = "cpu",
    every: int = 1,
    histograms: bool = False,
    generator: str = "torch",
    emit: Callable[[Frames], None] | None = None,
    progress: bool = False,
) -> Frames:
    """The tables `stats`, `losses`, `parity` and, if wanted, `histograms` of `depth` hidden layers, a network per seed.

    `init` and `lr` are those of all networks, or a sequence with one for each, which then stand in columns. A rule that
    is fitted to data sees each network's own first batch, and how it went is the table `lsuv`; one with a base width
    has learning rates of its own in every layer, `lr` times `mup.learning_rates`.
    Step k stands for the values and gradients after k updates; the row `update` is W_{k+1} - W_k. With `emit` the rows
    are handed over every 30 seconds and at the end, also when the run is interrupted, and nothing is returned.
    """
    check(train_depth=depth, train_width=width, train_batch=batch, train_steps=steps, every=every)
    rules, rates = rules_of(init, len(seeds)), _rates(lr, len(seeds))
    refuse_mismatch(data, loss, batch)
    collected: list[Frames] = []
    deliver = collected.append if emit is None else emit
    place = find_device(device)
    sizes = [data.x.shape[1], *[width] * depth, data.classes if LOSSES[loss].classes and data.classes else 1]
    number, groups = choose(DTYPES, dtype, "dtype"), list(chunks(seeds, place))
    choose(ACTIVATIONS, activation, "activation")
    choose(OPTIMIZERS, optimizer, "train.optimizer")
    with tqdm(total=steps * len(groups), desc="train", unit="step", disable=None if progress else True) as bar:
        for start, group in zip(range(0, len(seeds), len(groups[0])), groups, strict=True):
            part = slice(start, start + len(group))
            first, _ = next(iter(_batches(data, loss, batch, 1, group, number, place)))
            parameters, fit = drawn(rules[part], activation, sizes, group, first, generator)
            if fit is not None:
                deliver({"lsuv": fit.frame().assign(stage="train")})
            records = Records(group, deliver, histograms, _differing(init, rules, lr, rates, activation, part))
            given = lr if isinstance(lr, int | float) else rates[part]
            factors = [learning_rates(one, sizes, optimizer in ADAPTIVE) for one in rules[part]]
            pair = Pair(parameters, activation, loss, optimizer, given, batch, records, modules, factors)
            try:
                for step, (xb, yb) in enumerate(_batches(data, loss, batch, steps, group, number, place)):
                    pair.step(step, xb, yb, record=step % every == 0)
                    if records.due():
                        pair.flush()
                    bar.update()
            finally:
                pair.flush()
    names = dict.fromkeys(name for part in collected for name in part)
    return {name: pd.concat([part[name] for part in collected if name in part], ignore_index=True) for name in names}


def _rates(lr: float | Sequence[float], networks: int) -> list[float]:
    rates = [float(lr)] * networks if isinstance(lr, int | float) else [float(rate) for rate in lr]
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
    activation: str,
    part: slice,
) -> dict[str, pd.Categorical | np.ndarray]:
    """The columns in which the networks of an ensemble differ, a value for each."""
    found: dict[str, pd.Categorical | np.ndarray] = {}
    if not isinstance(init, str | Rule):
        names = pd.Categorical([name_of(one) for one in init])
        found["init"] = names[part]
        found["gain"] = np.array([one.gain_for(activation) for one in rules[part]])
    if not isinstance(lr, int | float):
        found["lr"] = np.array(rates[part])
    return found


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
