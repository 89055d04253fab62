"""The figure of where number formats end a stack: a row for each format, a mark at the layer of each event."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from initlab.figures.axes import name_rows, new_figure
from initlab.figures.lines import set_layer_ticks
from initlab.runs.schema import IN_EVERY_LABEL

EVENTS = {"overflow": "first inf", "subnormal": "first subnormal", "zero": "first zero", "all_zero": "all zero"}
ENDS = {"overflow": "inf", "all_zero": "zeros alone"}  # after these a stack carries no signal
EVENT_GAP = 0.2  # between the events of one format, in rows
PREDICTED_GAP = 0.08  # between predicted and measured


def draw_formats(frame: pd.DataFrame) -> Figure:
    """Full marks: predicted, with the layers of 95 % of networks; hollow: measured, from the first network to the last.

    An event that fewer than half of the networks meet has no mark.
    """
    order = list(dict.fromkeys(frame["format"].astype(str)))
    figure, (ax,) = new_figure(_title(frame, order))
    figure.set_size_inches(8.5, 0.75 * len(order) + 2.4)
    ax.set_xlim(0, _depth(frame) + 1)
    colours = sns.color_palette("colorblind", len(EVENTS))
    for position, ((event, name), colour) in enumerate(zip(EVENTS.items(), colours, strict=True)):
        rows = frame[frame["event"] == event]
        y = np.array([order.index(one) for one in rows["format"].astype(str)]) + EVENT_GAP * (position - 1.5)
        _marks(ax, rows[["band_low", "predicted", "band_high"]], y - PREDICTED_GAP / 2, colour, filled=True)
        _marks(ax, rows[["measured_low", "measured", "measured_high"]], y + PREDICTED_GAP / 2, colour, filled=False)
        ax.plot([], [], "o", color=colour, label=name)
    ax.plot([], [], "o", markerfacecolor="white", markeredgecolor="0.3", label="measured (full: predicted)")
    name_rows(ax, order)
    set_layer_ticks(ax, pd.Series([1, _depth(frame)]))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=10)
    return figure


def _depth(frame: pd.DataFrame) -> float:
    """The last layer, or the last that has an event where the table does not know its depth."""
    known = frame[["depth"] if "depth" in frame else ["predicted", "band_high", "measured", "measured_high"]]
    numbers = known.to_numpy(float)
    return float(numbers[np.isfinite(numbers)].max(initial=1))


def _marks(ax: Axes, spans: pd.DataFrame, y: np.ndarray, colour: object, filled: bool) -> None:
    for (low, centre, high), row in zip(spans.to_numpy(), y, strict=True):
        if np.isfinite(centre):
            last = high if np.isfinite(high) else ax.get_xlim()[1]
            ax.plot([low if np.isfinite(low) else centre, last], [row, row], color=colour, linewidth=2, alpha=0.5)
            face = colour if filled else "white"
            ax.plot([centre], [row], "o", markersize=6, markeredgecolor=colour, markerfacecolor=face)


def _title(frame: pd.DataFrame, order: list[str]) -> str:
    """Which format ends where: by what was measured, or by what is predicted where nothing was."""
    met: dict[tuple[str, float], list[str]] = {}
    held = []
    for name in order:
        rows = frame[(frame["format"].astype(str) == name) & frame["event"].isin(list(ENDS))].set_index("event")
        layers = rows["measured"].where(rows["measured_share"].notna(), rows["predicted"]).dropna()
        if len(layers):
            met.setdefault((ENDS[str(layers.idxmin())], layers.min()), []).append(name)
        else:
            held.append(name)
    ended = [f"{', '.join(names)}: {end} at layer {layer:.0f}" for (end, layer), names in met.items()]
    depth = f"{int(_depth(frame))} " if "depth" in frame else ""
    holds = [f"{', '.join(held)}: all {depth}layers"] if held else []
    run = ", ".join(str(frame[name].iloc[0]) for name in IN_EVERY_LABEL if name in frame)
    return f"Where a number format ends. {run}{': ' if run else ''}" + "; ".join([*ended, *holds])
