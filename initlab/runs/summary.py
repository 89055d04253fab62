"""Frames of one run or of many -> the short table that a run prints, and where each signal died.

Takes frames alone; a frame without the column `run` is one run.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from initlab.errors import UsageError
from initlab.runs import theory_rows
from initlab.runs.labels import add_labels, format_folders, label_columns, labels
from initlab.runs.schema import LOSSES, OPTION_OF, PARITY, STATS, THEORY, refuse_other_table
from initlab.stats.dtypes import FORMATS
from initlab.terminal import wrap_columns

# What the two backward passes are held to at the default shape; the table says where it is passed.
PARITY_LIMIT = {name: row.tolerance for name, row in FORMATS.items() if row.eps <= FORMATS["float32"].eps}
ENDS = {"nonfinite": "not finite", "zero": "exactly 0"}  # how a signal dies, in words
# Columns of what a stack has not: how its settings are trained, in which folder, and how often that is recorded.
OF_TRAINING = {name for name, option in OPTION_OF.items() if option.startswith("train.")} | {"data", "run", "every"}
PARTED = 0.01  # share by which the losses of two trainings differ that are said to part
ROUNDING = 1e-3  # of gradients at equal weights: a rule that is wrong differs by more


def merge_trainings(stats: pd.DataFrame) -> dict[str, str]:
    """Each label of the stack's rows -> the label that settings share which differ in their training alone.

    Rows of such settings are the same networks, bit for bit; where they are not, every label stays what it is.
    """
    rows = stats[stats["stage"] == "stack"]
    same = {str(label): str(label) for label in rows["label"].unique()}
    if not len(rows) or not {"init", "activation"} <= set(rows):
        return same
    merged = labels(rows.drop(columns=[name for name in OF_TRAINING if name in rows]))
    keys = [merged, *(rows[name] for name in ("seed", "layer", "tensor", "direction"))]
    joins = len(set(merged)) < len(same)
    if joins and rows.groupby(keys, observed=True)["std"].nunique(dropna=False).max() > 1:
        return same
    return dict(zip(rows["label"].astype(str), np.asarray(merged).astype(str), strict=True))


def stack_signal(stats: pd.DataFrame, direction: str = "forward") -> pd.DataFrame:
    """The stack's activations, or the gradients with respect to them, in network order.

    A network whose values die has no gradient that means anything: nan and inf take part in it. That of a linear stack
    does not hang on the values.
    """
    rows = stats[(stats["stage"] == "stack") & (stats["tensor"] == "activation")]
    if direction == "backward":
        dead = (rows["direction"] == "forward") & ((rows["n_nan"] + rows["n_inf"] > 0) | (rows["frac_zero"] == 1))
        dead &= theory_rows.needs_values(rows)
        if dead.any():
            names = [name for name in ("label", "run", "seed") if name in rows]
            rows = rows[~dead.groupby([rows[name].astype(str) for name in names]).transform("any")]
    return rows[rows["direction"] == direction].sort_values("layer")


def first_dead_layer(stats: pd.DataFrame, direction: str = "forward") -> pd.DataFrame:
    """Per label and seed the first layer, in the direction of travel, that is not finite and that is zero; nan = none.

    A layer is not finite if its activation (backward: the gradient with respect to it) has a nan or an inf. Backward
    the first layer is the deepest. Needs the column `label`.
    """
    rows = stack_signal(stats, direction)
    first = "min" if direction == "forward" else "max"
    nonfinite, zero = rows["n_nan"] + rows["n_inf"] > 0, rows["frac_zero"] == 1
    return first_dead(rows, ["label", "seed"], "layer", first, nonfinite, zero)


def first_dead(
    rows: pd.DataFrame, keys: list[str], along: str, first: str, nonfinite: pd.Series, zero: pd.Series
) -> pd.DataFrame:
    """Per combination of the keys the `first` (min or max) value of `along` in rows that are nonfinite, or zero."""
    places = {kind: rows[along].where(met) for kind, met in zip(ENDS, (nonfinite, zero), strict=True)}
    groups = rows[keys].assign(**places).groupby(keys, observed=True, sort=False)
    return groups[list(ENDS)].agg(first).astype(float).reset_index()


class Fate(NamedTuple):
    """What has become of the signal of an ensemble: where its middle network died, and how many networks died.

    kind: a name of ENDS, or "" while the middle network lives. at: the layer from which on it is dead, nan while it
    lives. along: what `at` counts. died: how many networks died, by kind. networks: how many there are.
    """

    kind: str
    at: float
    along: str
    died: Mapping[str, int]
    networks: int

    @property
    def shares(self) -> str:
        """How many networks died, in brackets; "" where none has, or all have in the one way that is told."""
        counts = [(kind, n) for kind, n in self.died.items() if n and (kind, n) != (self.kind, self.networks)]
        said = [f"{n} of {self.networks} {'networks' if kind == self.kind else ENDS[kind]}" for kind, n in counts]
        return f" ({', '.join(said)})" if said else ""

    def __str__(self) -> str:
        end = f"{ENDS[self.kind]} from {self.along} {self.at:.6g}" if self.kind else "alive"
        return end + self.shares


def find_fate(died: pd.DataFrame, first: str = "min", along: str = "layer") -> Fate:
    """The fate of the middle network, from rows of `first_dead`; first: "max" for a signal that travels downwards.

    The middle is that of `rank_quantiles`: a median is not finite where a half of the networks is not, and 0 where
    more than a half are 0.
    """
    met = {kind: np.sort(died[kind].to_numpy()) for kind in ENDS}  # nan stands last
    layers = {kind: one[: np.count_nonzero(one == one)][:: 1 if first == "min" else -1] for kind, one in met.items()}
    middle = {"nonfinite": (len(died) - 1) // 2, "zero": len(died) // 2}
    counts = {kind: len(found) for kind, found in layers.items()}
    for kind, found in layers.items():
        if len(found) > middle[kind]:
            return Fate(kind, float(found[middle[kind]]), along, counts, len(died))
    return Fate("", math.nan, along, counts, len(died))


def find_fates(died: pd.DataFrame, first: str = "min", along: str = "layer") -> dict[str, Fate]:
    """The fate of each label of `died`; arguments as in `find_fate`."""
    return {str(label): find_fate(rows, first, along) for label, rows in died.groupby("label", observed=True)}


def rank_quantiles(values: np.ndarray, shares: tuple[float, ...] = (0.16, 0.5, 0.84)) -> np.ndarray:
    """Quantiles over the last axis in which a network without a number ranks above all others; nan where one is hit.

    A network that exploded is then neither dropped, which would flatter the rest, nor does it hide them.
    """
    ranks = np.sort(np.where(np.isnan(values), np.inf, values), axis=-1)
    found = []
    for share in shares:
        below, part = divmod(share * (ranks.shape[-1] - 1), 1)
        low, high = ranks[..., int(below)], ranks[..., min(int(below) + 1, ranks.shape[-1] - 1)]
        found.append(low if part == 0 else (1 - part) * low + part * high)
    return np.where(np.isfinite(found), found, np.nan)


def band(frame: pd.DataFrame, along: list[str], value: str) -> pd.DataFrame:
    """Per label and position: median and 16-84 % of the networks, by `rank_quantiles`; needs `label` and `seed`."""
    keys = ["label", *along]
    twice = frame.loc[frame.duplicated([*keys, "seed"]), "label"]
    if len(twice):
        raise UsageError(f"{twice.iloc[0]}: a network has several rows at one {' and '.join(along)}")
    groups = frame.groupby(keys, observed=True)
    places = groups.size().index.to_frame(index=False).astype({"label": str})
    quantiles = np.full((3, len(places)), np.nan)
    order, counts = np.argsort(groups.ngroup().to_numpy(), kind="stable"), groups.size().to_numpy()
    values, starts = frame[value].to_numpy(dtype=float)[order], np.cumsum(counts) - counts
    for n in np.unique(counts):  # as a rule all have as many networks
        mine = counts == n
        quantiles[:, mine] = rank_quantiles(values[starts[mine][:, None] + np.arange(n)])
    return places[[*along, "label"]].assign(**dict(zip(("low", "median", "high"), quantiles, strict=True)))


def end_of_signal(stats: pd.DataFrame, direction: str = "forward") -> dict[str, str]:
    """Per label a few words about the std at the end of the way: the last layer forward, the first backward."""
    signal = stack_signal(stats, direction)
    signal = signal[signal["layer"] > 0]
    last, travel = ("max", "min") if direction == "forward" else ("min", "max")
    ends = signal["layer"] == signal.groupby("label", observed=True)["layer"].transform(last)
    end = band(signal[ends], ["layer"], "std").set_index("label")
    fates = find_fates(first_dead_layer(stats, direction), travel)
    lost = fates if direction == "forward" else find_fates(first_dead_layer(stats))
    found = {}
    for label in lost:
        if label not in end.index:
            if lost[label].kind:  # else no gradient was measured
                found[label] = f"no gradient, the values are {lost[label]}"
            continue
        found[label], row = str(fates[label]), end.loc[label]
        if not fates[label].kind:
            spread = f"({_number(row['low'])} to {_number(row['high'])})"
            found[label] = f"std {_number(row['median'])} at layer {row['layer']:.0f} {spread}{fates[label].shares}"
    return found


def findings(found: Mapping[str, str]) -> str:
    """What is said of every label, or how many met which fate where they are too many for a title."""
    if len(found) <= 4:
        return "; ".join(f"{label}: {said}" for label, said in found.items())
    fates = Counter("alive" if said.startswith("std") else said.split(" from")[0] for said in found.values())
    return f"{len(found)} settings: " + ", ".join(f"{n} {said}" for said, n in fates.most_common())


def loss_difference(losses: pd.DataFrame) -> pd.DataFrame:
    """Per step |by hand - nn.Module| / |nn.Module| of the losses: `median` and `largest` over the networks."""
    wide = losses.pivot(index=["seed", "step"], columns="implementation", values="loss")
    apart = (wide["scratch"] - wide["module"]).abs() / wide["module"].abs()
    return apart.groupby("step").agg(["median", "max"]).rename(columns={"max": "largest"}).reset_index()


def summarize(
    stats: pd.DataFrame,
    losses: pd.DataFrame | None,
    parity: pd.DataFrame | None,
    theory: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """A row per label.

    Mean and std of the last layer (median over seeds, 16-84 % of networks), the signal's fate, whether the layers agree
    with what is predicted, the last loss by hand and by nn.Module (median over seeds), how many networks diverged, the
    largest relative difference of a gradient.
    """
    given = {STATS: stats, LOSSES: losses, PARITY: parity, THEORY: theory}
    there = {name: frame for name, frame in given.items() if frame is not None and len(frame)}
    for name, frame in there.items():
        refuse_other_table(name, frame.columns)
    tables = add_labels(there)
    stats = tables[STATS]
    table = stats.drop_duplicates("label").set_index("label")[label_columns(stats)].astype(object)
    signal = stack_signal(stats)
    if len(signal):
        last = signal[signal["layer"] == signal.groupby("label", observed=True)["layer"].transform("max")]
        table["mean"] = band(last, ["layer"], "mean").set_index("label")["median"]
        spread = band(last, ["layer"], "std").set_index("label")
        table["std"], table["std16"], table["std84"] = spread["median"], spread["low"], spread["high"]
        table["signal"] = pd.Series(find_fates(first_dead_layer(stats)), dtype=object).map(str)
    if THEORY in tables:
        table["theory"] = pd.Series(theory_rows.find_agreement(tables[THEORY]), dtype=object)
    if LOSSES in tables:
        losses = tables[LOSSES]
        last = losses[losses["step"] == losses.groupby("label", observed=True)["step"].transform("max")]
        for name, implementation in (("by hand", "scratch"), ("nn.Module", "module")):
            rows = last[last["implementation"] == implementation]
            table[f"loss {name}"] = band(rows, ["step"], "loss").set_index("label")["median"]
        diverged = last[last["implementation"] == "scratch"].groupby("label", observed=True)["loss"]
        table["diverged"] = diverged.agg(lambda loss: f"{(~np.isfinite(loss)).sum()} of {len(loss)}")
    if PARITY in tables:
        parity = tables[PARITY]
        gradients = parity[parity["direction"] == "backward"].groupby("label", observed=True)
        table["gradient difference"] = gradients["relative_error"].max()
        table["limit"] = gradients["dtype"].first().map(PARITY_LIMIT) if "dtype" in parity else np.nan
        table["not comparable"] = gradients["n_nonfinite"].agg(lambda n: float((n > 0).mean()))
    return table.reset_index(drop=True)


def describe_parting(table: pd.DataFrame) -> str:
    """Why two right trainings end at other losses: one line where some do, or nothing."""
    if not {"loss by hand", "loss nn.Module", "gradient difference"} <= set(table):
        return ""
    names = ("loss by hand", "loss nn.Module", "gradient difference")
    ours, theirs, difference = (table[name].astype(float) for name in names)
    agree = difference <= ROUNDING
    n = int((agree & ((ours - theirs).abs() > PARTED * theirs.abs())).sum())
    if not n:
        return ""
    where = "" if n == len(table) else f" in {n} of {len(table)} rows"
    return (
        f"chaos: the two trainings part{where}, though gradients agree to {float(difference[agree].max()):.0e} at "
        "equal weights; this training makes rounding grow from step to step"
    )


def as_text(table: pd.DataFrame, width: int | None = None) -> str:
    """The summary as fixed-width text; what a run has not measured is left blank, nan is a result.

    width: characters of a line; columns beyond it stand below the others, behind those that name the rows again.
    """
    if "run" in table:
        table = table.assign(run=format_folders(table["run"].astype(str).tolist()))
    names = [name for name in table if name not in ("std16", "std84", "not comparable", "limit")]  # these serve others
    if "std16" in table:
        names.insert(names.index("std") + 1, "16-84 % of networks")
    if "diverged" in names and not table["diverged"].dropna().astype(str).str.match("[1-9]").any():
        names.remove("diverged")  # no network did
    shown = pd.DataFrame({name: [_text(name, row) for _, row in table.iterrows()] for name in names})
    first = next((k for k, name in enumerate(names) if name in _OF_THE_STACK or name.startswith(_OF_THE_TRAINING)), 0)
    return wrap_columns(shown, first, width)


_OF_THE_STACK = ("mean", "std", "16-84 % of networks", "signal")
_OF_THE_TRAINING = ("loss", "div", "grad")


def _text(name: str, row: pd.Series) -> str:
    witness = "signal" if name in _OF_THE_STACK else "diverged"
    if (name in _OF_THE_STACK or name.startswith(_OF_THE_TRAINING)) and pd.isna(row.get(witness)):
        return ""
    if name == "16-84 % of networks":
        low, high = _number(row["std16"]), _number(row["std84"])
        return low if low == high else f"{low} to {high}"
    value = row[name]
    if name == "theory":
        return value.short if isinstance(value, theory_rows.ProfileTest) else ""
    if name == "gradient difference":
        above = f" (above {row['limit']:.0e})" if value > row["limit"] else ""
        lost = f" ({row['not comparable']:.0%} not finite)" if row["not comparable"] else ""
        return _number(value) + above + lost
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:.3g}"


def timings_as_text(timings: pd.DataFrame) -> str:
    """A ladder's table with units that a person reads."""
    texts = {
        "version": timings["version"].astype(str),
        "shape": timings["shape"].astype(str),
        "median": [_with_unit(value, SECONDS) for value in timings["median"]],
        "25-75 %": [
            f"{_with_unit(a, SECONDS)} to {_with_unit(b, SECONDS)}" if a == a else ""
            for a, b in timings[["q25", "q75"]].to_numpy()
        ],
        "ratio": timings["ratio"].map(_blank(lambda ratio: f"{ratio:,.3g}" if ratio < 1000 else f"{ratio:,.0f}")),
        "peak memory": [_with_unit(value, BYTES) for value in timings["peak_bytes"]],
        "relative error": timings["relative_error"].map(_blank(_number)),
        "ulp": timings["ulp"].map(_blank(_number)),
        "note": timings["note"].astype(str),
    }
    return str(pd.DataFrame(texts).to_string(index=False))


def _blank(text: Callable[[float], str]) -> Callable[[float], str]:
    return lambda value: "" if pd.isna(value) else text(value)


SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
BYTES = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))


def _with_unit(value: float, units: Sequence[tuple[float, str]]) -> str:
    if pd.isna(value):
        return ""
    size, unit = next((pair for pair in units if value >= pair[0]), units[-1])
    return f"{value / size:.3g} {unit}"


def crossing(timings: pd.DataFrame) -> str:
    """The finding of a ladder: slowest against fastest at the smallest shape that both ran."""
    ran = timings.dropna(subset=["median"])
    if not len(ran):
        return "no version ran"
    most = ran.groupby("shape", sort=False)["version"].nunique()
    rows = ran[ran["shape"] == most.idxmax()].sort_values("median")
    fastest, slowest = rows.iloc[0], rows.iloc[-1]
    times = slowest["median"] / fastest["median"]
    said = f"{times:,.0f}" if times >= 100 else f"{times:.3g}"
    return f"{fastest['version']} is {said} times as fast as {slowest['version']} at {fastest['shape']}"
