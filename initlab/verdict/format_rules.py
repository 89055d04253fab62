"""Rules about number formats: what a network would lose in them, and the loss scale that saves its gradients."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from initlab.stats.format_shares import find_power
from initlab.verdict.finding import Finding
from initlab.verdict.rules import OVERFLOW, UNDERFLOW, WARNING


def judge_formats(rows: pd.DataFrame, names: Sequence[str]) -> Iterator[Finding]:
    """For each format the first tensor that it would overflow, and the gradients that it would take for 0.

    rows: of `measure` with these formats. names: of FORMATS.
    """
    for name in names:
        forward = rows[(rows["direction"] == "forward") & (rows[f"{name}_overflow"] > OVERFLOW)]
        if len(forward):
            row = forward.iloc[0]
            place = (int(row["layer"]), str(row["name"]), str(row["tensor"]), "forward")
            cause = f"{row[f'{name}_overflow']:.2g} of its entries are beyond the largest number of {name}"
            remedy = f"keep it in float32, or make it smaller: its largest number is {_find_largest(row):.3g}"
            yield Finding("number-format", WARNING, *place, cause, remedy, {"format": name})
        backward = rows[(rows["direction"] == "backward") & (rows[f"{name}_underflow"] > UNDERFLOW)]
        if len(backward):
            row = backward.loc[backward[f"{name}_underflow"].idxmax()]
            largest = max(_find_largest(one) for _, one in rows[rows["direction"] == "backward"].iterrows())
            scale = find_power(name, largest) if 0 < largest < math.inf else 0
            place = (int(row["layer"]), str(row["name"]), str(row["tensor"]), "backward")
            share, more = row[f"{name}_underflow"], len(backward) - 1
            cause = f"{share:.1%} of its gradient is 0 in {name}, and much of {more} tensors more"
            remedy = f"multiply the loss by at most 2^{scale} (a GradScaler), the largest scale that overflows nothing"
            yield Finding("number-format", WARNING, *place, cause, remedy, {"format": name, "log2_scale": scale})


def _find_largest(row: pd.Series) -> float:
    return float(np.nanmax([abs(row["min"]), abs(row["max"])]))
