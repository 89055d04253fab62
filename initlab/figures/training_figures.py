"""Figures of a training: values and gradients by layer and step, and the losses of both implementations."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from initlab.figures.axes import cell_edges, draw_heat_map, new_figure, plot_start
from initlab.figures.lines import MOST, PANELS, assign_styles, plot_lines, set_log_ticks, share_panels
from initlab.runs import summary, theory_rows
from initlab.runs.labels import shorten_labels
from initlab.runs.schema import LOSSES, STATS, THEORY

Tables = Mapping[str, pd.DataFrame]
BY_HAND = {"scratch": "by hand", "module": "nn.Module"}
NAMES = {"std": "log10 of the std; grey: not finite", "mean": "mean / std"}  # of colours


def _training_rows(tables: Tables, tensor: str, direction: str) -> pd.DataFrame:
    if STATS not in tables:
        return pd.DataFrame()
    stats = tables[STATS]
    chosen = (stats["stage"] == "train") & (stats["implementation"] == "scratch")
    return stats[chosen & (stats["tensor"] == tensor) & (stats["direction"] == direction)]


def training_activations(tables: Tables) -> Figure | None:
    """Mean and std of the preactivations over the training steps, a line per layer, or heat maps of many layers."""
    rows = _training_rows(tables, "preactivation", "forward")
    if not len(rows):
        return None
    label, layers = str(rows["label"].iloc[0]), sorted(rows["layer"].unique())
    by_layer = rows.assign(label="layer " + rows["layer"].astype(str))
    bands = {statistic: summary.band(by_layer, ["step"], statistic) for statistic in ("mean", "std")}
    figure, axes = new_figure(_training_title(label, bands["std"], layers), 1, 2)
    for ax, (statistic, band) in zip(axes, bands.items(), strict=True):
        ax.set_xlabel("training step")
        if len(layers) > MOST:
            _plot_layers(figure, ax, band, bands["std"], statistic, layers)
            continue
        names = [f"layer {layer}" for layer in layers]
        styles = assign_styles(names)
        died = summary.first_dead(
            by_layer, ["label", "seed"], "step", "min", by_layer["n_nan"] + by_layer["n_inf"] > 0, by_layer["step"] < 0
        )
        plot_lines(ax, band, "step", styles, died, log=False, names=ax is axes[-1], along="step")
        known = theory_rows.start(tables.get(THEORY, pd.DataFrame(columns=theory_rows.NEEDED)), statistic)
        colours = {layer: styles[name].colour for layer, name in zip(layers, names, strict=True)}
        plot_start(ax, known, colours, int(rows["step"].max()))
        ax.set_ylabel(f"{statistic} of the preactivations")
        if ax is axes[0] and len(known):
            ax.legend(*[part[-1:] for part in ax.get_legend_handles_labels()], loc="best", fontsize=8)
    return figure


def _plot_layers(
    figure: Figure, ax: Axes, band: pd.DataFrame, std: pd.DataFrame, statistic: str, layers: list[int], name: str = ""
) -> None:
    """A heat map of a statistic by layer and step: log10 of the std, the mean in units of the std; grey: not finite."""
    names = [f"layer {layer}" for layer in layers]
    table, unit = (rows.pivot(index="label", columns="step", values="median").reindex(names) for rows in (band, std))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log10(table.to_numpy()) if statistic == "std" else table.to_numpy() / unit.to_numpy()
    steps, rows = cell_edges(table.columns.to_numpy(float)), cell_edges(np.array(layers, float))
    draw_heat_map(figure, ax, steps, rows, values, name or NAMES[statistic], share=0.95, least=0.1)
    ax.set_ylabel("layer")
    ax.invert_yaxis()


def _training_title(label: str, band: pd.DataFrame, layers: list[int]) -> str:
    texts = []
    for layer in (layers[0], layers[-1]) if len(layers) > 1 else layers:
        line = band[band["label"] == f"layer {layer}"]["median"].to_numpy()
        alive = np.isfinite(line)
        gone = "" if alive.all() else f", not finite from step {int(np.argmin(alive))} on"
        span = f"from {line[0]:.3g} to {line[alive][-1]:.3g}{gone}" if alive.any() else "never finite"
        texts.append(f"layer {layer} {span}")
    return f"{label}: std of the preactivations in training, " + ", ".join(texts)


def gradient_norm(tables: Tables) -> Figure | None:
    """Norm of every layer's weight gradient at every recorded step: a line per layer, or a heat map of many layers."""
    rows = _training_rows(tables, "weight", "backward")
    if not len(rows):
        return None
    by_layer, layers = rows.assign(label="layer " + rows["layer"].astype(str)), sorted(rows["layer"].unique())
    names = [f"layer {layer}" for layer in layers]
    band = summary.band(by_layer, ["step"], "norm")
    values = band["median"].to_numpy()
    finite = values[np.isfinite(values) & (values > 0)]
    span = f"from {finite.min():.3g} to {finite.max():.3g}" if len(finite) else "0 or not finite everywhere"
    label = str(rows["label"].iloc[0])
    figure, (ax,) = new_figure(f"{label}: norm of the weight gradients, {span}, median over networks")
    ax.set_xlabel("training step")
    if len(layers) > MOST or not len(finite):
        _plot_layers(figure, ax, band, band, "std", layers, "log10 of the norm of dL/dW; grey: 0 or not finite")
        return figure
    lost = by_layer["n_nan"] + by_layer["n_inf"] > 0
    died = summary.first_dead(by_layer, ["label", "seed"], "step", "min", lost, by_layer["frac_zero"] == 1)
    plot_lines(ax, band, "step", assign_styles(names), died, names=True, along="step")
    ax.set_ylabel("norm of dL/dW (16-84 % of networks)")
    return figure


def loss(tables: Tables) -> Figure | None:
    """Loss by hand and by `nn.Module`, and beneath it their relative difference."""
    losses = tables.get(LOSSES, pd.DataFrame())
    if not len(losses):
        return None
    label = str(losses["label"].iloc[0])
    band = summary.band(losses.assign(label=losses["implementation"]), ["step"], "loss")
    difference = summary.loss_difference(losses)
    last = band[band["step"] == band["step"].max()].set_index("label")["median"]
    worst = difference["largest"].max()
    title = (
        f"{label}: loss {last['scratch']:.3g} by hand and {last['module']:.3g} by nn.Module "
        f"after {band['step'].max()} updates, relative difference at most {worst:.1g}"
        f"{': the two trainings have parted' if worst > 0.01 else ''}"
    )
    figure, (top, bottom) = new_figure(title, 2, 1, height=2.1, sharex=True, height_ratios=[2, 1])
    named = band.assign(label=band["label"].astype(str).map(BY_HAND))
    log = bool((band["low"].dropna() > 0).all()) and band["median"].max() > 3 * band["median"].min()
    plot_lines(
        top,
        named,
        "step",
        assign_styles(list(BY_HAND.values())),
        _find_lost(losses, BY_HAND),
        log=log,
        names=True,
        along="step",
    )
    top.set_ylabel("loss")
    bottom.plot(difference["step"], difference["largest"], color="0.25", label="largest of the networks")
    bottom.plot(difference["step"], difference["median"], ".", color="0.25", markersize=3, label="median")
    bottom.legend(fontsize=8)
    if (difference["largest"] > 0).any():
        bottom.set_yscale("log")
        set_log_ticks(bottom)
    bottom.set_ylabel("|difference| / loss")
    bottom.set_xlabel("training step")
    return figure


def _find_lost(losses: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """Per label and network the first step whose loss is not finite."""
    named = losses.assign(label=losses["implementation"].astype(str).map(names)) if names else losses
    lost = ~np.isfinite(named["loss"])
    return summary.first_dead(named, ["label", "seed"], "step", "min", lost, lost & False)


def compared_loss(tables: Tables) -> Figure | None:
    """Loss by hand of several runs, six in a panel."""
    losses = tables.get(LOSSES)
    if losses is None or not len(losses):
        return None
    rows = losses[losses["implementation"] == "scratch"]
    short, common = shorten_labels(list(dict.fromkeys(rows["label"].astype(str))))
    rows = rows.assign(label=rows["label"].astype(str).map(short))
    band = summary.band(rows, ["step"], "loss")
    last = band[band["step"] == band["step"].max()].sort_values("median")
    best = last.iloc[0]
    lowest = f"{best['label']} {best['median']:.3g}" if np.isfinite(best["median"]) else "none is finite"
    labels = list(short.values()) if len(short) <= PANELS * MOST else list(last["label"][: PANELS * MOST].astype(str))
    groups = share_panels(labels)
    title = f"Lowest loss after {best['step']} updates: {lowest}{f' ({common})' if common else ''}"
    title += f"; the best {len(labels)} of {len(short)} settings are drawn" if len(labels) < len(short) else ""
    figure, axes = new_figure(title, len(groups), sharex=True)
    died = _find_lost(rows, {})
    for ax, group in zip(axes, groups, strict=True):
        mine = band[band["label"].isin(group)]
        log = bool((mine["low"].dropna() > 0).all())
        mine_died = died[died["label"].isin(group)]
        plot_lines(ax, mine, "step", assign_styles(group), mine_died, log=log, names=len(labels) > 1, along="step")
        ax.set_ylabel("loss (median, 16-84 % of networks)")
    axes[-1].set_xlabel("training step")
    return figure
