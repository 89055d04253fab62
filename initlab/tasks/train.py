"""Two trainings side by side: the MLP by hand and its `nn.Module` twin, from the same weights on the same batches."""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from initlab.errors import UsageError, check, choose
from initlab.scratch import mlp
from initlab.scratch.layers import LOSSES, Loss
from initlab.scratch.mlp import Parameters, Pass
from initlab.signal.activations import ACTIVATIONS, Activation
from initlab.signal.init import Rule, draw, permutation, rule
from initlab.signal.stats import Blocks, Differences, Item, Key, Rows, saturated_share
from initlab.tasks.data import Data
from initlab.tasks.place import DTYPES, chunks, find_device

Frames = dict[str, pd.DataFrame]

# Elementwise optimizers only: they treat an ensemble as its members.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}

FLUSH_SECONDS, FLUSH_ROWS = 30.0, 200_000


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
    seeds: Sequence[int] = range(8),
    dtype: str = "float32",
    device: str = "cpu",
    every: int = 1,
    generator: str = "torch",
    emit: Callable[[Frames], None] | None = None,
    progress: bool = False,
) -> Frames:
    """The tables `stats`, `losses` and `parity` of `depth` hidden layers trained for `steps` steps, a network per seed.

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
            pair = _Pair(parameters, ACTIVATIONS[activation], LOSSES[loss], OPTIMIZERS[optimizer], lr)
            records = _Records(group, deliver)
            try:
                for step, (xb, yb) in enumerate(_batches(data, loss, batch, steps, group, number, place)):
                    pair.step(step, xb, yb, records if step % every == 0 else None, records.losses)
                    records.flush_if_due()
                    bar.update()
            finally:
                records.flush()
    return {name: pd.concat([part[name] for part in collected], ignore_index=True) for name in TABLES if collected}


TABLES = ("stats", "losses", "parity")


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


class _Records:
    """What has been measured and not yet handed over."""

    def __init__(self, seeds: Sequence[int], deliver: Callable[[Frames], None]) -> None:
        self.rows, self.parity = Rows(seeds), Differences(seeds)
        self.losses = Blocks(seeds, ("implementation", "seed", "step"), ("loss", "accuracy"))
        self._deliver, self._since = deliver, time.monotonic()

    def flush_if_due(self) -> None:
        if len(self.rows) > FLUSH_ROWS or time.monotonic() - self._since > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if len(self.losses):
            self._deliver(dict(zip(TABLES, (t.frame() for t in (self.rows, self.losses, self.parity)), strict=True)))
        self._since = time.monotonic()


class _Pair:
    """An ensemble trained by hand and its twins trained by torch, a step at a time."""

    def __init__(
        self,
        parameters: Parameters,
        activation: Activation,
        loss: Loss,
        optimizer: Callable[..., torch.optim.Optimizer],
        lr: float,
    ) -> None:
        self.activation, self.loss, self.parameters = activation, loss, parameters
        self.twins = [mlp.twin(parameters, member, activation) for member in range(len(parameters[0][0]))]
        self.by_hand = optimizer([p for pair in parameters for p in pair], lr=lr)
        self.by_torch = optimizer([p for model in self.twins for p in model.parameters()], lr=lr)

    def step(self, step: int, xb: Tensor, yb: Tensor, records: _Records | None, losses: Blocks) -> None:
        """One update of both; what is measured goes to `records`, if this step is to be recorded."""
        hand = mlp.forward_and_backward(self.parameters, xb, yb, self.activation, self.loss)
        self.by_torch.zero_grad()
        twin_losses, twin_out, module = mlp.twin_forward_and_backward(
            self.twins, xb, yb, self.loss, watch=records is not None
        )
        for name, out, value in (("scratch", hand.out, hand.loss), ("module", twin_out, twin_losses)):
            losses.put([Key("train", name, step, 0, "", "")], _loss_and_accuracy(out, yb, value, self.loss))
        theirs: Parameters = []
        if records is not None and module is not None:
            theirs = mlp.twin_parameters(self.twins)
            records.rows.add(
                [
                    *self._items("scratch", step, hand, self.parameters),
                    *self._items("module", step, module, theirs),
                ]
            )
            self._compare(step, xb, yb, module, theirs, records.parity)
        before = [(w.clone(), b.clone()) for w, b in self.parameters] if records is not None else []
        for pair, grads in zip(self.parameters, hand.parameter_grads, strict=True):
            for p, g in zip(pair, grads, strict=True):
                p.grad = g
        self.by_hand.step()
        self.by_torch.step()
        if records is not None:
            after = mlp.twin_parameters(self.twins)
            records.rows.add(
                [
                    *_updates("scratch", step, before, self.parameters),
                    *_updates("module", step, theirs, after),
                ]
            )

    def _items(self, implementation: str, step: int, seen: Pass, parameters: Parameters) -> list[Item]:
        key = partial(Key, "train", implementation, step)
        hidden = seen.preactivations[:-1]
        saturated = [saturated_share(self.activation.slope(z), self.activation.largest_slope) for z in hidden]
        items = []
        for direction, z, a, pairs in (
            ("forward", seen.preactivations, seen.activations, parameters),
            ("backward", seen.preactivation_grads, seen.activation_grads, seen.parameter_grads),
        ):
            shares = [*saturated, None] if direction == "forward" else [None] * len(z)
            items += [
                Item(key(layer, "preactivation", direction), t, share)
                for layer, (t, share) in enumerate(zip(z, shares, strict=True), start=1)
            ]
            items += [Item(key(layer, "activation", direction), t) for layer, t in enumerate(a, start=1)]
            items += _parameter_items(key, direction, pairs)
        return items

    def _compare(
        self, step: int, xb: Tensor, yb: Tensor, module: Pass, theirs: Parameters, parity: Differences
    ) -> None:
        """Gradients by hand at the module's parameters and batch against autograd's; and the two trainings' weights.

        The forward rows of `weight` and `bias` compare two trainings that run on by themselves; all others one pass.
        """
        hand = mlp.by_hand_at_twins(self.twins, xb, yb, self.activation, self.loss)
        backward = [
            [item for item in self._items("", step, seen, theirs) if item.key.direction == "backward"]
            for seen in (hand, module)
        ]
        parity.add(*backward)
        key = partial(Key, "train", "", step)
        parity.add(*(_parameter_items(key, "forward", pairs) for pairs in (self.parameters, theirs)))


def _parameter_items(key: Callable[[int, str, str], Key], direction: str, pairs: Parameters) -> list[Item]:
    items = []
    for layer, (w, b) in enumerate(pairs, start=1):
        items += [Item(key(layer, "weight", direction), w), Item(key(layer, "bias", direction), b.unsqueeze(-2))]
    return items


def _updates(implementation: str, step: int, before: Parameters, after: Parameters) -> list[Item]:
    return [
        Item(Key("train", implementation, step, layer, "update", "forward"), new - old)
        for layer, ((old, _), (new, _)) in enumerate(zip(before, after, strict=True), start=1)
    ]


def _loss_and_accuracy(out: Tensor, yb: Tensor, loss: Tensor, kind: Loss) -> Tensor:
    """(2, 1, E); the accuracy of a regression is nan."""
    value = loss.double()
    right = (out.argmax(-1) == yb).double().mean(-1) if kind.classes else torch.full_like(value, torch.nan)
    return torch.stack([value, right]).unsqueeze(1)
