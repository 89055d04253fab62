"""The numbers behind the walk through the layers: the table `stats`, thinned until it fits into a page, as lists.

Each view is a stage of a setting. Its tensors have a list per statistic, over the steps and inside them the layers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from initlab.runs.schema import HISTOGRAMS, STATS
from initlab.stats.statistics import STATISTICS

LEFT_OUT = ("rms", "q", "std_within")  # near others
# Column -> what it is called. Shares are made of those counts that are rarely anything but 0.
SHOWN = {
    name: name.replace("frac_", "share ")
    for name, row in STATISTICS.items()
    if not row.is_count and name not in LEFT_OUT
}
SHOWN |= {"subnormal": "share subnormal", "nonfinite": "share nan or inf"}
EXTREME = {"min": "min", "max": "max"}  # taken over the networks; of all others the median is
BINS = 40  # numbers that a histogram takes, about
LEAST = 3  # steps, and layers, that are left of each view: the first, the middle, the last
STAGES = {"stack": "the stack", "train": "the training", "probe": "the network"}


def thin(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the values, evenly spaced, the first and the last among them."""
    places = np.linspace(0, len(values) - 1, max(1, min(most, len(values)))).round().astype(int)
    return [values[k] for k in np.unique(places)]


def name_tensor(tensor: str, direction: str) -> str:
    return tensor if direction == "forward" else f"gradient of the {tensor}"


def plain_numbers(values: np.ndarray) -> list[Any]:
    """Numbers of three digits; None where there is none; a single one where all are equal."""
    found = [float(f"{value:.3g}") if math.isfinite(value) else None for value in values.tolist()]
    found = [int(value) if value is not None and value == int(value) and abs(value) < 1e6 else value for value in found]
    return found[:1] if found and all(value == found[0] for value in found) else found


def collect_views(tables: Mapping[str, pd.DataFrame], most: int) -> list[dict[str, Any]]:
    """The views of all settings, with about `most` numbers in all; needs `label`; of two trainings one."""
    if STATS not in tables:
        return []
    stages = tables[STATS].groupby(["label", "stage"], observed=True, sort=False)
    every, views = tables.get(HISTOGRAMS, pd.DataFrame()), []
    for (label, stage), rows in stages:
        bins = every[(every["label"] == label) & (every["stage"] == stage)] if len(every) else every
        views.append(collect_view(str(label), str(stage), rows, bins, most // stages.ngroups))
    return views


def collect_view(label: str, stage: str, rows: pd.DataFrame, bins: pd.DataFrame, most: int) -> dict[str, Any]:
    """One view, see `collect_views`."""
    steps, layers = (sorted(rows[name].unique().tolist()) for name in ("step", "layer"))
    keys = rows[["tensor", "direction"]].drop_duplicates()
    each = len(keys) * (len(SHOWN) + (BINS if len(bins) else 0))
    kept_steps = thin(steps, max(LEAST, most // (each * len(layers))))
    kept_layers = thin(layers, max(LEAST, most // (each * len(kept_steps))))
    for name, every, kept in (("step", steps, kept_steps), ("layer", layers, kept_layers)):
        if len(kept) < len(every):
            rows, bins = (frame[frame[name].isin(kept)] if len(frame) else frame for frame in (rows, bins))
    rows = rows.assign(
        subnormal=rows["n_subnormal"] / rows["count"], nonfinite=(rows["n_nan"] + rows["n_inf"]) / rows["count"]
    )
    grid = pd.MultiIndex.from_product([kept_steps, kept_layers], names=["step", "layer"])
    tensors = []
    for (tensor, direction), mine in rows.groupby(["tensor", "direction"], observed=True, sort=False):
        values = mine[list(SHOWN)].astype(float)
        values = values.fillna(np.inf).assign(**{name: values[name] for name in EXTREME})
        how = {name: EXTREME.get(name, "median") for name in SHOWN}
        found = values.groupby([mine["step"], mine["layer"]]).agg(how).reindex(grid)
        numbers = {name: plain_numbers(found[name].to_numpy()) for name in SHOWN}
        one = {
            "name": name_tensor(str(tensor), str(direction)),
            "layers": sorted(mine["layer"].unique().tolist()),
            "values": {name: column for name, column in numbers.items() if column != [None]},
        }
        if len(bins):
            chosen = bins[(bins["tensor"] == tensor) & (bins["direction"] == direction)]
            one["histograms"] = collect_histograms(chosen, grid)
        tensors.append(one)
    thinned = []
    for name, every, kept in (("steps", steps, kept_steps), ("layers", layers, kept_layers)):
        if len(kept) < len(every):
            thinned.append(f"{len(kept)} of {len(every)} {name}")
    return {
        "label": label, "stage": stage, "title": STAGES.get(stage, stage), "networks": int(rows["seed"].nunique()),
        "steps": kept_steps, "layers": kept_layers, "thinned": " and ".join(thinned), "tensors": tensors,
    }  # fmt: skip


def collect_histograms(bins: pd.DataFrame, grid: pd.MultiIndex) -> list[Any]:
    """For each step and layer the octave of the first bin and the shares of the entries in percent, all networks."""
    found: list[Any] = [None] * len(grid)
    for key, rows in bins.groupby(["step", "layer"], observed=True, sort=False):
        rows = rows[rows["positive"].map(len) > 0]
        if not len(rows):
            continue
        first = int(rows["first"].min())
        counts = np.zeros(int((rows["first"] + rows["positive"].map(len)).max()) - first)
        for start, positive, negative in rows[["first", "positive", "negative"]].itertuples(index=False):
            counts[start - first : start - first + len(positive)] += np.add(positive, negative)
        shares = (100 * counts / counts.sum()).tolist()
        found[grid.get_loc(key)] = [first, [float(f"{share:.2g}") for share in shares]]
    return found


def value_at(one: Mapping[str, Any], name: str, place: int) -> float | None:
    """A number of a tensor of a view; nan where entries are not finite, None where the statistic has no meaning."""
    column = one["values"].get(name, [None])
    found = column[0] if len(column) == 1 else column[place]
    if found is None and name != "nonfinite":
        return math.nan if value_at(one, "nonfinite", place) else None
    return None if found is None else float(found)
