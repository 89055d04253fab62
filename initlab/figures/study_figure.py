"""The figure of a study: one statistic over one column, a line per setting, beside what theory predicts."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from initlab.figures import figure_spec
from initlab.figures.axes import new_figure, set_title
from initlab.figures.figure_spec import FigureSpec
from initlab.figures.lines import (
    FLAT,
    MOST,
    Styles,
    assign_styles,
    mark_formats,
    plot_lines,
    plot_theory,
    set_layer_ticks,
    set_log_ticks,
)
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
    styles = assign_styles(labels, ordered)
    across = min(IN_A_ROW, len(panels))
    figure, axes = new_figure("", -(-len(panels) // across), across, sharex=True, sharey=True)
    set_title(figure, title, subtitle)
    several = rows.groupby(["panel", "label", "x"], observed=True).size().max() > 1
    spread = " (median and 16-84 % of networks)" if several else ""
    for position, (ax, panel) in enumerate(zip(axes, panels, strict=False)):
        last = position % across == across - 1 or position == len(panels) - 1
        _draw_panel(ax, one, rows, panel, styles, tables, names=last)
        ax.set_title(panel, fontsize=10)
        ax.set_xlabel(AXIS_LABELS.get(one.x, one.x))
        ax.set_ylabel(one.y + spread if position % across == 0 else "")
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return figure


def _draw_panel(
    ax: Axes,
    one: FigureSpec,
    rows: pd.DataFrame,
    panel: str,
    styles: Styles,
    tables: Mapping[str, pd.DataFrame],
    names: bool,
) -> None:
    """One panel: lines over numbers, points over text."""
    mine = rows[rows["panel"].astype(str) == panel]
    band, over_numbers = figure_spec.bands(mine), _is_number(tables[one.table], one.x)
    log = one.y_scale == "log" and bool((rows["y"] > 0).any())
    if not over_numbers:
        _draw_points(ax, band, styles, log, names)
        return
    scaled = one.y in SCALED and log
    died = figure_spec.first_dead(mine, one)
    direct = names and len(styles) <= 2 * MOST
    plot_lines(ax, band, "x", styles, died, one.backwards, log, FLAT if scaled else 0.0, direct, one.x)
    if names and len(styles) > 2 * MOST:
        ax.legend(fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(1.01, 1))
    if one.x_scale == "log" and (rows["x"] > 0).all():
        ax.set_xscale("log")
        set_log_ticks(ax, "x")
        measured = np.unique(rows["x"])
        if len(measured) <= TICKS:
            ax.set_xticks(measured, [f"{x:.4g}" for x in measured])
            ax.minorticks_off()
    if one.theory:
        lines = figure_spec.find_predictions(one, tables)
        plot_theory(ax, lines[lines["panel"].astype(str) == panel], styles, "x")
    if scaled:
        dtypes = [panel] if one.col == "dtype" else sorted(tables[one.table]["dtype"].astype(str).unique())
        mark_formats(ax, dtypes)
    if one.x == "layer":
        set_layer_ticks(ax, rows["x"])


def _draw_points(ax: Axes, band: pd.DataFrame, styles: Styles, log: bool, names: bool) -> None:
    """Text has no line between its values: a point with its band for each, the labels side by side."""
    texts = list(dict.fromkeys(band["x"]))
    for position, (label, style) in enumerate(styles.items()):
        rows = band[band["label"].astype(str) == label]
        x = np.array([texts.index(text) for text in rows["x"]]) + 0.6 * ((position + 0.5) / len(styles) - 0.5)
        spread = np.abs(rows[["low", "high"]].to_numpy().T - rows["median"].to_numpy())
        ax.errorbar(x, rows["median"], spread, color=style.colour, marker="o", linestyle="", capsize=3, label=label)
    ax.set_xticks(range(len(texts)), texts)
    ax.set_xlim(-0.5, len(texts) - 0.5)
    if log:
        ax.set_yscale("log")
        set_log_ticks(ax)
    if names and len(styles) > 1:
        ax.legend(fontsize=8, loc="best")


def _is_number(table: pd.DataFrame, name: str) -> bool:
    return bool(pd.api.types.is_numeric_dtype(table[bare(name)].dtype))
