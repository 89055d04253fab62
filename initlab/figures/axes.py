"""What figures are made of: a new figure with its title, colours, heat maps, named rows."""

import textwrap
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH, DPI = 8.5, 100  # inches, dots an inch: 850 pixels, as wide as a README shows
TITLE = 100  # letters in a line of a title


class NotebookFigure(Figure):
    """A figure that shows itself where it is the last line of a notebook's cell; pyplot does not know of it."""

    def _repr_png_(self) -> bytes:
        image = BytesIO()
        self.savefig(image, format="png", dpi=90)
        return image.getvalue()


def new_figure(
    title: str, rows: int = 1, columns: int = 1, height: float = 2.7, **settings: Any
) -> tuple[Figure, list[Axes]]:
    """An empty figure as wide as a page shows it, with a title that states the finding, and its axes row by row.

    height: of a row of panels, in inches. settings: go to `subplots`.
    """
    sns.set_theme(style="whitegrid", palette="colorblind", context="notebook", font_scale=0.78)
    lines = textwrap.wrap(title, TITLE) if title else []
    figure = NotebookFigure(figsize=(WIDTH, height * rows + 0.7 + 0.19 * len(lines)), layout="constrained", dpi=DPI)
    set_title(figure, title)
    axes = figure.subplots(rows, columns, squeeze=False, **settings)
    return figure, list(axes.flat)


def set_title(figure: Figure, title: str, subtitle: str = "") -> None:
    """A title over the whole width, which the finding may fill with several lines."""
    figure.suptitle("\n".join([*textwrap.wrap(title, TITLE), *([subtitle] if subtitle else [])]), fontsize=10.5)


def marker_if_sparse(values: pd.Series) -> str:
    """A marker where a line would have too few points to be seen."""
    return "o" if values.nunique() <= 3 else ""


Colours = dict[str, tuple[float, float, float]]


def assign_colours(order: list[str], palette: str = "colorblind") -> Colours:
    """A colour for each label, in their order."""
    return dict(zip(order, sns.color_palette(palette, len(order)), strict=True))


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


def draw_heat_map(
    figure: Figure, ax: Axes, x: np.ndarray, y: np.ndarray, values: np.ndarray, name: str, share: float, least: float
) -> None:
    """Values around 0 as colours that diverge from there; grey where they are not finite.

    x, y: the edges of the cells. name: of the colours. share: of the sizes, how many have a colour of their own; the
    colours reach at least to `least`.
    """
    ends = np.abs(values[np.isfinite(values)])
    limit = max(float(np.quantile(ends, share)) if len(ends) else 1.0, least)
    ax.set_facecolor("0.75")
    shown = np.ma.masked_invalid(values)
    mesh = ax.pcolormesh(x, y, shown, cmap="RdBu_r", vmin=-limit, vmax=limit, rasterized=True)
    figure.colorbar(mesh, ax=ax, label=name)
    ax.grid(visible=False)


def name_rows(ax: Axes, names: list[str]) -> None:
    """Rows from top to bottom, with a line between any two."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    for row in range(1, len(names)):
        ax.axhline(row - 0.5, color="0.85", linewidth=0.8, zorder=0)
