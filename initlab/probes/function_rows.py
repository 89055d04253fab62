"""The rows of functions of torch that modules of one's own call, each measured before anything can overwrite it."""

import sys
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from initlab.nn.activations import Activation
from initlab.probes.call_trace import CallTrace
from initlab.probes.hook_types import find_call, is_inside
from initlab.probes.operations import (
    FACTORS,
    SUMS,
    Operation,
    OperationMode,
    find_operation,
    guess_operation,
    list_tensors,
    refine_operation,
)
from initlab.probes.probed_modules import RELU, ProbedModule, measurable
from initlab.probes.tensor_rows import LAYERS, TensorRows
from initlab.probes.torch_private import ignore_functions, is_transforming, remove_mode

Call = tuple[Operation, tuple[Any, ...], Tensor, bool]  # what it gave, and whether the pass was none of a step's


class FunctionRows:
    """Which modules are at work, and what functions the innermost of them calls.

    Functions that a leaf calls, such as a layer of torch's, have no rows: its output has one.
    """

    def __init__(self, rows: TensorRows) -> None:
        self._rows = rows
        self._owners: list[ProbedModule] = []  # modules at work, one inside of another
        self._given: list[tuple[Any, ...]] = []  # what each of them was called with
        self._calls: list[int] = []  # how often each of them had been called before
        self._n_leaves = 0  # leaves at work
        self._leaves: list[int] = []  # and when each of the modules was called
        self._outermost: FrameType | None = None  # the call of the first of the modules at work
        self._mode: OperationMode | None = None
        self._recomputing: list[OperationMode] = []  # of checkpoints that run anew, one inside of another
        self._pending: Call | None = None  # the latest function, not yet measured
        self._trace: CallTrace | None = None  # of a module that may be an activation

    def open_module(self, m: ProbedModule, args: tuple[Any, ...] = ()) -> None:
        """Functions that are called now belong to this module."""
        rows = self._rows
        if not rows.is_unseen():
            rows.thread.check()
        self.measure_pending()
        if not self._is_under_way():
            self.end_pass()
        if not self._owners:
            self._outermost = find_call()
        self._begin_call(m, args)
        m.forget_activation_that_changes()
        if m.activation is not None:
            self.open_leaf(m.activation, args)
        rows.weights.open(m)
        if m.may_be_activation and not rows.is_unseen() and self._trace is None and not self._n_leaves:
            self._trace = CallTrace(args)
        if self._mode is None and not self._recomputing and not rows.is_unseen():
            self._mode = OperationMode(self.measure_pending, self._note)
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _begin_call(self, m: ProbedModule, args: tuple[Any, ...]) -> None:
        self._owners.append(m)
        self._given.append(args)
        self._rows.origins.open(args)
        self._calls.append(m.calls)
        self._leaves.append(self._n_leaves)
        m.calls += not self._rows.is_unseen()

    def begin_recomputation(self, m: ProbedModule) -> None:
        """A checkpoint runs functions of a module anew, perhaps inside of a backward pass that no mode hears."""
        with ignore_functions(), torch.enable_grad():
            self._rows.thread.check()
            self.measure_pending()
            self._begin_call(m, ())
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
        trace, self._trace, self._n_leaves = self._trace, None, self._leaves[-1] if self._leaves else 0
        if trace is not None and m.may_be_activation:
            m.look(trace.as_function(output))
            if m.activation is not None:
                self._rows.measure_saturation(m.activation, args)
            else:
                for call in trace.calls:
                    self._note(*call)
                    self.measure_pending()
        self.measure_pending()

    def close_module(self, m: ProbedModule) -> None:
        """A module is left, and those that an exception has left before."""
        while self._owners:
            self._given.pop()
            self._calls.pop()
            self._leaves.pop()
            if self._owners.pop() is m:
                break

    @property
    def call(self) -> int:
        """How often the innermost module at work had been called before in this step."""
        return self._calls[-1]

    def is_outermost(self, m: ProbedModule) -> bool:
        """Whether a module that is not the model itself is called by no other."""
        return bool(m.name) and (not self._owners or self._owners == [m]) and not self._n_leaves

    def is_at_work(self, m: ProbedModule) -> bool:
        """Whether a module has been called and is not done."""
        return m in self._owners and self._is_under_way()

    def _is_under_way(self) -> bool:
        """Whether the modules at work are so still: an interrupt leaves them without a word, and may be caught."""
        return self._outermost is None or is_inside(sys._getframe(1), self._outermost)

    @property
    def is_open(self) -> bool:
        """Whether a module is at work."""
        return bool(self._owners)

    def forget_trace(self) -> None:
        """An exception has ended the module that was looked at; its last function has run."""
        self._trace, self._n_leaves = None, 0
        self.measure_pending()

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
        self._pending, self._trace, self._n_leaves, self._outermost = None, None, 0, None
        for kept in (self._owners, self._given, self._calls, self._leaves):
            kept.clear()
        if mode is not None:
            remove_mode(mode)

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A function of torch was called; it is measured before the next one if it is one that has rows."""
        if self._n_leaves or is_transforming() or not self._is_under_way():
            return
        if self._trace is not None:
            self._trace.note(func, args, kwargs, output)
            return
        given = (*args, *kwargs.values())
        is_residual = func in SUMS and isinstance(output, Tensor) and self._is_residual(func, given, output)
        for x in list_tensors([output]):
            self._rows.origins.follow(func, given, x)
        if not isinstance(output, Tensor) or not measurable(output):
            return
        if func in FACTORS:
            self._rows.note_factors(args)
        operation = Operation(SUMS[func], "stream") if is_residual else find_operation(func, args, kwargs)
        z = None if self._rows.last is None else self._rows.last.x
        if operation is None and z is not None and z.shape == output.shape and z.dtype == output.dtype:
            operation = guess_operation(func, args, kwargs, z)
            if operation is not None and operation.activation is RELU:
                operation = operation if torch.equal(output.detach(), z.detach().clamp_min(0)) else None
            given = (z,)
        if operation is not None and (is_residual or operation.word != "stream"):
            self._pending = (operation, given, output, self._rows.is_unseen())

    def _is_residual(self, func: Any, args: tuple[Any, ...], output: Tensor) -> bool:
        """Whether a function sums two streams, none of them a weight."""
        rows, name = self._rows, SUMS[func]
        if name == "add":
            rows.note_bias(args)
        summands = [x for x in list_tensors(args[:1] if name == "addcmul" else args) if x.shape == output.shape]
        if any(map(rows.weights.find_source, summands)):
            return False
        return rows.origins.is_residual(name, args, output, partial(self._is_known, output))

    def _is_known(self, output: Tensor, x: Tensor) -> bool:
        """Whether a summand has a row, or is what a module at work was given first: others are parts of a formula.

        What has the shape of the first argument counts as it does; a mask has another.
        """
        if x._base is not None and x._base.shape[-1:] != x.shape[-1:]:
            return False
        alike = [args for args in self._given if args and isinstance(args[0], Tensor) and args[0].shape == x.shape]
        return self._rows.has_row(x, overwritten=x is output) or any(x is one for args in alike for one in args)

    def measure_pending(self) -> None:
        """The row of the function that was seen last."""
        if self._pending is None:
            return
        (operation, args, x, unseen), self._pending = self._pending, None
        rows, m = self._rows, self._owners[-1] if self._owners else None
        found = refine_operation(operation, args, rows.weights.find_source)
        if m is None or found is None:
            return
        if unseen:
            if found.word in LAYERS:
                rows.number_function(m, args)
            return
        rows.thread.check()
        m.ran = True
        rows.measure_function(m, self._calls[-1], found, args, x)
