"""The networks of one job: `seeds` of them, or every combination of the values on the axes `sweep.*`.

Plain values in and out. The seed runs fastest: the networks of one point of the grid are neighbours, an ensemble.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from initlab.errors import UsageError, check
from initlab.job.settings import Config
from initlab.nn.activations import Activation
from initlab.nn.init import FIELDS, Rule, rule
from initlab.tasks.ensemble.networks import Ensemble

TAKE_AXES = ("lab", "stack", "train")  # the tasks whose networks may differ inside a job


def refuse_axes(config: Config) -> None:
    """What cannot be an axis: one line for each mistake."""
    for name, values in vars(config.sweep).items():
        if values is None:
            continue
        option, text = f"sweep.{name}", f"[{','.join(map(str, values))}]"
        if config.task not in TAKE_AXES:
            raise UsageError(f"{option}={text}: task={config.task} has no axes; use task={'|'.join(TAKE_AXES)}")
        if name == "init" and config.init._target_:
            raise UsageError(f"{option}={text}: names rules; init._target_={config.init._target_} is one of your own")
        if not values:
            raise UsageError(f"{option}=[]: must name at least one value")
        if len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise UsageError(f"{option}={text}: {twice} stands there more than once")
        for value in values:
            if name == "seed":
                check(seed=value)
            if name == "lr":
                check(train_lr=value)
            if name == "gain" and not 0 <= value < math.inf:
                raise UsageError(f"{option}={text}: {value} must be a finite number, at least 0")


def grid_of(config: Config, scaling: Rule, activation: Activation, seeds: Sequence[int]) -> Ensemble:
    """The networks that a configuration asks for; without axes the rule is `scaling` for all of them."""
    axes = config.sweep
    rates: list[float] = [] if config.train.lr is None else [config.train.lr]
    if axes.init is None and axes.gain is None and axes.lr is None:
        return Ensemble([scaling] * len(seeds), seeds, rates * len(seeds))
    fields = {name: getattr(config.init, name) for name in FIELDS}
    bases = [(config.init.name, scaling)] if axes.init is None else [(name, rule(name, **fields)) for name in axes.init]
    gains: Sequence[float | None] = axes.gain or [None]
    points = [
        (name, rule(base, gain=gain), rate) for (name, base), gain, rate in product(bases, gains, axes.lr or rates)
    ]
    every = [(*point, seed) for point, seed in product(points, seeds)]
    names, rules, rates, numbers = (list(column) for column in zip(*every, strict=True))
    columns: dict[str, Any] = {}
    if axes.init is not None:
        columns["init"] = pd.Categorical(names, list(axes.init))
        for field in FIELDS:
            if field != "gain":
                values = np.array([getattr(one, field) for one in rules])
                columns[field] = pd.Categorical(values) if values.dtype.kind == "U" else values
    if axes.init is not None or axes.gain is not None:
        columns["gain"] = np.array([one.gain_for(activation) for one in rules])
    if axes.lr is not None:
        columns["lr"] = np.array(rates)
    return Ensemble(rules, numbers, rates, columns, len(points))
