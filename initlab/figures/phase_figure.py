"""The figure of a plane of networks: what was measured beside what theory predicts, in the same colours.

Brightness tells the values apart, so that the maps read in grey too; of chi_1 it is brightest at 1.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import LogLocator, NullFormatter

from initlab.figures.axes import WIDTH, cell_edges, new_figure
from initlab.meanfield.fixed_points import critical_line

TRAINABLE = 6  # depth scales that gradients and inputs survive, an estimate: Schoenholz et al. 2017
LINE: dict[str, Any] = {"colors": "white", "linewidths": 2.2}
UNDER: dict[str, Any] = {"colors": "black", "linewidths": 4.0}  # beneath the white line, for where the map is bright
DIVERGING = "RdBu_r"
WIDEST = 1e6  # between the ends of a logarithmic colour scale


class Map(NamedTuple):
    """What is shown: columns measured and predicted, their label, whether colours are logarithmic, and their map.

    Of what is a matter of above or below 1 the colours diverge from there.
    """

    measured: str
    predicted: str
    label: str
    log: bool
    colours: str = "viridis"


MAPS = {
    "sigma": (
        Map("cosine", "predicted_cosine", "cosine of two inputs", False),
        Map("chi_1", "predicted_chi_1", "chi_1: gradient's growth a layer", True, DIVERGING),
    ),
    "depth": (
        Map("cosine", "predicted_cosine", "cosine of two inputs", False),
        Map("q", "predicted_q", "q, second moment of preactivations", True),
    ),
}


def draw_phase(frame: pd.DataFrame) -> Figure:
    """Two rows of two maps: measured (mean over the networks) and predicted; the line chi_1 = 1 of infinite depth on
    all of them, crosses where a network's signal died, and over layers 6 xi_c.
    """
    plane = "depth" if frame["layer"].nunique() > 1 else "sigma"
    up = "layer" if plane == "depth" else "sigma_b"
    numbers = frame.select_dtypes("number").columns.difference(["gain", up])
    with np.errstate(invalid="ignore", over="ignore"):
        mean = frame.groupby([up, "gain"])[list(numbers)].mean()
    known = "activation" in frame  # the tables of run folders say it
    line = critical_line(str(frame["activation"].iloc[0])) if known else pd.DataFrame(columns=["sigma_w", "sigma_b"])
    figure, axes = new_figure(_title(frame, plane), 2, 2, sharex=True, sharey=True)
    figure.set_size_inches(WIDTH, 6.8)
    for row, shown in enumerate(MAPS[plane]):
        pair = axes[2 * row : 2 * row + 2]
        tables = [mean[name].unstack("gain") for name in (shown.measured, shown.predicted)]
        norm = _norm(np.stack([table.to_numpy() for table in tables]), shown)
        for ax, table, where in zip(pair, tables, ("measured", "theory, infinite width"), strict=True):
            mesh = _plot_map(ax, table, norm, shown.colours)
            _plot_critical(ax, mean, plane, line)
            ax.set_title(f"{shown.label}: {where}", fontsize=9.5)
        _mark_dead(pair[0], mean)
        bar = figure.colorbar(mesh, ax=pair, label=shown.label)
        if shown.log and norm.vmax < 100 * norm.vmin:  # type: ignore[operator]
            bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            bar.ax.yaxis.set_minor_formatter(NullFormatter())
    for ax in axes[2:]:
        ax.set_xlabel("sigma_w = std of a weight × sqrt(fan_in)")
    for ax in axes[::2]:
        ax.set_ylabel("layer" if plane == "depth" else "sigma_b = std of a bias")
    outline = [Stroke(linewidth=UNDER["linewidths"], foreground="black"), Normal()]
    line_style: dict[str, Any] = {"color": "white", "linewidth": LINE["linewidths"], "path_effects": outline}
    handles = [Line2D([], [], **line_style, label="critical: chi_1 = 1 at infinite depth")]
    if plane == "depth":
        handles.append(Line2D([], [], **line_style, linestyle="--", label="6 xi_c, trainable depth (estimate)"))
    if (frame["died_at"] > 0).any():
        handles.append(Line2D([], [], color="0.6", marker="x", linestyle="", label="a network's signal died"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _norm(values: np.ndarray, shown: Map) -> Normalize:
    if not shown.log:
        return Normalize(min(0.0, float(np.nanmin(values))), 1.0)
    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive):
        return LogNorm(0.1, 10)
    low, high = max(positive.min(), WIDEST**-0.5), min(positive.max(), WIDEST**0.5)
    if shown.colours == DIVERGING:
        far = max(high, 1 / low, 2.0)
        return LogNorm(1 / far, far)
    return LogNorm(min(low, high / 2), max(high, 2 * low))


def _plot_map(ax: Axes, table: pd.DataFrame, norm: Normalize, colours: str) -> Any:
    values = np.nan_to_num(table.to_numpy(dtype=float), posinf=np.finfo(float).max, nan=np.nan)
    if isinstance(norm, LogNorm):
        values = np.clip(values, norm.vmin, norm.vmax)
    ax.set_facecolor("0.75")
    ax.grid(visible=False)
    x, y = cell_edges(table.columns.to_numpy()), cell_edges(table.index.to_numpy())
    return ax.pcolormesh(x, y, np.ma.masked_invalid(values), norm=norm, cmap=colours, rasterized=True)


def _plot_critical(ax: Axes, mean: pd.DataFrame, plane: str, line: pd.DataFrame) -> None:
    """Where chi_1 of the fixed point is 1: the line itself where it crosses all of the plane, else where the points'
    own chi_1 passes 1, as where q has two fixed points; over layers also 6 xi_c.
    """
    chi_1 = mean["limit_chi_1"].unstack("gain")
    x, y, values = chi_1.columns.to_numpy(), chi_1.index.to_numpy(), np.log(chi_1.clip(lower=1e-300).to_numpy())
    low, high = line["sigma_b"].agg(["min", "max"])
    if plane == "sigma" and len(line) > 1 and low <= max(y[0], 1e-3) and high >= y[-1]:
        _plot_white(ax, line["sigma_w"], line["sigma_b"], "-")
    elif min(values.shape) > 1 and values.min() < 0 < values.max():
        for style in (UNDER, LINE):
            ax.contour(x, y, values, levels=[0.0], **style)
    if plane == "depth":
        depth = TRAINABLE * mean["predicted_xi_c"].groupby("gain").first()
        _plot_white(ax, depth.index, depth, "--")
    ax.set_xlim(*cell_edges(x)[[0, -1]])
    ax.set_ylim(*cell_edges(y)[[0, -1]])


def _plot_white(ax: Axes, x: Any, y: Any, linestyle: str) -> None:
    """White on black, visible on every colour."""
    ax.plot(x, y, color="black", linewidth=UNDER["linewidths"])
    ax.plot(x, y, color="white", linewidth=LINE["linewidths"], linestyle=linestyle)


def _mark_dead(ax: Axes, mean: pd.DataFrame) -> None:
    dead = mean[mean["died_at"] > 0].reset_index()
    up = dead.columns[0]
    if up == "layer":
        dead = dead[dead["layer"] >= dead["died_at"]]
    many = max(1, len(dead) // 400)
    ax.plot(dead["gain"][::many], dead[up][::many], "x", color="0.6", markersize=3)


def _title(frame: pd.DataFrame, plane: str) -> str:
    last = frame[frame["layer"] == frame["layer"].max()]
    mean = last.groupby(["gain", "sigma_b"])[["chi_1", "limit_chi_1", "cosine", "predicted_cosine"]].mean()
    difference = (mean["cosine"] - mean["predicted_cosine"]).abs()
    ordered, predicted = (mean["chi_1"] < 1).mean(), (mean["limit_chi_1"] < 1 - 1e-9).mean()  # to rounding
    run = f"{last['activation'].iloc[0]}, " if "activation" in last else ""
    width = f" of {last['width'].iloc[0]} units" if "width" in last else ""
    return (
        f"{run}{int(last['layer'].max())} layers{width}: "
        f"{ordered:.0%} of {len(mean)} points are ordered ({predicted:.0%} predicted); the cosine is "
        f"{difference.median():.2g} from theory in the median, {difference.max():.2g} at most"
    )
