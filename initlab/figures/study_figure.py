"""The figure of a study: one statistic over one column, a line per setting, beside what theory predicts."""

import textwrap
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from initlab.figures import figure_spec
from initlab.figures.axes import (
    Colours,
    assign_colours,
    layer_axis,
    legend,
    log_scale,
    mark_dead_layers,
    mark_format_limits,
    new_figure,
    plot_bands,
    plot_theory,
)
from initlab.figures.figure_spec import FigureSpec
from initlab.runs.select import bare

IN_A_ROW = 3  # panels
AXIS_LABELS = {"step": "training step"}
SCALED = ("std", "rms")  # a 1 means something, and so do the ends of the number formats
TICKS = 8  # values on a log axis that get a tick each
ORDERED = 4  # more values of a number than these are told apart by a scale of colours


def draw_study(one: FigureSpec, tables: Mapping[str, pd.DataFrame], title: str, subtitle: str = "") -> Figure:
    """Median and 16-84 % of networks, a panel per value of `one.col`.

    title, subtitle: the study's question and what became of its expectations. Raises `UsageError` where the tables have
    no such column or no such rows.
    """
    rows = figure_spec.select_rows(one, tables)
    table = tables[one.table]
    panels, labels = (list(map(str, dict.fromkeys(rows[of].sort_values()))) for of in ("panel", "label"))
    ordered = bool(one.by) and _is_number(table, one.by) and len(labels) > ORDERED
    colours = assign_colours(labels, "viridis" if ordered else "colorblind")
    across = min(IN_A_ROW, len(panels))
    figure, axes = new_figure("", -(-len(panels) // across), across, sharex=True, sharey=True)
    lines = [*textwrap.wrap(title, 52 * across + 34), subtitle]
    figure.suptitle("\n".join(filter(None, lines)), fontsize=12)
    several = rows.groupby(["panel", "label", "x"], observed=True).size().max() > 1
    spread = " (median and 16-84 % of networks)" if several else ""
    for position, (ax, panel) in enumerate(zip(axes, panels, strict=False)):
        _draw_panel(ax, one, rows, panel, colours, tables)
        ax.set_title(panel, fontsize=11)
        ax.set_xlabel(AXIS_LABELS.get(one.x, one.x))
        ax.set_ylabel(one.y + spread if position % across == 0 else "")
        if position == min(across, len(panels)) - 1 and len(labels) > 1:
            legend(ax, len(labels))
        elif (shown := ax.get_legend()) is not None:
            shown.remove()
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return figure


def _draw_panel(
    ax: Axes, one: FigureSpec, rows: pd.DataFrame, panel: str, colours: Colours, tables: Mapping[str, pd.DataFrame]
) -> None:
    """One panel: lines over numbers, points over text."""
    mine = rows[rows["panel"].astype(str) == panel]
    band, over_numbers = figure_spec.bands(mine), _is_number(tables[one.table], one.x)
    if over_numbers:
        plot_bands(ax, band, "x", colours=colours)
    else:  # text has no line between its values: a point with its band for each, the labels side by side
        texts = list(dict.fromkeys(band["x"]))
        for position, (label, colour) in enumerate(colours.items()):
            of_label = band[band["label"].astype(str) == label]
            x = np.array([texts.index(text) for text in of_label["x"]]) + 0.6 * ((position + 0.5) / len(colours) - 0.5)
            spread = np.abs(of_label[["low", "high"]].to_numpy().T - of_label["median"].to_numpy())
            ax.errorbar(x, of_label["median"], spread, color=colour, marker="o", linestyle="", capsize=3, label=label)
        ax.set_xticks(range(len(texts)), texts)
        ax.set_xlim(-0.5, len(texts) - 0.5)
    if one.y_scale == "log":
        log_scale(ax, rows["y"])
    if one.x_scale == "log" and pd.api.types.is_numeric_dtype(rows["x"].dtype) and (rows["x"] > 0).all():
        ax.set_xscale("log")
        measured = np.unique(rows["x"])
        if len(measured) <= TICKS:
            ax.set_xticks(measured, [f"{x:.4g}" for x in measured])
            ax.minorticks_off()
    if not over_numbers:
        return
    if one.theory:
        lines = figure_spec.find_predictions(one, tables)
        lines = lines[lines["panel"].astype(str) == panel]
        if len(lines):
            plot_theory(ax, lines, list(colours), "x", colours)
    if one.y in SCALED and ax.get_yscale() == "log":
        dtypes = [panel] if one.col == "dtype" else sorted(tables[one.table]["dtype"].astype(str).unique())
        mark_format_limits(ax, dtypes)
    if one.x == "layer":
        layer_axis(ax)
        ax.set_xlim(rows["x"].min() - 0.5, rows["x"].max() + 0.5)
    died = figure_spec.first_dead(mine, one)
    mark_dead_layers(ax, band, died, "backward" if one.backwards else "forward", one.x, colours)


def _is_number(table: pd.DataFrame, name: str) -> bool:
    return bool(pd.api.types.is_numeric_dtype(table[bare(name)].dtype))
