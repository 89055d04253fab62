"""The figure of the singular values of a stack: the spectrum of some layers, and how uneven it is, beside theory."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from initlab.figures.axes import assign_colours, log_scale, marker_if_sparse, new_figure
from initlab.figures.lines import set_layer_ticks, set_log_ticks
from initlab.runs import summary

RESOLVED = 45  # octaves below the largest singular value; what lies deeper is the rounding of float64


def draw_jacobian(moments: pd.DataFrame, spectra: pd.DataFrame) -> Figure:
    """Left the singular values by rank: of one run layer by layer, of several at their last layers. Right the variance
    of s^2 in units of its squared mean, measured (median and 16-84 % of networks) and predicted (dashed).

    nan, inf and 0 are not drawn; where nothing can be, the title still says what there is.
    """
    labels = list(dict.fromkeys(moments["label"].astype(str)))
    several = len(labels) > 1
    figure, (left, right) = new_figure(_title(spectra, labels), 1, 2)
    curves = _last_layers(spectra) if several else spectra.assign(label=spectra["layer"].astype(str))
    names = labels if several else list(dict.fromkeys(curves["label"]))
    colours = assign_colours(names, "colorblind" if several else "viridis")
    for name in names:
        _plot_spectrum(left, curves[curves["label"].astype(str) == name], colours[name], name)
    log_scale(left, np.concatenate([line.get_ydata() for line in left.lines]) if left.lines else np.array([]))
    if left.get_yscale() == "log":
        set_log_ticks(left)
    left.axhline(1, color="0.45", linestyle="--", linewidth=1, zorder=1)
    left.set_xlabel("rank / number of singular values")
    left.set_ylabel("singular value (median, 16-84 % of networks)")
    if len(left.lines) > 1:
        left.legend(title=None if several else "layer")
    for label in labels:
        _plot_variance(right, moments[moments["label"].astype(str) == label], colours.get(label, "C0"), label)
    log_scale(right, np.concatenate([line.get_ydata() for line in right.lines]))
    if right.get_yscale() == "log":
        set_log_ticks(right)
    set_layer_ticks(right, moments["layer"])
    right.set_ylabel("variance of s² / (mean of s²)², in a network")
    right.plot([], [], color="0.3", linestyle="--", label="predicted")
    right.legend(title=None)
    return figure


def _last_layers(spectra: pd.DataFrame) -> pd.DataFrame:
    last = spectra.groupby("label", observed=True)["layer"].transform("max")
    return spectra[spectra["layer"] == last]


def _plot_spectrum(ax: Axes, rows: pd.DataFrame, colour: object, name: str) -> None:
    """A line as far as every network's values are resolved and not 0."""
    logs = rows.pivot(index="rank", columns="seed", values="log2_singular_value")
    resolved = (logs >= logs.max() - RESOLVED).all(axis=1).to_numpy() & np.isfinite(logs).all(axis=1).to_numpy()
    if not resolved.any():
        return
    with np.errstate(over="ignore"):
        band = np.exp2(summary.rank_quantiles(logs[resolved].to_numpy()))
    _plot_band(ax, logs.index[resolved] / len(logs), band, colour, name)


def _plot_variance(ax: Axes, rows: pd.DataFrame, colour: object, label: str) -> None:
    """Measured: each network's own ratio. Predicted: expected numerator over expected denominator.

    Few large networks rule both expectations, and cancel in their ratio.
    """
    theory = rows.drop_duplicates("layer").sort_values("layer")
    with np.errstate(invalid="ignore", divide="ignore"):
        own = rows.assign(value=rows["var_s2"] / rows["mean_s2"] ** 2)
        expected = theory["predicted_var_s2"] / (theory["predicted_mean_s4"] - theory["predicted_var_s2"])
    measured = own.pivot(index="layer", columns="seed", values="value")
    _plot_band(ax, measured.index, summary.rank_quantiles(measured.to_numpy()), colour, label)
    ax.plot(theory["layer"], expected, color=colour, linestyle="--")


def _plot_band(ax: Axes, x: pd.Index, band: np.ndarray, colour: object, label: str) -> None:
    low, median, high = band
    ax.plot(x, median, color=colour, label=label, marker=marker_if_sparse(x.to_series()) or None)
    ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def _title(spectra: pd.DataFrame, labels: list[str]) -> str:
    found = {}
    last = _last_layers(spectra)
    for label in labels:
        rows = last[last["label"].astype(str) == label]
        middle = (rows["rank"].max() + 1) // 2
        of_rank = rows.groupby("rank")["log2_singular_value"]
        logs = [summary.rank_quantiles(of_rank.get_group(k).to_numpy())[1] for k in (1, middle)]
        low = logs[0] - RESOLVED
        with np.errstate(over="ignore"):
            largest, bound = np.exp2([logs[0], max(logs[1], low)])
        found[label] = f"largest {largest:.3g}, middle {'below ' if not logs[1] >= low else ''}{bound:.3g}"
    depths = sorted(last["layer"].unique())
    where = f"After {depths[0]} layers" if len(depths) == 1 else "At the last layers"
    return f"{where} the singular values are: {summary.findings(found)}"
