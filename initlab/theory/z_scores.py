"""Every measured number beside its prediction: rows of statistics and bands -> the table `theory`.

`z` counts standard deviations between a number and the centre of its law: of one network, and of the mean over an
ensemble (seed -1), which sees faults that hide in the spread of networks. Knows frames; nothing of how rows were
measured. A trained network is known at step 0 alone, before its weights have seen the data.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from initlab.nn.custom_activation import Given
from initlab.nn.init import Rule
from initlab.stats.keys import WORDS
from initlab.theory.forward_law import Data
from initlab.theory.predict import predict_bands
from initlab.theory.quantiles import NARROW, WIDE

ENSEMBLE = -1  # the seed of rows about the mean over all networks
COLUMNS = ("statistic", "measured", "predicted", "band_low", "band_high", "z", "limit", "method")
ROUNDING = 1e-4  # relative, absolute for shares: where nothing may vary a number format still rounds
FIXED = 1e-6  # a standard deviation below which nothing may vary: of a share it means one entry in a thousand networks
_PLACE = ["layer", "tensor", "direction"]
_QUANTILES = ("band_low", "band68_low", "predicted", "band68_high", "band_high")
_AT = np.array([-WIDE, -NARROW, 0.0, NARROW, WIDE])
BATCHES = 200  # a standard deviation to 5 %
_SCALES = ("q", "rms", "std", "norm")


class Input(NamedTuple):
    """Data as theory needs them: units, mean square of an entry, mean cosine of two inputs, and `closure.Data`."""

    units: int
    q: float
    cosine: float
    directions: float
    wander: tuple[float, float, float] = (0.0, 0.0, 0.0)


def input_of(x: np.ndarray, batch: int | None = None) -> Input:
    """Of data (rows, units), of up to 4096 rows: the cosine is that of two different rows and at least 0.

    With `batch` also how batches of so many rows differ, over BATCHES of them, drawn without replacement.
    """
    some = x[:: max(1, len(x) // 4096)].astype(np.float64)
    rows, units = some.shape
    q, centre = float((some**2).mean()), some.mean(0)
    alike = (rows * float((centre**2).mean()) - q) / (rows - 1) if rows > 1 else 0.0
    covariance = (some - centre).T @ (some - centre)
    size = float((covariance**2).sum())
    directions = float(covariance.trace()) ** 2 / size if size > 0 else 1.0
    wander = _wander(some, batch) if batch is not None and 1 < batch <= rows else (0.0, 0.0, 0.0)
    return Input(units, q, min(max(alike / q, 0.0), 1 - 1e-9) if q > 0 else 0.0, directions, wander)


def _wander(x: np.ndarray, batch: int) -> tuple[float, float, float]:
    """Covariance of ln of the mean square of the batch means and ln of the mean variance, over batches."""
    rng = np.random.default_rng(0)
    logs = []
    for _ in range(BATCHES):
        rows = x[rng.permutation(len(x))[:batch]]
        logs.append([_ln((rows.mean(0) ** 2).mean()), _ln(rows.var(0).mean())])
    cov = np.cov(np.array(logs).T)
    return (float(cov[0, 0]), float(cov[0, 1]), float(cov[1, 1])) if np.isfinite(cov).all() else (0.0, 0.0, 0.0)


@lru_cache(maxsize=16)
def _bands(*what: Any, **how: Any) -> pd.DataFrame:
    """Networks that differ in their seeds alone have one prediction; a file of many rows, not to be changed."""
    return predict_bands(*what, **how)


@np.errstate(all="ignore")  # where a signal is gone ratios to it are nan or inf: data
def beside_stack(
    stats: pd.DataFrame,
    init: str | Rule,
    activation: Given,
    depth: int,
    width: int,
    inputs: int,
    batch: int,
    method: str = "auto",
) -> pd.DataFrame:
    """The table `theory` of a stack's rows; every tensor's statistics that the theory knows.

    A column `member` tells ensembles of one rule apart: each has rows of its own with seed -1.
    Errors: what the theory cannot be asked, see `theory.predict_bands`.
    """
    bands = _bands(init, activation, depth, width, inputs=inputs, batch=batch, method=method)
    return worded(compared(stats[stats["stage"] == "stack"], bands))


@np.errstate(all="ignore")
def beside_training(
    stats: pd.DataFrame,
    widths: Sequence[int],
    given: Input,
    batch: int,
    init: str | Rule,
    activation: Given,
    method: str = "auto",
) -> pd.DataFrame:
    """The table `theory` of a trained network's step 0, layers of these widths on batches like `given`.

    Values: all that theory knows. Gradients: sizes below the last layer, on from what the loss has put there, which is
    measured; those of weights and biases hang on the labels too and are left out. A simulation draws inputs of its own,
    so that laws here are closed ones.
    """
    bands = _bands(
        init, activation, widths=tuple(widths), inputs=given.units, batch=batch, q0=given.q, c0=given.cosine,
        fixed_input=True, data=Data(given.directions, given.wander), outputs=True,
        method="closed" if method == "simulation" else method,
    )  # fmt: skip
    start = stats[(stats["stage"] == "train") & (stats["step"] == 0)]
    last = bands["layer"] == len(widths)  # of a network's last layer there is no activation
    forward = bands[(bands["direction"] == "forward") & ~(last & (bands["statistic"] == "frac_saturated"))]
    forward = compared(start, forward)
    backward = _below_the_loss(start, bands, widths)
    return worded(pd.concat([part for part in (forward, backward) if len(part)], ignore_index=True))


def _below_the_loss(start: pd.DataFrame, bands: pd.DataFrame, widths: Sequence[int]) -> pd.DataFrame:
    """Gradients over the one at the last preactivation: laws of the ratio, independent parts taken as such.

    A std is followed from the rms there: of a loss over classes a gradient has no pooled mean. What a batch's gradients
    have in common is the labels' business, so that the pooled mean below may be any share of 1/n.
    """
    top = len(widths)
    known = bands[(bands["direction"] == "backward") & bands["statistic"].isin(_SCALES)]
    known = known[known["tensor"].isin(["preactivation", "activation"])]
    at_top = known[(known["layer"] == top) & (known["tensor"] == "preactivation")].set_index("statistic")
    below = known[known["layer"] < top]
    above = at_top.loc[below["statistic"].astype(str).replace("std", "rms")]
    spread = np.maximum(below["sd"].to_numpy() ** 2 - above["sd"].to_numpy() ** 2, 0)
    pooled = (below["statistic"] == "std").to_numpy() / np.array(widths)[below["layer"] - 1]
    spread = np.sqrt(spread + pooled**2 / 2)
    below = below.assign(
        mean=below["mean"].to_numpy() - above["mean"].to_numpy(),
        ln_limit=below["ln_limit"].to_numpy() - above["ln_limit"].to_numpy(),
        sd=spread,
        method="from the loss down, " + below["method"],
    )
    loss = start[(start["layer"] == top) & (start["tensor"] == "preactivation") & (start["direction"] == "backward")]
    return compared(start, below, loss.assign(std=loss["rms"]))


def compared(stats: pd.DataFrame, bands: pd.DataFrame, over: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per row of `stats` and statistic in `bands`, and one with seed -1 for each ensemble.

    `measured`; `predicted`, the centre of its law at this width (median), and its 95 % band; z; `limit`, what infinite
    width predicts. Of what cannot be negative z is that of ln. A number that is not finite, or describes a tensor with
    entries that are not, has the z nan; so have all gradients of a network whose values are not finite somewhere, since
    phi' of inf and nan is no law's. `over`: bands are of the ratio to these rows, one for each network.
    """
    keys = [name for name in ("stage", "implementation", "seed", "step", "member", *_PLACE) if name in stats]
    rows = stats.reset_index(drop=True)
    at, of = _matched(rows, bands)
    if not len(at):
        return pd.DataFrame(columns=[*keys, *COLUMNS])
    left = _coded(rows[keys], keys).take(at).reset_index(drop=True)
    known = [name for name in bands if name not in _PLACE]
    law = pd.concat([left, _coded(bands[known], known).take(of).reset_index(drop=True)], axis=1)
    names = list(law["statistic"].cat.categories)
    law["measured"] = rows[names].to_numpy(float)[at, law["statistic"].cat.codes]
    if over is not None:
        law = _on_from(law, over)
    law["z"] = np.where(_lost(rows)[at], np.nan, deviations(law))
    return pd.concat([law[[*keys, *COLUMNS]], _ensembles(law, keys)], ignore_index=True)


def _lost(rows: pd.DataFrame) -> np.ndarray:
    """Which rows no law speaks of: entries that are not finite, or gradients through such."""
    lost = rows["n_nan"] + rows["n_inf"] > 0
    backward = rows["direction"] == "backward"
    network = [rows[name].astype(str) for name in ("stage", "implementation", "seed", "member") if name in rows]
    return np.asarray(lost | (backward & (lost & ~backward).groupby(network).transform("any")))


def _matched(rows: pd.DataFrame, bands: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the pairs of a row and a band that are about the same tensor, in the order of the rows."""
    both = [_coded(frame[_PLACE], _PLACE) for frame in (rows, bands)]
    place, law = np.zeros(len(rows), np.int64), np.zeros(len(bands), np.int64)
    for name in _PLACE:
        ours, theirs = (frame[name] for frame in both)
        if name == "layer":
            place, law = place + ours.to_numpy(), law + theirs.to_numpy()
            continue
        words = list(dict.fromkeys([*ours.cat.categories, *theirs.cat.categories]))
        place, law = (
            of * len(words) + np.array([words.index(word) for word in one.cat.categories], np.int64)[one.cat.codes]
            for of, one in ((place, ours), (law, theirs))
        )
    order = np.argsort(law, kind="stable")
    start, end = (np.searchsorted(law[order], place, side) for side in ("left", "right"))
    count = end - start
    at = np.repeat(np.arange(len(rows)), count)
    within = np.arange(len(at)) - np.repeat(np.cumsum(count) - count, count)
    return at, order[np.repeat(start, count) + within]


def _coded(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Words as categories in the order of their first appearance: a hundred times as fast to take and to compare."""
    coded = {}
    for name in names:
        column = frame[name]
        if pd.api.types.is_numeric_dtype(column.dtype) or isinstance(column.dtype, pd.CategoricalDtype):
            coded[name] = column
        else:
            codes, found = pd.factorize(column.to_numpy(object))
            coded[name] = pd.Series(pd.Categorical.from_codes(codes, list(found)), column.index)
    return pd.DataFrame(coded)


def worded(frame: pd.DataFrame) -> pd.DataFrame:
    """Words as categories in the order of the alphabet, whatever tables were joined."""
    words = [name for name in (*WORDS, "statistic", "method") if name in frame]
    return frame.assign(**{name: _alphabetical(frame[name]) for name in words})


def _alphabetical(column: pd.Series) -> pd.Categorical:
    if not isinstance(column.dtype, pd.CategoricalDtype):
        return pd.Categorical(column.astype(str))
    codes, found = column.cat.codes.to_numpy(), column.cat.categories
    used = sorted(found[k] for k in np.flatnonzero(np.bincount(codes[codes >= 0], minlength=len(found))))
    place = np.array([used.index(word) if word in used else -1 for word in found], np.int64)
    return pd.Categorical.from_codes(place[codes], used)


def _on_from(law: pd.DataFrame, over: pd.DataFrame) -> pd.DataFrame:
    """Laws of ln of a ratio, times the measured number that each is a ratio to."""
    by = ["implementation", "seed"]
    known = over.astype({"implementation": str}).melt(by, list(dict.fromkeys(law["statistic"])), "statistic", "known")
    wanted = law[[*by, "statistic"]].astype({"implementation": str, "statistic": str})
    start = _ln(wanted.merge(known, "left", [*by, "statistic"])["known"].to_numpy(float))
    centre, sd = law["mean"].to_numpy() + start, law["sd"].to_numpy()
    quantiles = {name: _exp(centre + k * sd) for name, k in zip(_QUANTILES, _AT, strict=True)}
    limit = _exp(law["ln_limit"].to_numpy() + start)
    return law.assign(mean=centre, limit=limit, **quantiles)


def _ln(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log(values))


def _exp(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(values))


def deviations(law: pd.DataFrame) -> np.ndarray:
    """z of `measured` under each row's law: of ln, or by the law's own quantiles where it is one of the statistic.

    Where nothing may vary z is 0, or inf for a difference that rounding does not explain.
    """
    measured, mean, sd = (law[name].to_numpy(float) for name in ("measured", "mean", "sd"))
    value = np.where(law["scale"] == "ln", _ln(measured), measured)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (value - mean) / sd
        same = (value == mean) | (np.abs(value - mean) <= ROUNDING)
    fixed = ~(sd > FIXED) & ~np.isnan(value)
    z = np.where(fixed, np.where(same, 0.0, np.copysign(np.inf, np.where(value > mean, 1.0, -1.0))), z)
    points = law[list(_QUANTILES)].to_numpy(float)
    steps = np.diff(points)
    skewed = (law["scale"] == "linear").to_numpy() & (steps > 0).all(-1) & np.isfinite(value)
    z[skewed] = _by_quantiles(value[skewed], points[skewed], steps[skewed])
    return z


def _by_quantiles(value: np.ndarray, points: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """z by straight lines through five quantiles, the outer ones prolonged; (R,), (R, 5), (R, 4)."""
    cell = np.clip((value[:, None] >= points).sum(-1) - 1, 0, 3)
    row = np.arange(len(value))
    return np.asarray(_AT[cell] + (value - points[row, cell]) / steps[row, cell] * np.diff(_AT)[cell])


def _ensembles(law: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """The mean over the networks, of ln where the law is one of ln: its band is 1/sqrt(E) as wide.

    z is the mean of the networks' z times sqrt(E), which is (mean - centre) / (sd / sqrt(E)).
    """
    logs = (law["scale"] == "ln").to_numpy()
    numbers = law[["z", "mean", "sd"]].assign(
        measured=np.where(logs, _ln(law["measured"].to_numpy(float)), law["measured"]),
        limit=np.where(logs, _ln(law["limit"].to_numpy(float)), law["limit"]),
    )
    names = list(numbers)
    by = [name for name in keys if name != "seed"] + ["statistic"]
    code = np.zeros(len(law), np.int64)
    for name in by:
        column = law[name]
        one = column.cat.codes if isinstance(column.dtype, pd.CategoricalDtype) else pd.factorize(column)[0]
        code = pd.factorize(code * (int(one.max()) + 1) + one)[0]
    count = np.bincount(code)
    with np.errstate(invalid="ignore"):  # nan, inf and -inf are results: nothing is skipped
        mean = np.stack([np.bincount(code, numbers[name]) / count for name in names])
    of = dict(zip(names, mean, strict=True))
    first = law.iloc[np.unique(code, return_index=True)[1]].reset_index(drop=True)
    logs = (first["scale"] == "ln").to_numpy()
    sides = of["mean"] + np.array([0.0, -WIDE, WIDE])[:, None] * of["sd"] / np.sqrt(count)
    shown = [np.where(logs, _exp(side), side) for side in (*sides, of["measured"], of["limit"])]
    columns = dict(zip(("predicted", "band_low", "band_high", "measured", "limit"), shown, strict=True))
    return first.assign(seed=ENSEMBLE, z=of["z"] * np.sqrt(count), **columns)[[*keys, *COLUMNS]]
