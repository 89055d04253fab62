"""The gain that each weight of a model has, and the one that what follows it needs."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from initlab.errors import UsageError
from initlab.models.dataflow import Flow, Follower
from initlab.models.fans import ModelTensor, Slice, as_weight_of_layer, is_readable, list_tensors
from initlab.models.symbolic_flow import find_flow
from initlab.nn.custom_activation import gain
from initlab.stats.backend import as_matrix
from initlab.stats.measure import measure
from initlab.stats.statistics import STATISTICS

_ROWS = tuple(STATISTICS)


class LayerGain(NamedTuple):
    """A weight, or one part of a stacked one, with its gain.

    name: the dotted name of the parameter, with the part in brackets. position: where the layer stands in the flow of
    data, -1 where it was not met. rms, std: of the finite entries. found: rms times sqrt(fan_in). needed: the gain that
    keeps gradients through what follows; 1 where that is no activation.
    """

    name: str
    tensor: ModelTensor
    part: Slice
    position: int
    follower: Follower | None
    rms: float
    std: float
    found: float
    needed: float

    @property
    def mean_size(self) -> float:
        """The size of the mean of the finite entries."""
        return math.sqrt(max(self.rms**2 - self.std**2, 0.0))

    @property
    def octaves(self) -> float:
        """log2 of the gain found over the gain needed: 1 is twice too large."""
        if not self.found > 0 or not self.needed > 0:
            return -math.inf if self.found == 0 else math.nan
        return math.log2(self.found / self.needed)


class ModelGains(NamedTuple):
    """The flow of a model, its tensors, and the gains of its weights in the order of the flow."""

    flow: Flow
    tensors: list[ModelTensor]
    gains: list[LayerGain]


def measure_gains(model: nn.Module, x: Any = None, flow: Flow | None = None) -> ModelGains:
    """The gains of all weights of a model, those that run first in front; `x`: a batch, by which the flow is found."""
    flow = flow or find_flow(model, x)
    tensors = list_tensors(model, flow.equations())
    positions = {node.name: k for k, node in reversed(list(flow.layers()))}
    layers = [(name, m._parameters.get("weight")) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    heads = {id(p): name for name, p in layers if p is not None}
    weights = []
    for tensor in tensors:
        head = heads.get(id(tensor.sources[0])) if tensor.kind == "embedding" and tensor.sources else None
        if head is not None:  # a table that a layer multiplies by too
            weights.append(as_weight_of_layer(tensor)._replace(module_name=head))
        elif tensor.is_weight:
            weights.append(tensor)
    found = [gain for tensor in weights for gain in _list_parts(tensor, flow, positions)]
    return ModelGains(flow, tensors, sorted(found, key=lambda one: (one.position < 0, one.position)))


def _list_parts(tensor: ModelTensor, flow: Flow, positions: dict[str, int]) -> Iterator[LayerGain]:
    if not is_readable(tensor.values) or not tensor.values.is_floating_point():
        return
    position = positions.get(tensor.module_name, positions.get(tensor.name, -1))
    if position < 0 and isinstance(tensor.module, nn.Linear):  # the output projection inside of torch's attention
        position = positions.get(tensor.module_name.rpartition(".")[0], -1)
    follower = flow.follower(position) if position >= 0 else None
    for part in tensor.slices:
        row = dict(zip(_ROWS, measure(as_matrix(tensor.cut(part).contiguous()), batched=False).tolist(), strict=True))
        name = f"{tensor.name}[{part.label}]" if part.label else tensor.name
        needed = needed_gain(tensor, follower)
        found = row["rms"] * math.sqrt(part.fan_in)
        yield LayerGain(name, tensor, part, position, follower, row["rms"], row["std"], found, needed)


def needed_gain(tensor: ModelTensor, follower: Follower | None) -> float:
    """The gain of a weight that keeps the second moment of gradients through what follows it, dimensionless.

    1 for what is followed by no activation: a sum, a product, a norm, attention, the output; for gates and projections.
    """
    if follower is None or follower.activation is None or tensor.kind in ("recurrent", "attention"):
        return 1.0
    try:
        return gain(follower.activation)
    except UsageError:  # a flat function has none
        return 1.0
