"""The hooks that see the tensors of an `nn.Module`: each tensor gets a key, is measured, and is forgotten.

Layers are numbered in the order in which the modules with parameters are first called; an activation has the number of
the layer below it. A module that is called again in a step gives further rows, numbered by `call`, and so does what
activation checkpointing computes anew; those of a second backward pass through one graph are numbered by `pass`.
The hooks change no value and leave nothing behind.
"""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from threading import Lock, get_ident
from typing import Any, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils.hooks import RemovableHandle

from initlab.errors import UsageError
from initlab.nn.activations import Activation
from initlab.probes.hook_types import Hook, Preactivation, count_writes
from initlab.probes.operations import Operation, OperationMode, find_axis, is_parameter, refine_operation
from initlab.probes.probe_buffer import ProbeBuffer
from initlab.probes.probed_modules import RELU, LayerAxis, ProbedModule, Site, as_batch, find_tensors, measurable
from initlab.probes.torch_private import is_differentiating, is_transforming
from initlab.stats.keys import TensorKey
from initlab.stats.summarize import saturated_share

_INPUT = LayerAxis(0, 0, 0)  # below the first layer
LAYERS = ("preactivation", "norm", "embedding")  # words of functions that are numbered


class Hooks:
    """The hooks of one network: installed for a recorded step and removed after it.

    With `training` only forward passes that autograd follows are seen: a validation between two steps is none of them.
    """

    def __init__(self, modules: list[ProbedModule], buffer: ProbeBuffer, stage: str, training: bool) -> None:
        self.modules, self._buffer, self._stage, self._training = modules, buffer, stage, training
        self.weight_numbers: dict[int, int] = {}  # parameter used by a function -> its layer
        self.added: set[int] = set()  # parameters that functions add
        self._numbered = self.calls = self.unfollowed = 0  # calls of the model, and those that autograd did not follow
        self._layer, self._last = _INPUT, cast(Preactivation | None, None)
        self._passes: dict[int, int] = {}  # how often a gradient has come in this step
        self._thread, self._lock = 0, Lock()  # that calls the model in this step
        self._root = next((m for m in modules if not m.name), None)  # the model itself, if it gives rows
        self._owners: list[ProbedModule] = []  # modules at work whose functions are layers of their own
        self._mode: OperationMode | None = None  # that sees these functions
        self._pending: tuple[Operation, tuple[Any, ...], Tensor] | None = None  # seen last, and not yet measured
        self._measured: dict[int, ReferenceType[Tensor]] = {}  # tensors that have a row
        self._counts: dict[tuple[str, int, str], int] = {}  # functions of one name in a call of a module
        self._on_modules: list[RemovableHandle] = []
        self._on_tensors: list[RemovableHandle] = []

    def install(self, model: nn.Module) -> None:
        """Put the hooks on the modules of the model."""
        self._on_modules.append(model.register_forward_pre_hook(Hook(self.begin_pass), with_kwargs=True))
        for m in self.modules:
            if m.is_owner:
                if m is not self._root:
                    self._on_modules.append(m.module.register_forward_pre_hook(Hook(self._open_module, m)))
                self._on_modules.append(m.module.register_forward_hook(Hook(self._close_module, m), always_call=True))
            elif m.parameters or m.chosen:
                self._on_modules.append(m.module.register_forward_hook(Hook(self._measure_output, m)))
            if m.activation is not None and not (m.chosen and m.activation is RELU):
                hook = Hook(self._measure_saturation, m.activation)
                self._on_modules.append(m.module.register_forward_pre_hook(hook))

    def remove(self) -> None:
        """Take all hooks away."""
        self.end_step()
        self._end_pass()
        for handle in self._on_modules:
            handle.remove()
        self._on_modules.clear()

    def begin_pass(self, model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        """A pass begins: below what comes now there is no layer but the input."""
        if torch._C._is_tracing() or is_transforming():
            raise UsageError(
                "probe: inside torch.func (vmap, grad, ...) or a trace nothing can be measured: call the model"
            )
        root = self._root
        if root is not None and self._owners[:1] == [root]:  # has begun already
            return
        if not self._is_unseen():
            self._set_thread()
        self.calls += 1
        self.unfollowed += not torch.is_grad_enabled()
        self._layer, self._last = _INPUT, None
        self._end_pass()
        if root is not None and root.chosen and not self._is_unseen():
            self._measure_input(root, args, kwargs or {})
        if root is not None and root.is_owner:
            self._open_module(root)

    def end_step(self) -> None:
        """Forget the step's graph and count calls from 0 again."""
        for handle in self._on_tensors:
            handle.remove()
        self._on_tensors.clear()
        self._passes.clear()
        self._counts.clear()
        self._last, self._thread = None, 0
        for m in self.modules:
            m.calls = 0

    def number(self, m: ProbedModule) -> int:
        """The layer of a module with parameters; one that was never called comes after those that were."""
        if not m.number:
            self._numbered += 1
            m.number = self._numbered
        return m.number

    def on_gradient(self, x: Tensor, see: Callable[[Tensor], None]) -> None:
        """`see` the gradient with respect to x in this step, before anything overwrites it."""
        self._on_tensors.append(x.register_hook(see))  # type: ignore[no-untyped-call]

    def _is_unseen(self) -> bool:
        """Whether a pass is none of a step's: a validation, or the first pass of a checkpoint."""
        return self._training and not torch.is_grad_enabled()

    def _measure_input(self, root: ProbedModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The rows of what the model is called with, layer 0."""
        try:
            given: Any = signature(root.module.forward).bind(*args, **kwargs).arguments
        except (TypeError, ValueError):  # the call itself will say so
            given = (*args, *kwargs.values())
        for part, x in find_tensors(given if len(given) > 1 else [*args, *kwargs.values()][0] if given else ()):
            key = TensorKey(self._stage, "module", 0, "activation", "forward", root.name, part, root.calls, "input")
            self._measure(x, self._make_site(key, self._layer, x.ndim - 1))

    def _make_site(self, key: TensorKey, layer: LayerAxis, axis: int) -> Site:
        return Site(layer, axis, self._buffer.code(key), self._buffer.code(key._replace(direction="backward")))

    def _measure(self, x: Tensor, site: Site) -> int:
        """Measure a tensor, and its gradient when that comes; gives the number of the row."""
        row = self._buffer.put(site.code, as_batch(x, site.axis))
        self._measured[id(x)] = ref(x)
        if x.requires_grad:
            self.on_gradient(x, partial(self._measure_gradient, site))
        return row

    def _set_last(self, x: Tensor, axis: int, row: int, is_layer: bool, rectifies: bool, args: tuple[Any, ...]) -> None:
        """Remember the output of a layer; a ReLU that was called with it says its saturated share."""
        last = self._last
        if is_layer:
            self._last = Preactivation(x, count_writes(x), axis, row)
        elif rectifies and last is not None and last.is_input(args, x is last.x):
            self._buffer.set_rectified(last.row, row)
            self._last = None  # its memory is free as early as without a probe

    def _open_module(self, m: ProbedModule, *_: Any) -> None:
        """A forward pre-hook: functions that are called now belong to this module."""
        if not self._is_unseen():
            self._set_thread()
        self._measure_pending()
        self._owners.append(m)
        if self._mode is None and not self._is_unseen():
            self._mode = OperationMode(self._measure_pending, self._note_function)
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _close_module(self, m: ProbedModule, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook, called after an exception too: measure what comes out of the module and has no row yet."""
        if not self._owners or (self._is_foreign() and output is None):
            return
        if output is not None:
            self._measure_output(m, module, args, output)
        else:
            self._pending = None
        while self._owners and self._owners.pop() is not m:  # those that an exception has left
            pass
        if not self._owners:
            self._end_pass()

    def _end_pass(self) -> None:
        mode, self._mode, self._pending = self._mode, None, None
        self._owners.clear()
        self._measured.clear()
        if mode is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _note_function(self, operation: Operation, args: tuple[Any, ...], output: Any) -> None:
        if type(output) is Tensor and measurable(output) and not is_transforming():
            self._pending = (operation, args, output)

    def _measure_pending(self) -> None:
        """The row of the function that was seen last, unless its output was that of a module."""
        if self._pending is None:
            return
        (operation, args, x), self._pending = self._pending, None
        m = self._owners[-1] if self._owners else None
        for p in args if operation.name == "add" else ():
            if isinstance(p, nn.Parameter):  # a bias, by its use
                self.weight_numbers.setdefault(id(p), self._layer.number)
                self.added.add(id(p))
        found = refine_operation(operation, args, x)
        if m is None or found is None or self._is_unseen():
            return
        self._measure_function(m, found, args, x)

    def _measure_function(self, m: ProbedModule, found: Operation, args: tuple[Any, ...], x: Tensor) -> None:
        self._set_thread()
        m.ran = True
        number, axis = self._layer.number, find_axis(found, x)
        if found.word in LAYERS:
            number = self._number_function(m, args)
            self._layer = LayerAxis(number, x.ndim - 1 if axis is None else axis, x.ndim)
        if axis is None:
            axis = self._layer.axis if x.ndim == self._layer.ndim else x.ndim - 1
        if not m.chosen:
            return
        count = self._counts[m.name, m.calls, found.name] = self._counts.get((m.name, m.calls, found.name), -1) + 1
        part = f"{found.name}.{count}" if count else found.name
        key = TensorKey(self._stage, "module", number, found.word, "forward", m.name, part, m.calls, found.name)
        if found.name == "softmax":
            self._measure(args[0], self._make_site(key._replace(tensor="logits"), self._layer, axis))
        if found.activation not in (None, RELU):
            self._measure_saturation(found.activation, m.module, args)
        row = self._measure(x, self._make_site(key, self._layer, axis))
        self._set_last(x, axis, row, found.word == "preactivation", found.activation is RELU, args)

    def _number_function(self, m: ProbedModule, args: tuple[Any, ...]) -> int:
        """The layer of a function with a weight: that of its module, or a further one for a further weight."""
        weight = next((t for t in args if isinstance(t, Tensor) and is_parameter(t)), None)
        base = weight if weight is None or weight._base is None else weight._base
        if m.is_layer and (base is None or m.first_weight in (0, id(base))):
            m.first_weight = id(base)
            return self.number(m)
        found = self.weight_numbers.get(id(base)) if base is not None else None
        if found is None:
            self._numbered += 1
            found = self.weight_numbers[id(base)] = self._numbered
        return found

    def _measure_output(self, m: ProbedModule, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook: number the layer, measure what comes out of it, and its gradient when that comes."""
        pending, self._pending = self._pending, None
        if pending is not None and (pending[2] is not output or m.is_owner):
            self._pending = pending
            self._measure_pending()
        if self._is_unseen():
            if m.is_layer:
                self.number(m)
            m.calls += m.is_owner
            return
        self._set_thread()
        m.ran = True
        m.calls += 1
        m.below = self._layer.number
        if m.is_layer and not m.is_owner:
            self._layer = LayerAxis(self.number(m), self._layer.axis, self._layer.ndim)
        plain = type(output) is Tensor and measurable(output)
        for part, x in (("", output),) if plain else find_tensors(output):
            self._measure_part(m, part, x, args)

    def _measure_part(self, m: ProbedModule, part: str, x: Tensor, args: tuple[Any, ...]) -> None:
        """One tensor of a module's output."""
        if m.is_owner and (seen := self._measured.get(id(x))) is not None and seen() is x:
            return
        if m.is_owner and m.is_layer:
            self._layer = LayerAxis(self.number(m), self._layer.axis, self._layer.ndim)
        site = self._find_site(m, part, x.ndim)
        self._layer = site.layer
        if not m.chosen:
            return
        self._set_last(x, site.axis, self._measure(x, site), m.is_layer, m.activation is RELU, args)

    def _measure_gradient(self, site: Site, grad: Tensor) -> None:
        self._buffer.put(self.count_pass(site.gradient_code), as_batch(grad, site.axis))

    def count_pass(self, code: int) -> int:
        """The number of the key of a gradient that comes now: another one if it has come before in this step."""
        self._passes[code] = passes = self._passes.get(code, -1) + 1
        if not passes:
            return code
        key = list(self._buffer.codes)[code]
        return self._buffer.code(key._replace(pass_=passes))

    def _is_foreign(self) -> bool:
        """Whether another thread than this calls the model in this step; autograd's own belong to the pass."""
        return self._thread not in (0, get_ident()) and not is_differentiating()

    def _set_thread(self) -> None:
        """A step belongs to the thread that calls the model first; rows of several at once could not be told apart."""
        with self._lock:
            foreign = self._is_foreign()
            self._thread = self._thread or get_ident()
        if foreign:
            raise UsageError(
                "probe: several threads call the model at once (nn.DataParallel does so); watch a model on one device, "
                "or DistributedDataParallel"
            )

    def _measure_saturation(self, activation: Activation, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook: the preactivation that an activation is about to see, perhaps to overwrite."""
        last = self._last
        if last is not None and last.is_input(args):
            slope = activation.slope(as_batch(last.x.detach(), last.axis))
            self._buffer.set_saturated(last.row, saturated_share(slope, activation.largest_slope))

    def _find_site(self, m: ProbedModule, part: str, ndim: int) -> Site:
        """The site of an output of this call, made when it is first seen."""
        seen = (self._layer, m.calls, part, ndim)
        if seen not in m.sites:
            number = self._layer.number
            layer = LayerAxis(number, m.axis(ndim), ndim) if m.is_layer else self._layer
            axis = layer.axis if ndim == layer.ndim else ndim - 1
            word = "loss" if m.is_owner and not ndim else m.word
            op = type_before_parametrizations(m.module).__name__
            key = TensorKey(self._stage, "module", number, word, "forward", m.name, part, m.calls - 1, op)
            m.sites[seen] = self._make_site(key, layer, axis)
        return m.sites[seen]
