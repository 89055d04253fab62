"""Layer-sequential unit variance (Mishkin & Matas 2015, algorithm 1): weights scaled by what the data make of them.

Layer by layer, the first one first: while the variance of the preactivations over the batch and the units is further
than `tolerance` from 1, and attempts are left, the weights are divided by the standard deviation. Each network of an
ensemble by itself. Knows neither how weights are drawn nor how layers are multiplied.
Legend: E ensemble, N batch, I fan_in, O fan_out, L layers.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from initlab.nn.activations import Activation
from initlab.nn.init import Rule
from initlab.stats.statistics import STATISTICS
from initlab.stats.summarize import derive, summarize

Layer = tuple[Tensor, Tensor | None]
Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]

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


class Fit:
    """What the data have made of an ensemble: factors of its layers, and how each came about."""

    def __init__(self, rules: Sequence[Rule], seeds: Sequence[int], device: torch.device) -> None:
        self.rules, self.seeds = rules, seeds
        self.factors: list[Tensor] = []  # (E,) float64 of every layer
        self._attempts = torch.tensor([one.attempts for one in rules], device=device)
        self._tolerance = torch.tensor([one.tolerance for one in rules], dtype=torch.float64, device=device)
        self._rows: list[_Row] = []

    def run(self, layers: Iterable[Layer], x: Tensor, phi: Activation, forward: Forward) -> "Fit":
        """Scale all layers; x (E, N, I) enters the first, `forward(x, w, b)` gives (E, N, O). Logs who gave up."""
        for w, b in layers:
            z = self._scale(len(self.factors) + 1, x, w, b, forward)
            x = phi.phi(z)
        for reason, words in GIVEN_UP.items():
            gone = [row for row in self._rows if row.outcome == reason]
            if gone:
                who = sorted({self.seeds[row.network] for row in gone})
                logging.getLogger(__name__).warning(
                    "lsuv gives up at layer %s: %s; so in %s of %s networks, first seed %s",
                    gone[0].layer, words, len(who), len(self.seeds), who[0],
                )  # fmt: skip
        return self

    def scaled(self, layer: int, w: Tensor, who: Sequence[int] | None = None) -> Tensor:
        """The weights (E, I, O) of a layer times its factors: of all networks, or of some."""
        factor = self.factors[layer - 1] if who is None else self.factors[layer - 1][list(who)]
        return _times(w, factor)

    def frame(self, columns: Mapping[str, pd.Categorical | np.ndarray] | None = None) -> pd.DataFrame:
        """A row per layer, attempt and network: std of the preactivations before it, factor after it, what came of it.

        Attempt 0 is what was drawn. The outcome is `scaled` until it is `fits` or one of GIVEN_UP. `columns`: in what
        else than their seeds the networks differ, a value for each.
        """
        found = pd.DataFrame(self._rows, columns=list(_Row._fields))
        network = found.pop("network").to_numpy(int)
        own = {"seed": np.array(self.seeds), **(columns or {})}
        words = {"outcome": found["outcome"].astype("category")}
        return found.assign(**words, **{name: each[network] for name, each in own.items()})

    def _scale(self, layer: int, x: Tensor, w: Tensor, b: Tensor | None, forward: Forward) -> Tensor:
        """The preactivations of a layer, its weights scaled as its data want it."""
        factor = torch.ones(len(w), dtype=torch.float64, device=w.device)
        running = self._attempts > 0
        z = forward(x, w, b)
        attempt = 0
        while bool(running.any()):
            found = derive(summarize(z))
            std, lost = found[_STD], found[_N_NAN] + found[_N_INF] > 0
            outcomes = {
                "not finite": lost | ~std.isfinite(),
                "zero": std == 0,
                FITS: (std.square() - 1).abs() < self._tolerance,
                "attempts": self._attempts <= attempt,
            }
            before, running = running, running & ~torch.stack(list(outcomes.values())).any(0)
            factor = torch.where(running, factor / std, factor)
            self._note(layer, attempt, before, std, factor, outcomes)
            if bool(running.any()):
                z = forward(x, _times(w, factor), b)
            attempt += 1
        self.factors.append(factor)
        return z

    def _note(
        self, layer: int, attempt: int, who: Tensor, std: Tensor, factor: Tensor, outcomes: dict[str, Tensor]
    ) -> None:
        told = {name: values.tolist() for name, values in outcomes.items()}
        for k, (s, f) in enumerate(zip(std.tolist(), factor.tolist(), strict=True)):
            if bool(who[k]):
                outcome = next((name for name, values in told.items() if values[k]), SCALED)
                self._rows.append(_Row(layer, attempt, k, s, f, outcome))


def _times(w: Tensor, factor: Tensor) -> Tensor:
    """In float64, rounded once; weights whose factor is 1 stay what they are."""
    return (w.double() * factor[:, None, None]).to(w.dtype)


def fit(
    rules: Sequence[Rule],
    seeds: Sequence[int],
    layers: Iterable[Layer],
    x: Tensor,
    phi: Activation,
    forward: Forward,
) -> Fit | None:
    """The fit of an ensemble, a rule and a seed for each network; None where no rule asks for one."""
    if not any(one.attempts for one in rules):
        return None
    return Fit(rules, seeds, x.device).run(layers, x, phi, forward)
