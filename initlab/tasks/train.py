"""Two trainings side by side: the MLP by hand and its `nn.Module` twin, from the same weights on the same batches."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from initlab.errors import UsageError, check, choose
from initlab.scratch.layers import LOSSES
from initlab.signal.activations import ACTIVATIONS
from initlab.signal.init import Rule, draw, permutation, rule
from initlab.tasks.data import Data
from initlab.tasks.pair import OPTIMIZERS, Frames, Pair, Records
from initlab.tasks.place import DTYPES, chunks, find_device


def train(
    data: Data,
    init: str | Rule = "kaiming",
    activation: str = "relu",
    depth: int = 1,
    width: int = 50,
    batch: int = 64,
    steps: int = 200,
    lr: float = 0.1,
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

    Step k stands for the values and gradients after k updates; the row `update` is W_{k+1} - W_k. With `emit` the rows
    are handed over every 30 seconds and at the end, also when the run is interrupted, and nothing is returned.
    """
    check(train_depth=depth, train_width=width, train_batch=batch, train_steps=steps, train_lr=lr, every=every)
    refuse_mismatch(data, loss, batch)
    collected: list[Frames] = []
    deliver = collected.append if emit is None else emit
    place = find_device(device)
    scaling = rule(init) if isinstance(init, str) else init
    sizes = [data.x.shape[1], *[width] * depth, data.classes if LOSSES[loss].classes and data.classes else 1]
    number, groups = choose(DTYPES, dtype, "dtype"), list(chunks(seeds, place))
    choose(ACTIVATIONS, activation, "activation")
    choose(OPTIMIZERS, optimizer, "train.optimizer")
    with tqdm(total=steps * len(groups), desc="train", unit="step", disable=None if progress else True) as bar:
        for group in groups:
            parameters = [
                draw(scaling, activation, shape, group, layer, number, place, generator)
                for layer, shape in enumerate(pairwise(sizes), start=1)
            ]
            records = Records(group, deliver, histograms)
            pair = Pair(parameters, activation, loss, optimizer, lr, batch, records, modules)
            try:
                for step, (xb, yb) in enumerate(_batches(data, loss, batch, steps, group, number, place)):
                    pair.step(step, xb, yb, record=step % every == 0)
                    if records.due():
                        pair.flush()
                    bar.update()
            finally:
                pair.flush()
    names = collected[0] if collected else ()
    return {name: pd.concat([part[name] for part in collected], ignore_index=True) for name in names}


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
