"""What is watched inside an `nn.Module`: which modules give rows, which tensors they put out, and what counts units.

A module with parameters of its own (Linear, Conv, LSTM, ...) gives preactivations; norms, embeddings and activations
are called so, with parameters or without; a leaf that only moves or drops entries (Dropout, Flatten, pooling) is
`other`. Units are the channels of convolutions, pooling included,
(N, C, H, W) -> (N H W, C), and the last dimension of everything else, (B, T, C) -> (B T, C).
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from initlab.errors import UsageError, as_several, nearest, show
from initlab.nn.activations import ACTIVATIONS, Activation
from initlab.nn.custom_activation import as_activation
from initlab.probes.torch_private import ConvNd, NormBase
from initlab.stats.dtypes import DTYPES, resolve_dtype

PARAMETRIZED = "parametrizations"
MEASURED = frozenset(map(resolve_dtype, DTYPES))
RELU = ACTIVATIONS["relu"]


def _module_text(module: nn.Module) -> tuple[type, str]:
    """What a module computes; whether in place makes no difference."""
    return type_before_parametrizations(module), repr(module).replace(", inplace=True", "").replace("inplace=True", "")


# A LeakyReLU of another slope and a GELU by tanh are none of the table's.
_ROWS = {_module_text(row.module()): row for row in ACTIVATIONS.values()}
_NUMERICAL: dict[tuple[type, str], Activation | None] = {}  # those that had to be looked at
# torch's modules by the file that defines them; softmax and attention mix units.
_WORDS = {"activation": "activation", "batchnorm": "norm", "instancenorm": "norm", "normalization": "norm"}
_WORDS |= {"sparse": "embedding"} | dict.fromkeys(
    ("dropout", "flatten", "pooling", "padding", "fold", "upsampling", "pixelshuffle", "channelshuffle", "distance"),
    "other",
)
_MIXING = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.GLU, nn.MultiheadAttention)


def name_output(module: nn.Module) -> str:
    """What the output of a module is called in the column `tensor`."""
    home = type_before_parametrizations(module).__module__
    known = _WORDS.get(home.rpartition(".")[2]) if home.startswith("torch.nn.modules.") else None
    if isinstance(module, nn.MultiheadAttention):
        return "preactivation"
    if known is None and isinstance(module, nn.Identity):
        return "other"
    if known is None and is_owner(module) and any(module.children()):
        return "stream"
    return known or ("preactivation" if own_parameters(module) else "activation")


def find_activation(module: nn.Module) -> Activation | None:
    """The function of an activation module: a row of the table, or looked at numerically; None where it is none."""
    text = _module_text(module)
    if text in _ROWS:
        return _ROWS[text]
    if (
        name_output(module) != "activation"
        or isinstance(module, _MIXING)
        or not text[0].__module__.startswith("torch.")
    ):
        return None
    if own_parameters(module):  # they change: it is looked at as it is now
        return _look_at_function(module)
    if text not in _NUMERICAL:
        _NUMERICAL[text] = _look_at_function(copy.deepcopy(module))
    return _NUMERICAL[text]


def _look_at_function(module: nn.Module) -> Activation | None:
    try:
        return as_activation(module)
    except UsageError:  # random, or with a parameter for each unit
        return None


class LayerAxis(NamedTuple):
    """What a layer tells the activations above it: its number, and which of how many dimensions counts its units."""

    number: int
    axis: int
    ndim: int


class Site(NamedTuple):
    """What stays the same from step to step of an output of a module."""

    layer: LayerAxis  # what it tells the activations above it
    axis: int
    code: int  # numbers of the keys of its rows, and of those of its gradient
    gradient_code: int


class ProbedModule:
    """A module under its dotted name, its parameters and its number once it has one."""

    def __init__(self, name: str, module: nn.Module, chosen: bool) -> None:
        self.name, self.module, self.chosen = name, module, chosen
        self.parameters = own_parameters(module)
        self.word, self.activation = name_output(module), find_activation(module)
        self.is_layer = bool(self.parameters) and self.word != "activation"  # which the layers are numbered by
        self.is_owner = is_owner(module)
        self.expected = not (self.is_owner and any(module.children()))  # to be called; a block's parts speak for it
        self._second = isinstance(module, (NormBase, nn.GroupNorm))
        self._from_end = 1 + (len(module.kernel_size) if isinstance(module, ConvNd) else 0)
        self.number = self.calls = self.below = 0  # `below`: the layer that it was last called above
        self.first_weight = 0  # id of the weight that a function of its own used first
        self.ran = False
        self.sites: dict[tuple[LayerAxis, int, str, int], Site] = {}  # by the layer below, call, part and ndim

    def axis(self, ndim: int) -> int:
        """Which dimension of its output counts units."""
        return min(1, ndim - 1) if self._second else ndim - self._from_end


def is_owner(module: nn.Module) -> bool:
    """Whether functions that a module calls are layers of its own: one of the user's, or torch's of several parts."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.MultiheadAttention)):
        return False
    kind = type_before_parametrizations(module)
    if kind.__module__.startswith("torch.nn.modules."):
        return any(name != PARAMETRIZED for name, _ in module.named_children())
    return True


def own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that belong to the module itself, those behind its parametrizations (weight_norm, ...) included."""
    found = list(module.named_parameters(recurse=False))
    if PARAMETRIZED in module._modules:
        hidden = module.get_submodule(PARAMETRIZED)
        found += [(f"{PARAMETRIZED}.{name}", p) for name, p in hidden.named_parameters()]
    return found


def name_parameter(module: nn.Module, part: str, p: Tensor, added: bool = False) -> str:
    """`weight` or `bias`: by shape, and a vector by what it is for; `added`: a function was seen to add it."""
    name = part.rpartition(".")[2].lower()
    if sum(n > 1 for n in p.shape) >= 2:
        return "weight"
    if added:
        return "bias"
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


def select(model: nn.Module, patterns: Sequence[str]) -> list[ProbedModule]:
    """All modules that give rows, those chosen whose dotted name matches a glob; each glob must match something."""
    named = {
        f"{name}.".removeprefix("_orig_mod.").rstrip("."): module
        for name, module in model.named_modules()
        if PARAMETRIZED not in name.split(".")
        and (own_parameters(module) or not any(module.children()) or is_owner(module))
    }
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            shown = ", ".join(list(named)[:8]) + (", ..." if len(named) > 8 else "")
            raise UsageError(f"layers={pattern}: matches none of {shown}{nearest(pattern, named)}")
    found = [
        ProbedModule(name, m, any(fnmatchcase(name, pattern) for pattern in patterns)) for name, m in named.items()
    ]
    for m in found:  # torch's attention takes the weights of its parts and calls none of them
        m.expected &= not isinstance(named.get(m.name.rpartition(".")[0]), nn.MultiheadAttention)
    return found


def measurable(x: Tensor) -> bool:
    """Whether its entries are numbers of a known format that lie in memory one by one; there may be none."""
    return x.dtype in MEASURED and x.layout is torch.strided and x.numel() > 0


def find_tensors(output: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
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
        yield from find_tensors(value, f"{path}.{key}" if path else str(key))


def as_batch(x: Tensor, axis: int) -> Tensor:
    """(N, C) of any tensor, C its dimension `axis`; x itself where it has that shape, else cut off from the graph."""
    if x.ndim == 2 and axis == 1:
        return x
    x = x.detach()
    return x.movedim(axis, -1).reshape(-1, x.shape[axis]) if x.ndim > 1 else x.reshape(1, -1)
