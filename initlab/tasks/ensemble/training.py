"""How networks are trained: the optimizers, the ways to run their modules, and all choices in one object."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import unwrap
from typing import TypeVar

import torch
from torch import Tensor

from initlab.errors import Limits, UsageError, check_value, choose, keep_checked, show
from initlab.nn.custom_loss import GivenLoss, as_loss, check_loss
from initlab.nn.loss_table import Loss
from initlab.tasks.data import Data

Optimizer = Callable[..., torch.optim.Optimizer]
GivenOptimizer = str | Optimizer

_Kind = TypeVar("_Kind", bound=torch.optim.Optimizer)
_WRAPPED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict", "step")


def _drop_compiler(kind: type[_Kind]) -> type[_Kind]:
    """The optimizer without its provisions for torch.compile: the first use of these imports a compiler for a second.

    Its methods are those of torch without their decorators, of which remains that no step is differentiated.
    """
    methods = {name: unwrap(getattr(kind, name)) for name in _WRAPPED}
    return type(kind.__name__, (kind,), methods | {"step": torch.no_grad()(methods["step"])})


_SGD = _drop_compiler(torch.optim.SGD)
# Elementwise optimizers only: they treat an ensemble as its members.
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": _SGD,
    "momentum": partial(_SGD, momentum=0.9),
    "nesterov": partial(_SGD, momentum=0.9, nesterov=True),
    "rmsprop": _drop_compiler(torch.optim.RMSprop),
    "adam": _drop_compiler(torch.optim.Adam),
    "adamw": _drop_compiler(torch.optim.AdamW),
}
# They divide a gradient by its own size.
ADAPTIVE = ("rmsprop", "adam", "adamw")
# Rates at which the book's network learns the shipped data and no unit dies; an adaptive optimizer has one of its own.
RATES = {"cross_entropy": 0.1, "mse": 0.01}
OWN_RATE = 0.01  # with a loss of the user's own
ADAPTIVE_RATE = 0.001  # and that of an optimizer of the user's own
CLASSES = Limits(1, 10**6, whole=True, optional=True)  # of data; None where targets are numbers
# How the modules of an ensemble run on steps that are not recorded; recorded ones go one by one.
MODULES = {"one_by_one": "each nn.Module by itself", "vmap": "all as one program, torch.func.vmap"}


def default_rate(loss: GivenLoss, optimizer: GivenOptimizer) -> float:
    """The learning rate that is taken where none is given; 10 steps of a momentum of 0.9 add up.

    loss, optimizer: names, or those of the user's own. Errors: an unknown loss or optimizer.

    >>> default_rate("mse", "sgd"), default_rate("mse", "adam")
    (0.01, 0.001)
    """
    as_optimizer(optimizer)
    rate = choose(RATES, loss, "train.loss") if isinstance(loss, str) else OWN_RATE
    if not isinstance(optimizer, str) or optimizer in ADAPTIVE:
        return ADAPTIVE_RATE
    return rate if optimizer == "sgd" else rate / 10


def as_optimizer(given: GivenOptimizer) -> Optimizer:
    """What makes an optimizer of parameters and a learning rate.

    given: a name of OPTIMIZERS, or a class of torch's or of the user's own, perhaps with some of its arguments.
    Errors: an unknown name; what makes no torch.optim.Optimizer that takes a step without being asked for a loss.

    >>> as_optimizer(torch.optim.Adagrad).__name__
    'Adagrad'
    """
    if isinstance(given, str):
        return choose(OPTIMIZERS, given, "train.optimizer")
    if not callable(given):
        raise UsageError(f"train.optimizer={show(given)}: must be a name or a class of torch.optim.Optimizer")
    name = f"train.optimizer: {getattr(given, '__name__', getattr(given, 'func', given))}"
    weight, bias = torch.zeros(2, 3), torch.zeros(2)
    weight.grad, bias.grad = torch.ones(2, 3), torch.ones(2)
    try:
        made = given([weight, bias], lr=ADAPTIVE_RATE)
        if isinstance(made, torch.optim.Optimizer):
            made.step()
    except (Exception, SystemExit) as error:  # a class of the user's may raise anything
        reason = str(error) or type(error).__name__
        raise UsageError(f"{name} cannot train a weight (2, 3) and a bias (2,) with lr=0.001 ({reason})") from error
    if not isinstance(made, torch.optim.Optimizer):
        raise UsageError(f"{name} makes a {type(made).__name__}; it must be a torch.optim.Optimizer")
    return given


def arrange_members(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[list[Tensor]]:
    """Of each network its tensors w, b, w, b, ... in torch's orientation, views of w (E, I, O) and b (E, O)."""
    return [[one for w, b in pairs for one in (w[k].mT, b[k])] for k in range(len(pairs[0][0]))]


@dataclass(frozen=True)
class Training:
    """How networks are trained: `depth` hidden layers of `width` units, on batches of `batch` rows, `steps` updates.

    optimizer: a name of OPTIMIZERS, or a class, of which each network has an object of its own. loss: a name of LOSSES,
    or a function as `as_loss` takes it. modules: a name of MODULES. drift: also record how far the first batch's
    preactivations have moved. every: record every k-th step. histograms: record histograms too.
    Errors: a number out of its range; an unknown name.
    """

    depth: int = 1
    width: int = 50
    batch: int = 64
    steps: int = 200
    optimizer: GivenOptimizer = "sgd"
    loss: GivenLoss = "cross_entropy"
    modules: str = "one_by_one"
    drift: bool = False
    every: int = 1
    histograms: bool = False

    def __post_init__(self) -> None:
        keep_checked(self, ("depth", "width", "batch", "steps", "drift"), "train.")
        keep_checked(self, ("every", "histograms"))
        as_optimizer(self.optimizer)
        as_loss(self.loss)
        choose(MODULES, self.modules, "train.modules")

    @property
    def objective(self) -> Loss:
        """The loss as a row of the table."""
        return as_loss(self.loss)

    def takes_classes(self, data: Data) -> bool:
        """Whether targets are classes, and outputs as many; else numbers."""
        classes = self.objective.classes
        return data.classes is not None if classes is None else classes

    def sizes(self, data: Data) -> list[int]:
        """Units of the data, of every hidden layer, and of the last one: one for each class, or one number."""
        outputs = data.classes if self.takes_classes(data) and data.classes else 1
        return [data.x.shape[1], *[self.width] * self.depth, outputs]

    def check_data(self, data: Data) -> None:
        """Refuse data that are none, a loss that does not fit the targets, and a batch larger than the data."""
        n = len(data.x) if isinstance(data.x, Tensor) and data.x.ndim == 2 and not data.x.is_complex() else -1
        if not isinstance(data.y, Tensor) or data.y.shape != (n,) or data.y.is_complex():
            raise UsageError(f"data={data.name}: x must be a tensor (n, I) of real numbers, y a tensor (n,)")
        classes = range(check_value("data.classes", data.classes, CLASSES) or 0)
        if len(classes) and not bool(torch.isin(data.y, torch.arange(len(classes), device=data.y.device)).all()):
            raise UsageError(f"data={data.name}: targets must be classes from 0 to {len(classes) - 1}")
        if self.objective.classes and data.classes is None:
            raise UsageError(f"train.loss={self.loss}: data={data.name} has no classes; use train.loss=mse")
        if self.batch > len(data.x):
            raise UsageError(
                f"train.batch={self.batch}: data={data.name} has {len(data.x)} training rows; use at most as many"
            )
        if not isinstance(self.loss, str):
            y = data.y[: self.batch]
            y = y.long() if self.takes_classes(data) else y.float()
            check_loss(self.objective, torch.zeros(self.batch, self.sizes(data)[-1]), y)
