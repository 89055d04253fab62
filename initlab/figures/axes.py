"""What figures are made of: a new figure with its title, lines with bands, ends of number formats, marks of death."""

import textwrap
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from initlab.runs import summary
from initlab.stats.dtypes import FORMATS

BEYOND = 10.0  # so far does an axis follow a prediction beyond what was measured


class NotebookFigure(Figure):
    """A figure that shows itself where it is the last line of a notebook's cell; pyplot does not know of it."""

    def _repr_png_(self) -> bytes:
        image = BytesIO()
        self.savefig(image, format="png", dpi=90)
        return image.getvalue()


def new_figure(title: str, rows: int = 1, columns: int = 1, **settings: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure with a title that states the finding, and its axes row by row; settings go to `subplots`."""
    sns.set_theme(style="whitegrid", palette="colorblind", context="notebook")
    figure = NotebookFigure(figsize=(5.5 * columns + 4, 2.6 * rows + 2.9), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 52 * columns + 34)), fontsize=12)
    axes = figure.subplots(rows, columns, squeeze=False, **settings)
    return figure, list(axes.flat)


def marker_if_sparse(values: pd.Series) -> str:
    """A marker where a line would have too few points to be seen."""
    return "o" if values.nunique() <= 3 else ""


Colours = dict[str, tuple[float, float, float]]


def assign_colours(order: list[str], palette: str = "colorblind") -> Colours:
    """A colour for each label, in their order."""
    return dict(zip(order, sns.color_palette(palette, len(order)), strict=True))


def plot_bands(
    ax: Axes,
    band: pd.DataFrame,
    x: str,
    marker: str = "",
    colours: Colours | None = None,
) -> None:
    """A line of medians and a band from 16 to 84 % for every label, told apart by colour and by dashes."""
    band = band.assign(label=band["label"].astype(str))
    colours = colours or assign_colours(list(band["label"].unique()))
    order = list(colours)
    sns.lineplot(
        data=band, x=x, y="median", hue="label", style="label", hue_order=order, style_order=order,
        palette=colours, errorbar=None, ax=ax, marker=marker or marker_if_sparse(band[x]) or None, markersize=6,
    )  # fmt: skip
    for label, rows in band.groupby("label"):
        ax.fill_between(rows[x], rows["low"], rows["high"], color=colours[label], alpha=0.2, linewidth=0)
    legend(ax, len(order))


def legend(ax: Axes, labels: int) -> None:
    """Inside the axes, or beside them where there are many labels."""
    if labels > 3:
        ax.legend(title=None, loc="upper left", bbox_to_anchor=(1.01, 1))
    else:
        ax.legend(title=None)


def plot_theory(
    ax: Axes, lines: pd.DataFrame, order: list[str], x: str = "layer", colours: Colours | None = None
) -> None:
    """What theory predicts: dashed with the 95 % band of one network, or circles where several labels share the axes.

    The axis follows the band as far as the measured values reach, and a little beyond.
    """
    low, high = ax.get_ylim()
    if len(order) == 1:
        ax.plot(lines[x], lines["predicted"], color="0.1", linestyle=(0, (5, 2)), linewidth=1.6, label="theory")
        ax.fill_between(
            lines[x], lines["low"], lines["high"], facecolor="none", edgecolor="0.72", hatch="////",
            linewidth=0.8, zorder=0.5, label="theory: 95 % of networks",
        )  # fmt: skip
        ends = lines[["low", "high"]].to_numpy()
        ends = ends[np.isfinite(ends) & (ends > 0)]
        if len(ends):
            low, high = min(low, max(ends.min(), low / BEYOND)), max(high, min(ends.max(), high * BEYOND))
    else:
        colours = colours or assign_colours(order)
        style: dict[str, Any] = {"marker": "o", "fillstyle": "none", "markersize": 6, "linestyle": ""}
        for label, mine in lines.groupby("label", observed=True):
            few_points = mine[mine[x].rank() % max(1, len(mine) // 10) == 0]
            ax.plot(few_points[x], few_points["predicted"], color=colours[str(label)], **style)
        ax.plot([], [], color="0.3", label="theory", **style)
    ax.set_ylim(low, high)
    legend(ax, len(order))


def plot_start(ax: Axes, known: pd.DataFrame, colours: Mapping[int, object], steps: int) -> None:
    """Diamonds left of step 0: the prediction for step 0 of every layer, with its 95 % band; there is none later."""
    if not len(known):
        return
    gap = max(steps, 1) * min(0.014, 0.11 / len(known))
    for k, (layer, centre, low, high) in enumerate(known.itertuples(index=False), start=1):
        ax.plot([-k * gap] * 2, [low, high], color=colours[layer], linewidth=2, solid_capstyle="butt")
        ax.plot([-k * gap], [centre], "D", markersize=4, markeredgecolor=colours[layer], markerfacecolor="white")
    ax.plot([], [], "D", markersize=4, markeredgecolor="0.3", markerfacecolor="white", label="theory at step 0, 95 %")


def log_scale(ax: Axes, values: pd.Series | np.ndarray, least: float = 1.0) -> None:
    """A log axis, unless there is nothing that it could show or less than the factor `least` between the values."""
    positive = np.asarray(values, dtype=float)
    positive = positive[np.isfinite(positive) & (positive > 0)]
    if len(positive) and positive.max() >= least * positive.min():
        ax.set_yscale("log")


def cell_edges(centres: np.ndarray) -> np.ndarray:
    """The edges of the cells of a heat map, from their centres, which are evenly spaced."""
    half = (centres[1] - centres[0]) / 2 if len(centres) > 1 else 0.5
    return np.append(centres - half, centres[-1] + half)


def name_rows(ax: Axes, names: list[str]) -> None:
    """Rows from top to bottom, with a line between any two."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    for row in range(1, len(names)):
        ax.axhline(row - 0.5, color="0.85", linewidth=0.8, zorder=0)


def layer_axis(ax: Axes) -> None:
    """Layers are whole numbers."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer")


def mark_format_limits(ax: Axes, dtypes: list[str]) -> None:
    """Grey lines: 1, and the ends of the number formats where the curves come near them."""
    low, high = ax.get_ylim()
    ax.axhline(1, color="0.45", linestyle="--", linewidth=1, zorder=1)
    for dtype in dtypes:
        row = FORMATS[dtype]
        for value, name in zip((row.max, row.tiny, row.least), ("largest", "smallest normal", "smallest"), strict=True):
            if low / 1e3 < value < high * 1e3 and (value > 1e4 or value < 1e-4):
                ax.axhline(value, color="0.7", linestyle=":", linewidth=1.2, zorder=1)
                ax.annotate(
                    f"{name} {dtype}", (1, value), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                    textcoords="offset points", ha="right", fontsize=8, color="0.4",
                )  # fmt: skip


def mark_dead_layers(
    ax: Axes,
    band: pd.DataFrame,
    died: pd.DataFrame,
    direction: str,
    along: str = "layer",
    colours: Colours | None = None,
) -> None:
    """A cross on the axis and a label at the layer from which a signal is not finite or exactly 0."""
    order = list(band["label"].astype(str).unique())
    colours = colours or assign_colours(order)
    height = 0
    for label in order:
        mine = died[died["label"].astype(str) == label]
        first = "min" if direction == "forward" else "max"
        fate = summary.find_fate(mine, first, along)
        if not fate.kind:
            continue
        layer, y = fate.at, 0.04 + 0.075 * height
        height += 1
        ax.axvline(layer, color=colours[label], linestyle=":", linewidth=1.4)
        ax.plot(
            [layer], [y], marker="X", markersize=9, color=colours[label], transform=ax.get_xaxis_transform(),
            clip_on=False,
        )  # fmt: skip
        left = layer > ax.get_xlim()[1] / 2
        name = f"{label}: " if len(order) > 1 else ""
        ax.annotate(
            f"{name}{fate}", (layer, y), xycoords=ax.get_xaxis_transform(), xytext=(-9 if left else 9, 0),
            textcoords="offset points", ha="right" if left else "left", va="center", fontsize=9,
            color=colours[label], bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85},
        )  # fmt: skip
