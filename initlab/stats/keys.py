"""The words of rows as columns of a tidy frame: which tensor each row is about, and what one row says of another.

Knows nothing of tensors. Legend: E networks of an ensemble.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

WORDS = ("stage", "implementation", "tensor", "direction", "name", "part")  # the columns that repeat few of them


class Spot(NamedTuple):
    """Which tensor of a network a row is about, whatever the step; the words stand in the README's glossary."""

    stage: str
    implementation: str
    layer: int
    tensor: str
    direction: str
    name: str = ""  # dotted name of the module
    part: str = ""  # name of the parameter, or the path in a module's nested output
    call: int = 0  # how often the module had been called in this step


def key_columns(
    spots: list[Spot], code: np.ndarray, steps: np.ndarray, seeds: Sequence[int]
) -> dict[str, np.ndarray | pd.Categorical]:
    """The words of the rows, a column each in the order of the table; the seed runs fastest."""
    repeated = np.repeat(code, len(seeds))
    columns: dict[str, np.ndarray | pd.Categorical] = {}
    for name in ("stage", "implementation", "seed", "step", "layer", "tensor", "direction", "name", "part", "call"):
        if name == "seed":
            columns[name] = np.tile(np.asarray(seeds, dtype=np.int64), len(code))
        elif name == "step":
            columns[name] = np.repeat(steps, len(seeds))
        elif name in WORDS:
            codes, found = pd.factorize(np.array([getattr(spot, name) for spot in spots], dtype=object))
            columns[name] = pd.Categorical.from_codes(codes[repeated], list(found))
        else:
            columns[name] = np.array([getattr(spot, name) for spot in spots], dtype=np.int64)[repeated]
    return columns


def update_ratio(spots: list[Spot], code: np.ndarray, steps: np.ndarray, rms: np.ndarray) -> np.ndarray:
    """rms(update) / rms(weight) of the same step on rows of updates, nan elsewhere, (rows, E)."""
    ratio = np.full(rms.shape, np.nan)
    weights = {
        spot: place for place, spot in enumerate(spots) if (spot.tensor, spot.direction) == ("weight", "forward")
    }
    partner = {
        place: weights[spot._replace(tensor="weight")]
        for place, spot in enumerate(spots)
        if spot.tensor == "update" and spot._replace(tensor="weight") in weights
    }
    partner_of = np.full(len(spots) + 1, -1)
    partner_of[list(partner)] = list(partner.values())
    keys = np.unique(steps, return_inverse=True)[1] * len(spots)
    weight = np.flatnonzero(np.isin(code, list(weights.values())))
    update = np.flatnonzero(partner_of[code] >= 0)
    if len(weight) and len(update):
        order = np.argsort((keys + code)[weight], kind="stable")
        found, sought = (keys + code)[weight][order], (keys + partner_of[code])[update]
        at = np.searchsorted(found, sought, side="right") - 1  # of several the last
        met = (at >= 0) & (found[at] == sought)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio[update[met]] = rms[update[met]] / rms[weight[order[at[met]]]]
    return ratio
