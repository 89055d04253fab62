"""The figure of a study: one statistic over one column, a line per setting, beside what theory predicts."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
    drop_dead,
    find_range,
    mark_formats,
    plot_lines,
    plot_theory,
    set_layer_ticks,
    set_log_ticks,
)
from initlab.runs.select import list_columns

IN_A_ROW = 3  # panels
AXIS_LABELS = {"step": "training step", "layer / width": "depth over width (layer / width)"}
SCALED = ("std", "rms")  # a 1 means something, and so do the ends of the number formats
TICKS = 8  # values on a log axis that get a tick each
ALIKE = 3.0  # a factor: a common axis may be so much longer than what a panel needs
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
    across = 2 if len(panels) == 4 else min(IN_A_ROW, len(panels))
    figure, axes = new_figure("", -(-len(panels) // across), across, sharex=True)
    set_title(figure, title, subtitle)
    several = rows.groupby(["panel", "label", "x"], observed=True).size().max() > 1
    spread = " (median, 16-84 %)" if several else ""
    of_panel = {panel: _Shown.find(one, rows[rows["panel"].astype(str) == panel]) for panel in panels}
    limits = share_limits({panel: _find_range(one, shown) for panel, shown in of_panel.items()}, one.y_scale == "log")
    for position, (ax, panel) in enumerate(zip(axes, panels, strict=False)):
        last = one.backwards or position % across == across - 1 or position == len(panels) - 1
        _draw_panel(ax, one, of_panel[panel], panel, styles, tables, limits[panel], names=last)
        ax.set_title(panel, fontsize=10, loc="left")
        ax.set_xlabel(AXIS_LABELS.get(one.x, one.x))
        ax.set_ylabel(one.y + spread if position % across == 0 else "")
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return figure


def _is_scaled(one: FigureSpec) -> bool:
    """Whether a 1 means something: of a value's size, not of a gradient's."""
    alone = one.where.get("direction") != "backward" and one.where.get("tensor") != "drift"
    return one.y in SCALED and one.y_scale == "log" and alone


class _Shown(NamedTuple):
    """What one panel shows: its rows, their bands, and where signals died."""

    rows: pd.DataFrame
    band: pd.DataFrame
    died: pd.DataFrame

    @classmethod
    def find(cls, one: FigureSpec, rows: pd.DataFrame) -> "_Shown":
        return cls(rows, figure_spec.bands(rows), figure_spec.first_dead(rows, one))


def _find_range(one: FigureSpec, shown: _Shown) -> tuple[float, float]:
    """The ends of the y axis of one panel."""
    living, _ = drop_dead(shown.band, shown.died, one.backwards)
    return find_range(shown.band if one.whole else living, one.y_scale == "log", FLAT if _is_scaled(one) else 0.0)


def share_limits(limits: Mapping[str, tuple[float, float]], log: bool) -> dict[str, tuple[float, float]]:
    """One axis for all panels, unless some of them would use less than a third of it."""
    known = [pair for pair in limits.values() if pair[0] < pair[1]]
    if not known:
        return dict(limits)
    low, high = min(pair[0] for pair in known), max(pair[1] for pair in known)
    spans = [np.log(b / a) if log else b - a for a, b in [*known, (low, high)]]
    return dict.fromkeys(limits, (low, high)) if spans[-1] < ALIKE * min(spans) else dict(limits)


def _draw_panel(
    ax: Axes,
    one: FigureSpec,
    shown: _Shown,
    panel: str,
    styles: Styles,
    tables: Mapping[str, pd.DataFrame],
    limits: tuple[float, float],
    names: bool,
) -> None:
    """One panel: lines over numbers, points over text."""
    mine, band, died = shown
    log = one.y_scale == "log" and bool((mine["y"] > 0).any())
    if not _is_number(tables[one.table], one.x):
        _draw_points(ax, one, band, styles, log, names)
        ax.set_ylim(*limits)
        return
    direct = names and len(styles) <= 2 * MOST
    log_x = one.x_scale == "log" and bool((mine["x"] > 0).all())
    if log_x:
        ax.set_xscale("log")
    plot_lines(ax, band, "x", styles, died, one.backwards, log, names=direct, along=one.x, limits=limits)
    if names and len(styles) > 2 * MOST:
        ax.legend(fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(1.01, 1))
    if log_x:
        set_log_ticks(ax, "x")
        measured = np.unique(mine["x"])
        if len(measured) <= TICKS:
            ax.set_xticks(measured, [f"{x:.4g}" for x in measured])
            ax.minorticks_off()
    if one.theory:
        lines = figure_spec.find_predictions(one, tables)
        plot_theory(ax, lines[lines["panel"].astype(str) == panel], styles, "x")
    if _is_scaled(one):
        mark_formats(ax, [panel] if one.col == "dtype" else sorted(tables[one.table]["dtype"].astype(str).unique()))
    if one.x == "layer":
        set_layer_ticks(ax, mine["x"])
    mark_expected(ax, one, panel, styles)


def mark_expected(ax: Axes, one: FigureSpec, panel: str, styles: Styles, places: Sequence[str] = ()) -> None:
    """What the source gives: a point, a level line for a y alone, an upright one for an x alone; with its text."""
    for row in one.expected:
        elsewhere = isinstance(row.get("x"), str) and row["x"] not in places  # a text that was not measured
        if row.get("panel", panel) != panel or elsewhere:
            continue
        colour = styles[row["label"]].colour if row.get("label") in styles else "0.2"
        x = places.index(row["x"]) if row.get("x") in places else row.get("x")
        low, high = ax.get_xlim()
        if isinstance(x, int | float) and not low <= x <= high:
            continue  # nor was this
        if x is None:
            ax.axhline(row["y"], color=colour, linestyle=":", linewidth=1.4)
            at, coordinates = (1, row["y"]), ax.get_yaxis_transform()
        elif "y" not in row:
            ax.axvline(x, color=colour, linestyle=":", linewidth=1.4)
            at, coordinates = (x, 0), ax.get_xaxis_transform()
        else:
            ax.plot([x], [row["y"]], "_", color="0.1", markersize=26, markeredgewidth=1.6, zorder=5)
            at, coordinates = (x, row["y"]), ax.transData
        left = x is None or (not places and "y" in row and x > (low + high) / 2)
        ax.annotate(
            row.get("text", ""), at, xycoords=coordinates, xytext=(-4 if left else 4, 3), fontsize=7.5,
            textcoords="offset points", ha="right" if left else "left", color="0.2",
        )  # fmt: skip


def _draw_points(ax: Axes, one: FigureSpec, band: pd.DataFrame, styles: Styles, log: bool, names: bool) -> None:
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
    mark_expected(ax, one, str(band["panel"].iloc[0]), styles, texts)
    if names and len(styles) > 1:
        ax.legend(fontsize=8, loc="best")


def _is_number(table: pd.DataFrame, name: str) -> bool:
    return all(pd.api.types.is_numeric_dtype(table[part].dtype) for part in list_columns(name))
