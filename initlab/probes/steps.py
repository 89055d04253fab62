"""The steps of a user's own loop around an `nn.Module`: which are recorded, when what is measured, and what is undone.

With an optimizer a step ends when every parameter that has a gradient has been updated, by one optimizer or by several;
where some never are, it ends with the next forward pass. Values, gradients and updates belong to the parameters W_k
before it. A step that a gradient scaler skips is a step without updates. Without an optimizer every forward pass of
the whole model is a step. On steps that are not recorded no module carries a hook. A recorded step of a compiled model
runs uncompiled: inside compiled code no hook is heard.
"""

import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from initlab.probes.hook_types import Hook
from initlab.probes.hooks import Hooks
from initlab.probes.parameters import Parameters
from initlab.probes.probe_buffer import ProbeBuffer
from initlab.probes.probed_modules import ProbedModule
from initlab.probes.torch_private import is_differentiating
from initlab.probes.updates import add_listener, find_held


class StepTracker:
    """Records every `every`-th step from `open` to `close`."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        modules: list[ProbedModule],
        every: int,
        buffer: ProbeBuffer,
    ) -> None:
        self.step, self._every = 0, every
        self._model, self._buffer, self._training = model, buffer, bool(optimizers)
        self._stage = "train" if optimizers else "probe"
        self._hooks = Hooks(modules, buffer, self._stage, training=self._training)
        self._parameters: Parameters | None = None
        self._outer, self._uncompiled = ExitStack(), ExitStack()
        self._recording = self._running = self._recorded = False
        self._known = list(optimizers)  # that may update the model
        self._stepped: dict[int, set[int]] = {}  # in this step: optimizer -> ids of the parameters that it holds
        self._whole: Optimizer | None = None  # that was seen to hold all parameters
        self._late: list[int] = []  # parameters whose gradients are found inside of step()
        self._waiting: list[RemovableHandle] = []  # for the pass that ends a step with updates still to come

    def open(self) -> None:
        if self._training:
            self._outer = add_listener(self._before_update, self._after_update, self._see_scale, self._skip_update)
            self._begin()
            return
        for handle in (
            self._model.register_forward_pre_hook(Hook(self._before_pass), with_kwargs=True),
            self._model.register_forward_hook(Hook(self._after_pass)),
        ):
            self._outer.callback(handle.remove)
        if self._model._compiled_call_impl is not None:  # then these two are compiled with it
            self._outer.enter_context(torch.compiler.set_stance("force_eager"))

    def close(self) -> None:
        """Remove every hook, then close the step that is under way."""
        self._hooks.remove()
        self._remove_waiting()
        self._uncompiled.close()
        self._outer.close()
        self._buffer.end_step(self.step)
        self.step += self._running or bool(self._stepped)  # a probe that is opened again goes on counting
        self._recording = self._running = False
        self._stepped = {}

    def warn(self, depth: int) -> None:
        """Name what was chosen and never seen, and why nothing was: a selection that looks right and yields nothing."""
        idle = [m.name or type(m.module).__name__ for m in self._hooks.modules if m.chosen and m.expected and not m.ran]
        calls, unfollowed = self._hooks.calls, self._hooks.unfollowed
        text = ""
        if idle and self._recorded:
            names = ", ".join(idle[:8]) + (f" and {len(idle) - 8} more" if len(idle) > 8 else "")
            text = f"never called in a recorded step: {names}; only their parameters have rows"
        elif not self._recorded and not calls:
            text = "the model was never called while it was watched"
        elif not self._recorded and calls == unfollowed:
            text = f"the model was called {calls} times, always without autograd: such passes belong to no step"
        elif not self._recorded:
            text = f"the model was called {calls} times, but no optimizer that holds its parameters has stepped"
        if text:
            warnings.warn(f"probe: {text}", UserWarning, stacklevel=depth)

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
        if due and self._parameters is not None:
            self._parameters.start()

    def _end(self) -> None:
        if self._recording:
            self._hooks.end_step()
            self._buffer.end_step(self.step)
            if self._parameters is not None and self._every > 1:
                self._parameters.forget()
        self.step += 1
        self._stepped = {}

    def _all_parameters(self) -> Parameters:
        """Found late: lazy modules have theirs, and layers their numbers, only after a forward pass."""
        if self._parameters is None:
            self._parameters = Parameters(self._hooks, self._buffer, self._stage, self._training)
            self._parameters.start()
        return self._parameters

    # --- with optimizers ------------------------------------------------------------------------------------------

    def _before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._whole is not optimizer or self._recording:
            held = {id(p) for p in find_held(self._model, optimizer)}
            self._whole = optimizer if held >= {id(p) for p in self._model.parameters()} else None
        else:
            held = set()  # all of them
        if not held and self._whole is None:
            return
        if id(optimizer) in self._stepped:  # once more: the passes in between were not the model's own
            self._remove_waiting()
            self._end()
            self._begin()
        if self._recording:
            self._recorded = True
            self._measure(optimizer, held, gradients=not _has_closure(args, kwargs))
        self._stepped[id(optimizer)] = held

    def _measure(self, optimizer: Optimizer, held: set[int], gradients: bool) -> None:
        """Values and gradients of what the optimizer holds, and at first of what none that is known will update."""
        elsewhere: set[int] = set()
        if not any(known is optimizer for known in self._known):
            self._known.append(optimizer)
        for known in self._known:
            if known is not optimizer:
                elsewhere.update(id(p) for p in find_held(self._model, known))
        parameters = self._all_parameters()
        chosen = parameters.choose(lambda p: id(p) in held or (not self._stepped and id(p) not in elsewhere))
        parameters.measure_values(chosen)
        self._late = chosen
        if gradients:
            parameters.measure_gradients(chosen)

    def _after_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        held = self._stepped.get(id(optimizer))
        if held is None:
            return
        if self._recording:
            if _has_closure(args, kwargs):
                self._all_parameters().measure_gradients(self._late)
            self._all_parameters().measure_updates(held)
        self._end_if_covered()

    def _see_scale(self, scale: float) -> None:
        if self._recording:
            self._buffer.set_loss_scale(scale)

    def _skip_update(self, optimizer: Optimizer) -> None:
        held = {id(p) for p in find_held(self._model, optimizer)}
        if held:
            if self._recording:
                self._recorded = True
                self._measure(optimizer, held, gradients=True)
            self._stepped[id(optimizer)] = held
            self._end_if_covered()

    def _end_if_covered(self) -> None:
        """End the step if no gradient waits for another optimizer; else the next forward pass ends it."""
        updated = set().union(*self._stepped.values())
        whole = self._whole is not None or all(p.grad is None or id(p) in updated for p in self._model.parameters())
        if whole and not is_differentiating():
            self._remove_waiting()
            self._end()
            self._begin()
        elif not self._waiting:
            modules = {m.module for m in self._hooks.modules} | {self._model}
            self._waiting = [m.register_forward_pre_hook(Hook(self._end_before_pass)) for m in modules]

    def _end_before_pass(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and not is_differentiating():
            self._remove_waiting()
            self._end()
            self._begin()
            if self._recording and module is self._model:
                self._hooks.begin_pass(module, args)

    def _remove_waiting(self) -> None:
        for handle in self._waiting:
            handle.remove()
        self._waiting = []

    # --- without ----------------------------------------------------------------------------------------------------

    def _before_pass(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if self._running:
            self._end()
        self._running = True
        self._begin()
        if self._recording:  # a hook that is installed inside of a pass misses its beginning
            self._hooks.begin_pass(model, args, kwargs)

    def _after_pass(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._recording:
            self._recorded = True
            parameters = self._all_parameters()
            parameters.start()
            parameters.measure_values(parameters.choose(lambda p: True))
            if torch.is_grad_enabled():
                parameters.measure_coming_gradients()


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(callable(found) for found in (*args[1:], *kwargs.values()))
