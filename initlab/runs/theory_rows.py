"""The table `theory` -> whether a measured profile agrees with what is predicted, and the lines that figures draw."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from initlab.stats.dtypes import FORMATS
from initlab.stats.keys import KEY_COLUMNS
from initlab.terminal import text_as_html
from initlab.theory.profile import p_value
from initlab.theory.quantiles import NO_LAW, OUTSIDE

NEEDED = [*KEY_COLUMNS, "label", "statistic", "predicted", "band_low", "band_high", "z", "rho", "method"]
DOUBTFUL, REJECTED = 0.05, 0.001  # p below which a correct run is rare, and too rare to be met
KNOWN = 0.1  # standard deviations of one network to which the formulas know the centre of their law; measured
DRAWN = 0.25  # the same of a few hundred simulated networks, where some inputs stand for the batch
NEAR = 16.0  # so near the end of a number format, as a factor, what is measured is not the signal alone


class ProfileTest(NamedTuple):
    """How the std of all layers, mean over the networks, agrees with its prediction.

    p: the share of correct ensembles whose largest |z| over all layers is at least as large; nan where nothing can be
    judged. z, layer: the largest |z|, in standard errors, and where it stands. layers: how many were judged, of
    `every`. died: the first layer at which networks are dead where the format holds the prediction, nan for none.
    outside: whether no layer has a law that holds.
    """

    p: float
    z: float
    layer: int
    layers: int
    every: int
    died: float
    outside: bool

    def _repr_html_(self) -> str:
        return text_as_html(self)

    @property
    def short(self) -> str:
        """For a column: 'p 0.41'."""
        if self.outside:
            return "out of range"
        return "-" if math.isnan(self.p) else f"p {self.text}"

    @property
    def text(self) -> str:
        return f"{self.p:.2g}" if self.p >= REJECTED else f"< {REJECTED:g}"

    def __str__(self) -> str:
        if self.outside:
            return "theory: no test, no formula holds here; theory=simulation knows more"
        if math.isnan(self.p):
            return "theory: no test, no layer lies inside the number format"
        judged = f"{self.layers} layers" if self.layers == self.every else f"{self.layers} of {self.every} layers"
        if self.p >= DOUBTFUL:
            judged = judged if self.every > 1 else "the layer"
            return f"theory: {judged} agree{'s' * (self.every == 1)}, p = {self.text}"
        if not math.isnan(self.died) and not self.p:
            return f"theory: does not agree, from layer {self.died:.0f} networks are dead that should live"
        far = f"{abs(self.z):.3g} standard errors {'above' if self.z > 0 else 'below'} at layer {self.layer}"
        if self.p < REJECTED:
            return f"theory: does not agree, p {self.text}: {far}"
        return f"theory: doubtful, p = {self.text}: {far}"


def _rows(theory: pd.DataFrame, direction: str) -> pd.DataFrame:
    """Rows of std in the stack, or of a run that only trained: in its step 0, where gradients come from the loss."""
    rows = theory[(theory["statistic"] == "std") & (theory["direction"] == direction) & (theory["layer"] > 0)]
    stack = rows[(rows["stage"] == "stack") & (rows["tensor"] == "activation")]
    if len(stack):
        return stack
    return rows[(rows["implementation"] == "scratch") & (rows["tensor"] == "preactivation")]


def _has_no_law(rows: pd.DataFrame) -> pd.Series:
    """Of each row whether no law is known, or only a formula that does not hold."""
    return rows["method"].astype(str).str.contains(f"{OUTSIDE}|{NO_LAW}")


def needs_values(rows: pd.DataFrame) -> np.ndarray:
    """Of each row whether a gradient hangs on the values that it passes: that of a linear stack does not."""
    if "activation" not in rows:
        return np.ones(len(rows), bool)
    return np.asarray(rows["activation"].astype(str) != "linear")


def find_agreement(theory: pd.DataFrame, direction: str = "forward") -> dict[str, ProfileTest]:
    """Per label one test of the whole profile; needs `label`. Runs of one label are one ensemble.

    Layers where the prediction comes near an end of the number format are not judged: a network that dies there dies as
    predicted. A gradient is judged where the forward pass lives, or does not matter. Networks that died too early count
    where they are half of all, else the others are judged.
    """
    rows = _rows(theory, direction)
    rows = rows[rows["seed"] >= 0].sort_values("layer", ascending=direction == "forward", kind="stable")
    if direction == "backward":
        values = _rows(theory, "forward")
        keys = [name for name in ("label", "run", "seed") if name in rows]
        gone = values.loc[(values["measured"] == 0) & needs_values(values), keys]
        dead = pd.MultiIndex.from_frame(rows[keys].astype(str)).isin(pd.MultiIndex.from_frame(gone.astype(str)))
        rows = rows[rows["z"].notna() & ~dead]
    every = rows.groupby("label", observed=True)["layer"].nunique()
    doubtful = _has_no_law(rows)
    lawful = set(rows.loc[~doubtful, "label"].astype(str))
    rows = rows[~doubtful]
    dtypes = rows["dtype"].astype(str) if "dtype" in rows else pd.Series("float32", rows.index)
    held = {name: (FORMATS[name].tiny * NEAR, FORMATS[name].max / NEAR) for name in dtypes.unique()}
    least, most = (dtypes.map({name: ends[k] for name, ends in held.items()}).astype(float) for k in (0, 1))
    rows = rows[(rows["band_low"] > least) & (rows["band_high"] < most)]
    dead = rows["z"].isna() | (rows["measured"] == 0) & (rows["z"] != 0)
    known = np.where(rows["method"].astype(str).str.endswith("inputs"), DRAWN, KNOWN)
    layers = rows.assign(z=rows["z"].where(~dead), dead=dead, known=known).groupby(
        ["label", "layer"], observed=True, sort=False
    )
    found = layers.agg(
        lost=("dead", "mean"), z=("z", "mean"), n=("z", "count"), rho=("rho", "first"), known=("known", "first")
    )
    found = found.reset_index()
    by_label = {str(label): mine for label, mine in found.groupby("label", observed=True)}
    return {
        str(label): _judge(by_label.get(str(label), found[:0]), int(count), str(label) not in lawful)
        for label, count in every.items()
    }


def _judge(layers: pd.DataFrame, every: int, outside: bool) -> ProfileTest:
    """layers: in the order of travel `layer`, `z`, `known` and `rho`, `n` networks that live, and the share `lost`."""
    at, lost = layers["layer"].to_numpy(), layers["lost"].to_numpy() >= 0.5
    if lost.any():
        return ProfileTest(0.0, math.nan, 0, len(at), every, float(at[lost.argmax()]), outside)
    if not len(at):
        return ProfileTest(math.nan, math.nan, 0, 0, every, math.nan, outside)
    z = (layers["z"] / np.sqrt(1 / layers["n"] + layers["known"] ** 2)).to_numpy()
    far = int(np.abs(z).argmax())
    p = p_value(z, layers["rho"].to_numpy())
    return ProfileTest(p, float(z[far]), int(at[far]), len(at), every, math.nan, outside)


def lines(theory: pd.DataFrame, direction: str) -> pd.DataFrame:
    """Per label and layer of the stack: `predicted`, `low` and `high` of one network's std, where the law holds."""
    rows = _rows(theory[(theory["stage"] == "stack") & (theory["seed"] >= 0)], direction)
    rows = rows[~_has_no_law(rows)]
    return _bands(rows, ["label", "layer"])


def start(theory: pd.DataFrame, statistic: str) -> pd.DataFrame:
    """Per layer of a training the preactivations' `predicted`, `low` and `high` of one network at step 0."""
    rows = theory[(theory["stage"] == "train") & (theory["implementation"] == "scratch") & (theory["seed"] >= 0)]
    rows = rows[(rows["tensor"] == "preactivation") & (rows["direction"] == "forward")]
    return _bands(rows[rows["statistic"] == statistic], ["layer"])


def _bands(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    names = {"band_low": "low", "band_high": "high"}
    return rows.drop_duplicates(keys)[[*keys, "predicted", *names]].rename(columns=names).sort_values(keys)


def describe(found: Sequence[ProfileTest]) -> str:
    """The line beneath the short table."""
    if len(found) == 1:
        return str(found[0])
    text = "theory: p of the std of all layers together; a correct run has p below 0.05 in one of 20"
    return (
        f"{text}; where it is out of range theory=simulation knows more" if any(one.outside for one in found) else text
    )
