"""Statistics of the user: functions (..., N, C) -> (...) whose results stand in columns behind the built-in ones."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from initlab.errors import UsageError
from initlab.stats.keys import KEY_COLUMNS, MODULE_COLUMNS
from initlab.stats.statistics import MORE_COLUMNS, STATISTICS

Function = Callable[[Tensor], Tensor]

RESERVED = (*KEY_COLUMNS, *MODULE_COLUMNS, *STATISTICS, *MORE_COLUMNS, "network", "run", "init", "gain", "lr")


def checked_statistics(statistics: Mapping[str, Function] | None, reserved: Iterable[str] = ()) -> dict[str, Function]:
    """The functions by the names of their columns; a name that is taken, or no function, is refused in one line.

    `reserved` are names of further columns of the tables, such as those of the configuration.
    """
    if statistics is not None and not isinstance(statistics, Mapping):
        raise UsageError(f"statistics={statistics!r}: must be a dictionary of functions by the names of their columns")
    given = dict(statistics or {})
    for name, function in given.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise UsageError(f"statistics.{name}: the name of a column must be letters, digits and underscores")
        if name in RESERVED or name in reserved:
            raise UsageError(f"statistics.{name}: the tables have a column of this name; choose another one")
        if not callable(function):
            raise UsageError(f"statistics.{name}={function!r}: must be a function (..., N, C) -> (...)")
    return given


def measure_custom(statistics: Mapping[str, Function], x: Tensor) -> Tensor:
    """The results for x (..., N, C), in float64: (functions, ...).

    Entries that are nan or inf are data and reach the functions as they are. Each function gets a copy, so that nothing
    it does changes a measurement or a training. A function that raises, or gives anything but one number for each of
    the leading dimensions, is refused in one line.
    """
    found = []
    for name, function in statistics.items():
        try:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                value = function(x.clone())
        except Exception as error:  # a function of the user may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UsageError(f"statistics.{name}: fails for a tensor {tuple(x.shape)}: {reason}") from error
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != tuple(x.shape[:-2]):
            wanted = f"{tuple(x.shape[:-2])} for a tensor {tuple(x.shape)}"
            raise UsageError(f"statistics.{name}: gives {shape}, must give {wanted}, one number for each (N, C)")
        found.append(value.detach().to(x.device, torch.float64))
    return torch.stack(found) if found else x.new_empty((0, *x.shape[:-2]), dtype=torch.float64)
