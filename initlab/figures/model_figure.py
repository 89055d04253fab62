"""The figure of a measured model: layers downwards in network order, powers of two across, what number formats hold.

Left the outputs of the modules, right their parameters; values and gradients are told apart by colour, marks at the
edges say where a signal is exactly 0, inf or nan.
"""

import textwrap
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from initlab.errors import UsageError
from initlab.figures.axes import DPI, TITLE, WIDTH, NotebookFigure
from initlab.figures.model_rows import place_rows
from initlab.stats.dtypes import FORMATS

SERIES = {"values": 0, "gradients": 1, "update": 2}  # and their colours in the palette
NAMES = {"values": "forward: values", "gradients": "backward: gradients", "update": "updates of parameters"}
# The formats of the ruler by their short names: fp32, bf16, fp16, fp8 e4m3, ...
RULER = {
    name.replace("float8_", "fp8 ").replace("bfloat", "bf").replace("float", "fp"): row
    for name, row in FORMATS.items()
    if name != "float64"
}
OFFSET = 0.17  # of a series from the middle of its row
ROW, TALLEST = 0.2, 15.0  # inches of a row, and of all rows together at most
LETTER_ROW = 0.16  # inches that a line of text needs
LEAST_SPAN = 12  # octaves around 1 that are always shown
EDGE = {"zero": 0.012, "inf": 0.988, "nan": 0.988}  # of the axes' width: where the marks of a dead signal stand
MARKS: dict[str, dict[str, Any]] = {
    "zero": {"marker": "o", "markerfacecolor": "white"},
    "inf": {"marker": ">"},
    "nan": {"marker": "X"},
}
MOST = 0.9  # of the rows that follow: as many are dead where a signal is said to be dead "from here on"
WORDS = {"zero": "exactly 0", "inf": "inf", "nan": "nan"}


def draw_model(frame: pd.DataFrame, octaves: pd.DataFrame | None = None, bands: pd.DataFrame | None = None) -> Figure:
    """A dot at the rms and a bar to the largest magnitude; with histograms the bar begins at the smallest one.

    frame: the table `stats` of `measure` or of a probe; of several steps the last, and the first one hollow.
    octaves: its table `histograms`. bands: the table `theory`, what `predict` gives, or the `bands` of a verdict: the
    95 % band of the rms lies beneath the values, and the gradients, of the same layer and tensor. Raises `UsageError`
    where there is no output and no parameter.
    """
    rows = place_rows(frame, octaves)
    if not len(rows):
        raise UsageError("plot: there is no output and no parameter in these rows")
    sides = [side for side in (True, False) if (rows["is_output"] == side).any()]
    places = int(rows["place"].max()) + 1
    height = min(ROW * places, TALLEST) + 0.3
    figure = NotebookFigure(figsize=(WIDTH, height + 2.4), layout="constrained", dpi=DPI)
    ruler = 0.19 * len(RULER)
    with sns.axes_style("whitegrid"):
        grid = figure.subplots(
            2, len(sides), sharex="col", sharey="row", squeeze=False,
            height_ratios=[ruler, height], width_ratios=[1.35, 1][: len(sides)],
        )  # fmt: skip
    for column, side in enumerate(sides):
        mine = rows[rows["is_output"] == side]
        top, ax = grid[:, column]
        low, high = find_span(mine, bands if side else None)
        ax.set_xlim(low, high)
        draw_ruler(top, ax, named=column == 0)
        if bands is not None and side:
            draw_bands(ax, mine, bands)
        draw_rows(ax, mine, ROW * places > TALLEST)
        top.set_title("outputs of the modules" if side else "parameters", fontsize=10)
        ax.set_xlabel("magnitude")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.xaxis.set_major_formatter(lambda x, _: f"$2^{{{x:.0f}}}$")
    name_places(grid[1, 0], rows, height)
    lines = textwrap.wrap(describe_model(rows), TITLE)
    figure.suptitle("\n".join(lines), fontsize=10.5)
    handles = list(list_handles(rows, octaves is not None, bands))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def find_span(rows: pd.DataFrame, bands: pd.DataFrame | None) -> tuple[float, float]:
    """Octaves from left to right: all that was measured, the bands of a verdict, and some around 1."""
    found = rows[["low", "middle", "high"]].to_numpy(float).ravel()
    if bands is not None and "name" in bands:
        with np.errstate(divide="ignore"):
            found = np.append(found, np.log2(bands[["band_low", "band_high"]].to_numpy(float)))
    found = found[np.isfinite(found)]
    low, high = min([-LEAST_SPAN / 2, *found]), max([LEAST_SPAN / 2, *found])
    margin = 0.06 * (high - low)
    return low - margin, high + margin


def draw_ruler(top: Axes, ax: Axes, named: bool) -> None:
    """Above the rows what each format holds: normal numbers thick, subnormal ones thin; its ends go down as lines."""
    low, high = ax.get_xlim()
    for row, one in enumerate(RULER.values()):
        least, tiny, largest = (float(np.log2(value)) for value in (one.least, one.tiny, one.max))
        top.plot([max(tiny, low), min(largest, high)], [row, row], color="0.45", linewidth=4, solid_capstyle="butt")
        top.plot([max(least, low), max(tiny, low)], [row, row], color="0.45", linewidth=1.3, solid_capstyle="butt")
        for end in (least, largest):
            if low < end < high:
                top.plot([end] * 2, [row - 0.42, row + 0.42], color="0.45", linewidth=1.3)
                ax.axvline(end, color="0.72", linewidth=0.9, linestyle=(0, (2, 2)), zorder=0.8)
    ax.axvline(0, color="0.45", linewidth=0.9, zorder=0.8)
    top.set_ylim(len(RULER) - 0.4, -0.6)
    top.set_yticks(range(len(RULER)), list(RULER), fontsize=8)
    top.grid(visible=False)
    top.tick_params(labelbottom=False, labelleft=named)
    for spine in top.spines.values():
        spine.set_visible(False)


def draw_rows(ax: Axes, rows: pd.DataFrame, dense: bool) -> None:
    colours = sns.color_palette("colorblind", len(SERIES))
    first, last = rows["step"].min(), rows["step"].max()
    for (step, series), mine in rows.groupby(["step", "series"], sort=False):
        colour, pale = colours[SERIES[series]], step == first != last
        y = mine["place"].to_numpy() + find_offset(rows, series)
        alive = ((mine["state"] == "") & np.isfinite(mine["middle"])).to_numpy()
        x, ends = mine["middle"].to_numpy(), mine["low"].where(np.isfinite(mine["low"]), mine["middle"]).to_numpy()
        size = 2.2 if dense else 4
        if not pale:
            ax.hlines(
                y[alive], ends[alive], mine["high"].to_numpy()[alive], color=colour, alpha=0.4,
                linewidth=1 if dense else 2.6, zorder=2,
            )  # fmt: skip
        style: dict[str, Any] = {"color": colour, "markersize": size, "zorder": 3 if not pale else 2.5}
        style |= {"markerfacecolor": "white", "alpha": 0.6} if pale else {}
        ax.plot(x[alive], y[alive], "o", **style)
        if mine["is_output"].iloc[0]:
            ax.plot(np.where(alive, x, np.nan), y, color=colour, linewidth=0.8, alpha=0.25 if pale else 0.45, zorder=1)
        for state, mark in MARKS.items():
            there = (mine["state"] == state).to_numpy()
            where = np.full(there.sum(), EDGE[state])
            if there.any() and not pale:
                ax.plot(
                    where, y[there], linestyle="", transform=ax.get_yaxis_transform(), clip_on=False,
                    **{"color": colour, "markersize": 3 if dense else 5, "zorder": 4, **mark},
                )  # fmt: skip
        if not pale and not alive.all():
            mark_first_dead(ax, mine, y, colour)


def find_offset(rows: pd.DataFrame, series: str) -> float:
    """How far a series stands below the middle of its row: all that are there stand side by side."""
    shown = [name for name in SERIES if (rows["series"] == name).any()]
    return OFFSET * (2 * shown.index(series) - (len(shown) - 1)) if series in shown else 0.0


def mark_first_dead(ax: Axes, mine: pd.DataFrame, y: np.ndarray, colour: Any) -> None:
    """Words at the place where the signal of this colour ends first, in the direction in which it travels."""
    found = find_first_dead(mine)
    if found is not None:
        state, at, rest = found
        right = EDGE[state] > 0.5
        text = f"{WORDS[state]} from here on" if rest else WORDS[state]
        ax.annotate(
            text, (EDGE[state], y[at]), xycoords=ax.get_yaxis_transform(), xytext=(-8 if right else 8, 0),
            textcoords="offset points", ha="right" if right else "left", va="center", fontsize=9, color=colour,
            zorder=5, bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85},
        )  # fmt: skip


def find_first_dead(mine: pd.DataFrame) -> tuple[str, int, bool] | None:
    """State and position of the first row that died, and whether what follows did too; rows of parameters follow from
    nothing.
    """
    order = np.arange(len(mine))
    if mine["series"].iloc[0] == "gradients":
        order = order[::-1]
    dead = (mine["state"] != "").to_numpy()[order]
    if not dead.any():
        return None
    at = int(dead.argmax())
    rest = bool(dead[at:].mean() >= MOST) and len(dead) - at > 1 and bool(mine["is_output"].iloc[0])
    return str(mine["state"].iloc[order[at]]), int(order[at]), rest


def describe_model(rows: pd.DataFrame) -> str:
    """What became of the values and of the gradients, in a sentence each."""
    first, last = int(rows["step"].min()), int(rows["step"].max())
    texts = []
    for series, word in (("values", "Values"), ("gradients", "gradients")):
        outputs = rows[rows["is_output"] & (rows["series"] == series) & (rows["step"] == last)].sort_values("place")
        mine = outputs if len(outputs) else rows[(rows["series"] == series) & (rows["step"] == last)]
        if not len(mine):
            continue
        found = find_first_dead(mine)
        if found is not None:
            state, at, rest = found
            lost = int((mine["state"] != "").sum())
            where = f"from {mine['text'].iloc[at]} on" if rest else f"at {mine['text'].iloc[at]}"
            texts.append(f"{word} are {WORDS[state]} {where} ({lost} of {len(mine)} tensors)")
        else:
            ends = mine if series == "values" else mine[::-1]
            texts.append(f"{word} {describe_way(ends['text'].tolist(), ends['middle'].tolist())}")
    when = f"Step {last} (hollow: step {first}). " if first != last else ""
    return when + "; ".join(texts)


def describe_way(names: list[str], octaves: list[float]) -> str:
    """How the size changes from the first to the last of some places."""
    growth = octaves[-1] - octaves[0]
    if not np.isfinite(growth):
        return f"have no finite size at {names[-1] if np.isfinite(octaves[0]) else names[0]}"
    if len(names) == 1:
        return f"have an rms of $2^{{{octaves[0]:.3g}}}$ at {names[0]}"
    way = f"from {names[0]} to {names[-1]}"
    if abs(growth) < 1:
        return f"keep their size {way}"
    return f"{'grow' if growth > 0 else 'shrink'} $2^{{{abs(growth):.3g}}}$-fold {way}"


def draw_bands(ax: Axes, rows: pd.DataFrame, bands: pd.DataFrame) -> None:
    """Shaded beneath the dots: what 95 % of networks have. Of gradients theory knows ratios alone."""
    named = [name for name in ("name", "part", "call") if name in bands]
    keys = ["layer", "tensor", "direction", *named]
    known = bands[bands["statistic"].astype(str) == "rms"].astype(dict.fromkeys(keys[1:3], str)).drop_duplicates(keys)
    for series in ("values", "gradients") if named else ("values",):
        mine = rows[(rows["series"] == series) & (rows["step"] == rows["step"].max())]
        found = mine.merge(known[[*keys, "band_low", "band_high"]], on=keys).sort_values("place")
        colour = sns.color_palette("colorblind")[SERIES[series]] if named else "0.5"
        shaded = "stream" if (found["tensor"] == "stream").any() else "preactivation"  # what runs through the network
        for tensor, same in found.groupby("tensor"):
            with np.errstate(divide="ignore"):
                low, high = (np.log2(same[name].to_numpy(float)) for name in ("band_low", "band_high"))
            y = same["place"] + find_offset(rows, series)
            ax.hlines(y, low, high, color=colour, linewidth=8, alpha=0.3, zorder=0.9)
            if tensor == shaded:
                ax.fill_betweenx(y, low, high, color=colour, linewidth=0, alpha=0.15, zorder=0.85)


def name_places(ax: Axes, rows: pd.DataFrame, height: float) -> None:
    """The names of the modules from top to bottom, or of as many as there is room for, those with parameters first."""
    names = rows.drop_duplicates("place").set_index("place")["text"].sort_index()
    ax.set_ylim(len(names) - 0.4, -0.6)
    gap = LETTER_ROW * len(names) / height  # places between two names that do not touch
    if gap > 1:
        with_parameters = names[names.index.isin(rows["place"][~rows["is_output"]])]
        names = with_parameters if len(with_parameters) else names
    shown: list[int] = []
    for place in names.index:
        if not shown or place - shown[-1] >= gap:
            shown.append(place)
    ax.set_yticks(shown, names[shown], fontsize=8)


def list_handles(rows: pd.DataFrame, smallest: bool, bands: pd.DataFrame | None) -> Iterable[Line2D]:
    colours = sns.color_palette("colorblind", len(SERIES))
    for series, number in SERIES.items():
        if (rows["series"] == series).any():
            yield Line2D([], [], color=colours[number], marker="o", markersize=5, label=NAMES[series])
    bar = "rms, and bar from smallest to largest |x|" if smallest else "rms, and bar to the largest |x|"
    yield Line2D([], [], color="0.4", marker="o", markersize=4, linewidth=2.6, label=bar)
    for state, mark in MARKS.items():
        if (rows["state"] == state).any():
            yield Line2D([], [], linestyle="", **{"color": "0.3", "markersize": 5, **mark}, label=WORDS[state])
    if bands is not None:
        drawn = "method" in bands and (bands["method"] == "reference").all()
        whose = "95 % of networks under the right rule" if drawn else "theory: 95 % of networks"
        yield Line2D([], [], color="0.8", linewidth=7, label=whose)
