"""The two trainings of `train`: an ensemble by hand and its `nn.Module` twins, a step at a time, and their records."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from initlab.engine import mlp
from initlab.engine.fast_network import Engine, Factors
from initlab.engine.mlp import Parameters
from initlab.engine.module_recorder import ModuleRecorder
from initlab.engine.named_tensors import change_items, items_of, update_items
from initlab.engine.recorders import Recording
from initlab.errors import UsageError
from initlab.nn.activations import Activation
from initlab.nn.loss_table import Loss
from initlab.stats.backend import Backend
from initlab.stats.buffer import RowBuffer, StatsBuffer
from initlab.stats.keys import LOSS_COLUMNS, PARITY_COLUMNS, TensorKey
from initlab.stats.statistics import NONFINITE
from initlab.tasks.ensemble.networks import Emit, Ensemble
from initlab.tasks.ensemble.training import Training, arrange_members, as_optimizer

FLUSH_ROWS = 200_000


class Records:
    """What has been measured of an ensemble and not yet emitted."""

    def __init__(self, ensemble: Ensemble, backend: Backend, emit: Emit, histograms: bool) -> None:
        seeds = ensemble.seeds
        self.rows = StatsBuffer(seeds, backend, histograms, flush_rows=FLUSH_ROWS)
        self.parity = RowBuffer(seeds, PARITY_COLUMNS, ("relative_error", NONFINITE))
        self.losses = RowBuffer(seeds, LOSS_COLUMNS, ("loss", "accuracy"))
        self._ensemble, self._emit = ensemble, emit

    def flush(self) -> None:
        if len(self.losses):
            rows = self.rows.take_tables()
            frames = {"stats": rows.pop("stats"), "losses": self.losses.take(), "parity": self.parity.take(), **rows}
            self._emit({name: self._ensemble.add_columns(frame) for name, frame in frames.items()})


class TwinTraining:
    """An ensemble trained by hand and its twins trained by torch, a step at a time."""

    def __init__(
        self,
        parameters: Parameters,
        activation: Activation,
        training: Training,
        lr: float | Sequence[float],
        records: Records,
        factors: Sequence[Factors] = (),
    ) -> None:
        """`factors`, of each network, multiply the learning rates of its layers; none: all are 1."""
        self.activation, self.loss, self.records = activation, training.objective, records
        self.drift, self._start = training.drift, dict[str, tuple[Tensor, list[Tensor]]]()
        self.hand: _Hand
        optimizer = training.optimizer
        if optimizer == "sgd":
            engine = Engine(parameters, activation, training.loss, lr, training.batch, factors)
            self.hand = _ByEngine(engine, records)
        elif isinstance(lr, Sequence) or any(one != factors[0] for one in factors):
            raise UsageError(f"train.optimizer={optimizer}: a learning rate for each network needs sgd")
        else:
            arrange = arrange_whole if isinstance(optimizer, str) else arrange_members
            self.hand = _ByPass(parameters, activation, self.loss, records, arrange)
            self.hand.optimizers = [
                as_optimizer(optimizer)(parameter_groups(some, lr, factors[0] if factors else ()), lr=lr)
                for some in self.hand.leaves
            ]
        self.twins = [mlp.twin(parameters, member, self.activation) for member in range(len(parameters[0][0]))]
        self.at_once = mlp.Together(self.twins, self.loss) if training.modules == "vmap" else None
        self.recorder = ModuleRecorder(self.twins, activation, self.loss, records.rows, records.parity)
        rates = lr if isinstance(lr, Sequence) else [lr] * len(self.twins)
        groups = [
            parameter_groups(list(model.parameters()), rate, one)
            for model, rate, one in zip(self.twins, rates, factors or [()] * len(self.twins), strict=True)
        ]
        if isinstance(optimizer, str):  # which treats an ensemble as its members
            groups = [[group for one in groups for group in one]]
        self.by_torch = [as_optimizer(optimizer)(some, lr=rates[0]) for some in groups]

    def step(self, step: int, xb: Tensor, yb: Tensor, record: bool) -> None:
        """One update of both, measured if `record`."""
        if record:  # the parameters of this step, before the two trainings move on
            self.recorder.compare(self.hand.list_members(), step)
            if self.drift:
                for name, pairs in (("scratch", self.hand.parameters()), ("module", mlp.twin_parameters(self.twins))):
                    if name not in self._start:
                        self._start[name] = xb, mlp.forward(pairs, xb, self.activation)[0]
                    x, start = self._start[name]
                    now = mlp.forward(pairs, x, self.activation)[0]
                    self.records.rows.add(change_items(name, "drift", start, now), step)
        self._note("scratch", step, yb, *self.hand.step(step, xb, yb, record))
        for optimizer in self.by_torch:
            optimizer.zero_grad()
        if record:
            values, out = self.recorder.look(xb, yb, step)
        elif self.at_once is None:
            values, out = mlp.run_twins(self.twins, xb, yb, self.loss)
        else:
            values, out = self.at_once.forward_and_backward(xb, yb)
        self._note("module", step, yb, values, out)
        for optimizer in self.by_torch:
            optimizer.step()
        if record:
            self.recorder.finish(step)

    def flush(self) -> None:
        """Emit what the records have, all rows of the recorded steps among them."""
        self.hand.flush()
        self.records.flush()

    def _note(self, name: str, step: int, yb: Tensor, loss: Tensor, out: Tensor) -> None:
        """Loss and accuracy of every network; the accuracy of a regression is nan."""
        value = loss.double()
        right = (
            (out.argmax(-1) == yb).double().mean(-1)
            if not yb.is_floating_point()
            else torch.full_like(value, torch.nan)
        )
        key = TensorKey("train", name, 0, "", "")
        self.records.losses.put([key], torch.stack([value, right]).unsqueeze(1), step)


def parameter_groups(parameters: Sequence[Tensor], lr: float, factors: Factors) -> list[dict[str, Any]]:
    """Groups for an optimizer of torch's: parameters w, b, w, b, ... whose learning rates agree."""
    rates = [lr * one for layer in factors for one in layer] or [lr] * len(parameters)
    by_rate: dict[float, list[Tensor]] = {}
    for p, rate in zip(parameters, rates, strict=True):
        by_rate.setdefault(rate, []).append(p)
    return [{"params": alike, "lr": rate} for rate, alike in by_rate.items()]


def arrange_whole(pairs: Parameters) -> list[list[Tensor]]:
    """The tensors of all networks together, w (E, I, O), b (E, O), w, b, ..., as one list in a list."""
    return [[one for pair in pairs for one in pair]]


class _Hand(Protocol):
    """A training by hand."""

    def step(self, step: int, xb: Tensor, yb: Tensor, record: bool) -> tuple[Tensor, Tensor]:
        """One update; losses (E,) and outputs (E, N, O) before it."""

    def parameters(self) -> Parameters:
        """The weights and biases that the next step starts from."""

    def list_members(self) -> list[list[Tensor]]:
        """The same of each network: w (I, O), b (O,), w, b, ..., as they lie in memory."""

    def flush(self) -> None:
        """Put into the records what still waits."""


class _ByEngine:
    """Gradient descent on the fast path, where recording costs least."""

    def __init__(self, engine: Engine, records: Records) -> None:
        self.engine = engine
        self.recording = Recording(engine, records.rows)
        self._members = [
            [one.view(net.count, *shape)[k] for w, b in zip(net.w.each, net.b.each, strict=True)
             for one, shape in ((w, w.shape[-2:]), (b, b.shape[-1:]))]
            for net in engine.networks for k in range(net.count)
        ]  # fmt: skip

    def step(self, step: int, xb: Tensor, yb: Tensor, record: bool) -> tuple[Tensor, Tensor]:
        loss = self.recording.step(xb, yb, step) if record else self.engine.step(xb, yb)
        return loss, self.engine.outputs

    def parameters(self) -> Parameters:
        return self.engine.parameters

    def list_members(self) -> list[list[Tensor]]:
        return self._members

    def flush(self) -> None:
        self.recording.flush()


class _ByPass:
    """Gradients by hand, handed to an optimizer of torch's."""

    def __init__(
        self,
        parameters: Parameters,
        activation: Activation,
        loss: Loss,
        records: Records,
        arrange: Callable[[Parameters], list[list[Tensor]]],
    ) -> None:
        """`arrange` makes of parameters, and of their gradients, the lists of tensors that `optimizers` train."""
        self.weights, self.activation, self.loss, self.rows = parameters, activation, loss, records.rows
        self.arrange, self.leaves = arrange, arrange(parameters)
        self.optimizers: list[torch.optim.Optimizer] = []

    def step(self, step: int, xb: Tensor, yb: Tensor, record: bool) -> tuple[Tensor, Tensor]:
        seen = mlp.forward_and_backward(self.weights, xb, yb, self.activation, self.loss)
        before = [(w.clone(), b.clone()) for w, b in self.weights] if record else []
        if record:
            self.rows.add(items_of("scratch", seen, self.weights, self.activation), step)
        for leaves, grads in zip(self.leaves, self.arrange(seen.parameter_grads), strict=True):
            for p, g in zip(leaves, grads, strict=True):
                p.grad = g
        for optimizer in self.optimizers:
            optimizer.step()
        if record:
            self.rows.add(update_items("scratch", before, self.weights), step)
        return seen.loss, seen.out

    def parameters(self) -> Parameters:
        return self.weights

    def list_members(self) -> list[list[Tensor]]:
        return [[one[k] for pair in self.weights for one in pair] for k in range(len(self.weights[0][0]))]

    def flush(self) -> None:
        """Everything is in the records already."""
