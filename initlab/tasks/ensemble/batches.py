"""The batches of a training, and the trained network as it stands before its first step."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from initlab.nn.custom_activation import Given
from initlab.nn.init import Rule, permutation
from initlab.tasks.data import Data, load
from initlab.tasks.ensemble.device import Where
from initlab.tasks.ensemble.networks import draw_trained
from initlab.tasks.ensemble.training import Training


def batches(data: Data, training: Training, seeds: Sequence[int], where: Where) -> Iterable[tuple[Tensor, Tensor]]:
    """xb (E, N, I) and yb (E, N), each network in its own order, reshuffled every epoch; short batches are left out."""
    x = data.x.to(where.device, where.dtype)
    y = data.y.to(where.device, torch.int64 if training.takes_classes(data) else where.dtype)
    per_epoch = len(x) // training.batch
    for step in range(training.steps):
        epoch, number = divmod(step, per_epoch)
        if number == 0:
            order = torch.stack([permutation(len(x), seed, "order", epoch) for seed in seeds]).to(where.device)
        chosen = order[:, number * training.batch : (number + 1) * training.batch]
        yield x[chosen], y[chosen]


class FirstStep(NamedTuple):
    """[(w, b), ...] of one network, and the batch that its first step sees."""

    parameters: list[tuple[Tensor, Tensor]]
    xb: Tensor
    yb: Tensor


def find_first_step(
    data: Data | str, training: Training, init: Rule, activation: Given, seed: int, where: Where
) -> FirstStep:
    """The network of `task=train` with this seed, and its first batch: the numbers are those of that task's step 0.

    data: a name of SOURCES or a `Data`. Errors: data that do not fit the loss, or fewer rows than a batch has.
    """
    source = data if isinstance(data, Data) else load(data)
    training.check_data(source)
    (xb, yb), *_ = batches(source, replace(training, steps=1), [seed], where)
    start = draw_trained([init], activation, training.sizes(source), [seed], xb, where.generator)
    return FirstStep([(w[0], b[0]) for w, b in start.parameters], xb[0], yb[0])
