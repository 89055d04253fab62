"""The steps of a user's own loop around an `nn.Module`: which are recorded, when what is measured, and what is undone.

With an optimizer a step ends with its `step()`: values, gradients and updates belong to the parameters W_k before it.
Without one every forward pass of the whole model is a step, and there are no updates. On steps that are not recorded
no module carries a hook. A recorded step of a compiled model runs uncompiled: inside compiled code no hook is heard.
"""

import sys
import warnings
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from initlab.errors import UsageError
from initlab.probes.hooks import Hook, Hooks
from initlab.probes.parameters import Parameters
from initlab.probes.probe_buffer import ProbeBuffer
from initlab.probes.probed_modules import ProbedModule


class StepTracker:
    """Records every `every`-th step from `open` to `close`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        modules: list[ProbedModule],
        every: int,
        buffer: ProbeBuffer,
    ) -> None:
        self.step, self._every = 0, every
        self._model, self._optimizer, self._buffer = model, optimizer, buffer
        self._stage = "probe" if optimizer is None else "train"
        self._hooks = Hooks(modules, buffer, self._stage, training=optimizer is not None)
        self._parameters: Parameters | None = None
        self._outer, self._uncompiled = ExitStack(), ExitStack()
        self._recording = self._running = self._recorded = False
        if optimizer is not None:
            _refuse_foreign(model, optimizer)

    def open(self) -> None:
        if self._optimizer is not None:
            handles = [
                self._optimizer.register_step_pre_hook(self._before_update),
                self._optimizer.register_step_post_hook(self._after_update),
            ]
        else:
            handles = [
                self._model.register_forward_pre_hook(Hook(self._before_pass)),
                self._model.register_forward_hook(Hook(self._after_pass)),
            ]
            if self._model._compiled_call_impl is not None:  # then these two are compiled with it
                self._outer.enter_context(torch.compiler.set_stance("force_eager"))
        for handle in handles:
            self._outer.callback(handle.remove)
        if self._optimizer is not None:
            self._begin()

    def close(self) -> None:
        """Remove every hook, then close the step that is under way."""
        self._hooks.remove()
        self._uncompiled.close()
        self._outer.close()
        self._buffer.end_step(self.step)
        self.step += self._running  # a probe that is opened again goes on counting
        self._recording = self._running = False

    def warn(self, depth: int) -> None:
        """Name what was chosen and never seen: a selection that looks right and yields nothing."""
        idle = [w.name or type(w.module).__name__ for w in self._hooks.modules if w.chosen and not w.ran]
        if idle and self._recorded:
            names = ", ".join(idle[:8]) + (f" and {len(idle) - 8} more" if len(idle) > 8 else "")
            text = f"probe: never called in a recorded step: {names}; only their parameters have rows"
            warnings.warn(text, UserWarning, stacklevel=depth)
        elif not self._recorded:
            warnings.warn("probe: the model was never called while it was watched", UserWarning, stacklevel=depth)

    def _begin(self) -> None:
        due = self.step % self._every == 0
        if due and not self._recording:
            if "torch._dynamo" in sys.modules:
                self._uncompiled.enter_context(torch.compiler.set_stance("force_eager"))
            self._hooks.install(self._model)
        elif self._recording and not due:
            self._hooks.remove()
            self._uncompiled.close()
        self._recording = due

    def _end(self) -> None:
        if self._recording:
            self._hooks.end_step()
            self._buffer.end_step(self.step)
        self.step += 1

    def _all_parameters(self) -> Parameters:
        """Found late: lazy modules have theirs, and layers their numbers, only after a forward pass."""
        if self._parameters is None:
            self._parameters = Parameters(self._hooks, self._buffer, self._stage, self._optimizer is not None)
        return self._parameters

    def _before_update(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._recording:
            self._recorded = True
            self._all_parameters().measure_values()
            if not _has_closure(args, kwargs):
                self._all_parameters().measure_gradients()

    def _after_update(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._recording:
            if _has_closure(args, kwargs):  # the gradients were found inside of step()
                self._all_parameters().measure_gradients()
            self._all_parameters().measure_updates()
        self._end()
        self._begin()

    def _before_pass(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self._running:
            self._end()
        self._running = True
        self._begin()
        if self._recording:  # a hook that is installed inside of a pass misses its beginning
            self._hooks.begin_pass()

    def _after_pass(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._recording and not torch.compiler.is_compiling():
            self._recorded = True
            self._all_parameters().measure_values()
            if torch.is_grad_enabled():
                self._all_parameters().measure_coming_gradients()


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(callable(found) for found in (*args[1:], *kwargs.values()))


def _refuse_foreign(model: nn.Module, optimizer: object) -> None:
    """One line where the steps of this optimizer are no steps of this model."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"optimizer={type(optimizer).__name__}: must be a torch.optim.Optimizer")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise UsageError(f"optimizer={type(optimizer).__name__}: holds none of the model's parameters")
