"""How many inputs feed one output of each weight of a model, and how many outputs one input feeds.

`fan_in` is the number of products that are summed in one output, on average and without padding: the number by which
the variance of an output follows from that of the weights. `fan_out` is the number of outputs that one input feeds; for
a convolution with a stride it is counted as in torch, without the stride.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations

from initlab.probes.computed_weights import PARAMETRIZED, ComputedWeight, find_computed
from initlab.probes.probed_modules import name_output, own_parameters
from initlab.probes.torch_private import ConvNd, NormBase

NAN = math.nan
GATES = {"LSTM": ("input gate", "forget gate", "cell", "output gate"), "GRU": ("reset gate", "update gate", "new")}
PROJECTIONS = ("query", "key", "value")
# Names under which libraries keep the three projections of attention in one matrix.
STACKED = ("in_proj", "qkv", "c_attn", "query_key_value")
# Words in the names of tables of vectors that are looked up or added, and multiplied with nothing.
TABLES = ("embed", "pos", "token", "bias_table", "latent", "prompt", "memory", "queries")


class Slice(NamedTuple):
    """A part of a weight that is initialized for itself, such as a gate: its rows, its fans."""

    label: str
    start: int
    stop: int
    fan_in: float
    fan_out: float


class ModelTensor(NamedTuple):
    """A parameter of a model as the forward pass uses it.

    name: dotted. module_name, module: whose it is. part: its name there. kind: linear, convolution, transposed
    convolution, recurrent, attention, embedding, norm, bias, slope, scale, or unknown. axis: the dimension that counts
    outputs. slices: its parts along `axis`, one or several. values: detached. sources: the parameters that it is, or is
    computed from. computed: by what, or None.
    """

    name: str
    module_name: str
    module: nn.Module
    part: str
    kind: str
    axis: int
    slices: tuple[Slice, ...]
    values: Tensor
    sources: tuple[nn.Parameter, ...]
    computed: ComputedWeight | None

    @property
    def is_weight(self) -> bool:
        """Whether it is multiplied with inputs."""
        return self.kind in WEIGHTS

    @property
    def rms(self) -> float:
        """Root mean square of the values."""
        return find_rms(self.values)

    def cut(self, one: Slice) -> Tensor:
        """The values of a slice, with outputs first."""
        if not self.values.ndim:
            return self.values.reshape(1)
        return self.values.narrow(self.axis, one.start, one.stop - one.start).transpose(0, self.axis)


WEIGHTS = ("linear", "convolution", "transposed convolution", "recurrent", "attention")


def list_tensors(model: nn.Module, equations: Mapping[str, str] | None = None) -> list[ModelTensor]:
    """Every parameter of a model once, in the order in which its modules were registered.

    equations: what functions do with parameters, by their names: "io" where a weight is kept as (inputs, outputs).

    A weight that is computed (weight_norm, spectral_norm, a parametrization, pruning) stands for the parameters that it
    is computed from. A parameter that several modules share stands where it is met first.
    """
    found, seen, known = [], set[int](), equations or {}
    for name, module in model.named_modules():
        if PARAMETRIZED in name.split("."):
            continue
        own = own_parameters(module)
        computed = list(find_computed(module))
        for weight in computed:
            sources = tuple(p for part, p in own if weight.is_made_of(part))
            found.append(_describe(name, module, weight.part, weight.compute().detach(), sources, weight, known))
            seen.update(map(id, sources))
        for part, p in own:
            if id(p) not in seen:
                seen.add(id(p))
                found.append(_describe(name, module, part, p if is_lazy(p) else p.detach(), (p,), None, known))
    return found


def _describe(
    name: str,
    module: nn.Module,
    part: str,
    values: Tensor,
    sources: tuple[nn.Parameter, ...],
    by: ComputedWeight | None,
    equations: Mapping[str, str],
) -> ModelTensor:
    full = f"{name}.{part}" if name else part
    shape = () if is_lazy(values) else tuple(values.shape)
    kind = _find_kind(module, full, part, shape)
    equation = equations.get(full, "")
    kind = "linear" if len(equation) == len(shape) > 1 else kind
    outputs_second = kind == "transposed convolution" or (kind == "linear" and is_transposed(module))
    axis = equation.index("o") if kind == "linear" and "o" in equation else int(outputs_second)
    slices = tuple(_cut(module, full, part, kind, axis, shape, equation))
    return ModelTensor(full, name, module, part, kind, axis, slices, values, sources, by)


def _find_kind(module: nn.Module, full: str, part: str, shape: tuple[int, ...]) -> str:
    """What a parameter of a module is for, by the class of the module, its own shape and its name."""
    last = full.lower().split(".")[-1]
    owner = full.lower().split(".")[-2] if "." in full else ""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent" if len(shape) == 2 else "bias"
    if isinstance(module, nn.MultiheadAttention):
        return "attention" if part.endswith("weight") else "bias"
    if is_norm(module):
        return "bias" if "bias" in last or last == "beta" else "norm"
    if isinstance(module, nn.PReLU):
        return "slope"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, ConvNd) and len(shape) > 1 and last == "weight":
        return "transposed convolution" if module.transposed else "convolution"
    if len([n for n in shape if n > 1]) < 2 and not isinstance(module, nn.Linear | nn.Bilinear):
        is_bias = "bias" in last or last in ("b", "beta") or last.endswith("_b")
        return "bias" if is_bias else "embedding" if _is_table(last, owner, shape) else "scale"
    if isinstance(module, nn.Linear | nn.Bilinear):
        return "linear" if len(shape) > 1 else "bias"
    if _is_table(last, owner, shape):
        return "embedding"
    if is_transposed(module) and len(shape) == 2:
        return "linear"
    return "unknown"  # a table or a matrix: only its use tells


def _is_table(last: str, owner: str, shape: tuple[int, ...]) -> bool:
    named = any(word in last for word in TABLES) or (last == "weight" and any(word in owner for word in TABLES))
    return len(shape) > 1 and (named or shape[0] == 1)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: one of torch's, one derived from it, or one of somebody's own that is called so."""
    kind = type_before_parametrizations(module)
    alone = not any(name != PARAMETRIZED for name, _ in module.named_children())
    derived = isinstance(module, (NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)) and "Act" not in kind.__name__
    return alone and (derived or name_output(module) == "norm" or kind.__name__.endswith("Norm"))


def is_transposed(module: nn.Module) -> bool:
    """Whether a module of several libraries' class Conv1D keeps its weight as (inputs, outputs)."""
    return type_before_parametrizations(module).__name__ == "Conv1D" and not isinstance(module, ConvNd)


def _cut(
    module: nn.Module, full: str, part: str, kind: str, axis: int, shape: tuple[int, ...], equation: str
) -> Iterator[Slice]:
    """The parts of a parameter and their fans."""
    if not shape:
        yield Slice("", 0, 1, NAN, NAN)
        return
    outputs, labels = shape[axis], _find_labels(module, full, part, kind, axis, shape)
    fan_in, fan_out = _count(module, kind, axis, shape)
    if len(equation) == len(shape) > 1:
        fan_in, fan_out = (math.prod(n for n, k in zip(shape, equation, strict=True) if k == word) for word in "io")
    size = outputs // max(len(labels), 1)
    for k, label in enumerate(labels):
        each_out = fan_out / len(labels) if kind in WEIGHTS else fan_out
        yield Slice(label, k * size, (k + 1) * size, fan_in, each_out)


def _find_labels(
    module: nn.Module, full: str, part: str, kind: str, axis: int, shape: tuple[int, ...]
) -> tuple[str, ...]:
    """What the parts of a stacked parameter are called."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and "_hr" not in part:
        mode = getattr(module, "mode", type(module).__name__.removesuffix("Cell"))
        return GATES.get(mode, ("",))
    around = full.lower().split(".")[-3:]  # a number may stand between
    stacked = any(word in one for word in STACKED for one in around)
    inputs = shape[1 - axis] if len(shape) > 1 else 0
    if stacked and shape[axis] % 3 == 0 and (not inputs or shape[axis] == 3 * inputs):
        return PROJECTIONS
    if stacked and kind == "bias" and shape[axis] % 3 == 0:
        return PROJECTIONS
    return ("",)


def _count(module: nn.Module, kind: str, axis: int, shape: tuple[int, ...]) -> tuple[float, float]:
    """fan_in and fan_out of a whole parameter."""
    if kind == "embedding":  # one row is looked up: what feeds an output is one number
        return 1, shape[-1]
    if kind not in WEIGHTS:
        return NAN, NAN
    if isinstance(module, ConvNd):
        taps, stride = math.prod(module.kernel_size), math.prod(module.stride)
        inputs, outputs = module.in_channels // module.groups, module.out_channels // module.groups
        return (inputs * taps / stride if module.transposed else inputs * taps), outputs * taps
    if isinstance(module, nn.Bilinear):
        return shape[1] * shape[2], shape[0]
    if len(shape) == 2:
        return shape[1 - axis], shape[axis]
    if len(shape) == 3:  # a stack of matrices; which way they stand only a pass can tell
        return NAN, NAN
    return shape[1] * math.prod(shape[2:]), shape[0] * math.prod(shape[2:])


def find_rms(values: Tensor) -> float:
    """Root mean square, in float64."""
    return float(values.double().square().mean().sqrt())


def as_weight_of_layer(table: ModelTensor) -> ModelTensor:
    """A table of vectors that a layer multiplies by too, as the weight that it then is."""
    rows, columns = table.values.shape
    return table._replace(kind="linear", slices=(Slice("", 0, rows, columns, rows),))


def orthogonal_view(values: Tensor) -> Tensor:
    """(outputs, everything else) of a weight with outputs first, as torch.nn.init.orthogonal_ sees it."""
    return values.reshape(values.shape[0], -1) if values.ndim > 1 else values.reshape(1, -1)


def is_readable(values: Tensor) -> bool:
    """Whether a parameter has numbers that can be looked at: not on the meta device, not lazy, not empty."""
    return not is_lazy(values) and not values.is_meta and values.numel() > 0 and values.layout is torch.strided
