"""The table `theory` -> how many layers keep to their band, and the lines that figures draw."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from initlab.stats.keys import KEY_COLUMNS
from initlab.theory.quantiles import WIDE

NEEDED = [*KEY_COLUMNS, "label", "statistic", "predicted", "band_low", "band_high", "z", "method"]
MEANING = "std, mean over the networks"


def _rows(theory: pd.DataFrame, direction: str) -> pd.DataFrame:
    """Rows of std in the stack, or of a run that only trained: in its step 0, where gradients come from the loss."""
    rows = theory[(theory["statistic"] == "std") & (theory["direction"] == direction) & (theory["layer"] > 0)]
    stack = rows[(rows["stage"] == "stack") & (rows["tensor"] == "activation")]
    if len(stack):
        return stack
    return rows[(rows["implementation"] == "scratch") & (rows["tensor"] == "preactivation")]


def count_in_band(theory: pd.DataFrame, direction: str = "forward") -> dict[str, str]:
    """Per label how many layers' mean over the ensemble is within the 95 % band: '49 of 50'; needs `label`.

    A layer that is not finite is not within. Runs of one label are one ensemble: their z add up like those of networks.
    """
    found = {}
    for label, rows in _rows(theory, direction).groupby("label", observed=True):
        whole = rows[rows["seed"] < 0]
        z = whole.groupby("layer")["z"].agg(lambda z: z.mean(skipna=False) * np.sqrt(len(z)))
        outside = ", outside its range" if whole["method"].astype(str).str.contains("outside").any() else ""
        found[str(label)] = f"{int((z.abs() <= WIDE).sum())} of {len(z)}{outside}"
    return found


def lines(theory: pd.DataFrame, direction: str) -> pd.DataFrame:
    """Per label and layer of the stack: `predicted`, `low` and `high` of one network's std."""
    rows = _rows(theory[(theory["stage"] == "stack") & (theory["seed"] >= 0)], direction)
    return _bands(rows, ["label", "layer"])


def start(theory: pd.DataFrame, statistic: str) -> pd.DataFrame:
    """Per layer of a training the preactivations' `predicted`, `low` and `high` of one network at step 0."""
    rows = theory[(theory["stage"] == "train") & (theory["implementation"] == "scratch") & (theory["seed"] >= 0)]
    rows = rows[(rows["tensor"] == "preactivation") & (rows["direction"] == "forward")]
    return _bands(rows[rows["statistic"] == statistic], ["layer"])


def _bands(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    names = {"band_low": "low", "band_high": "high"}
    return rows.drop_duplicates(keys)[[*keys, "predicted", *names]].rename(columns=names).sort_values(keys)


def sentence(count: str) -> str:
    """'49 of 50' as a sentence; what stands after a comma is a reservation."""
    kept, _, reservation = count.partition(", ")
    hint = f", {reservation}: theory=simulation knows more" if reservation else ""
    return f"theory: {kept} layers within the 95 % band{hint}"


def describe(found: Sequence[str]) -> str:
    """The line beneath the short table."""
    if len(found) == 1:
        return f"{sentence(found[0])} ({MEANING})"
    hint = "; outside its range theory=simulation knows more" if any("," in one for one in found) else ""
    return f"theory: layers within the 95 % band ({MEANING}){hint}"
