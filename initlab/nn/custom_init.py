"""A function that fills a weight, torch's or the user's own, as the distribution of a rule."""

from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from initlab.errors import UsageError, show
from initlab.nn.init import DISTRIBUTIONS, Rule, WeightNumbers
from initlab.nn.philox import keys

Filler: TypeAlias = Callable[[Tensor], Any]
_torch_draws = Lock()  # its default generator belongs to the whole process, also where threads take a network each


def make_rule(fill: Filler, name: str = "") -> Rule:
    """A rule whose weights a function writes: into a tensor of torch's shape (O, I), or it returns one of that shape.

    fill: such as torch.nn.init.xavier_normal_; it draws with torch's default generator, which is seeded for each
    network and layer. name: what tables call the distribution; without one it is the function's module and name. A
    `gain` of the rule multiplies what the function writes. Theory has no law of such weights.
    Errors: what cannot be called; a function that fails, leaves entries unwritten or returns another shape; one whose
    numbers do not follow from torch's seed.

    >>> make_rule(torch.nn.init.xavier_normal_).distribution
    'torch.nn.init.xavier_normal_'
    """
    if not callable(fill):
        raise UsageError(f"init={show(fill)}: must be a function that fills a tensor, such as torch.nn.init.eye_")
    name = name or f"{fill.__module__}.{getattr(fill, '__qualname__', type(fill).__name__)}"
    first, again = (_fill(fill, name, (4, 6), 0, blank=0.0) for _ in range(2))
    if not torch.equal(first, again) and bool((first == first).all()):
        raise UsageError(f"init: {name} gives other numbers with the same torch.manual_seed; draw with torch alone")
    blank = _fill(fill, name, (4, 6), 0, blank=torch.nan)
    if bool((blank.isnan() & ~first.isnan()).any()):
        raise UsageError(f"init: {name} leaves entries unwritten; it must fill the tensor, or return another")
    DISTRIBUTIONS[name] = partial(_draw, fill, name)
    return Rule(gain=1.0, mode="constant", distribution=name)


def _fill(fill: Filler, name: str, shape: Sequence[int], seed: int, blank: float) -> Tensor:
    """One weight (I, O), float32; `blank` stands in the tensor before."""
    weight = torch.full(tuple(shape)[::-1], blank)
    with _torch_draws, torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        try:
            found = fill(weight)
        except (Exception, SystemExit) as error:  # a function of the user's may raise anything
            reason = str(error) or type(error).__name__
            raise UsageError(f"init: {name} cannot fill a weight {tuple(weight.shape)} ({reason})") from error
    found = weight if found is None else torch.as_tensor(found) if isinstance(found, np.ndarray) else found
    if not isinstance(found, Tensor) or found.shape != weight.shape or found.is_complex():
        given = tuple(found.shape) if isinstance(found, Tensor) else show(found)
        raise UsageError(
            f"init: {name} returns {given}; it must fill or return real numbers (O, I)={tuple(weight.shape)}"
        )
    return found.detach().to("cpu", torch.float32).mT.contiguous()


def _draw(fill: Filler, name: str, shape: tuple[int, int], std: float, numbers: WeightNumbers) -> Tensor:
    """Weights (E, I, O), `std` times what the function writes for each network's own seed."""
    own = keys(numbers.seeds, "weight", numbers.layer)
    each = torch.stack([_fill(fill, name, shape, key >> 1, torch.nan) for key in own])
    return each if std == 1 else each.mul_(std)
