"""The networks of one job: `seeds` of them, or every combination of the values on the axes `sweep.*`.

Plain values in and out. The seed runs fastest: the networks of one point of the grid are neighbours, an ensemble.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from initlab.errors import UsageError, check
from initlab.job.options import seeds
from initlab.job.settings import Config
from initlab.nn.activations import Activation
from initlab.nn.init import Rule, rule

TAKE_AXES = ("lab", "stack", "train")  # the tasks whose networks may differ inside a job


class Grid(NamedTuple):
    """Rule, seed and learning rate of every network, and the columns in which its points differ, a value for each."""

    rules: Sequence[Rule]
    seeds: Sequence[int]
    rates: Sequence[float]
    columns: Mapping[str, np.ndarray | pd.Categorical]
    points: int = 1

    def named(self, frame: pd.DataFrame) -> pd.DataFrame:
        """A program's frame, whose networks are told by `network`, with the columns of this grid and no others."""
        if "network" not in frame:
            return frame
        who = frame["network"].to_numpy()
        kept = frame.drop(columns=[name for name in ("network", "init", "gain", "lr") if name in frame])
        return kept.assign(**{name: values[who] for name, values in self.columns.items()})

    def firsts(self) -> range:
        """The first network of every point."""
        return range(0, len(self.seeds), len(self.seeds) // self.points)


def refuse_axes(config: Config) -> None:
    """What cannot be an axis: one line for each mistake."""
    for name, values in vars(config.sweep).items():
        if values is None:
            continue
        option, said = f"sweep.{name}", f"[{','.join(map(str, values))}]"
        if config.task not in TAKE_AXES:
            raise UsageError(f"{option}={said}: task={config.task} has no axes; use task={'|'.join(TAKE_AXES)}")
        if not values:
            raise UsageError(f"{option}=[]: must name at least one value")
        if len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise UsageError(f"{option}={said}: {twice} stands there more than once")
        for value in values:
            if name == "seed":
                check(seed=value)
            if name == "lr":
                check(train_lr=value)
            if name == "gain" and not 0 <= value < math.inf:
                raise UsageError(f"{option}={said}: {value} must be a finite number, at least 0")


def grid_of(config: Config, scaling: Rule, phi: Activation | str) -> Grid:
    """The networks that a configuration asks for; without axes the rule is `scaling` for all of them."""
    axes, own = config.sweep, seeds(config)
    if axes.init is None and axes.gain is None and axes.lr is None:
        return Grid([scaling] * len(own), own, [config.train.lr] * len(own), {})
    given = {name: value for name, value in vars(config.init).items() if name != "name"}
    bases = [(config.init.name, scaling)] if axes.init is None else [(name, rule(name, **given)) for name in axes.init]
    gains: Sequence[float | None] = [None] if axes.gain is None else axes.gain
    rates = [config.train.lr] if axes.lr is None else axes.lr
    points = [
        (name, base if gain is None else replace(base, gain=gain), rate)
        for (name, base), gain, rate in product(bases, gains, rates)
    ]
    every = [(name, one, rate, seed) for (name, one, rate), seed in product(points, own)]
    columns: dict[str, Any] = {}
    if axes.init is not None:
        columns["init"] = pd.Categorical([name for name, *_ in every], list(axes.init))
        for field in ("mode", "distribution", "bias", "gain_kind", "attempts", "tolerance", "base_width"):
            values = np.array([getattr(one, field) for _, one, *_ in every])
            columns[field] = pd.Categorical(values) if values.dtype.kind == "U" else values
    if axes.init is not None or axes.gain is not None:
        columns["gain"] = np.array([one.gain_for(phi) for _, one, *_ in every])
    if axes.lr is not None:
        columns["lr"] = np.array([rate for _, _, rate, _ in every])
    _, rules, networks_rates, networks_seeds = zip(*every, strict=True)
    return Grid(rules, networks_seeds, networks_rates, columns, len(points))
