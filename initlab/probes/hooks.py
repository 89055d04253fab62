"""The hooks that see the tensors of an `nn.Module`: each tensor gets a key, is measured, and is forgotten.

Layers are numbered in the order in which the modules with parameters are first called; an activation has the number of
the layer below it. A module that is called again in a step gives further rows, numbered by `call`, and so does what
activation checkpointing computes anew; those of a second backward pass through one graph are numbered by `pass`.
The hooks change no value and leave nothing behind.
"""

from collections.abc import Callable
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from initlab.errors import UsageError
from initlab.nn.activations import Activation
from initlab.probes.probe_buffer import ProbeBuffer
from initlab.probes.probed_modules import RELU, LayerAxis, ProbedModule, Site, as_batch, find_tensors, measurable
from initlab.stats.keys import TensorKey
from initlab.stats.summarize import saturated_share

_INPUT = LayerAxis(0, 0, 0)  # below the first layer


class Hook(partial[None]):
    """A hook that its module's copies do not inherit: what is copied or pickled in its place does nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return do_nothing

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return partial, (do_nothing,)


def do_nothing(*args: Any) -> None:
    """What stands in a copy of a watched module where its hook was."""


class _Preactivation(NamedTuple):
    """The latest output of a layer, how often it had been overwritten, and its row."""

    x: Tensor
    version: int
    axis: int
    row: int

    def is_input(self, args: tuple[Any, ...], overwritten: bool = False) -> bool:
        """Whether a module was called with these very values, which it has perhaps overwritten itself since."""
        if not args or args[0] is not self.x:
            return False
        return _version(self.x) == self.version + (overwritten and not self.x.is_inference())


def _version(x: Tensor) -> int:
    """How often x has been overwritten; torch does not count that in inference mode."""
    return 0 if x.is_inference() else x._version


class Hooks:
    """The hooks of one network: installed for a recorded step and removed after it.

    With `training` only forward passes that autograd follows are seen: a validation between two steps is none of them.
    """

    def __init__(self, modules: list[ProbedModule], buffer: ProbeBuffer, stage: str, training: bool) -> None:
        self.modules, self._buffer, self._stage, self._training = modules, buffer, stage, training
        self._numbered = self.calls = self.unfollowed = 0  # calls of the model, and those that autograd did not follow
        self._layer, self._last = _INPUT, cast(_Preactivation | None, None)
        self._passes: dict[int, int] = {}  # how often a gradient has come in this step
        self._thread = 0  # that calls the model in this step
        self._on_modules: list[RemovableHandle] = []
        self._on_tensors: list[RemovableHandle] = []

    def install(self, model: nn.Module) -> None:
        """Put the hooks on the modules of the model."""
        self._on_modules.append(model.register_forward_pre_hook(Hook(self.begin_pass)))
        for m in self.modules:
            if m.parameters or m.chosen:
                self._on_modules.append(m.module.register_forward_hook(Hook(self._measure_output, m)))
            if m.activation is not None and not (m.chosen and m.activation is RELU):
                hook = Hook(self._measure_saturation, m.activation)
                self._on_modules.append(m.module.register_forward_pre_hook(hook))

    def remove(self) -> None:
        """Take all hooks away."""
        self.end_step()
        for handle in self._on_modules:
            handle.remove()
        self._on_modules.clear()

    def begin_pass(self, *_: Any) -> None:
        """A pass begins: below what comes now there is no layer."""
        if is_compiling():
            return
        if torch._C._is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
            raise UsageError(
                "probe: inside torch.func (vmap, grad, ...) or a trace nothing can be measured: call the model"
            )
        self.calls += 1
        self.unfollowed += not torch.is_grad_enabled()
        self._layer, self._last = _INPUT, None

    def end_step(self) -> None:
        """Forget the step's graph and count calls from 0 again."""
        for handle in self._on_tensors:
            handle.remove()
        self._on_tensors.clear()
        self._passes.clear()
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

    def _measure_output(self, m: ProbedModule, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook: number the layer, measure what comes out of it, and its gradient when that comes."""
        if is_compiling():
            return
        if self._training and not torch.is_grad_enabled():  # perhaps the first pass of a checkpoint
            if m.is_layer:
                self.number(m)
            return
        if self._thread != get_ident():
            self._set_thread()
        m.ran = True
        m.calls += 1
        m.below = self._layer.number
        if m.is_layer:
            self._layer = LayerAxis(self.number(m), self._layer.axis, self._layer.ndim)
        plain = type(output) is Tensor and measurable(output)
        for part, x in (("", output),) if plain else find_tensors(output):
            site = self._find_site(m, part, x.ndim)
            self._layer = site.layer
            if not m.chosen:
                continue
            row = self._buffer.put(site.code, as_batch(x, site.axis))
            if m.is_layer:
                self._last = _Preactivation(x, _version(x), site.axis, row)
            elif m.activation is RELU and self._last is not None and self._last.is_input(args, x is self._last.x):
                self._buffer.set_rectified(self._last.row, row)
                self._last = None  # its memory is free as early as without a probe
            if x.requires_grad:
                self.on_gradient(x, partial(self._measure_gradient, site))

    def _measure_gradient(self, site: Site, grad: Tensor) -> None:
        self._buffer.put(self.count_pass(site.gradient_code), as_batch(grad, site.axis))

    def count_pass(self, code: int) -> int:
        """The number of the key of a gradient that comes now: another one if it has come before in this step."""
        self._passes[code] = passes = self._passes.get(code, -1) + 1
        if not passes:
            return code
        key = list(self._buffer.codes)[code]
        return self._buffer.code(key._replace(pass_=passes))

    def _set_thread(self) -> None:
        """A step belongs to the thread that calls the model first; rows of several at once could not be told apart."""
        if self._thread:
            raise UsageError(
                "probe: several threads call the model at once (nn.DataParallel does so); watch a model on one device, "
                "or DistributedDataParallel"
            )
        self._thread = get_ident()

    def _measure_saturation(self, activation: Activation, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook: the preactivation that an activation is about to see, perhaps to overwrite."""
        last = self._last
        if not is_compiling() and last is not None and last.is_input(args):
            slope = activation.slope(as_batch(last.x.detach(), last.axis))
            self._buffer.set_saturated(last.row, saturated_share(slope, activation.largest_slope))

    def _find_site(self, m: ProbedModule, part: str, ndim: int) -> Site:
        """The site of an output of this call, made when it is first seen."""
        seen = (self._layer, m.calls, part, ndim)
        if seen not in m.sites:
            number = self._layer.number
            layer = LayerAxis(number, m.axis(ndim), ndim) if m.is_layer else self._layer
            axis = layer.axis if ndim == layer.ndim else ndim - 1
            key = TensorKey(self._stage, "module", number, m.word, "forward", m.name, part, m.calls - 1)
            codes = (self._buffer.code(key), self._buffer.code(key._replace(direction="backward")))
            m.sites[seen] = Site(layer, axis, *codes)
        return m.sites[seen]
