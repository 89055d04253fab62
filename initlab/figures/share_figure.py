"""The figure of what number formats would do to a model: tensors downwards, the share that each format loses across."""

import textwrap
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from initlab.figures.axes import DPI, WIDTH, NotebookFigure
from initlab.figures.model_figure import ROW, TALLEST, name_places
from initlab.figures.model_rows import OUTPUTS, PASSED_ON, add_places, complete_rows

# Share of the long table -> its colour and what it is called.
EVENTS: dict[str, tuple[str, str]] = {
    "underflow": ("0.25", "becomes 0"),
    "subnormal": ("0.7", "subnormal: loses digits"),
    "overflow_most": ("#d55e00", "overflows"),
}
HALF = 0.36  # height of a bar, in rows


def draw_format_shares(frame: pd.DataFrame) -> Figure:
    """A column for each format; in each row a bar for the values and one for the gradients, of the last step."""
    rows = complete_rows(frame)
    rows = rows[~(rows["op"].str.startswith(PASSED_ON) & (rows["tensor"] == "other"))]
    rows = add_places(rows[rows["step"] == rows["step"].max()])
    rows = rows[rows["series"].isin(list(OUTPUTS.values()))]
    rows["worst"] = rows[list(EVENTS)].sum(axis=1)
    formats = list(dict.fromkeys(rows["format"]))
    places = int(rows["place"].max()) + 1 if len(rows) else 1
    height = min(1.4 * ROW * places, TALLEST) + 0.3
    figure = NotebookFigure(figsize=(max(WIDTH, 2 + 2.2 * len(formats)), height + 2), layout="constrained", dpi=DPI)
    with sns.axes_style("whitegrid"):
        axes = figure.subplots(1, len(formats), sharey=True, squeeze=False)[0]
    for ax, name in zip(axes, formats, strict=True):
        mine = rows[rows["format"] == name].sort_values("worst").drop_duplicates(["place", "series"], keep="last")
        for series, offset in zip(OUTPUTS.values(), (-0.2, 0.2), strict=True):
            shown = mine[mine["series"] == series]
            y, left = shown["place"].to_numpy() + offset, np.zeros(len(shown))
            hatch: dict[str, Any] = {"hatch": "////", "edgecolor": "white"} if series == "gradients" else {}
            for share, (colour, _) in EVENTS.items():
                width = shown[share].fillna(0).to_numpy()
                ax.barh(y, width, HALF, left, color=colour, linewidth=0, **hatch)
                left = left + width
        ax.set_xlim(0, 1)
        ax.xaxis.set_major_formatter(PercentFormatter(1))
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("share of the entries")
    name_places(axes[0], rows, height)
    figure.suptitle("\n".join(textwrap.wrap(describe_shares(rows, formats), 60 + 14 * len(formats))), fontsize=10.5)
    handles: list[Any] = [Patch(facecolor=colour, label=word) for colour, word in EVENTS.values()]
    handles.append(Patch(facecolor="0.5", hatch="////", edgecolor="white", label="hatched: gradients"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def describe_shares(rows: pd.DataFrame, formats: list[str]) -> str:
    """For each format the tensor that loses most, not counting lost digits."""
    texts = []
    for name in formats:
        mine = rows[rows["format"] == name].reset_index(drop=True)
        lost = mine["underflow"] + mine["overflow_most"]
        if lost.max() > 0:
            worst = mine.loc[lost.idxmax()]
            event = "overflow" if worst["overflow_most"] >= worst["underflow"] else "become 0"
            texts.append(
                f"{name}: {100 * lost.max():.2g} % of the entries {event} ({worst['series']}, {worst['text']})"
            )
        else:
            texts.append(f"{name} holds all")
    return "; ".join(texts)
