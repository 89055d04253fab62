"""The hooks that see the tensors of an `nn.Module` pass: numbered, handed to the buffer, and forgotten.

Layers are numbered in the order in which the modules with parameters are first called; an activation has the number of
the layer below it. A module that is called again in a step gives further rows, numbered by `call`, and so does what
activation checkpointing computes anew; a second backward pass through one graph gives its backward rows a second time.
What is watched: watched.py. Knows nothing of steps and optimizers. The hooks change no value and leave nothing behind.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.hooks import RemovableHandle

from initlab.errors import UsageError
from initlab.nn.activations import Activation
from initlab.probes.probed_modules import RELU, Layer, Place, Watched, as_batch, measurable, tensors
from initlab.stats.buffer import Buffer
from initlab.stats.kernels.addresses import in_reach
from initlab.stats.keys import Spot

_INPUT = Layer(0, 0, 0)  # below the first layer
_OURS = -1  # torch numbers its hooks from 0


class Hook(partial[None]):
    """A hook that its module's copies do not inherit: what is copied or pickled in its place does nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return nothing

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _nothing, ()


def nothing(*args: Any) -> None:
    """What stands in a copy of a watched module where its hook was."""


def _nothing() -> Callable[..., None]:
    return nothing


def _version(x: Tensor) -> int:
    """How often x has been overwritten; torch does not count that in inference mode."""
    return 0 if x.is_inference() else x._version


class _Seen(dict[int, partial[None]]):
    """The hooks of a tensor, as torch keeps them: it wants to refer to them weakly."""


class _Last:
    """The latest preactivation: the tensor, how often it had been overwritten, where it belongs, its row."""

    __slots__ = ("foresaw", "place", "row", "version", "x")

    def __init__(self) -> None:
        self.x: Tensor | None = None

    def keep(self, x: Tensor, place: Place, row: int, foresaw: bool) -> None:
        self.x, self.version, self.place, self.row, self.foresaw = x, _version(x), place, row, foresaw

    def is_input(self, args: tuple[Any, ...], overwritten: bool = False) -> bool:
        """Whether a module was called with these very values, which it has perhaps overwritten itself since."""
        x = self.x
        if x is None or not args or args[0] is not x:
            return False
        return _version(x) == self.version + (overwritten and not x.is_inference())


class Hooks:
    """The hooks of one network: installed for a recorded step and removed after it.

    With `training` only forward passes that autograd follows are seen: a validation between two steps is none of them.
    """

    def __init__(self, watched: list[Watched], buffer: Buffer, stage: str, training: bool) -> None:
        self.watched, self._buffer, self._stage, self._training = watched, buffer, stage, training
        self._numbered = 0
        self._layer, self._last = _INPUT, _Last()
        self._modules: list[RemovableHandle] = []
        self._graph: list[RemovableHandle] = []
        self._seen: list[_Seen] = []  # the hooks of tensors that had none

    def install(self, model: nn.Module) -> None:
        self._modules.append(model.register_forward_pre_hook(Hook(self.begin_pass)))
        for w in self.watched:
            if w.parameters or w.chosen:
                self._modules.append(w.module.register_forward_hook(Hook(self._after, w)))
            if w.activation is not None and not (w.chosen and w.activation is RELU):
                self._modules.append(w.module.register_forward_pre_hook(Hook(self._before, w.activation)))

    def end_step(self) -> None:
        """Forget the step's graph and count calls from 0 again."""
        for handle in self._graph:
            handle.remove()
        for seen in self._seen:
            seen.pop(_OURS, None)
        self._graph.clear()
        self._seen.clear()
        self._last.x = None
        for w in self.watched:
            w.calls = 0

    def begin_pass(self, *_: Any) -> None:
        """A pass begins: below what comes now there is no layer."""
        if is_compiling():
            return
        if torch._C._is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
            raise UsageError(
                "probe: inside torch.func (vmap, grad, ...) or a trace nothing can be measured: call the model"
            )
        self._layer, self._last.x = _INPUT, None

    def remove(self) -> None:
        self.end_step()
        for handle in self._modules:
            handle.remove()
        self._modules.clear()

    def number(self, w: Watched) -> int:
        """The layer of a module with parameters; one that was never called comes after those that were."""
        if not w.number:
            self._numbered += 1
            w.number = self._numbered
        return w.number

    def on_gradient(self, x: Tensor, see: Callable[[Tensor], None]) -> None:
        """`see` the gradient with respect to x in this step, before anything overwrites it."""
        self._graph.append(x.register_hook(see))  # type: ignore[no-untyped-call]

    def _after(self, w: Watched, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook: number the layer, and take what comes out of it."""
        if is_compiling() or (self._training and not torch.is_grad_enabled()):
            return
        w.ran = True
        w.calls += 1
        if len(w.direct) >= w.calls and self._again(w, w.direct[w.calls - 1], module, args, output):
            return
        if w.parameters:
            self._layer = self._layer._replace(number=self.number(w))
        found = (("", output),) if type(output) is Tensor and measurable(output) else tensors(output)
        for part, x in found:
            ndim = x.ndim
            if w.parameters:
                self._layer = Layer(self._layer.number, w.axis(ndim), ndim)
            if w.chosen:
                place = self._place(w, part, self._layer.axis if ndim == self._layer.ndim else ndim - 1)
                self._value(w, place, x, args)
                if x is output and len(w.direct) >= w.calls - 1 and place.sit(self._buffer, x.shape, self._layer):
                    w.direct[w.calls - 1 : w.calls] = [place]

    def _again(self, w: Watched, place: Place, module: nn.Module, args: tuple[Any, ...], x: Any) -> bool:
        """The short road for a tensor that has come from here before; False where something is different now."""
        node = x.grad_fn if type(x) is Tensor else None
        if node is None or x.shape != place.shape or not in_reach(x):
            return False
        buffer, last = self._buffer, self._last
        if w.parameters:
            row = buffer.take(place.seat, x, place.before_relu)
            if row < 0:
                return False
            last.x, last.version, last.place, last.row, last.foresaw = x, x._version, place, row, place.before_relu
            place.before_relu = False
            self._layer = place.layer
        elif place.layer != self._layer:
            return False
        elif w.activation is RELU and last.is_input(args, x is last.x):
            if not self._relu(place, module, x):
                return False
        elif buffer.take(place.seat, x) < 0:
            return False
        if x._backward_hooks is None:  # `register_hook` without its handle
            seen = x._backward_hooks = _Seen(((_OURS, place.see),))
            node._register_hook_dict(x)
            self._seen.append(seen)
        else:
            self.on_gradient(x, place.see)
        return True

    def _relu(self, place: Place, module: nn.Module, x: Tensor) -> bool:
        """The row of a ReLU's output: perhaps it is there already."""
        buffer, last = self._buffer, self._last
        plain = len(module._forward_hooks) == 1 and not _global_forward_hooks and "forward" not in module.__dict__
        if not (last.foresaw and plain and buffer.foreseen(place.seat, last.row)):
            row = buffer.take(place.seat, x)
            if row < 0:
                return False
            buffer.relu(last.row, row)
        last.place.before_relu = plain and buffer.foresees
        last.x = None  # its memory is free as early as without us
        return True

    def _value(self, w: Watched, place: Place, x: Tensor, args: tuple[Any, ...]) -> None:
        """A row for an output, and one for its gradient when that comes."""
        row = self._buffer.put(place.spot, as_batch(x, place.axis))
        last = self._last
        if w.parameters:
            last.keep(x, place, row, False)
        elif w.activation is RELU and last.is_input(args, x is last.x):
            self._buffer.relu(last.row, row)
            last.x = None  # its memory is free as early as without us
        if x.requires_grad:
            self.on_gradient(x, place.see)

    def _gradient(self, place: Place, grad: Tensor) -> None:
        in_place = grad.shape == place.shape and in_reach(grad) and self._buffer.take(place.back_seat, grad) >= 0
        if not in_place:
            self._buffer.put(place.back_spot, as_batch(grad, place.axis))

    def _before(self, activation: Activation, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook: the preactivation that an activation is about to see, perhaps to overwrite."""
        last = self._last
        if not is_compiling() and last.x is not None and last.is_input(args):
            self._buffer.saturate(last.row, as_batch(last.x, last.place.axis), activation)

    def _place(self, w: Watched, part: str, axis: int) -> Place:
        """Where the values of an output of this call belong, and what takes its gradient."""
        key = (self._layer.number, w.calls, part, axis)
        if key not in w.places:
            tensor = "preactivation" if w.parameters else "activation"
            spot = Spot(self._stage, "module", self._layer.number, tensor, "forward", w.name, part, w.calls - 1)
            w.places[key] = Place(spot, axis, self._layer, self._gradient)
        return w.places[key]
