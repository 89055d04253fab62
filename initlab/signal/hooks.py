"""What is watched inside an `nn.Module`, and the hooks that see it pass.

A module with parameters of its own (Linear, Conv, LayerNorm, Embedding, LSTM, ...) gives preactivations, a leaf without
(ReLU, Dropout, Flatten, ...) activations. Layers are numbered in the order in which the modules with parameters are
first called; an activation has the number of the layer below it. Units are the channels of convolutions, pooling
included, (N, C, H, W) -> (N H W, C), and the last dimension of everything else, (B, T, C) -> (B T, C).
A module that is called again in a step gives further rows, numbered by `call`, and so does what activation
checkpointing computes anew; a second backward pass through one graph gives its backward rows a second time.
Knows nothing of steps and optimizers. The hooks change no value and leave nothing behind.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from initlab.errors import UsageError, nearest
from initlab.signal.activations import ACTIVATIONS, Activation
from initlab.signal.buffer import Buffer
from initlab.signal.tidy import Spot

PARAMETRIZED = "parametrizations"
FORMATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_RELU = ACTIVATIONS["relu"]


def _described(module: nn.Module) -> tuple[type, str]:
    """What a module computes; whether in place makes no difference."""
    return type(module), repr(module).replace(", inplace=True", "").replace("inplace=True", "")


# A LeakyReLU of another slope and a GELU by tanh are none of the table's.
_ROWS = {_described(row.module()): row for row in ACTIVATIONS.values()}


class Watched:
    """A module under its dotted name, its parameters and its number once it has one."""

    def __init__(self, name: str, module: nn.Module, chosen: bool) -> None:
        self.name, self.module, self.chosen = name, module, chosen
        self.parameters = own_parameters(module)
        self.activation = None if self.parameters else _ROWS.get(_described(module))
        self._second = isinstance(module, (_NormBase, nn.GroupNorm))
        self._from_end = 1 + (len(module.kernel_size) if isinstance(module, _ConvNd) else 0)
        self.number = self.calls = 0
        self.ran = False
        self.places: dict[tuple[int, int, str, int], tuple[Spot, Callable[[Tensor], None]]] = {}

    def axis(self, ndim: int) -> int:
        """Which dimension of its output counts units."""
        return min(1, ndim - 1) if self._second else ndim - self._from_end


def own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that belong to the module itself, those behind its parametrizations (weight_norm, ...) included."""
    found = list(module.named_parameters(recurse=False))
    if PARAMETRIZED in module._modules:
        hidden = module.get_submodule(PARAMETRIZED)
        found += [(f"{PARAMETRIZED}.{name}", p) for name, p in hidden.named_parameters()]
    return found


def select(model: nn.Module, layers: str | Sequence[str]) -> list[Watched]:
    """All modules that give rows, those chosen whose dotted name matches a glob; each glob must match something."""
    named = {
        name.removeprefix("_orig_mod."): module
        for name, module in model.named_modules()
        if PARAMETRIZED not in name.split(".") and (own_parameters(module) or not any(module.children()))
    }
    patterns = [layers] if isinstance(layers, str) else list(layers)
    if not patterns:
        raise UsageError("layers: empty; give at least one glob, such as layers='*'")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            shown = ", ".join(list(named)[:8]) + (", ..." if len(named) > 8 else "")
            raise UsageError(f"layers={pattern}: matches none of {shown}{nearest(pattern, named)}")
    return [Watched(name, m, any(fnmatchcase(name, pattern) for pattern in patterns)) for name, m in named.items()]


def measurable(x: Tensor) -> bool:
    """Whether its entries are numbers of a known format that lie in memory one by one; there may be none."""
    return x.dtype in FORMATS and x.layout is torch.strided and x.numel() > 0


def tensors(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested output that can be measured, each with its path: ("0", ...), ("1.hidden", ...)."""
    if isinstance(output, Tensor):
        if measurable(output):
            yield path, output
        return
    parts: Any = ()
    if isinstance(output, Mapping):
        parts = output.items()
    elif isinstance(output, (tuple, list)):
        parts = enumerate(output)
    elif is_dataclass(output):
        parts = [(field.name, getattr(output, field.name)) for field in fields(output)]
    for key, value in parts:
        yield from tensors(value, f"{path}.{key}" if path else str(key))


def as_batch(x: Tensor, axis: int) -> Tensor:
    """(N, C) of any tensor, C its dimension `axis`; cut off from the graph."""
    if x.requires_grad:
        x = x.detach()
    ndim = x.ndim
    if ndim == 2 and axis == 1:
        return x
    if ndim < 2:
        return x.reshape(1, -1)
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])


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


class _Last(NamedTuple):
    """The latest preactivation: the tensor, how often it had been overwritten, its values as (N, C), its row."""

    x: Tensor
    version: int
    flat: Tensor
    row: int

    def is_input(self, args: tuple[Any, ...], overwritten: bool = False) -> bool:
        """Whether a module was called with these very values, which it has perhaps overwritten itself since."""
        if not args or args[0] is not self.x:
            return False
        return _version(self.x) == self.version + (overwritten and not self.x.is_inference())


class Hooks:
    """The hooks of one network: installed for a recorded step and removed after it.

    With `training` only forward passes that autograd follows are seen: a validation between two steps is none of them.
    """

    def __init__(self, watched: list[Watched], buffer: Buffer, stage: str, training: bool) -> None:
        self.watched, self._buffer, self._stage, self._training = watched, buffer, stage, training
        self._numbered = self._below = self._below_axis = self._below_ndim = 0
        self._last: _Last | None = None
        self._modules: list[RemovableHandle] = []
        self._graph: list[RemovableHandle] = []

    def install(self, model: nn.Module) -> None:
        self._modules.append(model.register_forward_pre_hook(Hook(self.begin_pass)))
        for w in self.watched:
            if w.parameters or w.chosen:
                self._modules.append(w.module.register_forward_hook(Hook(self._after, w)))
            if w.activation is not None and not (w.chosen and w.activation is _RELU):
                self._modules.append(w.module.register_forward_pre_hook(Hook(self._before, w.activation)))

    def end_step(self) -> None:
        """Forget the step's graph and count calls from 0 again."""
        for handle in self._graph:
            handle.remove()
        self._graph.clear()
        self._last = None
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
        self._below = self._below_axis = self._below_ndim = 0
        self._last = None

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
        if w.parameters:
            self._below = w.number or self.number(w)
        found = (("", output),) if type(output) is Tensor and measurable(output) else tensors(output)
        for part, x in found:
            ndim = x.ndim
            if w.parameters:
                self._below_ndim, self._below_axis = ndim, w.axis(ndim)
            if w.chosen:
                self._value(w, part, x, self._below_axis if ndim == self._below_ndim else ndim - 1, args)

    def _value(self, w: Watched, part: str, x: Tensor, axis: int, args: tuple[Any, ...]) -> None:
        """A row for an output, and one for its gradient when that comes."""
        flat = as_batch(x, axis)
        spot, gradient = self._places(w, part, axis)
        row = self._buffer.put(spot, flat)
        last = self._last
        if w.parameters:
            self._last = _Last(x, _version(x), flat, row)
        elif w.activation is _RELU and last is not None and last.is_input(args, overwritten=x is last.x):
            self._buffer.relu(last.row, row)
            self._last = None  # its memory is free as early as without us
        if x.requires_grad:
            self.on_gradient(x, gradient)

    def _gradient(self, spot: Spot, axis: int, grad: Tensor) -> None:
        self._buffer.put(spot, as_batch(grad, axis))

    def _before(self, activation: Activation, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook: the preactivation that an activation is about to see, perhaps to overwrite."""
        last = self._last
        if not is_compiling() and last is not None and last.is_input(args):
            self._buffer.saturate(last.row, last.flat, activation)

    def _places(self, w: Watched, part: str, axis: int) -> tuple[Spot, Callable[[Tensor], None]]:
        """Where the values of an output of this call belong, and what takes its gradient."""
        key = (self._below, w.calls, part, axis)
        if key not in w.places:
            tensor = "preactivation" if w.parameters else "activation"
            spot = Spot(self._stage, "module", self._below, tensor, "forward", w.name, part, w.calls - 1)
            w.places[key] = (spot, partial(self._gradient, spot._replace(direction="backward"), axis))
        return w.places[key]
