"""How far every measured number is from its prediction: rows of statistics and bands become the table `theory`.

`z` counts standard deviations between a number and the centre of its law: for one network, and for the mean over an
ensemble (seed -1), which shows faults that hide in the spread of networks. A trained network is predicted at step 0
alone, before its weights have met the data.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from initlab.nn.custom_activation import Given
from initlab.nn.init import Rule
from initlab.stats.keys import KEY_COLUMNS, TENSOR_COLUMNS, TEXT_COLUMNS
from initlab.stats.statistics import IN_LN
from initlab.theory.forward_law import BatchVariation
from initlab.theory.predict import predict
from initlab.theory.quantiles import NARROW, WIDE

ENSEMBLE = -1  # the seed of rows about the mean over all networks
COLUMNS = ("statistic", "measured", "predicted", "band_low", "band_high", "z", "limit", "rho", "method")
ROUNDING = 1e-4  # relative, absolute for shares: where nothing may vary a number format still rounds
FIXED = 1e-6  # a standard deviation below which nothing may vary: of a share it means one entry in a thousand networks
_KEYS = list(TENSOR_COLUMNS)
_QUANTILES = ("band_low", "band68_low", "predicted", "band68_high", "band_high")
_AT = np.array([-WIDE, -NARROW, 0.0, NARROW, WIDE])
SEEN = 2.0**-20  # of the rms: eight times what float32 rounds, below which a difference of inputs is not seen
BATCHES = 200  # a standard deviation to 5 %
_SCALES = [name for name in IN_LN if name != "std_within"]


class InputMoments(NamedTuple):
    """What theory needs to know of data: units, mean square of an entry, mean cosine of two inputs, and how inputs and
    batches differ (the two fields of `forward_law.BatchVariation`)."""

    units: int
    q: float
    cosine: float
    directions: float
    wander: tuple[float, float, float] = (0.0, 0.0, 0.0)


def measure_input(x: np.ndarray, batch: int | None = None) -> InputMoments:
    """Moments of data (rows, units), from up to 4096 rows; the cosine is that of two different rows, at least 0.

    With `batch` also how batches of so many rows differ: the covariance of ln of the mean square of the batch means and
    ln of the mean variance, over BATCHES of them, drawn without replacement.
    """
    some = x[:: max(1, len(x) // 4096)].astype(np.float64)
    rows, units = some.shape
    q, centre = float((some**2).mean()), some.mean(0)
    alike = (rows * float((centre**2).mean()) - q) / (rows - 1) if rows > 1 else 0.0
    covariance = (some - centre).T @ (some - centre)
    size = float((covariance**2).sum())
    directions = float(covariance.trace()) ** 2 / size if size > 0 else 1.0
    wander = (0.0, 0.0, 0.0)
    if batch is not None and 1 < batch <= rows:
        rng = np.random.default_rng(0)
        parts = (some[rng.permutation(rows)[:batch]] for _ in range(BATCHES))
        cov = np.cov(np.array([[_ln((part.mean(0) ** 2).mean()), _ln(part.var(0).mean())] for part in parts]).T)
        if np.isfinite(cov).all():
            wander = (float(cov[0, 0]), float(cov[0, 1]), float(cov[1, 1]))
    return InputMoments(units, q, min(max(alike / q, 0.0), 1 - 1e-9) if q > 0 else 0.0, directions, wander)


@lru_cache(maxsize=16)
def _predict(*what: Any, **how: Any) -> pd.DataFrame:
    """One prediction for networks that differ in their seeds alone; the frame is shared and must not be changed."""
    return predict(*what, **how)


@np.errstate(all="ignore")  # where a signal is gone ratios to it are nan or inf: data
def compare_stack(
    stats: pd.DataFrame,
    init: str | Rule,
    activation: Given,
    depth: int,
    width: int,
    inputs: int,
    batch: int,
    widths: Sequence[int] = (),
    method: str = "auto",
    input_gradient: bool = False,
) -> pd.DataFrame:
    """The table `theory` for the rows `stats` of a stack: every statistic of every tensor that theory predicts.

    The other parameters are those of `predict`; with `widths` depth and width are not used. A column `member` in
    `stats` tells ensembles of one rule apart: each has rows of its own with seed -1. Raises UsageError for what
    `predict` cannot be asked.
    """
    layers = {"widths": tuple(widths)} if widths else {"depth": depth, "width": width}
    bands = _predict(
        init, activation, **layers, inputs=inputs, batch=batch, method=method, input_gradient=input_gradient
    )
    return as_categories(compare(stats[stats["stage"] == "stack"], bands))


@np.errstate(all="ignore")
def compare_training(
    stats: pd.DataFrame,
    widths: Sequence[int],
    given: InputMoments,
    batch: int,
    init: str | Rule,
    activation: Given,
    method: str = "auto",
) -> pd.DataFrame:
    """The table `theory` for step 0 of a trained network with layers of these widths on batches like `given`.

    Values: all that theory predicts. Gradients: sizes below the last layer, predicted from the measured size of the
    loss's own gradient there; those of weights and biases depend on the labels too and are left out. A simulation draws
    inputs of its own, so that the laws here are closed ones.
    """
    bands = _predict(
        init, activation, widths=tuple(widths), inputs=given.units, batch=batch, q0=given.q, c0=given.cosine,
        fixed_input=True, data=BatchVariation(given.directions, given.wander), outputs=True,
        method="closed" if method == "simulation" else method,
    )  # fmt: skip
    start = stats[(stats["stage"] == "train") & (stats["step"] == 0)]
    last = bands["layer"] == len(widths)  # of a network's last layer there is no activation
    forward = bands[(bands["direction"] == "forward") & ~(last & (bands["statistic"] == "frac_saturated"))]
    forward = compare(start, forward)
    backward = _below_the_loss(start, bands, widths)
    return as_categories(pd.concat([part for part in (forward, backward) if len(part)], ignore_index=True))


def _below_the_loss(start: pd.DataFrame, bands: pd.DataFrame, widths: Sequence[int]) -> pd.DataFrame:
    """Gradients of the hidden layers: the law of their ratio to the one at the last preactivation, which is measured.

    Independent parts are taken as such. A std follows from the rms there, since the gradient of a loss over classes has
    no pooled mean. What the gradients of a batch have in common depends on the labels, so that the pooled mean below
    may be any share of 1/n.
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
        method="from the loss down, " + below["method"].astype(str),
    )
    loss = start[(start["layer"] == top) & (start["tensor"] == "preactivation") & (start["direction"] == "backward")]
    return compare(start, below, loss.assign(std=loss["rms"]))


def compare(stats: pd.DataFrame, bands: pd.DataFrame, over: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per row of `stats` and statistic in `bands`, and one with seed -1 for each ensemble.

    Columns: `measured`; `predicted`, the median of its law at this width; its 95 % band; `z`; `limit`, the prediction
    of infinite width. For a statistic that cannot be negative z is the distance of the logarithms. z is nan for a
    number that is not finite, for a tensor with entries that are not, and for all gradients of a network whose values
    are not finite somewhere, since no law gives phi' of inf and nan. `over`: the bands are those of the ratio to these
    rows, one for each network.
    """
    keys = [name for name in (*KEY_COLUMNS[:4], "member", *TENSOR_COLUMNS) if name in stats]
    rows = stats.reset_index(drop=True)
    lost = rows["n_nan"] + rows["n_inf"] > 0
    backward = rows["direction"] == "backward"
    network = [rows[name].astype(str) for name in ("stage", "implementation", "seed", "member") if name in rows]
    lost |= backward & (lost & ~backward).groupby(network).transform("any")
    law = rows[keys].assign(_row=np.arange(len(rows))).merge(_leave_rounding(bands), on=_KEYS)
    if law.empty:
        return pd.DataFrame(columns=[*keys, *COLUMNS])
    at = law["_row"].to_numpy()
    codes, names = pd.factorize(law["statistic"])
    law["measured"] = rows[list(names)].to_numpy(float)[at, codes]
    if over is not None:
        law = _multiply_by_measured(law, over)
    law["z"] = np.where(lost.to_numpy()[at], np.nan, z_scores(law))
    return pd.concat([law[[*keys, *COLUMNS]], _compare_ensembles(law, keys)], ignore_index=True)


def _leave_rounding(bands: pd.DataFrame) -> pd.DataFrame:
    """The bands without those of a `std_within` so far below the rms that float32 shows rounding in its place."""
    sizes = bands.loc[bands["statistic"] == "rms", [*_KEYS, "predicted"]].rename(columns={"predicted": "size"})
    size = bands[_KEYS].merge(sizes, "left", _KEYS)["size"].to_numpy(float)
    lost = (bands["statistic"] == "std_within").to_numpy() & (bands["predicted"].to_numpy(float) < SEEN * size)
    if not lost.any():
        return bands
    found = bands.astype({"method": object})
    found.loc[lost, "method"] = "below rounding"
    found.loc[lost, ["mean", "sd"]] = np.nan
    return found


def as_categories(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns of labels as categories in alphabetical order, whatever tables were joined."""
    labels = {}
    for name in (name for name in (*TEXT_COLUMNS, "statistic", "method") if name in frame):
        column = frame[name].astype("category").cat.remove_unused_categories()
        labels[name] = column.cat.reorder_categories(sorted(column.cat.categories))
    return frame.assign(**labels)


def _multiply_by_measured(law: pd.DataFrame, over: pd.DataFrame) -> pd.DataFrame:
    """Laws of ln of a ratio become laws of the number itself: each times the measured number of its network."""
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


def z_scores(law: pd.DataFrame) -> np.ndarray:
    """z of `measured` under the law of each row: from ln, or from the quantiles of a law of the statistic itself.

    Where nothing may vary z is 0, or inf for a difference that rounding does not explain; where no law is known, nan.
    """
    measured, mean, sd = (law[name].to_numpy(float) for name in ("measured", "mean", "sd"))
    value = np.where(law["scale"] == "ln", _ln(measured), measured)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (value - mean) / sd
        same = (value == mean) | (np.abs(value - mean) <= ROUNDING)
    fixed = ~(sd > FIXED) & ~np.isnan(value) & ~np.isnan(mean)
    z = np.where(fixed, np.where(same, 0.0, np.copysign(np.inf, np.where(value > mean, 1.0, -1.0))), z)
    points = law[list(_QUANTILES)].to_numpy(float)
    steps = np.diff(points)
    skewed = (law["scale"] == "linear").to_numpy() & (steps > 0).all(-1) & np.isfinite(value)
    # by straight lines through five quantiles, the outer ones prolonged
    value, points, steps = value[skewed], points[skewed], steps[skewed]
    cell = np.clip((value[:, None] >= points).sum(-1) - 1, 0, 3)
    row = np.arange(len(value))
    z[skewed] = _AT[cell] + (value - points[row, cell]) / steps[row, cell] * np.diff(_AT)[cell]
    return z


def _compare_ensembles(law: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
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
    code = law.groupby(by, sort=False, observed=True, dropna=False).ngroup().to_numpy()
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
