"""The tasks `audit` and `diagnose`: any nn.Module, or the trained network, from the command line."""

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from initlab.errors import UsageError
from initlab.nn.init import Rule, gaussian
from initlab.tasks.course.graph import build_mlp, first_shape
from initlab.tasks.ensemble.device import Where
from initlab.verdict.audit import Audit, audit
from initlab.verdict.diagnose import diagnose
from initlab.verdict.finding import Verdict

STEPS = 3  # of training, by which the learning rate of the trained network is judged


class ModelSetting:
    """A model with a batch for it: the user's, or the trained network as its options say.

    model: any nn.Module or None. shapes: of its inputs, unit Gaussian; None guesses from its first layer, a linear one.
    scaling, activation, depth, width, batch, seed, loss: of the trained network. lr: its learning rate.
    Errors: no nn.Module; shapes that are none.
    """

    def __init__(
        self,
        model: nn.Module | None,
        shapes: Sequence[Sequence[int]] | None,
        scaling: Rule,
        activation: str,
        depth: int,
        width: int,
        batch: int,
        seed: int,
        loss: str,
        lr: float,
        where: Where,
    ) -> None:
        if not isinstance(model, nn.Module | None):
            raise UsageError(f"model: is a {type(model).__name__}; must be an nn.Module")
        self.own, self.y, self.loss, self.optimizer = model is None, None, None, None
        if model is None:
            model, x, y = build_mlp(scaling, activation, depth, width, batch, seed, loss, None)
            self.y = y.to(where.device)
            self.loss = nn.functional.cross_entropy if loss == "cross_entropy" else _squared_loss
            self.inputs: list[Tensor] | None = [x.to(where.device, where.dtype)]
        elif shapes is not None:
            self.inputs = [gaussian(shape, seed, "input", k) for k, shape in enumerate(shapes)]
        else:
            self.inputs = None
        self.model = model.to(where.device, where.dtype)
        if self.inputs is not None:
            self.inputs = [x.to(where.device, where.dtype) for x in self.inputs]
        self._batch, self._seed, self._lr, self._where = batch, seed, lr, where

    def audit(self) -> Audit:
        """What the parameters say; the batch is used only where shapes were given."""
        return audit(self.model, None if self.inputs is None else tuple(self.inputs))

    def diagnose(self) -> Verdict:
        """What one pass says; of the trained network a few steps too."""
        inputs = self.inputs
        if inputs is None:
            inputs = [gaussian(first_shape(self.model, self._batch), self._seed, "input")]
            inputs = [x.to(self._where.device, self._where.dtype) for x in inputs]
        optimizer = torch.optim.SGD(self.model.parameters(), lr=self._lr) if self.own else None
        return diagnose(self.model, tuple(inputs), self.y, self.loss, optimizer, STEPS if self.own else 0)


def _squared_loss(out: Tensor, y: Tensor) -> Tensor:
    """The book's loss: a label as one number."""
    return (out.flatten() - y.to(out.dtype)).square().mean()


def audit_frames(found: Audit) -> dict[str, pd.DataFrame]:
    """The tables `audit` and `findings`; a shape stands as a text."""
    shapes = ["x".join(map(str, shape)) for shape in found.frame["shape"]]
    return {"audit": found.frame.assign(shape=shapes), "findings": found.verdict.table}
