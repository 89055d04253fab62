"""The rows of functions of torch that modules of one's own call, each measured before anything can overwrite it."""

from typing import Any

import torch
from torch import Tensor

from initlab.nn.activations import Activation
from initlab.probes.call_trace import CallTrace
from initlab.probes.operations import Operation, OperationMode, find_operation, guess_operation, refine_operation
from initlab.probes.probed_modules import RELU, ProbedModule, measurable
from initlab.probes.tensor_rows import LAYERS, TensorRows
from initlab.probes.torch_private import ignore_functions, is_transforming

Call = tuple[Operation, tuple[Any, ...], Tensor]


class FunctionRows:
    """Which modules are at work, and what functions the innermost of them calls.

    Functions that a leaf calls, such as a layer of torch's, have no rows: its output has one.
    """

    def __init__(self, rows: TensorRows) -> None:
        self._rows = rows
        self._owners: list[ProbedModule] = []  # modules at work, one inside of another
        self._given: list[tuple[Any, ...]] = []  # what each of them was called with
        self._n_leaves = 0  # leaves at work
        self._mode: OperationMode | None = None
        self._recomputing: list[OperationMode] = []  # of checkpoints that run anew, one inside of another
        self._pending: Call | None = None  # the latest function, not yet measured
        self._trace: CallTrace | None = None  # of a module that may be an activation
        self._rectifiers: dict[tuple[object, ...], bool] = {}  # functions of several tensors: whether they are a ReLU

    def open_module(self, m: ProbedModule, args: tuple[Any, ...] = ()) -> None:
        """Functions that are called now belong to this module."""
        rows = self._rows
        if not rows.is_unseen():
            rows.thread.check()
        self.measure_pending()
        self._owners.append(m)
        self._given.append(args)
        if m.activation is not None:
            self.open_leaf(m.activation, args)
        rows.weights.open(m)
        if m.may_be_activation and not rows.is_unseen() and self._trace is None and not self._n_leaves:
            self._trace = CallTrace(args)
        if self._mode is None and not self._recomputing and not rows.is_unseen():
            self._mode = OperationMode(self.measure_pending, self._note)
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def begin_recomputation(self, m: ProbedModule) -> None:
        """A checkpoint runs functions of a module anew, perhaps inside of a backward pass that no mode hears."""
        with ignore_functions(), torch.enable_grad():
            self._rows.thread.check()
            self.measure_pending()
            self._owners.append(m)
            self._given.append(())
            mode = OperationMode(self.measure_pending, self._note)
        self._recomputing.append(mode)
        mode.__enter__()  # type: ignore[no-untyped-call]

    def end_recomputation(self, m: ProbedModule) -> None:
        """They have run, and so have the gradients inside of them."""
        self._recomputing.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]
        with ignore_functions(), torch.enable_grad():
            self.measure_pending()
        self.close_module(m)

    def end_functions(self, m: ProbedModule, args: tuple[Any, ...], output: Any) -> None:
        """The functions of a module are over: the last one is measured, and a module of only some may be one."""
        trace, self._trace, self._n_leaves = self._trace, None, 0
        if trace is not None and m.may_be_activation:
            m.look(trace.as_function(output))
            if m.activation is not None:
                self._rows.measure_saturation(m.activation, args)
            else:
                for call in trace.calls:
                    self._note(*call)
                    self.measure_pending()
        self.measure_pending()

    def close_module(self, m: ProbedModule) -> bool:
        """A module is left, and those that an exception has left before; whether it was the outermost one."""
        while self._owners:
            self._given.pop()
            if self._owners.pop() is m:
                break
        return not self._owners

    @property
    def is_open(self) -> bool:
        """Whether a module is at work."""
        return bool(self._owners)

    def forget_pending(self) -> None:
        """An exception has ended the module that called it."""
        self._pending = self._trace = None
        self._n_leaves = 0

    def open_leaf(self, activation: Activation | None, args: tuple[Any, ...]) -> None:
        """Functions that are called now belong to no row of their own."""
        self.measure_pending()
        self._n_leaves += 1
        if activation is not None:
            self._rows.measure_saturation(activation, args)

    def close_leaf(self) -> None:
        """The leaf is over."""
        self._n_leaves = max(0, self._n_leaves - 1)

    def end_pass(self) -> None:
        """No module is at work any more."""
        mode, self._mode = self._mode, None
        self.forget_pending()
        self._owners.clear()
        self._given.clear()
        if mode is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A function of torch was called; it is measured before the next one if it is one that has rows."""
        if self._n_leaves or is_transforming():
            return
        if self._trace is not None:
            self._trace.note(func, args, kwargs, output)
            return
        if not isinstance(output, Tensor) or not measurable(output):
            return
        operation = find_operation(func, args, kwargs)
        z = None if self._rows.last is None else self._rows.last.x
        if operation is None and z is not None and z.shape == output.shape and z.dtype == output.dtype:
            operation = guess_operation(func, args, kwargs, z)
            if operation is not None and operation.activation is RELU and not self._is_relu(func, z, output):
                operation = None
            args = (z,)
        if operation is not None:
            self._pending = (operation, (*args, *kwargs.values()), output)

    def _is_relu(self, func: Any, z: Tensor, output: Tensor) -> bool:
        """Whether what a function of several tensors gives is max(z, 0); looked at once in each module."""
        place = (self._owners[-1].name if self._owners else "", func, z.shape[-1])
        if place not in self._rectifiers:
            self._rectifiers[place] = torch.equal(output.detach(), z.detach().clamp_min(0))
        return self._rectifiers[place]

    def _is_known(self, x: Any) -> bool:
        """Whether a summand is what a module at work was given, or has a row: others are parts of a formula."""
        return isinstance(x, Tensor) and (
            self._rows.has_row(x) or any(x is one for args in self._given for one in args)
        )

    def measure_pending(self) -> None:
        """The row of the function that was seen last."""
        if self._pending is None:
            return
        (operation, args, x), self._pending = self._pending, None
        rows, m = self._rows, self._owners[-1] if self._owners else None
        if operation.name == "add":
            rows.note_bias(args)
        found = refine_operation(operation, args, x, rows.weights.find_source)
        if m is None or found is None or (found.word == "stream" and not any(map(self._is_known, args))):
            return
        if rows.is_unseen():
            if found.word in LAYERS:
                rows.number_function(m, args)
            return
        rows.thread.check()
        m.ran = True
        rows.measure_function(m, found, args, x)
