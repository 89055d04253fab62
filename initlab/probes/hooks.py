"""The hooks that see the tensors of an `nn.Module`: each tensor gets a key, is measured, and is forgotten.

Layers are numbered in the order in which the modules with parameters are first called; an activation has the number of
the layer below it. A module that is called again in a step gives further rows, numbered by `call`, and so does what
activation checkpointing computes anew; those of a second backward pass through one graph are numbered by `pass`.
The hooks change no value and leave nothing behind.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from initlab.errors import UsageError
from initlab.nn.activations import Activation
from initlab.probes.function_rows import FunctionRows
from initlab.probes.hook_types import Hook
from initlab.probes.probe_buffer import ProbeBuffer
from initlab.probes.probed_modules import (
    RELU,
    ProbedModule,
    describe_output,
    find_tensors,
    is_whole,
    list_outputs,
    measurable,
    own_parameters,
    select,
)
from initlab.probes.tensor_rows import TensorRows
from initlab.probes.torch_private import has_no_values, is_differentiating
from initlab.stats.keys import TensorKey


class Hooks:
    """The hooks of one network: installed for a recorded step and removed after it.

    With `training` only forward passes that autograd follows are seen: a validation between two steps is none of them.
    """

    def __init__(
        self, model: nn.Module, patterns: Sequence[str], buffer: ProbeBuffer, stage: str, training: bool
    ) -> None:
        self._patterns, self._training = patterns, training
        self.modules = select(model, patterns)
        self._present = _list_present(model)
        self._root = next((m for m in self.modules if not m.name), None)  # the model itself, if it gives rows
        self.rows = TensorRows(buffer, stage, training)
        self._functions = FunctionRows(self.rows)
        self._has_bypassed = False  # whether its modules were called outside of `forward`
        self.calls = self.unfollowed = 0  # calls of the model, and those that autograd did not follow
        self._n_inputs = 0  # passes in this step
        self._recomputing: list[ProbedModule | None] = []  # whose functions checkpoints run anew, one inside of another
        self.unseen: dict[str, str] = {}  # modules that ran and put out nothing that can be measured: what it was
        self._handles: list[RemovableHandle] = []

    def install(self, model: nn.Module) -> None:
        """Put the hooks on the modules of the model."""
        self._handles.append(model.register_forward_pre_hook(Hook(self.begin_pass), with_kwargs=True))
        sees_functions = any(m.is_owner for m in self.modules)
        self.unseen |= {m.label: "scripted" for m in self.modules if m.is_scripted and m.chosen}
        for m in self.modules:
            if m.is_scripted:
                continue
            module, add = m.module, self._handles.append
            for chain in [c.source for c in m.computed if c.is_chain]:
                add(chain.register_forward_pre_hook(Hook(self._open_leaf, None), with_kwargs=True))
                add(chain.register_forward_hook(Hook(self._note_weight)))
            if m.is_owner:
                if m is not self._root:
                    add(module.register_forward_pre_hook(Hook(self._open_module, m)))
                hook = Hook(self._close_module, m)
                add(module.register_forward_hook(hook, with_kwargs=True, always_call=True))
                continue
            asks = m.activation is not None and not (m.chosen and m.activation is RELU)
            if sees_functions or asks:
                hook = Hook(self._open_leaf, m.activation if asks else None)
                add(module.register_forward_pre_hook(hook, with_kwargs=True))
            if sees_functions or m.parameters or m.chosen:
                add(module.register_forward_hook(Hook(self._close_leaf, m), always_call=sees_functions))

    def _install_anew(self, model: nn.Module) -> None:
        """Modules, or what computes their weights, were replaced since: those that take a place have its number."""
        numbers = {m.name: m.number for m in self.modules}
        known = {(m.name, m.module, *(part for part, _ in m.parameters)): m for m in self.modules}
        found = select(model, self._patterns, strict=False)
        self.modules = [known.get((m.name, m.module, *(part for part, _ in m.parameters)), m) for m in found]
        for m in self.modules:
            m.number = m.number or numbers.get(m.name, 0)
        self._root = next((m for m in self.modules if not m.name), None)
        self._remove_hooks()
        self.install(model)

    def find_parameters(self) -> None:
        """Some were replaced since."""
        for m in self.modules:
            m.parameters = own_parameters(m.module)

    def remove(self) -> None:
        """Take all hooks away."""
        self.end_step()
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        """A pass begins: below what comes now there is no layer but the input."""
        if not self._training and has_no_values():
            raise UsageError(
                "probe: inside torch.func (vmap, grad, ...), a trace or fake tensors nothing can be measured: call the "
                "model"
            )
        if kwargs is None or not self._handles:  # taken away by a hook that came before this one
            return
        seen = not self.rows.is_unseen()
        if seen:
            self.rows.thread.check()
            present = _list_present(model)
            if present != self._present:
                self._present = present
                self._install_anew(model)
        root = self._root
        if root is not None and self.is_at_work():  # it calls itself
            self._functions.open_module(root, args)
            return
        self.calls += 1
        self.unfollowed += not torch.is_grad_enabled() or has_no_values()
        self.rows.begin_pass()
        self._functions.end_pass()
        if seen and is_whole(self._patterns):
            self._measure_input(model, args, kwargs)
        if root is not None and root.is_owner:
            self._functions.open_module(root, args)

    def list_gaps(self, parameters: Sequence[str]) -> str:
        """What has no row in the steps that were recorded, each kind with its reason; parameters: those without."""
        root, idle = self._root, [m for m in self.modules if m.chosen and m.expected and not m.ran]
        bypassed = root is not None and root.is_owner and root.chosen and (self._has_bypassed or not self.calls)
        kinds = {
            "never called in a recorded step": [m.label for m in idle if not m.unfollowed],
            "called without autograd or inside of a transform only, so outside of every step": [
                m.label for m in idle if m.unfollowed
            ],
            "ran, but what came out cannot be measured": [f"{m} ({what})" for m, what in self.unseen.items()],
            "forward was bypassed, or had returned, so that functions between the modules have no rows": [root.label]
            if root is not None and bypassed
            else [],
            "parameters without rows": parameters,
        }
        found = []
        for kind, names in kinds.items():
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            found += [f"{kind}: {', '.join(names[:8])}{more}"] if names else []
        return "; ".join(found)

    def explain_nothing(self) -> str:
        """Why no step was recorded."""
        if not self.calls:
            return "the model was never called while it was watched"
        if self.calls == self.unfollowed:
            how = "always without autograd or inside of a transform"
            return f"the model was called {self.calls} times, {how}: such passes belong to no step"
        return f"the model was called {self.calls} times, but no optimizer that holds its parameters has stepped"

    def begin_recomputation(self, function: Any) -> None:
        """A checkpoint runs a function anew: its functions belong to the module whose method it is, else to the model.

        A module that is called itself has its own hooks.
        """
        given: list[Any] = []
        while isinstance(function, partial):
            given, function = [*function.args, *given], function.func
        owner = getattr(function, "__self__", given[0] if given else None)
        called = isinstance(function, nn.Module) or getattr(function, "__name__", "").endswith("_call_impl")
        m = next((m for m in self.modules if m.module is owner), self._root)
        own = m is not None and m.is_owner and not called
        self._recomputing.append(m if own else None)
        if m is not None and own:
            self._functions.begin_recomputation(m)

    def end_recomputation(self) -> None:
        """It has run, and so have the gradients inside of it."""
        m = self._recomputing.pop() if self._recomputing else None
        if m is not None:
            self._functions.end_recomputation(m)

    def is_at_work(self) -> bool:
        """Whether the model has been called and is not done."""
        return self._root is not None and self._functions.is_at_work(self._root)

    def end_step(self) -> None:
        """Forget the step's graph and count calls from 0 again."""
        self._functions.end_pass()
        self.rows.end_step()
        self._n_inputs = 0
        for m in self.modules:
            m.calls = 0

    def _measure_input(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The rows of what the model is called with, layer 0."""
        for part, x in list_inputs(model, args, kwargs):
            key = TensorKey(self.rows.stage, "module", 0, "activation", "forward", "", part, self._n_inputs, "input")
            self.rows.measure(x, self.rows.make_site(key, x.ndim - 1))
        self._n_inputs += 1

    def _open_module(self, m: ProbedModule, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook of a module whose functions have rows."""
        self._functions.open_module(m, args)

    def _close_module(
        self, m: ProbedModule, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """A forward hook, called after an exception too: measure what comes out of the module and has no row yet."""
        if not self._functions.is_open or (self.rows.thread.is_foreign() and output is None):
            return
        if output is None and sys.exc_info()[0] is not None:
            self._functions.forget_trace()
        else:
            self._functions.end_functions(m, args, output)
            self._measure_output(m, self._functions.call, (*args, *kwargs.values()), output)
        self._functions.close_module(m)
        if not self._functions.is_open:
            self._functions.end_pass()
            if not self.rows.is_unseen():
                self.rows.weights.measure_rest(self.modules, self.rows.numbers.of_weights)

    def _open_leaf(
        self, activation: Activation | None, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """A forward pre-hook of a module whose functions have no rows."""
        self._functions.open_leaf(activation, args or tuple(kwargs.values()))

    def _close_leaf(self, m: ProbedModule, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._functions.close_leaf()
        if output is not None or sys.exc_info()[0] is None:
            self._measure_output(m, m.calls, args, output)

    def _note_weight(self, chain: nn.Module, args: tuple[Any, ...], weight: Any) -> None:
        """A forward hook of what computes a weight."""
        self._functions.close_leaf()
        if not self.rows.is_unseen():
            self.rows.weights.note(chain, weight)

    def _measure_output(self, m: ProbedModule, call: int, given: tuple[Any, ...], output: Any) -> None:
        """Number the layer, measure what a module makes of what it was given, and its gradient when that comes."""
        rows = self.rows
        if rows.is_unseen():
            if m.is_layer:
                rows.numbers.number(m)
            m.unfollowed = True
            return
        rows.thread.check()
        self._has_bypassed |= self._functions.is_outermost(m) and not is_differentiating()
        m.ran = True
        m.calls += not m.is_owner
        m.below = rows.layer
        if m.is_layer and not m.is_owner:
            rows.layer = rows.numbers.number(m)
        plain = type(output) is Tensor and measurable(output)
        found = [("", output)] if plain else list_outputs(m.module, output)
        first = next((x for _, x in find_tensors(given)), None) if m.is_owner else None
        for part, x in found:
            if m.is_owner and rows.has_row(x) and x is not first:  # a function has made it
                rows.note_shape(x)
                continue
            word = m.word
            if isinstance(first, nn.Parameter) and first.shape == x.shape:  # as a fake quantization of weights
                holder = next((one for one in self.modules if any(p is first for _, p in one.parameters)), m)
                rows.weights.put(m.name, call, rows.numbers.number(holder), part, x, type(m.module).__name__)
                continue
            if word == "stream" and (first is None or first.shape != x.shape):
                word = "other" if x.ndim else "loss"
            rows.measure_output(m, call, part, x, given, "attention" if part == "attn_output_weights" else word)
        if not found and m.chosen and m.expected:
            self.unseen.setdefault(m.label, describe_output(output))
        if m.chosen:
            number = rows.numbers.number(m) if m.is_layer else rows.layer
            rows.weights.measure(m, call, number, rows.numbers.of_weights)


def list_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a model is called with, each by the name of its argument; by none where it is the only one."""
    try:
        given: Any = signature(model.forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # the call itself will say so
        given = (*args, *kwargs.values())
    return find_tensors(given if len(given) > 1 else [*args, *kwargs.values()][0] if given else ())


def _list_present(model: nn.Module) -> list[tuple[object, ...]]:
    """The modules of a model and the names of their parameters, by which one that has changed is known."""
    return [(id(module), *module._parameters.keys()) for module in model.modules()]
