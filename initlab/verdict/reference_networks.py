"""What healthy means for any architecture: the same one with weights drawn by the right rule, several times."""

import math
import warnings
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from initlab.models.fans import ModelTensor
from initlab.models.layer_gains import LayerGain
from initlab.probes.snapshot import measure
from initlab.verdict.evidence import NetworkEvidence, changed_weights
from initlab.verdict.rules import NETWORKS
from initlab.verdict.stacked_networks import KEYS, RowTensor, find_taps, measure_stacked
from initlab.verdict.trends import Trend

KINDS = (("forward", "rms"), ("forward", "std_within"), ("backward", "rms"))


class Reference:
    """`NETWORKS` networks of the model's architecture under the right rule: their trends, and the sizes of layers."""

    def __init__(self, evidence: NetworkEvidence) -> None:
        self._evidence = evidence

    @cached_property
    def frames(self) -> list[pd.DataFrame]:
        """The rows of preactivations and residual sums of each network."""
        return measure_networks(self._evidence)

    @cached_property
    def _trend_table(self) -> dict[tuple[str, str], list[Trend]]:
        e = self._evidence
        own = [NetworkEvidence(e.model, e.x, e.y, e.loss, e.known, rows, e.layers) for rows in self.frames]
        return {kind: [one.trend(*kind) for one in own] for kind in KINDS}

    def trend(self, direction: str, column: str) -> tuple[float, float]:
        """Mean and standard deviation over the networks of octaves a layer."""
        rates = [one.rate for one in self._trend_table[direction, column]]
        return float(np.mean(rates)), float(np.std(rates, ddof=1))

    def bands(self) -> pd.DataFrame:
        """What 95 % of such networks have, by normal log2(rms): a row per tensor as in the table `theory`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            octaves = np.log2([rows["rms"].to_numpy(dtype=float) for rows in self.frames])
            middle, spread = octaves.mean(0), octaves.std(0, ddof=1)
        bands = self.frames[0][["layer", "direction", *KEYS]].assign(statistic="rms", predicted=2.0**middle)
        low, high = 2.0 ** (middle - 1.96 * spread), 2.0 ** (middle + 1.96 * spread)
        return bands.assign(band_low=low, band_high=high, method="reference")


def measure_networks(e: NetworkEvidence, stacked: bool = True) -> list[pd.DataFrame]:
    """The rows of preactivations and residual sums of `NETWORKS` networks under the right rule.

    stacked: all in one pass where the model allows it, which is asked by comparison with the first; else one by one.
    """
    with warnings.catch_warnings(action="ignore"):
        frames, taps, states = list[pd.DataFrame](), list[RowTensor](), list[dict[str, Tensor]]()
        for seed in range(int(NETWORKS)):
            with changed_weights(e.model, draw_parameters(e, torch.Generator().manual_seed(seed))):
                if not stacked or not taps:
                    rows = measure(e.model, e.x, e.y, e.loss)
                    frames.append(rows[rows["tensor"].isin(["preactivation", "stream"])])
                try:
                    taps = taps or (find_taps(e, frames[0]) if stacked else [])
                except Exception:  # what runs in a model of the user's may raise anything; it is measured alone then
                    stacked = False
                if stacked:
                    named = [*e.model.named_parameters(), *e.model.named_buffers()]
                    states.append({name: value.detach().clone() for name, value in named})
        if not stacked:
            return frames
        try:
            return measure_stacked(e, frames[0], taps, states)
        except Exception:  # of functional_call, of vmap, or of the model under them
            return measure_networks(e, stacked=False)


def right_std(evidence: NetworkEvidence, gain: LayerGain) -> float:
    """The standard deviation of weights that the layer needs: that of residual branches falls with their number."""
    branches = max(1, len(evidence.known.flow.branches))
    share = 1 / math.sqrt(branches) if evidence.is_residual_end(gain) else 1.0
    return share * gain.needed / math.sqrt(gain.part.fan_in)


def draw_parameters(evidence: NetworkEvidence, generator: torch.Generator) -> Iterator[tuple[ModelTensor, Tensor]]:
    """New values: normal weights of the right size, biases 0, norms 1; tables and the rest as they are."""
    of_tensors: dict[str, list[LayerGain]] = {}
    for gain in evidence.gains:
        of_tensors.setdefault(gain.tensor.name, []).append(gain)
    for tensor in evidence.known.tensors:
        values = tensor.values
        if tensor.computed is not None and tensor.computed.is_estimated:
            continue
        if tensor.kind in ("bias", "norm"):
            yield tensor, torch.full_like(values, float(tensor.kind == "norm"))
        elif tensor.name in of_tensors:
            new = torch.randn(values.shape, generator=generator).to(values.device, values.dtype)
            for gain in of_tensors[tensor.name]:
                part = gain.part
                new.narrow(tensor.axis, part.start, part.stop - part.start).mul_(right_std(evidence, gain))
            yield tensor, new
