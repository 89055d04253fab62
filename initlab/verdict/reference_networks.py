"""What healthy means for any architecture: the same one with weights drawn by the right rule, several times."""

import math
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from initlab.models.fans import ModelTensor
from initlab.models.layer_gains import LayerGain
from initlab.probes.snapshot import measure
from initlab.verdict.evidence import NetworkEvidence, changed_weights
from initlab.verdict.rules import NETWORKS
from initlab.verdict.trends import Trend


class Reference:
    """The trends of `NETWORKS` networks of the model's architecture under the right rule."""

    def __init__(self, evidence: NetworkEvidence) -> None:
        self._evidence = evidence
        self._trends: dict[tuple[str, str], list[Trend]] | None = None

    def trend(self, direction: str, column: str) -> tuple[float, float]:
        """Mean and standard deviation over the networks of octaves a layer."""
        if self._trends is None:
            self._trends = self._measure()
        rates = [one.rate for one in self._trends[direction, column]]
        return float(np.mean(rates)), float(np.std(rates, ddof=1))

    def _measure(self) -> dict[tuple[str, str], list[Trend]]:
        e = self._evidence
        kinds = (("forward", "rms"), ("forward", "std_within"), ("backward", "rms"))
        found: dict[tuple[str, str], list[Trend]] = {kind: [] for kind in kinds}
        for seed in range(int(NETWORKS)):
            drawn = draw_parameters(e, torch.Generator().manual_seed(seed))
            with changed_weights(e.model, drawn), warnings.catch_warnings(action="ignore"):
                rows = measure(e.model, e.x, e.y, e.loss)
            one = NetworkEvidence(e.model, e.x, e.y, e.loss, e.known, rows, e.layers)
            for direction, column in kinds:
                found[direction, column].append(one.trend(direction, column))
        return found


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
