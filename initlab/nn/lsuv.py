"""Layer-sequential unit variance (Mishkin & Matas 2015, algorithm 1): weights scaled by what the data make of them.

Layer by layer, the first one first: while the variance of the preactivations over the batch and the units is further
than `tolerance` from 1, and attempts are left, the weights are divided by the standard deviation. Each network of an
ensemble by itself. Legend: E ensemble, N batch, I fan_in, O fan_out, L layers.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from initlab.nn.init import Rule
from initlab.nn.network import Network, Plain, Weights, forward
from initlab.stats.measure import backend_for
from initlab.stats.statistics import STATISTICS
from initlab.stats.summarize import derive

FITS, SCALED = "fits", "scaled"
GIVEN_UP = {
    "zero": "all preactivations are equal, there is nothing to scale",
    "not finite": "preactivations are not finite",
    "attempts": "no attempt is left",
}
_STD, _N_NAN, _N_INF = (list(STATISTICS).index(name) for name in ("std", "n_nan", "n_inf"))


class _Row(NamedTuple):
    layer: int
    attempt: int
    network: int
    std: float
    factor: float
    outcome: str


class Fit(Plain):
    """What the data have made of an ensemble: factors of its layers, and how each came about.

    It is the arithmetic of the pass that fits: its linear map scales the weights of the layer that it multiplies.
    """

    def __init__(self, rules: Sequence[Rule], seeds: Sequence[int], device: torch.device) -> None:
        self.seeds = seeds
        self.factors: list[Tensor] = []  # (E,) float64 of every layer
        self._attempts = torch.tensor([one.attempts for one in rules], device=device)
        self._tolerance = torch.tensor([one.tolerance for one in rules], dtype=torch.float64, device=device)
        self._rows: list[_Row] = []

    def linear(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        """The preactivations of the next layer, its weights scaled as its data want it."""
        factor = torch.ones(len(w), dtype=torch.float64, device=w.device)
        running = self._attempts > 0
        z = super().linear(x, w, b)
        attempt = 0
        while bool(running.any()):
            found = derive(backend_for(z.device).rows(z))
            std, lost = found[_STD], found[_N_NAN] + found[_N_INF] > 0
            outcomes = {
                "not finite": lost | ~std.isfinite(),
                "zero": std == 0,
                FITS: (std.square() - 1).abs() < self._tolerance,
                "attempts": self._attempts <= attempt,
            }
            before, running = running, running & ~torch.stack(list(outcomes.values())).any(0)
            factor = torch.where(running, factor / std, factor)
            flags = {name: values.tolist() for name, values in outcomes.items()}
            for k, (s, f) in enumerate(zip(std.tolist(), factor.tolist(), strict=True)):
                if bool(before[k]):
                    outcome = next((name for name, values in flags.items() if values[k]), SCALED)
                    self._rows.append(_Row(len(self.factors) + 1, attempt, k, s, f, outcome))
            if bool(running.any()):
                z = super().linear(x, _times(w, factor), b)
            attempt += 1
        self.factors.append(factor)
        return z

    def scale(self, layer: int, w: Tensor, who: Sequence[int] | None = None) -> Tensor:
        """The weights (E, I, O) of a layer times its factors: of all networks, or of those numbered in `who`."""
        factor = self.factors[layer - 1] if who is None else self.factors[layer - 1][list(who)]
        return _times(w, factor)

    def warn(self) -> None:
        """Log at which layer networks were given up, and why."""
        for reason, text in GIVEN_UP.items():
            gone = [row for row in self._rows if row.outcome == reason]
            if gone:
                who = sorted({self.seeds[row.network] for row in gone})
                logging.getLogger(__name__).warning(
                    "lsuv gives up at layer %s: %s; so in %s of %s networks, first seed %s",
                    gone[0].layer, text, len(who), len(self.seeds), who[0],
                )  # fmt: skip

    def frame(self, columns: Mapping[str, pd.Categorical | np.ndarray] | None = None) -> pd.DataFrame:
        """A row per layer, attempt and network: std of the preactivations before it, factor after it, what came of it.

        Attempt 0 is what was drawn. The outcome is `scaled` until it is `fits` or one of GIVEN_UP. `columns`: in what
        else than their seeds the networks differ, a value for each.
        """
        found = pd.DataFrame(self._rows, columns=list(_Row._fields))
        network = found.pop("network").to_numpy(int)
        each = {"seed": np.array(self.seeds), **(columns or {})}
        outcome = {"outcome": found["outcome"].astype("category")}
        return found.assign(**outcome, **{name: values[network] for name, values in each.items()})


def _times(w: Tensor, factor: Tensor) -> Tensor:
    """In float64, rounded once; weights whose factor is 1 stay what they are."""
    return (w.double() * factor[:, None, None]).to(w.dtype)


def fit(rules: Sequence[Rule], seeds: Sequence[int], network: Network, weights: Weights, x: Tensor) -> Fit | None:
    """Fit the weights of an ensemble to a batch; None where no rule asks for it.

    rules, seeds: one of each for every network. network: the architecture. weights: layer -> w (E, I, O) as drawn and
    b (E, O) or None. x: the batch, (E, N, I). Logs which networks were given up, and why.
    Source: Mishkin & Matas 2015, "All you need is a good init", algorithm 1.
    """
    if not any(one.attempts for one in rules):
        return None
    found = Fit(rules, seeds, x.device)
    forward(network, weights, x, lambda layer, z, a: None, found)
    found.warn()
    return found
