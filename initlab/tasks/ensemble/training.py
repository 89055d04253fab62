"""How networks are trained: the optimizers, the ways to run their modules, and all choices in one object."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from initlab.errors import Limits, UsageError, check_value, choose, keep_checked
from initlab.nn.loss_table import LOSSES
from initlab.tasks.data import Data

Optimizer = Callable[..., torch.optim.Optimizer]

# Elementwise optimizers only: they treat an ensemble as its members.
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
# They divide a gradient by its own size.
ADAPTIVE = ("rmsprop", "adam", "adamw")
# Rates at which the book's network learns the shipped data and no unit dies; an adaptive optimizer has one of its own.
RATES = {"cross_entropy": 0.1, "mse": 0.01}
ADAPTIVE_RATE = 0.001
CLASSES = Limits(1, 10**6, whole=True, optional=True)  # of data; None where targets are numbers
# How the modules of an ensemble run on steps that are not recorded; recorded ones go one by one.
MODULES = {"one_by_one": "each nn.Module by itself", "vmap": "all as one program, torch.func.vmap"}


def default_rate(loss: str, optimizer: str) -> float:
    """The learning rate that is taken where none is given; 10 steps of a momentum of 0.9 add up.

    Errors: an unknown loss or optimizer.

    >>> default_rate("mse", "sgd"), default_rate("mse", "adam")
    (0.01, 0.001)
    """
    choose(OPTIMIZERS, optimizer, "train.optimizer")
    rate = choose(RATES, loss, "train.loss")
    return ADAPTIVE_RATE if optimizer in ADAPTIVE else rate if optimizer == "sgd" else rate / 10


@dataclass(frozen=True)
class Training:
    """How networks are trained: `depth` hidden layers of `width` units, on batches of `batch` rows, `steps` updates.

    optimizer: a name of OPTIMIZERS; loss: of LOSSES; modules: of MODULES. drift: also record how far the first batch's
    preactivations have moved. every: record every k-th step. histograms: record histograms too.
    Errors: a number out of its range; an unknown name.
    """

    depth: int = 1
    width: int = 50
    batch: int = 64
    steps: int = 200
    optimizer: str = "sgd"
    loss: str = "cross_entropy"
    modules: str = "one_by_one"
    drift: bool = False
    every: int = 1
    histograms: bool = False

    def __post_init__(self) -> None:
        keep_checked(self, ("depth", "width", "batch", "steps", "drift"), "train.")
        keep_checked(self, ("every", "histograms"))
        choose(OPTIMIZERS, self.optimizer, "train.optimizer")
        choose(LOSSES, self.loss, "train.loss")
        choose(MODULES, self.modules, "train.modules")

    def sizes(self, data: Data) -> list[int]:
        """Units of the data, of every hidden layer, and of the last one: one for each class, or one number."""
        outputs = data.classes if LOSSES[self.loss].classes and data.classes else 1
        return [data.x.shape[1], *[self.width] * self.depth, outputs]

    def check_data(self, data: Data) -> None:
        """Refuse data that are none, a loss that does not fit the targets, and a batch larger than the data."""
        n = len(data.x) if isinstance(data.x, Tensor) and data.x.ndim == 2 and not data.x.is_complex() else -1
        if not isinstance(data.y, Tensor) or data.y.shape != (n,) or data.y.is_complex():
            raise UsageError(f"data={data.name}: x must be a tensor (n, I) of real numbers, y a tensor (n,)")
        classes = range(check_value("data.classes", data.classes, CLASSES) or 0)
        if len(classes) and not bool(torch.isin(data.y, torch.arange(len(classes), device=data.y.device)).all()):
            raise UsageError(f"data={data.name}: targets must be classes from 0 to {len(classes) - 1}")
        if LOSSES[self.loss].classes and data.classes is None:
            raise UsageError(f"train.loss={self.loss}: data={data.name} has no classes; use train.loss=mse")
        if self.batch > len(data.x):
            raise UsageError(
                f"train.batch={self.batch}: data={data.name} has {len(data.x)} training rows; use at most as many"
            )
