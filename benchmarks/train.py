"""A training as it is typed, `task=train`: by hand and by torch, every tensor recorded and both gradients compared.

It is divided by both trainings as bare loops over nn.Module, on the same batches from the same weights.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks import bare, subjects
from benchmarks.nets import LR
from benchmarks.race import Asked, Builds, Contestant, Outcome, Setting, run
from initlab.tasks.data import load
from initlab.tasks.ensemble.networks import Frames
from initlab.tasks.train import train

DEEP: dict[str, Any] = {"depth": 50, "width": 100, "batch": 64, "steps": 20}
BOOK: dict[str, Any] = {"depth": 1, "width": 50, "batch": 64, "steps": 100}
SEEDS = 8
EVERY = 10


def group(setting: Setting) -> Outcome:
    outcome = Outcome()
    for name, sizes in (("recorded", DEEP), ("book", BOOK)):
        loops, id_ = f"{name}, two bare loops", f"train.{name}"
        builds: Builds = {loops: partial(bare.two_trainings, **sizes)}
        asked = []
        for variant, every in (("nohist", 1), ("plain", 1), ("every10", EVERY)):
            typed = f"{name} as typed, {variant}"
            builds[typed] = partial(typed_training, sizes, every=every, accelerated=variant != "plain")
            asked.append(Asked(id_, variant, typed, loops))
        outcome.add(run(builds, asked, setting))
    eight = partial(typed_training, DEEP, seeds=SEEDS, accelerated=True)
    builds = {"8 networks as typed": eight, "8 networks, every 10th step": partial(eight, every=EVERY)}
    outcome.add(run(builds, [Asked("train.eight", "nohist", *builds)], setting))
    return outcome


def typed_training(sizes: Mapping[str, Any], every: int = 1, accelerated: bool = True, seeds: int = 1) -> Contestant:
    """A training as `task=train` makes it, tables included: by hand and as nn.Module; gives how many rows it left."""
    subjects.available(accelerated)
    digits = load("digits")

    def train_once() -> int:
        rows: list[int] = []

        def emit(frames: Frames) -> None:
            rows.extend(map(len, frames.values()))

        train(digits, **sizes, lr=LR, seeds=seeds, every=every, emit=emit)
        return sum(rows)

    return Contestant(subjects.backend(accelerated, train_once), sizes["steps"] * seeds)
