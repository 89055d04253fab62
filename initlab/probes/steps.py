"""The steps of a user's own loop around an `nn.Module`: which are recorded, when what is measured, and what is undone.

With an optimizer a step ends when every parameter that has a gradient has been updated, by one optimizer or by several;
where some never are, it ends with the next forward pass. Values, gradients and updates belong to the parameters W_k
before it. A step that a gradient scaler skips is a step without updates. Without an optimizer every forward pass of
the whole model is a step. On steps that are not recorded no module carries a hook. A recorded step of a compiled model
runs uncompiled: inside compiled code no hook is heard.
"""

import sys
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from initlab.probes.hook_types import Hook, is_inside
from initlab.probes.hooks import Hooks
from initlab.probes.losses import LossRows, find_scales
from initlab.probes.parameters import Parameters
from initlab.probes.probe_buffer import ProbeBuffer
from initlab.probes.probed_modules import is_whole
from initlab.probes.torch_private import ignore_functions, is_differentiating
from initlab.probes.updates import add_listener, find_held

MIXED = (
    "a backward pass began at a loss multiplied by a GradScaler and one that was not: its gradients are as found, and "
    "no scale was divided out"
)


class StepTracker:
    """Records every `every`-th step from `open` to `close`."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        patterns: Sequence[str],
        every: int,
        buffer: ProbeBuffer,
    ) -> None:
        self.step, self._every = 0, every
        self._model, self._buffer, self._training = model, buffer, bool(optimizers)
        self._stage = "train" if optimizers else "probe"
        self._hooks = Hooks(model, patterns, buffer, self._stage, training=self._training)
        self._losses = LossRows(buffer, self._stage) if is_whole(patterns) else None
        self._parameters: Parameters | None = None
        self._outer, self._uncompiled = ExitStack(), ExitStack()
        self._recording = self._running = self._recorded = False
        self._known = list(optimizers)  # that may update the model
        self._stepped: dict[int, set[int]] = {}  # in this step: optimizer -> ids of the parameters that it holds
        self._stepping: FrameType | None = None  # the step of an optimizer that is under way
        self._whole: Optimizer | None = None  # that was seen to hold all parameters
        # Of the backward pass under way: whose gradients are asked for, those seen before, and what scaled its losses.
        self._sources: Sequence[Tensor] | None = None
        self._n_gradients, self._scales, self._mixed = 0, set[float](), False
        self._deferred: set[int] = set()  # ids of updated parameters that another optimizer may update too
        self._late: list[int] = []  # parameters whose gradients are found inside of step()
        self._waiting: list[RemovableHandle] = []  # for the pass that ends a step with updates still to come

    def open(self) -> None:
        self._outer = add_listener(self, updates=self._training)
        if self._training:
            self._begin()
            return
        after = self._model.register_forward_hook(Hook(self._after_pass))
        before = Hook(self._before_pass, after)
        for handle in (after, self._model.register_forward_pre_hook(before, with_kwargs=True)):
            self._outer.callback(handle.remove)
        if self._model._compiled_call_impl is not None:  # then these two are compiled with it
            self._outer.enter_context(torch.compiler.set_stance("force_eager"))

    def close(self) -> None:
        """Remove every hook, then close the step that is under way."""
        with self._outer, self._uncompiled:
            self._remove_waiting()
            self._hooks.remove()
        self._buffer.end_step(self.step)
        self.step += self._running or bool(self._stepped)  # a probe that is opened again goes on counting
        self._recording = self._running = False
        self._stepped = {}
        if self._losses is not None:
            self._losses.end_step()

    def warn(self, depth: int) -> None:
        """Name what was chosen and never seen, and why nothing was: a selection that looks right and yields nothing."""
        broadcast = "" if self._losses is None else self._losses.broadcast
        unseen = [] if self._parameters is None else self._parameters.unseen
        gaps = self._hooks.list_gaps(unseen) if self._recorded else self._hooks.explain_nothing()
        for text in (broadcast, MIXED if self._mixed else "", gaps):
            if text:
                warnings.warn(f"probe: {text}", UserWarning, stacklevel=depth)

    def _begin(self) -> bool:
        """A step begins; says whether hooks were put on the model now, which a pass that has begun does not hear."""
        due = self.step % self._every == 0
        is_new = due and not self._recording
        if is_new:
            if "torch._dynamo" in sys.modules:
                self._uncompiled.enter_context(torch.compiler.set_stance("force_eager"))
            self._hooks.install(self._model)
        elif self._recording and not due:
            self._hooks.remove()
            self._uncompiled.close()
        self._recording = due
        if due and self._parameters is not None:
            self._parameters.start()
        return is_new

    def _end(self) -> None:
        if self._recording:
            self._measure_updates(self._deferred.copy())
            self._hooks.end_step()
            self._buffer.end_step(self.step)
            if self._parameters is not None and self._every > 1:
                self._parameters.forget()
        self.step += 1
        self._stepped = {}
        if self._losses is not None:
            self._losses.end_step()

    def _all_parameters(self) -> Parameters:
        """Found late: lazy modules have theirs, and layers their numbers, only after a forward pass; a loop may replace
        some."""
        if self._training and self._parameters is not None and not self._parameters.is_current():
            self._parameters = None
            self._hooks.find_parameters()
        if self._parameters is None:
            self._parameters = Parameters(self._hooks, self._buffer, self._stage, self._training)
            self._parameters.start()
        return self._parameters

    # --- backward passes --------------------------------------------------------------------------------------------

    @property
    def is_recording(self) -> bool:
        return self._recording

    def before_backward(self, roots: Sequence[Tensor], sources: Sequence[Tensor] | None) -> None:
        """A backward pass begins at these losses; gradients tell whether it is the model's own.

        What only asks for gradients of other tensors than parameters, as a gradient penalty, begins at no loss.
        """
        if not self._recording:
            return
        roots = [root for root in roots if isinstance(root, Tensor)]
        scales = set().union(*map(find_scales, roots))
        self._sources, self._n_gradients, self._scales = sources, self._hooks.rows.gradients.count, scales
        self._buffer.pass_scale = next(iter(scales)) if len(scales) == 1 else 1.0
        if self._losses is not None:
            of_own = sources is None
            if sources is not None:
                own = {id(p) for p in self._model.parameters() if p.requires_grad}
                of_own = not own or any(id(p) in own for p in sources)
            losses = [root for root in roots if of_own and (sources is None or root.numel() == 1)]
            known = [(loss, self._hooks.rows.find_row(loss)) for loss in losses]
            self._losses.begin(known, self._hooks.rows.layer, self._n_gradients)
        if sources is None and self._training and any(m.ran for m in self._hooks.modules):
            self._all_parameters().note_gradients()

    def after_backward(self, gradients: Sequence[Tensor | None]) -> None:
        """It is over: the losses have rows, and the gradients stand as it has left them."""
        if not self._recording:
            return
        scale, self._buffer.pass_scale = self._buffer.pass_scale, 1.0
        if self._hooks.rows.gradients.count > self._n_gradients:
            self._mixed |= len(self._scales) > 1
            if scale != 1:
                self._buffer.set_step_scale(scale)
        if self._losses is not None:
            self._losses.end(self._hooks.rows.gradients.count)
        if self._training and any(m.ran for m in self._hooks.modules):
            if self._sources is None:
                self._all_parameters().look_at_gradients(scale)
            else:
                self._all_parameters().look_at_results(self._sources, gradients, scale)

    def begin_recomputation(self, function: Any) -> None:
        """A checkpoint runs a function anew, outside of the module that it belongs to."""
        if self._recording:
            self._hooks.begin_recomputation(function)

    def end_recomputation(self) -> None:
        """It has run."""
        if self._recording:
            self._hooks.end_recomputation()

    # --- with optimizers ------------------------------------------------------------------------------------------

    def before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if is_compiling():  # nothing is heard inside of compiled code
            return
        with ignore_functions():
            self._begin_update(sys._getframe(1), optimizer, has_closure=_has_closure(args, kwargs))

    def _begin_update(self, frame: FrameType, optimizer: Optimizer, has_closure: bool) -> None:
        if self._stepping is not None and is_inside(frame, self._stepping):
            return  # of the step of an optimizer made of others
        if self._whole is not optimizer or self._recording:
            own = {id(p) for p in self._model.parameters()}
            held = own & {id(p) for group in optimizer.param_groups for p in group["params"]}
            self._whole = optimizer if held == own else None
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
            self._measure(optimizer, held, gradients=not has_closure)
        # A fused optimizer, which divides by the loss's scale itself, may be about to leave the weights alone.
        is_skipping = bool(getattr(optimizer, "found_inf", None))
        self._stepped[id(optimizer)] = set() if is_skipping else held
        self._stepping = frame

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
            parameters.measure_gradients(chosen, float(getattr(optimizer, "grad_scale", None) or 1))

    def after_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        held = None if is_compiling() else self._stepped.get(id(optimizer))
        if held is None or self._stepping is not sys._getframe(1):
            return
        self._stepping = None
        with ignore_functions():
            if self._recording:
                if _has_closure(args, kwargs):
                    self._all_parameters().measure_gradients(self._late, 1.0)
                waiting = [one for one in self._known if id(one) not in self._stepped]
                later = {id(p) for one in waiting for p in find_held(self._model, one)}
                self._measure_updates(held - later)
                self._deferred |= held & later
            self._end_if_covered()

    def _measure_updates(self, held: set[int]) -> None:
        self._all_parameters().measure_updates(held)
        self._hooks.rows.weights.measure_updates(held)
        self._deferred -= held

    def end_unscaling(self, optimizer: Optimizer) -> None:
        if self._recording and self._parameters is not None:
            self._parameters.note_unscaling({id(p) for p in find_held(self._model, optimizer)})

    def skip_update(self, optimizer: Optimizer) -> None:
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
            modules = {m.module for m in self._hooks.modules if not m.is_scripted} | {self._model}
            hook = Hook(self._end_before_pass)
            self._waiting = [m.register_forward_pre_hook(hook, prepend=True, with_kwargs=True) for m in modules]

    def _end_before_pass(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled() and not is_differentiating():
            self._remove_waiting()
            self._end()
            if self._begin() and module is self._model:
                self._hooks.begin_pass(module, args, kwargs)

    def _remove_waiting(self) -> None:
        for handle in self._waiting:
            handle.remove()
        self._waiting = []

    # --- without ----------------------------------------------------------------------------------------------------

    def _before_pass(self, after: RemovableHandle, model: nn.Module, args: Any, kwargs: Any) -> None:
        if self._hooks.is_at_work():  # the model calls itself
            return
        if self._running:
            self._end()
        self._running = True
        if self._begin():
            self._hooks.begin_pass(model, args, kwargs)
        cast(OrderedDict[int, Any], model._forward_hooks).move_to_end(
            after.id
        )  # what the model put out has its rows by then

    def _after_pass(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._recording and not self._hooks.is_at_work():
            self._recorded = True
            parameters = self._all_parameters()
            parameters.start()
            parameters.measure_values(parameters.choose(lambda p: id(p) not in self._hooks.rows.weights.replaced))
            if torch.is_grad_enabled():
                parameters.measure_coming_gradients()


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(callable(found) for found in (*args[1:], *kwargs.values()))
