"""Two trainings side by side: the MLP by hand and its `nn.Module` twin, from the same weights on the same batches."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch

from initlab.errors import UsageError, check, check_functions, library_call
from initlab.nn.activations import ACTIVATIONS, Activation
from initlab.nn.custom_activation import Given, as_activation, check_trainable
from initlab.nn.custom_loss import GivenLoss
from initlab.nn.init import Rule
from initlab.nn.mup import learning_rates
from initlab.stats.keys import Seeds
from initlab.stats.measure import backend_for
from initlab.stats.row_order import NETWORK, sort_rows
from initlab.stats.statistics import Function
from initlab.tasks.data import Data, as_data, load
from initlab.tasks.ensemble.batches import batches
from initlab.tasks.ensemble.device import Where
from initlab.tasks.ensemble.memory import free_memory, readable
from initlab.tasks.ensemble.networks import Emit, Ensemble, Frames, Init, draw_trained
from initlab.tasks.ensemble.plan import CACHED, split
from initlab.tasks.ensemble.training import ADAPTIVE, GivenOptimizer, Training, default_rate
from initlab.tasks.twins import Records, TwinTraining
from initlab.terminal import Bar


@library_call
def train(
    data: Data | tuple[Any, Any] | str = "digits",
    init: Init = "kaiming",
    activation: Given = "relu",
    depth: int = 1,
    width: int = 50,
    batch: int = 64,
    steps: int = 200,
    lr: float | Sequence[float] | None = None,
    optimizer: GivenOptimizer = "sgd",
    loss: GivenLoss = "cross_entropy",
    modules: str = "one_by_one",
    drift: bool = False,
    seeds: Seeds = 8,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    every: int = 1,
    histograms: bool = False,
    generator: str = "philox",
    statistics: Mapping[str, Function] | None = None,
    emit: Emit | None = None,
    progress: bool = False,
    **rule_fields: Any,
) -> Frames:
    """Train networks by hand and as `nn.Module`; the tables `stats`, `losses`, `parity`, perhaps `histograms`, `lsuv`.

    data: `digits`, `teacher`, `mnist`, a `Data`, or a pair x, y as `as_data` takes it. init: a rule's name, a `Rule`,
    or a sequence with one for each network. activation: a name, a row of the table, or an elementwise function. depth:
    hidden layers. width: units of each. batch: rows in a step. steps: updates. lr: learning rate of all, one for each,
    or None: `default_rate`. optimizer, loss, modules, drift, every, histograms: as in `Training`. seeds: how many
    networks, or their seeds. dtype, device, generator, statistics: as in `stack`. emit: gets the tables every 30
    seconds and at the end, also when the training is interrupted; nothing is then returned. progress: show a bar.
    rule_fields: fields of the rule, as gain=1.5. Where rules or learning rates differ, they are columns.

    Step k stands for the values and gradients after k updates; the row `update` is W_{k+1} - W_k. With `drift` there
    are rows `drift` too: preactivations at W_k less those at W_0, both of the batch of step 0. A rule that is fitted to
    data sees each network's own first batch, and how it went is the table `lsuv`; one with a base width has learning
    rates of its own in every layer, `lr` times `mup.learning_rates`.
    Errors: an unknown name, a number out of its range, data that do not fit the loss, a network too large for memory.

    >>> sorted(train("digits", depth=1, width=4, batch=8, steps=2, seeds=1))
    ['losses', 'parity', 'stats']
    """
    check(progress=progress)
    check_functions(emit=emit)
    row = as_activation(activation)
    training = Training(depth, width, batch, steps, optimizer, loss, modules, drift, every, histograms)
    where, rates = Where.resolve(dtype, device, generator), default_rate(loss, optimizer) if lr is None else lr
    ensemble = Ensemble.resolve(init, seeds, row, rule_fields, rates)
    if row not in ACTIVATIONS.values():
        check_trainable(row, where.dtype)
    collected: list[Frames] = []
    if emit is None:
        ensemble = replace(ensemble, columns={**ensemble.columns, NETWORK: np.arange(len(ensemble))})
    source = load(data) if isinstance(data, str) else as_data(data, getattr(data, "name", "own"))
    run_training(source, training, row, ensemble, where, emit or collected.append, progress, statistics)
    names = dict.fromkeys(name for frames in collected for name in frames)
    parts = {name: [frames[name] for frames in collected if name in frames] for name in names}
    return {name: sort_rows(pd.concat(some, ignore_index=True)) for name, some in parts.items()}


def run_training(
    data: Data,
    training: Training,
    activation: Activation,
    ensemble: Ensemble,
    where: Where,
    emit: Emit,
    progress: bool = False,
    statistics: Mapping[str, Function] | None = None,
) -> None:
    """`train` of what has been resolved; every k-th step is recorded, and emitted however the training ends."""
    training.check_data(data)
    refuse_unknown_scaling(ensemble.rules, training)
    sizes, backend = training.sizes(data), backend_for(where.device, statistics)
    parts = split(len(ensemble), _most_together(sizes, training.batch, len(ensemble), where))
    total = training.steps * len(parts)
    with Bar(total=total, desc="train", unit="step", disable=None if progress else True) as bar:
        for some in map(ensemble.part, parts):
            (first, _), *_ = batches(data, replace(training, steps=1), some.seeds, where)
            start = draw_trained(some.rules, activation, sizes, some.seeds, first, where.generator)
            if start.fit is not None:
                emit({"lsuv": start.fit.frame(some.columns).assign(stage="train")})
            factors = [learning_rates(one, sizes, training.optimizer in ADAPTIVE) for one in some.rules]
            lr = some.rates if len(set(ensemble.rates)) > 1 else some.rates[0]
            records = Records(some, backend, emit, training.histograms)
            twins = TwinTraining(start.parameters, activation, training, lr, records, factors)
            try:
                for step, (xb, yb) in enumerate(batches(data, training, some.seeds, where)):
                    twins.step(step, xb, yb, record=step % training.every == 0)
                    if records.rows.due():
                        twins.flush()
                    bar.update()
            finally:
                twins.flush()


def refuse_unknown_scaling(rules: Sequence[Rule], training: Training) -> None:
    """A rule with a base width says how the learning rates of known optimizers follow the width, of no others."""
    if not isinstance(training.optimizer, str) and any(one.base_width for one in rules):
        raise UsageError("init.base_width: how learning rates follow the width is known of named optimizers alone")


def _most_together(sizes: Sequence[int], batch: int, networks: int, where: Where) -> int:
    """How many networks run together: on a CPU what a cache holds, on a GPU all that half of the free memory holds.

    Counted are twelve copies of the parameters (two trainings with gradients, updates and an optimizer's state) and of
    every layer's values (forward and backward, twice, and their float64). Refused: one network that does not fit.
    """
    parameters = sum(i * o + o for i, o in pairwise(sizes))
    needed = 12.0 * where.dtype.itemsize * (parameters + batch * sum(sizes))
    free = free_memory(where.device)
    if needed > free:
        raise UsageError(
            f"train.depth={len(sizes) - 2} train.width={sizes[1]} train.batch={batch}: one network works on about "
            f"{readable(needed)} and {readable(free)} are free; make it smaller"
        )
    most = min(networks, CACHED) if where.device.type == "cpu" else networks
    return max(1, int(min(most, free / 2 / needed)))
