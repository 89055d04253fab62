"""A plane of networks, measured as one batched program and predicted at every point.

Plane `sigma`: (sigma_w, sigma_b) at the last layer. Plane `depth`: (sigma_w, layer) at one sigma_b. sigma_w is the
gain: weights have variance sigma_w^2 / fan_in, biases sigma_b^2. Poole et al. 2016; Schoenholz et al. 2017.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from initlab.errors import LIMITS, Limits, UsageError, check, check_value, choose
from initlab.meanfield.fixed_points import phase_plane
from initlab.meanfield.trajectories import trajectory
from initlab.nn.custom_activation import Given, as_activation
from initlab.nn.init import DISTRIBUTIONS
from initlab.stats.keys import Seeds, resolve_seeds
from initlab.tasks.ensemble.device import Where
from initlab.tasks.phase_points import Points, PointStatistics, measure_points
from initlab.terminal import Bar

PLANES = {"sigma": "(sigma_w, sigma_b) at the last layer", "depth": "(sigma_w, layer) at one sigma_b"}
WEIGHTS = {"common": "all points scale the same random numbers", "fresh": "each point draws its own"}
MOST_POINTS = 256  # on an axis
FITTED = (1e-10, 0.1)  # 1 - cosine between these falls by a constant factor a layer in the ordered phase
LEAST = 3  # layers through which a line is fitted
NOISE = 3.0  # standard deviations that a cosine must be away from its end to count as on its way there
THEORY = 4096  # points that are predicted together
LIMIT_COLUMNS = {  # column -> that of `phase_plane`
    "limit_q": "q",
    "limit_cosine": "c",
    "limit_chi_1": "chi_1",
    "predicted_xi_c": "xi_c",
    "predicted_phase": "phase",
}
AWAY = 0.1  # |ln chi_1| beyond which a point is away from the critical line


class Axis(NamedTuple):
    """Evenly spaced values, both ends among them."""

    low: float
    high: float
    points: int

    def values(self, name: str) -> list[float]:
        """Refuses what is no axis; `name` is the option's."""
        scale = LIMITS["sigma_w"]
        low, high = check_value(f"{name}.min", self.low, scale), check_value(f"{name}.max", self.high, scale)
        points = check_value(f"{name}.points", self.points, Limits(1, MOST_POINTS, whole=True))
        if low > high:
            raise UsageError(f"{name}.min={low:g}: must not be above {name}.max={high:g}")
        return [float(x) for x in np.linspace(low, high, points)]


SIGMA_W, SIGMA_B = Axis(0.5, 3.0, 64), Axis(0.0, 1.0, 64)


def phase(
    plane: str = "sigma",
    sigma_w: Axis = SIGMA_W,
    sigma_b: Axis | float | None = None,
    activation: Given = "tanh",
    depth: int = 50,
    width: int = 100,
    batch: int = 8,
    correlation: float = 0.5,
    weights: str = "common",
    distribution: str = "normal",
    seeds: Seeds = 8,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    generator: str = "philox",
    progress: bool = False,
) -> Iterator[pd.DataFrame]:
    """The table `phase`, a frame for each seed as it comes: a row per point, in the plane `depth` per point and layer.

    plane: a name of PLANES. sigma_w: the axis of standard deviations of weights times sqrt(fan_in). sigma_b: that of
    biases, an axis in the plane `sigma` (0 to 1 if None), one number in the plane `depth` (sqrt(0.05) if None).
    activation: a name of the table. depth, width: of each network. batch: inputs of a network, at least 2. correlation:
    of every two inputs, from 0 to below 1. weights: a name of WEIGHTS. distribution: of the weights. seeds: how many
    networks a point has, or their seeds. dtype, device, generator, progress: as in `stack`.

    Measured are the preactivations: `q`, `std`, `cosine` (mean over pairs), `chi_1` (sigma_w^2 times the mean squared
    slope), `growth` (its geometric mean over the layers so far: the factor per layer of a gradient's second moment),
    `frac_saturated`, and `xi_c`, in layers, from how fast the cosine goes to its end; nan where that cannot be seen. A
    signal that died (`died_at`) has q = 0 or inf, and the cosine and slopes of the last layer at which it was alive.
    `predicted_*` is infinite width at the same layer, `limit_*` at infinite depth.
    Errors: what `Axis.values` refuses, fewer than 2 inputs, a correlation outside [0, 1).
    """
    choose(PLANES, plane, "phase.plane")
    across = sigma_w.values("phase.sw")
    if plane == "sigma":
        up = (sigma_b if isinstance(sigma_b, Axis) else SIGMA_B).values("phase.sb")
    else:
        up = check(phase_sigma_b=0.05**0.5 if sigma_b is None or isinstance(sigma_b, Axis) else sigma_b)
    numbers = resolve_seeds(seeds)
    depth, width, batch, correlation = check(depth=depth, width=width, phase_batch=batch, phase_correlation=correlation)
    fresh = choose(dict(zip(WEIGHTS, (False, True), strict=True)), weights, "phase.weights")
    choose(DISTRIBUTIONS, distribution, "init.distribution")
    row, where = as_activation(activation), Where.resolve(dtype, device, generator)
    gains, biases = across * len(up), [value for value in up for _ in across]
    points = Points(gains, biases, row, depth, width, batch, correlation, distribution, fresh)
    return measure_plane(plane, points, numbers, where, progress)


def measure_plane(
    plane: str, points: Points, seeds: Sequence[int], where: Where, progress: bool
) -> Iterator[pd.DataFrame]:
    """The table `phase` of the points of a plane, a frame for each seed."""
    layers, slopes = measured_layers(plane, points.depth)
    rows = layers if plane == "depth" else [points.depth]
    theory = predict_points(points, rows)
    total = len(points.sigma_w) * points.depth * len(seeds)
    with Bar(total=total, desc="phase", unit="layer", unit_scale=True, disable=None if progress else True) as bar:
        for seed in seeds:
            found = measure_points(points, seed, layers, slopes, where, bar.update)
            yield points_frame(points, found, np.array(layers), np.array(slopes), rows, theory).assign(seed=seed)


def measured_layers(plane: str, depth: int) -> tuple[list[int], list[int]]:
    """Layers that are measured, and those at which slopes are taken too, which cost as much as the activation."""
    every = list(range(1, depth + 1))
    return (every, every) if plane == "depth" else (steps(depth, 1.35), steps(depth, 3.0))


def steps(depth: int, ratio: float) -> list[int]:
    """Layers from 1 to the last, each `ratio` times the one before.

    >>> steps(50, 2.0)
    [1, 2, 4, 8, 16, 32, 50]
    """
    found = [1]
    while found[-1] < depth:
        found.append(min(depth, max(found[-1] + 1, round(found[-1] * ratio))))
    return found


def predict_points(points: Points, rows: Sequence[int]) -> pd.DataFrame:
    """A row per point and layer of `rows`, points slowest: at this layer, and at infinite depth; in bounded memory."""
    across, at = list(dict.fromkeys(points.sigma_w)), [layer - 1 for layer in rows]
    rising = points.sigma_b[:: len(across)]
    together, frames = max(1, THEORY // len(across)), []
    for up in (rising[start : start + together] for start in range(0, len(rising), together)):
        weights, biases = (torch.tensor(values, dtype=torch.float64) for values in (across, up))
        scales = weights.repeat(len(up)), biases.repeat_interleave(len(across))
        path = trajectory(points.row, *scales, points.depth, points.correlation)
        with np.errstate(divide="ignore"):
            growth = np.exp(np.cumsum(np.log(path.chi_1.numpy()), -1) / np.arange(1, points.depth + 1))
        found = {
            "predicted_q": path.q.numpy(), "predicted_cosine": 1 - path.apart.numpy(),
            "predicted_chi_1": path.chi_1.numpy(), "predicted_growth": growth,
        }  # fmt: skip
        frame = pd.DataFrame({name: values[:, at].ravel() for name, values in found.items()})
        limits = phase_plane(points.row, across, up, first_layer=True)
        limit = {name: np.repeat(limits[column].to_numpy(), len(rows)) for name, column in LIMIT_COLUMNS.items()}
        frames.append(frame.assign(**limit))
    return pd.concat(frames, ignore_index=True)


def points_frame(
    points: Points,
    found: PointStatistics,
    layers: np.ndarray,
    slopes: np.ndarray,
    rows: Sequence[int],
    theory: pd.DataFrame,
) -> pd.DataFrame:
    """What was measured of all points, at the layers `rows`, with the predictions `theory`; points slowest."""
    sigma_w, sigma_b = np.array(points.sigma_w)[:, None], np.array(points.sigma_b)[:, None]
    died = found.died_at[:, None]
    apart = hold_last_alive(found.apart, layers, died)
    chi_1 = sigma_w**2 * hold_last_alive(found.slope, slopes, died)
    saturated = hold_last_alive(found.saturated, slopes, died)
    at, near = np.searchsorted(layers, rows), np.searchsorted(slopes, rows)
    with np.errstate(invalid="ignore"):
        std = np.sqrt(np.maximum(found.q[:, at] - found.mean[:, near] ** 2, 0))
    q = found.q[:, at]
    columns = {
        "gain": sigma_w, "sigma_b": sigma_b, "layer": np.array(rows)[None], "q": q,
        "std": np.where(np.isfinite(q), std, np.inf),
        "cosine": 1 - apart[:, at], "one_minus_cosine": apart[:, at], "chi_1": chi_1[:, near],
        "growth": mean_growth(chi_1, slopes)[:, near], "frac_saturated": saturated[:, near],
        "xi_c": depth_scale(apart, chi_1[:, -1], layers)[:, None], "n_nan": found.nan[:, near],
        "n_inf": found.inf[:, near], "died_at": died,
    }  # fmt: skip
    shape = (len(sigma_w), len(rows))
    frame = pd.DataFrame({name: np.broadcast_to(values, shape).ravel() for name, values in columns.items()})
    frame = frame.astype({"n_nan": "int64", "n_inf": "int64", "died_at": "int64"})
    phases = np.where(frame["q"] == np.inf, "unbounded", np.where(frame["chi_1"] > 1, "chaotic", "ordered"))
    frame = pd.concat([frame.assign(phase=phases), theory], axis=1)
    return frame.assign(difference=frame["cosine"] - frame["predicted_cosine"], mode="fan_in", bias=0.0)


def hold_last_alive(values: np.ndarray, layers: np.ndarray, died: np.ndarray) -> np.ndarray:
    """Where a signal has died, what it was when last seen alive; 0 of one that no layer has seen alive."""
    found = values.copy()
    gone = (died > 0) & (layers >= died)
    for k in range(1, values.shape[1]):
        found[:, k] = np.where(gone[:, k], found[:, k - 1], found[:, k])
    return np.asarray(np.nan_to_num(found, nan=0.0))


def mean_growth(chi_1: np.ndarray, layers: np.ndarray) -> np.ndarray:
    """Geometric mean over layers 1 to l at every l of `layers`, between them by straight lines in the logarithm."""
    logs = np.log(np.maximum(chi_1, 1e-300))
    sums = [logs[:, 0]]
    for k in range(1, len(layers)):
        gap = layers[k] - layers[k - 1]
        sums.append(sums[-1] + gap * (logs[:, k] + logs[:, k - 1]) / 2 + (logs[:, k] - logs[:, k - 1]) / 2)
    alive = np.minimum.accumulate(chi_1, axis=-1) > 0
    return np.asarray(np.where(alive, np.exp(np.stack(sums, -1) / layers), 0.0))


def depth_scale(apart: np.ndarray, chi_1: np.ndarray, layers: np.ndarray) -> np.ndarray:
    """xi_c in layers, (P,): |c_l - c_end| falls by e in so many. nan where fewer than 3 layers show it.

    In the ordered phase (chi_1 < 1) the end is 1 and 1 - c between FITTED counts; else it is the mean of the last third
    of the layers, and what stands out of their spread.
    """
    tail = apart[:, -max(LEAST, len(layers) // 3) :]
    end, noise = np.where(chi_1 < 1, 0.0, tail.mean(-1)), np.where(chi_1 < 1, 0.0, tail.std(-1))
    away = np.abs(apart - end[:, None])
    ordered = (away > FITTED[0]) & (away < FITTED[1])
    leaving = np.logical_and.accumulate(away > NOISE * noise[:, None] + 1e-6, axis=-1)
    use = np.where((chi_1 < 1)[:, None], ordered, leaving)
    with np.errstate(divide="ignore", invalid="ignore"):
        y, n = np.where(use, np.log(np.where(use, away, 1.0)), 0.0), use.sum(-1)
        x = np.where(use, layers, 0)
        slope = (n * (x * y).sum(-1) - x.sum(-1) * y.sum(-1)) / (n * (x * x).sum(-1) - x.sum(-1) ** 2)
        return np.asarray(np.where((n >= LEAST) & (slope < 0), -1 / slope, np.nan))


def phase_as_text(frame: pd.DataFrame) -> str:
    """Of the last layer, means over the networks of a point: shares of the phases, and how far theory is off."""
    last = frame[frame["layer"] == frame["layer"].max()]
    keys = ["gain", "sigma_b"]
    mean = last.groupby(keys)[["cosine", "predicted_cosine", "chi_1", "limit_chi_1"]].mean()
    predicted_phases = last.groupby(keys)["predicted_phase"].first()
    died = last.groupby(keys)["died_at"].max() > 0
    lines = [f"{len(mean)} points, {last['seed'].nunique()} network(s) each, {int(last['layer'].max())} layers"]
    measured, predicted = mean["chi_1"] < 1, mean["limit_chi_1"] < 1 - 1e-9  # to rounding
    lines.append(
        f"ordered, gradients shrink: {measured.mean():.1%} measured, {predicted.mean():.1%} predicted; "
        f"chaotic or unbounded, they grow: {1 - measured.mean():.1%} and {1 - predicted.mean():.1%}"
    )
    shares = ", ".join(f"{word} {share:.1%}" for word, share in predicted_phases.value_counts(normalize=True).items())
    lines.append(f"theory: {shares}")
    far = (np.log(mean["limit_chi_1"].clip(1e-300)).abs() > AWAY) & ~died
    if far.any():
        apart = (mean["cosine"] - mean["predicted_cosine"])[far]
        gain, sigma_b = apart.abs().idxmax()
        lines.append(
            f"away from the critical line (chi_1 off 1 by more than {math.expm1(AWAY):.0%}) measured and predicted "
            f"agree in the phase of {(measured == predicted)[far].mean():.1%} of the points; the cosine differs by "
            f"{apart.abs().median():.2g} in the median, most at sigma_w {gain:.3g}, sigma_b {sigma_b:.3g}: "
            f"{apart[(gain, sigma_b)]:+.2g}"
        )
    if died.any():
        lines.append(f"the signal died at {died.mean():.1%} of the points")
    return "\n".join(lines)
