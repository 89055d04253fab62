"""What the rules of a verdict look at: the flow of a model, the gains of its weights, measured rows, trends."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from initlab.models.dataflow import FlowNode
from initlab.models.fans import ModelTensor, is_readable
from initlab.models.layer_gains import LayerGain, ModelGains, measure_gains
from initlab.models.symbolic_flow import attributes_as_they_were
from initlab.models.traced_flow import TracedFlow
from initlab.models.weight_writer import put_weight
from initlab.probes.probed_modules import find_tensors
from initlab.probes.snapshot import measure
from initlab.verdict.trends import Trend, fit_trend

Loss = Callable[..., Tensor]
FEW_SUMS = 4  # residual sums from which on a network is taken for a residual one


def default_loss(out: Any) -> Tensor:
    """A loss for a model without one: the `loss` that the output holds, else its product with fixed random numbers."""
    own = getattr(out, "loss", None)
    if isinstance(own, Tensor) and own.numel() == 1:
        return own
    total = torch.zeros(())
    generator = torch.Generator().manual_seed(0)
    for _, t in find_tensors(out):
        if t.is_floating_point() and t.requires_grad:
            factor = torch.randn(t.shape, generator=generator).to(t.device, t.dtype)
            total = total.to(t.device) + (t * factor).sum() / math.sqrt(t.numel())
    return total


@dataclass
class NetworkEvidence:
    """A model with a batch, and what was measured of both in one forward and backward pass."""

    model: nn.Module
    x: Any
    y: Any
    loss: Loss
    known: ModelGains
    rows: pd.DataFrame
    layers: dict[str, int]  # dotted names of modules and parameters, and the numbers of their layers
    notes: tuple[str, ...] = ()  # what was not measured, and why

    @property
    def gains(self) -> list[LayerGain]:
        """The gains of the weights, in the order in which they run."""
        return self.known.gains

    @property
    def nodes(self) -> list[FlowNode]:
        """The operations of the pass."""
        return self.known.flow.nodes

    @property
    def eps(self) -> float:
        """The precision of the coarsest number format among the parameters."""
        return max((torch.finfo(p.dtype).eps for p in self.model.parameters() if p.is_floating_point()), default=0.0)

    @property
    def n_layers(self) -> int:
        """The highest number of a layer."""
        return int(self.rows["layer"].max()) if len(self.rows) else 0

    def layer_of(self, name: str) -> int:
        """The number of the layer of a module or parameter, or of the nearest module around it; -1 if it has none."""
        while name:
            inside = [layer for one, layer in self.layers.items() if one.startswith(f"{name}.")]
            if name in self.layers or inside:
                return self.layers.get(name) or min(inside, default=0)
            name = name.rpartition(".")[0]
        return self.layers.get("", -1)

    def select(self, tensor: str, direction: str = "forward") -> pd.DataFrame:
        """The rows of one kind of tensor in one direction, in their order."""
        return self.rows[(self.rows["tensor"] == tensor) & (self.rows["direction"] == direction)]

    @cached_property
    def depths(self) -> dict[tuple[str, str, str, int], int]:
        """How deep each preactivation and each residual sum lies, by tensor, name, part and call.

        Layers on the longest way to it are counted, itself too: towers that stand side by side have the same depths,
        and a layer that is called again lies deeper.
        """
        left = {name: list(depths) for name, depths in self.known.flow.depths().items()}
        rows = self.rows[(self.rows["direction"] == "forward") & self.rows["tensor"].isin(["preactivation", "stream"])]
        found, last = dict[tuple[str, str, str, int], int](), 0
        for key in zip(rows["tensor"], rows["name"], rows["part"], rows["call"], strict=True):
            if key[0] == "preactivation" and left.get(key[1]):
                last = left[key[1]].pop(0)
            found[key] = last
        return found

    def layer_at(self, depth: int) -> int:
        """The number of the first layer of this depth."""
        key = next((key for key, one in self.depths.items() if one == depth and key[0] == "preactivation"), None)
        rows = self.select("preactivation")
        own = rows[(rows["name"] == key[1]) & (rows["part"] == key[2])] if key is not None else rows
        return int(own["layer"].iloc[0]) if len(own) else -1

    def trend(self, direction: str, column: str = "rms") -> Trend:
        """How the preactivations change from layer to layer, or the gradients with respect to them.

        Of a residual network it is the sums that are looked at, which all layers read from and write to.
        """
        sums = sum(key[0] == "stream" for key in self.depths)
        kind = "stream" if sums >= FEW_SUMS and len(self.known.flow.branches) >= FEW_SUMS else "preactivation"
        rows = self.select(kind, direction)
        depth = [self.depths.get((kind, *key), 0) for key in zip(rows["name"], rows["part"], rows["call"], strict=True)]
        rows = rows.assign(depth=depth)
        finite = rows[(rows["n_nan"] + rows["n_inf"]) == 0]
        sizes = finite[column].to_numpy(dtype=float)
        if column == "std_within":  # differences of equal numbers are rounding
            sizes = np.where(sizes > 32 * self.eps * finite["rms"].to_numpy(dtype=float), sizes, 0.0)
        with np.errstate(divide="ignore"):
            return fit_trend(finite["depth"].tolist(), np.log2(sizes).tolist())

    def find_bias(self, gain: LayerGain) -> ModelTensor | None:
        """The bias that is added to what a weight gives."""
        own = (t for t in self.known.tensors if t.kind == "bias" and t.module_name == gain.tensor.module_name)
        return next((t for t in own if is_readable(t.values)), None)

    @cached_property
    def dead_shares(self) -> pd.Series:
        """The largest share of dead units among the activations of each layer, by its number."""
        shares: pd.Series = self.select("activation").groupby("layer")["frac_dead"].max()
        return shares

    @cached_property
    def residual_ends(self) -> list[str]:
        """The dotted names of the layers in which residual branches end."""
        ends = [self.nodes[k].name for _, layers in self.known.flow.branches for k in layers]
        return list(dict.fromkeys(ends))

    def is_residual_end(self, gain: LayerGain) -> bool:
        """Whether a residual branch ends in this weight; of torch's attention that is its output projection."""
        ends = self.residual_ends
        inside = gain.tensor.module_name.endswith(".out_proj") and gain.tensor.module_name[: -len(".out_proj")] in ends
        stacked = isinstance(gain.tensor.module, nn.MultiheadAttention)
        return inside or (not stacked and (gain.tensor.name in ends or gain.tensor.module_name in ends))


def collect_evidence(model: nn.Module, x: Any, y: Any, loss: Loss, formats: Sequence[str] = ()) -> NetworkEvidence:
    """Trace one pass and measure one, neither of which leaves a trace; `formats`: as for `measure`."""
    with attributes_as_they_were(model):  # what a pass keeps, such as a cache, is not for the next one
        flow = TracedFlow(model).record(x, y, loss)
    known = measure_gains(model, flow=flow)
    with attributes_as_they_were(model), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        rows = measure(model, x, y, loss, formats=formats)
    notes = tuple(str(one.message).removeprefix("probe: ") for one in heard if str(one.message).startswith("probe: "))
    notes = tuple(filter(None, (_drop_idle(model, note) for note in notes)))
    layers: dict[str, int] = {}
    own = rows[(rows["direction"] == "forward") & rows["tensor"].isin(["weight", "preactivation", "norm", "embedding"])]
    for name, part, layer in zip(own["name"], own["part"], own["layer"], strict=True):
        layers.setdefault(name, int(layer))
        layers.setdefault(f"{name}.{part}" if name else part, int(layer))
    return NetworkEvidence(model, x, y, loss, known, rows, layers, notes)


def _drop_idle(model: nn.Module, note: str) -> str:
    """A note on modules that were not called, without those that have no parameters; others as they are."""
    text, _, names = note.partition("never called in a recorded step: ")
    if text or not names:
        return note
    modules = dict(model.named_modules())
    kept = [name for name in names.split(", ") if name not in modules or any(True for _ in modules[name].parameters())]
    return f"never called: {', '.join(kept)}" if kept else ""


@contextmanager
def changed_parameters(values: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Within the block parameters have other values; their own memory is not touched and comes back after it."""
    kept = [(p, p.data) for p, _ in values]
    try:
        for p, value in values:
            p.data = value
        yield
    finally:
        for p, data in reversed(kept):
            p.data = data


@contextmanager
def changed_weights(model: nn.Module, values: Iterable[tuple[ModelTensor, Tensor]]) -> Iterator[None]:
    """Within the block tensors of a model have other values, those that are computed through what they come from."""
    new = list(values)
    sources = [(p, p.detach().clone()) for tensor, _ in new for p in tensor.sources]
    with changed_parameters(sources), attributes_as_they_were(model):
        with torch.no_grad():
            for tensor, value in new:
                put_weight(tensor, value)
        yield
