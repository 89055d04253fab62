"""What is watched inside an `nn.Module`: which modules give rows, which tensors they put out, and what counts units.

A module with parameters of its own (Linear, Conv, LSTM, ...) gives preactivations; norms, embeddings and activations
are called so, with parameters or without; a leaf that only moves or drops entries (Dropout, Flatten, pooling) is
`other`. Units are the channels of convolutions, pooling included,
(N, C, H, W) -> (N H W, C), and the last dimension of everything else, (B, T, C) -> (B T, C).
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from initlab.errors import UsageError, as_several, nearest, show
from initlab.nn.activations import ACTIVATIONS, Activation
from initlab.nn.custom_activation import as_activation
from initlab.probes.computed_weights import PARAMETRIZED, find_computed
from initlab.probes.torch_private import ConvNd, NormBase
from initlab.stats.backend import as_matrix
from initlab.stats.dtypes import DTYPES, resolve_dtype
from initlab.stats.kernels.cpu import library

COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
MEASURED = frozenset(map(resolve_dtype, DTYPES)) | set(COMPLEX)
RELU = ACTIVATIONS["relu"]
MOST_LOOKS = 64  # at one function: one whose numbers change from step to step is not looked at for ever


def _module_text(module: nn.Module) -> tuple[type, str]:
    """What a module computes; whether in place makes no difference."""
    return type_before_parametrizations(module), repr(module).replace(", inplace=True", "").replace("inplace=True", "")


# A LeakyReLU of another slope and a GELU by tanh are none of the table's.
_ROWS = {_module_text(row.module()): row for row in ACTIVATIONS.values()}
_LAYERS = ("Linear", "Conv", "LSTM", "GRU", "Embedding")  # how torch's quantized layers are called
_NUMERICAL: dict[tuple[type, str], Activation | None] = {}  # those that had to be looked at
# torch's modules by the file that defines them; softmax and attention mix units.
_WORDS = {"activation": "activation", "batchnorm": "norm", "instancenorm": "norm", "normalization": "norm"}
_WORDS |= {"sparse": "embedding", "loss": "loss"} | dict.fromkeys(
    ("dropout", "flatten", "pooling", "padding", "fold", "upsampling", "pixelshuffle", "channelshuffle", "distance"),
    "other",
)
_MIXING = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.GLU, nn.MultiheadAttention)

# What torch's documentation calls the outputs of modules that give several: by their paths in what is returned.
_OUTPUTS: dict[type[nn.Module], dict[str, str]] = {
    nn.LSTM: {"0": "output", "0.0": "output", "1.0": "h_n", "1.1": "c_n"},  # 0.0 of a packed sequence
    nn.GRU: {"0": "output", "0.0": "output", "1": "h_n"},
    nn.RNN: {"0": "output", "0.0": "output", "1": "h_n"},
    nn.LSTMCell: {"0": "h_1", "1": "c_1"},
    nn.MultiheadAttention: {"0": "attn_output", "1": "attn_output_weights"},
}


def name_output(module: nn.Module) -> str:
    """What the output of a module is called in the column `tensor`."""
    kind = type_before_parametrizations(module)
    known = _WORDS.get(kind.__module__.rpartition(".")[2]) if _is_torchs(kind) else None
    if isinstance(module, nn.MultiheadAttention) or (_is_quantized(kind) and kind.__name__.startswith(_LAYERS)):
        return "preactivation"
    if known is None and kind.__module__.startswith("torch.ao.quantization."):
        return "other"
    if known is None and is_owner(module) and any(module.children()):
        return "stream"
    if known is None and isinstance(module, nn.Identity):
        return "other"
    return known or ("preactivation" if own_parameters(module) else "other")


def _is_torchs(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.modules.")


def _is_quantized(kind: type) -> bool:
    return kind.__module__.startswith("torch.ao.nn.")


def find_activation(module: nn.Module) -> Activation | None:
    """The function of an activation module of torch's: a row of the table, or looked at numerically; None where it is
    none."""
    text = _module_text(module)
    if text in _ROWS:
        return _ROWS[text]
    if text[0].__module__.startswith("torch."):
        if _WORDS.get(text[0].__module__.rpartition(".")[2]) != "activation" or isinstance(module, _MIXING):
            return None
        if own_parameters(module):  # they change: it is looked at as it is now
            return look_at_function(module)
        if text not in _NUMERICAL:
            _NUMERICAL[text] = look_at_function(copy.deepcopy(module))
        return _NUMERICAL[text]
    return None


def look_at_function(function: Callable[[Tensor], Tensor]) -> Activation | None:
    """A function as an activation; None where it is random, not elementwise, or a straight line."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
            found = as_activation(function)
            slope = found.slope(torch.linspace(-8, 8, 64, dtype=torch.float64, device="cpu"))
    except Exception:  # random, not elementwise, or nothing that takes such numbers
        return None
    return found if float(slope.max() - slope.min()) > 1e-6 else None


class ProbedModule:
    """A module under its dotted name, its parameters and its number once it has one."""

    def __init__(self, name: str, module: nn.Module, chosen: bool) -> None:
        self.name, self.module, self.chosen = name, module, chosen
        self.is_scripted = isinstance(module, torch.jit.ScriptModule)  # takes no hooks
        self.parameters = own_parameters(module)
        self.computed = [] if self.is_scripted else list(find_computed(module))
        self.word, self.activation = name_output(module), find_activation(module)
        # Which the layers are numbered by; a quantized one keeps its weights elsewhere.
        self.is_layer = (bool(self.parameters) or self.word == "preactivation") and self.word != "activation"
        self.is_owner, self.is_quantized = is_owner(module), _is_quantized(type(module))
        # One of the user's with nothing inside: the functions that it calls may together be an activation.
        inside = (module.children(), module.parameters(), module.buffers())
        self._n_looks, self._state = 0, dict[str, object]()
        self.may_be_activation = self.is_owner and all(next(found, None) is None for found in inside)
        # To be called; parts speak for blocks.
        is_observer = type(module).__module__.startswith("torch.ao.quantization.")
        is_block = self.is_owner and any(module.children())
        is_container = isinstance(module, (nn.ParameterList, nn.ParameterDict))
        self.expected = not (is_container or is_observer or self.is_scripted or is_block)
        self._second = isinstance(module, (NormBase, nn.GroupNorm))
        self._from_end = 1 + (len(module.kernel_size) if isinstance(module, ConvNd) else 0)
        self.number = self.calls = self.below = 0  # `below`: the layer that it was last called above
        self.first_weight = 0  # id of the weight that a function of its own used first
        self.within: ProbedModule | None = None  # torch's attention, which takes the weights of this part of it
        self.ran = self.unfollowed = False  # called in a recorded step, called without autograd
        self.sites: dict[tuple[object, ...], Any] = {}  # what stays the same from step to step of its outputs

    def look(self, function: Callable[[Tensor], Tensor] | None) -> None:
        """Whether the module is an activation, by what it has computed in a call."""
        self.may_be_activation, self._n_looks = False, self._n_looks + 1
        self.activation = None if function is None else look_at_function(function)
        if self.activation is not None:
            self.word = "activation"

    def forget_activation_that_changes(self) -> None:
        """A call begins: an activation of the user's with other numbers in it than before is looked at anew."""
        if not self._n_looks and not self.may_be_activation:
            return
        own = vars(self.module).items()
        state: dict[str, object] = {name: value for name, value in own if isinstance(value, int | float | str)}
        if self._n_looks and self.activation is not None and state != self._state:
            self.activation, self.may_be_activation = None, self._n_looks < MOST_LOOKS
        self._state = state

    @property
    def label(self) -> str:
        """What it is called in a message."""
        return self.name or type(self.module).__name__

    def axis(self, ndim: int) -> int:
        """Which dimension of its output counts units."""
        return min(1, ndim - 1) if self._second else ndim - self._from_end


def is_owner(module: nn.Module) -> bool:
    """Whether functions that a module calls are layers of its own: one of the user's, or torch's of several parts."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
        own = "forward" in vars(module) or type(module).forward not in (nn.Sequential.forward, nn.Module.forward)
        return own and not isinstance(module, torch.jit.ScriptModule)
    kind = type_before_parametrizations(module)
    if kind is nn.Softmax:
        return True
    if isinstance(module, nn.MultiheadAttention) or _is_quantized(kind):
        return False
    if _is_torchs(kind):
        return any(name != PARAMETRIZED for name, _ in module.named_children())
    return True


def own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that belong to the module itself, those behind its parametrizations (weight_norm, ...) included."""
    found = list(module.named_parameters(recurse=False))
    if any(name == PARAMETRIZED for name, _ in module.named_children()):
        hidden = module.get_submodule(PARAMETRIZED)
        found += [(f"{PARAMETRIZED}.{name}", p) for name, p in hidden.named_parameters()]
    return found


def name_parameter(module: nn.Module, part: str, p: Tensor, added: bool = False, multiplied: bool = False) -> str:
    """`weight` or `bias`: by shape, and a vector by what it is for; `added`, `multiplied`: by a function."""
    name = part.rpartition(".")[2].lower()
    if sum(n > 1 for n in p.shape) >= 2:
        return "weight"
    if added or multiplied:
        return "bias" if added else "weight"
    if name_output(module) in ("norm", "activation"):
        return "bias" if "bias" in name or name in ("beta", "b") else "weight"
    factor = "weight" in name or "original" in name or name in ("gamma", "alpha", "scale", "gain", "g", "w")
    return "weight" if factor else "bias"


def find_parameter_device(model: object) -> torch.device:
    """Where the parameters of a module lie; a processor for whatever has none."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if first is None else first.device


def refuse_several(seeds: Sequence[int]) -> None:
    if len(seeds) != 1:
        raise UsageError(f"seeds: {len(seeds)} given; an nn.Module is one network and has one")


def list_patterns(layers: str | Iterable[str]) -> list[str]:
    """One glob, or any number of them, as a list; a UsageError for what is neither."""
    found = []
    for pattern in as_several(layers, str):
        if not isinstance(pattern, str):
            raise UsageError(f"layers={show(layers)}: must be a glob on the names of modules, or a list of them")
        found.append(pattern)
    if not found:
        raise UsageError("layers: empty; give at least one glob, such as layers='*'")
    return found


def is_whole(patterns: Sequence[str]) -> bool:
    """Whether the model itself, whose name is empty, is chosen: its input and its loss have rows."""
    return any(fnmatchcase("", pattern) for pattern in patterns)


def select(model: nn.Module, patterns: Sequence[str], strict: bool = True) -> list[ProbedModule]:
    """All modules that give rows, those chosen whose dotted name matches a glob.

    strict: each glob must match something.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            "model: is scripted, and scripted modules take no hooks; give the nn.Module that it was made of"
        )
    named = {
        f"{name}.".removeprefix("_orig_mod.").rstrip("."): module
        for name, module in model.named_modules()
        if PARAMETRIZED not in name.split(".")
        and (own_parameters(module) or not any(module.children()) or is_owner(module))
    }
    for pattern in patterns:
        if strict and not any(fnmatchcase(name, pattern) for name in named):
            shown = ", ".join(list(named)[:8]) + (", ..." if len(named) > 8 else "")
            raise UsageError(f"layers={pattern}: matches none of {shown}{nearest(pattern, named)}")
    found = [
        ProbedModule(name, m, any(fnmatchcase(name, pattern) for pattern in patterns)) for name, m in named.items()
    ]
    by_name = {m.name: m for m in found}
    for m in found:  # torch's attention takes the weights of its parts and calls none of them
        above = by_name.get(m.name.rpartition(".")[0])
        if above is not None and isinstance(above.module, nn.MultiheadAttention):
            m.within, m.expected = above, False
    return found


def measurable(x: Tensor) -> bool:
    """Whether it has entries, numbers of a known format that lie in its own memory one by one."""
    plain = type(x) in (Tensor, nn.Parameter) or type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
    return plain and x.dtype in MEASURED and x.layout is torch.strided and not x.is_meta and x.numel() > 0


def find_tensors(output: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested output that can be measured, each with its path: ("0", ...), ("1.hidden", ...).

    Of several by one path, as in {"a.b": ..., "a": {"b": ...}}, the later ones are numbered: "a.b~1".
    """
    seen: set[str] = set()
    for path, x in _find_parts(output):
        name = next(name for n in count() if (name := f"{path}~{n}" if n else path) not in seen)
        seen.add(name)
        yield name, x


def list_outputs(module: nn.Module, output: object) -> list[tuple[str, Tensor]]:
    """The tensors of what a module returned: by the names that torch has for them, else by their paths."""
    names = next((names for kind, names in _OUTPUTS.items() if isinstance(module, kind)), {})
    return [(names.get(path, path), x) for path, x in find_tensors(output)]


def _find_parts(output: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        if measurable(output):
            yield path, output
        return
    parts: Any = ()
    if not path and hasattr(output, "__dict__") and not isinstance(output, (Mapping, tuple, type, nn.Module)):
        parts = [(key, value) for key, value in vars(output).items() if not key.startswith("_")]
    if isinstance(output, Mapping):
        parts = output.items()
    elif isinstance(output, (tuple, list)):
        parts = enumerate(output)
    elif is_dataclass(output):
        parts = [(field.name, getattr(output, field.name)) for field in fields(output)]
    for key, value in parts:
        yield from _find_parts(value, f"{path}.{key}" if path else str(key))


def describe_output(output: object) -> str:
    """Why an output has no row: the kind of numbers that it holds, or that it holds no tensor."""
    tensor = output if isinstance(output, Tensor) else None
    if tensor is None and isinstance(output, (tuple, list)):
        tensor = next((x for x in output if isinstance(x, Tensor)), None)
    if tensor is None:
        return f"{type(output).__name__} without tensors"
    if type(tensor) is not Tensor or tensor.is_meta:
        return "meta" if tensor.is_meta else type(tensor).__name__
    if tensor.layout is not torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    return str(tensor.dtype).removeprefix("torch.") if tensor.numel() else f"empty, {tuple(tensor.shape)}"


def as_batch(x: Tensor, axis: int) -> Tensor:
    """(N, C) of any tensor, C its dimension `axis`; x itself where it has that shape, else cut off from the graph.

    A complex unit counts as two, its real and its imaginary part.
    """
    if x.ndim == 2 and axis == 1 and not x.is_complex():
        return x
    x = x.detach()
    if axis == 1 and x.ndim > 2 and x.dtype is torch.float32 and x.is_cpu and x.is_contiguous() and library():
        batch = x.new_empty((x.numel() // x.shape[1], x.shape[1]))  # as below, in less time
        library().units_last(x.data_ptr(), *x.shape[:2], x.shape[2:].numel(), batch.data_ptr())  # type: ignore[union-attr]
        return batch
    x = as_real(x.movedim(axis, -1) if x.ndim > 1 else x.reshape(1, -1))
    return x.reshape(-1, x.shape[-1])


def as_real(x: Tensor) -> Tensor:
    """A complex tensor (..., C) as its real and imaginary parts (..., 2 C); any other as it is."""
    return torch.view_as_real(x.detach().resolve_conj()).flatten(-2) if x.is_complex() else x


def as_dense(x: Tensor) -> Tensor:
    """A weight or its gradient as real numbers that lie in memory one by one."""
    return as_real(x.detach() if x.layout == torch.strided else x.detach().to_dense())


def as_weight(x: Tensor) -> Tensor:
    """(O, rest) of a weight or its gradient."""
    return as_matrix(as_dense(x))
