"""The tasks `audit` and `diagnose`: any nn.Module, or the trained network, from the command line."""

from collections.abc import Sequence

import pandas as pd
from torch import Tensor, nn

from initlab.engine import mlp
from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import Rule, gaussian
from initlab.tasks.course.graph import first_shape
from initlab.tasks.data import Data
from initlab.tasks.ensemble.batches import find_first_step
from initlab.tasks.ensemble.device import Where
from initlab.tasks.ensemble.training import OPTIMIZERS, Training
from initlab.verdict.audit import Audit, audit
from initlab.verdict.diagnose import diagnose
from initlab.verdict.finding import Verdict

STEPS = 3  # of training, by which the learning rate of the trained network is judged


class ModelSetting:
    """A model with a batch for it: the user's, or the trained network as its options say.

    model: any nn.Module or None. shapes: of its inputs, unit Gaussian; None guesses from its first layer, a linear one.
    scaling, activation, training, lr, data: of the trained network, which sees its first batch.
    Errors: no nn.Module; shapes that are none.
    """

    def __init__(
        self,
        model: nn.Module | None,
        shapes: Sequence[Sequence[int]] | None,
        scaling: Rule,
        activation: str,
        training: Training,
        lr: float,
        seed: int,
        where: Where,
        data: Data | str = "digits",
    ) -> None:
        if not isinstance(model, nn.Module | None):
            raise UsageError(f"model: is a {type(model).__name__}; must be an nn.Module")
        self.own, self.y, self.loss = model is None, None, None
        inputs: list[Tensor] | None = None
        if model is None:
            parameters, x, self.y = find_first_step(data, training, scaling, activation, seed, where)
            model = mlp.twin([(w[None], b[None]) for w, b in parameters], 0, ACTIVATIONS[activation])
            self.loss, inputs = training.objective.module, [x]
        elif shapes is not None:
            inputs = [gaussian(shape, seed, "input", k) for k, shape in enumerate(shapes)]
        self.model = model.to(where.device, where.dtype)
        self.inputs = None if inputs is None else tuple(x.to(where.device, where.dtype) for x in inputs)
        self._batch, self._seed, self._lr, self._where = training.batch, seed, lr, where

    def audit(self) -> Audit:
        """What the parameters say; the batch is used only where shapes were given."""
        return audit(self.model, self.inputs)

    def diagnose(self) -> Verdict:
        """What one pass says; of the trained network a few steps too."""
        inputs = self.inputs
        if inputs is None:
            x = gaussian(first_shape(self.model, self._batch), self._seed, "input")
            inputs = (x.to(self._where.device, self._where.dtype),)
        optimizer = OPTIMIZERS["sgd"](self.model.parameters(), lr=self._lr) if self.own else None
        return diagnose(self.model, inputs, self.y, self.loss, optimizer, STEPS if self.own else 0)


def audit_frames(found: Audit) -> dict[str, pd.DataFrame]:
    """The tables `audit` and `findings`; a shape stands as a text."""
    shapes = ["x".join(map(str, shape)) for shape in found.frame["shape"]]
    return {"audit": found.frame.assign(shape=shapes), "findings": found.verdict.table}
