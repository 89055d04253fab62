"""The figure of `task=broadcast`: what a view reads, number for number, and which of them are the same in memory."""

import ast
import math

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from initlab.figures.axes import new_figure

ACROSS = 5  # panels beside each other
TALLEST = 3  # rows of a panel
INK = 0.15  # as dark as a text on pale colours has to be


def draw_broadcast(examples: pd.DataFrame) -> Figure | None:
    """A panel for each view: its numbers, coloured by their place in memory; one colour is one number, read again.

    examples: the table of that name. None where it has no views.
    """
    rows = examples[examples["part"] == "view"]
    rows = rows[rows["shape"].map(lambda text: 0 < len(ast.literal_eval(text)) <= 2)]
    if not len(rows):
        return None
    stretched = [one for one in rows.to_dict("records") if count_numbers(one) > one["stored"]]
    most = max(stretched, key=lambda one: count_numbers(one) / one["stored"], default=None)
    title = "Views read the numbers of another tensor; nothing is copied"
    if most is not None:
        title = (
            f"{most['expression']} shows {count_numbers(most)} numbers and stores {most['stored']}: "
            "a stretched dimension has stride 0. One colour is one place in memory"
        )
    figure, axes = new_figure(title, math.ceil(len(rows) / ACROSS), ACROSS, height=1.9)
    for ax, row in zip(axes, rows.to_dict("records"), strict=False):
        shape, stride = (ast.literal_eval(row[name]) for name in ("shape", "stride"))
        values = np.array(row["values"].replace("[", "").replace("]", "").split()).reshape(shape)
        places = row["offset"] + sum(step * index for step, index in zip(stride, np.indices(shape), strict=True))
        draw_cells(ax, np.atleast_2d(values), np.atleast_2d(places))
        ax.set_title(row["expression"], fontsize=9)
        ax.set_xlabel(
            f"shape {row['shape']}, stride {row['stride']}\n{row['stored']} stored: {row['memory']}", fontsize=8
        )
    for ax in axes[len(rows) :]:
        ax.set_visible(False)
    return figure


def count_numbers(row: dict[str, str]) -> int:
    """How many numbers a view shows."""
    return math.prod(ast.literal_eval(row["shape"]))


def draw_cells(ax: Axes, values: np.ndarray, places: np.ndarray) -> None:
    """The numbers as cells of a table; places: of each in memory, from the beginning of what is stored."""
    colours = sns.color_palette("pastel", 10)
    for (row, column), text in np.ndenumerate(values):
        colour = colours[int(places[row, column]) % len(colours)]
        ax.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="white"))
        ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=9, color=str(INK))
    size = max(TALLEST, *values.shape)
    ax.set(xlim=(0, size), ylim=(size, 0), aspect="equal", xticks=[], yticks=[])
    ax.grid(visible=False)
    sns.despine(ax=ax, left=True, bottom=True)
