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
    banded,
    beside,
    coloured,
    layer_axis,
    legend,
    limits,
    log_scale,
    mark_deaths,
    sheet,
)
from initlab.figures.figure_spec import Picture
from initlab.runs.select import bare

IN_A_ROW = 3  # panels
SAID = {"step": "training step"}
SCALED = ("std", "rms")  # a 1 means something, and so do the ends of the number formats
FEW = 8  # places on a log axis that are named themselves
ORDERED = 4  # more values of a number than these are told apart by a scale of colours


def draw_study(one: Picture, tables: Mapping[str, pd.DataFrame], title: str, subtitle: str = "") -> Figure:
    """Median and 16-84 % of networks; raises `UsageError` where the tables have no such column or no such rows."""
    rows = figure_spec.rows_of(one, tables)
    table = tables[one.table]
    panels, labels = (list(map(str, dict.fromkeys(rows[of].sort_values()))) for of in ("panel", "label"))
    ordered = bool(one.by) and _is_number(table, one.by) and len(labels) > ORDERED
    colours = coloured(labels, "viridis" if ordered else "colorblind")
    across = min(IN_A_ROW, len(panels))
    figure, axes = sheet("", -(-len(panels) // across), across, sharex=True, sharey=True)
    wrapped = textwrap.wrap(title, 52 * across + 34)
    figure.suptitle("\n".join([*wrapped, *([subtitle] if subtitle else [])]), fontsize=12)
    several = rows.groupby(["panel", "label", "x"], observed=True).size().max() > 1
    spread = " (median and 16-84 % of networks)" if several else ""
    for place, (ax, panel) in enumerate(zip(axes, panels, strict=False)):
        _draw(ax, one, rows, panel, colours, tables)
        ax.set_title(panel, fontsize=11)
        ax.set_xlabel(SAID.get(one.x, one.x))
        ax.set_ylabel(one.y + spread if place % across == 0 else "")
        if place == min(across, len(panels)) - 1 and len(labels) > 1:
            legend(ax, len(labels))
        elif (shown := ax.get_legend()) is not None:
            shown.remove()
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return figure


def _draw(
    ax: Axes, one: Picture, rows: pd.DataFrame, panel: str, colours: Colours, tables: Mapping[str, pd.DataFrame]
) -> None:
    """One panel."""
    mine = rows[rows["panel"].astype(str) == panel]
    band = figure_spec.bands(mine)
    if not _is_number(tables[one.table], one.x):
        _points(ax, band, colours)
        _scale(ax, one, rows)
        return
    banded(ax, band, "x", colours=colours)
    _scale(ax, one, rows)
    if one.theory:
        lines = figure_spec.predicted(one, tables)
        lines = lines[lines["panel"].astype(str) == panel]
        if len(lines):
            beside(ax, lines, list(colours), "x", colours)
    if one.y in SCALED and ax.get_yscale() == "log":
        limits(ax, [panel] if one.col == "dtype" else sorted(tables[one.table]["dtype"].astype(str).unique()))
    if one.x == "layer":
        layer_axis(ax)
        ax.set_xlim(rows["x"].min() - 0.5, rows["x"].max() + 0.5)
    died = figure_spec.deaths(mine, one)
    mark_deaths(ax, band, died, "backward" if one.backwards else "forward", one.x, colours)


def _is_number(table: pd.DataFrame, name: str) -> bool:
    return bool(pd.api.types.is_numeric_dtype(table[bare(name)].dtype))


def _scale(ax: Axes, one: Picture, rows: pd.DataFrame) -> None:
    """A log axis where it is asked for and there is something that it can show."""
    if one.y_scale == "log":
        log_scale(ax, rows["y"])
    if one.x_scale == "log" and _all_positive(rows["x"]):
        ax.set_xscale("log")
        measured = np.unique(rows["x"])
        if len(measured) <= FEW:
            ax.set_xticks(measured, [f"{x:.4g}" for x in measured])
            ax.minorticks_off()


def _all_positive(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values.dtype) and bool((values > 0).all())


def _points(ax: Axes, band: pd.DataFrame, colours: Colours) -> None:
    """Words have no line between them: a point with its band for each, the labels side by side."""
    words = list(dict.fromkeys(band["x"]))
    for place, (label, colour) in enumerate(colours.items()):
        mine = band[band["label"].astype(str) == label]
        at = np.array([words.index(word) for word in mine["x"]]) + 0.6 * ((place + 0.5) / len(colours) - 0.5)
        spread = np.abs(mine[["low", "high"]].to_numpy().T - mine["median"].to_numpy())
        ax.errorbar(at, mine["median"], spread, color=colour, marker="o", linestyle="", capsize=3, label=label)
    ax.set_xticks(range(len(words)), words)
    ax.set_xlim(-0.5, len(words) - 0.5)
