"""The numbers behind the walk through the layers: the table `stats`, thinned until it fits into a page, as lists.

Each view is a stage of a setting. Its tensors have a list per statistic, over the steps and inside them the layers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
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
    if not len(tables.get(STATS, ())):
        return []
    stats, bins = tables[STATS], tables.get(HISTOGRAMS, pd.DataFrame())
    stages = stats.groupby(["label", "stage"], observed=True, sort=False)
    views: list[dict[str, Any]] = []
    kept = []
    step, layer = stats["step"].to_numpy(), stats["layer"].to_numpy()
    tensor = stats.groupby(["tensor", "direction"], observed=True, sort=False).ngroup().to_numpy()
    for (label, stage), places in stages.indices.items():
        each = len(np.unique(tensor[places])) * (len(SHOWN) + (BINS if len(bins) else 0))
        steps, layers = np.unique(step[places]).tolist(), np.unique(layer[places]).tolist()
        share = most // len(stages.indices)
        some_steps = thin(steps, max(LEAST, share // (each * len(layers))))
        some_layers = thin(layers, max(LEAST, share // (each * len(some_steps))))
        kept.append(places[np.isin(step[places], some_steps) & np.isin(layer[places], some_layers)])
        pairs = (("steps", steps, some_steps), ("layers", layers, some_layers))
        thinned = [f"{len(some)} of {len(every)} {name}" for name, every, some in pairs if len(some) < len(every)]
        networks = stats["seed"].to_numpy()[places]
        views.append({
            "label": str(label), "stage": str(stage), "title": STAGES.get(str(stage), str(stage)),
            "networks": len(np.unique(networks)), "steps": some_steps, "layers": some_layers,
            "thinned": " and ".join(thinned), "tensors": [],
        })  # fmt: skip
    by_name: dict[tuple[str, ...], dict[str, Any]] = {(view["label"], view["stage"]): view for view in views}
    for name, rows in take_medians(stats.iloc[np.concatenate(kept)]):
        fill_view(by_name[name[:2]], name[2:], rows, bins)
    return views


def take_medians(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Over the networks, for each label, stage, tensor and direction: a row per step and layer; nan ranks above all.

    Each row is its step, its layer and the numbers of SHOWN.
    """
    lost = rows["n_nan"] + rows["n_inf"]
    values = rows.assign(subnormal=rows["n_subnormal"] / rows["count"], nonfinite=lost / rows["count"])
    values = values[list(SHOWN)].astype(float)
    values = values.fillna(np.inf).assign(**{name: values[name] for name in EXTREME})
    keys = [rows[name] for name in ("label", "stage", "tensor", "direction")]
    grouped = values.groupby([*keys, rows["step"], rows["layer"]], observed=True, sort=False)
    found = grouped.agg({name: EXTREME.get(name, "median") for name in SHOWN}).reset_index()
    numbers = found[["step", "layer", *SHOWN]].to_numpy(dtype=float)
    for name, mine in found.groupby(
        ["label", "stage", "tensor", "direction"], observed=True, sort=False
    ).indices.items():
        yield tuple(map(str, name)), numbers[mine]


def fill_view(view: dict[str, Any], key: tuple[str, ...], rows: np.ndarray, bins: pd.DataFrame) -> None:
    """Add one tensor to a view: its statistics (rows of `take_medians`), and its histograms where there are any."""
    steps, layers = view["steps"], view["layers"]
    place = np.searchsorted(steps, rows[:, 0]) * len(layers) + np.searchsorted(layers, rows[:, 1])
    grid = np.full((len(steps) * len(layers), len(SHOWN)), np.nan)
    grid[place] = rows[:, 2:]
    numbers = {name: plain_numbers(column) for name, column in zip(SHOWN, grid.T, strict=True)}
    one = {
        "name": name_tensor(*key),
        "layers": np.unique(rows[:, 1].astype(int)).tolist(),
        "values": {name: column for name, column in numbers.items() if column != [None]},
    }
    if len(bins):
        mine = (bins["label"] == view["label"]) & (bins["stage"] == view["stage"])
        mine &= (bins["tensor"] == key[0]) & (bins["direction"] == key[1])
        mine &= bins["step"].isin(steps) & bins["layer"].isin(layers)
        if mine.any():  # of a stack none are recorded
            one["histograms"] = collect_histograms(bins[mine], pd.MultiIndex.from_product([steps, layers]))
    view["tensors"].append(one)


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
