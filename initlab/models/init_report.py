"""What was done to each parameter of a model: a frame, a text that says it, and groups for an optimizer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
from torch import nn

from initlab.terminal import NotebookText


class InitRow(NamedTuple):
    """A parameter: whether it was set, its mean and std now, the gain, and what its learning rate is multiplied by."""

    parameter: str
    shape: tuple[int, ...]
    kind: str
    done: bool
    mean: float
    std: float
    gain: float
    sgd: float = 1.0
    adam: float = 1.0
    note: str = ""

    def __str__(self) -> str:
        gain = f", gain {self.gain:.4g}" if self.gain == self.gain else ""
        numbers = f"std {self.std:.4g}{gain}" if self.std else f"all {self.mean:.4g}"
        words = [f"{self.kind} {self.shape}", numbers if self.done else "left as it is"]
        if self.adam != 1 or self.sgd != 1:
            words.append(f"learning rate times {self.adam:.4g} (Adam), {self.sgd:.4g} (SGD)")
        return "; ".join([*words, *filter(None, [self.note])])


class InitReport(NotebookText):
    """What `init_` did: `frame` has a row per parameter, `groups` the learning rates, and its text says all of it."""

    def __init__(
        self, rule: str, rows: Sequence[InitRow], remarks: Sequence[str], parameters: Sequence[Sequence[nn.Parameter]]
    ) -> None:
        self.rule, self.remarks = rule, list(remarks)
        self._rows, self._parameters = list(rows), list(parameters)

    @property
    def frame(self) -> pd.DataFrame:
        """parameter, shape, kind, done, mean, std, gain, sgd, adam, note."""
        return pd.DataFrame(self._rows, columns=list(InitRow._fields))

    def groups(self, lr: float, adaptive: bool = True) -> list[dict[str, Any]]:
        """The parameters in groups of one learning rate, as optimizers of torch take them.

        lr: the learning rate at the base width. adaptive: for Adam and its like; else for gradient descent.
        """
        found: dict[float, list[nn.Parameter]] = {}
        for row, parameters in zip(self._rows, self._parameters, strict=True):
            found.setdefault(row.adam if adaptive else row.sgd, []).extend(parameters)
        return [{"params": parameters, "lr": lr * factor} for factor, parameters in found.items()]

    def __str__(self) -> str:
        width = max((len(row.parameter) for row in self._rows), default=0)
        return "\n".join(
            [f"init_: {self.rule}", *(f"{row.parameter:{width}}  {row}" for row in self._rows), *self.remarks]
        )

    __repr__ = __str__
