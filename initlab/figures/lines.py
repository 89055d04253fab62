"""Lines in one panel: told apart by colour and dashes, named at their ends, and marked where a signal leaves.

The axis shows what lives. A signal that died would need forty decades for itself: it leaves through the edge on which
it died, and a mark there says at which layer. At most MOST lines share a panel.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from initlab.figures.axes import marker_if_sparse
from initlab.runs import summary
from initlab.stats.dtypes import FORMATS

PANELS = 4  # below each other; more lines than fit into them are a heat map, or the best of them
MOST = 6  # lines in one panel, and colours that are told apart
SHORT = {"nonfinite": "inf at ", "zero": "0 at "}  # where a panel is narrow
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1.2)),
    (0, (7, 2, 1.5, 2)),
    (0, (3, 1.5, 1, 1.5, 1, 1.5)),
    (0, (9, 3)),
)
TEXT = 8.5  # points
NEAR_END = 30.0  # a factor: so near to the end of a number format the axis shows it
BEYOND = 10.0  # so far does an axis follow a prediction beyond what was measured
FLAT = 3.0  # a curve that stays near 1 shall look like it: the axis shows at least a factor of this on both sides


class Style(NamedTuple):
    """How one line is drawn."""

    colour: Any
    dash: Any = "-"


Styles = Mapping[str, Style]


def assign_styles(labels: Sequence[str], ordered: bool = False) -> dict[str, Style]:
    """Colour and dashes for each label; ordered: shades from dark to light, for labels that are numbers."""
    if ordered or len(labels) > 2 * MOST:
        return {
            label: Style(colour)
            for label, colour in zip(labels, sns.color_palette("viridis", len(labels)), strict=True)
        }
    palette = sns.color_palette("colorblind", 10)
    return {label: Style(palette[k % 10], DASHES[k % len(DASHES)]) for k, label in enumerate(labels)}


def plot_lines(
    ax: Axes,
    band: pd.DataFrame,
    x: str,
    styles: Styles,
    died: pd.DataFrame | None = None,
    backwards: bool = False,
    log: bool = True,
    flat: float = 0.0,
    names: bool = False,
    along: str = "layer",
    limits: tuple[float, float] | None = None,
) -> None:
    """A line of medians and a band from 16 to 84 % for each label, with its name and the mark of its death.

    band: columns `x`, `label`, `low`, `median`, `high`. styles: of all labels of the figure. died: rows of
    `summary.first_dead`. backwards: whether the signal travels from large x to small. log: the scale of the axis.
    flat: a factor around 1 that the axis shows at least. names: whether lines are named at their ends. along: what x
    counts. limits: the ends of the axis, if they are known already.
    """
    band = band.assign(label=band["label"].astype(str))
    labels = [label for label in styles if (band["label"] == label).any()]
    living, fates = drop_dead(band, died, backwards)
    fates = {label: fate._replace(along=along) for label, fate in fates.items() if label in labels}
    low, high = limits or find_range(living, log, flat)
    if log and low < high:
        ax.set_yscale("log")
    if low < high:
        ax.set_ylim(low, high)
        if log:
            set_log_ticks(ax)
    marker = marker_if_sparse(band[x])
    for label in labels:
        rows, style = band[band["label"] == label].sort_values(x), styles[label]
        ax.plot(
            rows[x], rows["median"], color=style.colour, linestyle=style.dash, linewidth=1.8, label=label,
            marker=marker, markersize=5,
        )  # fmt: skip
        ax.fill_between(rows[x], rows["low"], rows["high"], color=style.colour, alpha=0.18, linewidth=0)
    ax.set_xlim(*find_ends(band[x], ax.get_xscale() == "log"))
    mark_ends(ax, band, x, fates, styles, names or len(styles) > 1, backwards)
    if names and len(labels):
        name_lines(ax, band[~band["label"].isin(list(fates))], x, styles, backwards)


def share_panels(labels: Sequence[str]) -> list[list[str]]:
    """The labels in as few panels as hold them, about as many in each."""
    size = -(-len(labels) // max(1, -(-len(labels) // MOST)))
    return [list(labels[k : k + size]) for k in range(0, len(labels), max(1, size))]


def find_ends(x: pd.Series, log: bool = False) -> tuple[float, float]:
    """The ends of an axis a little beyond the numbers on it."""
    low, high = float(x.min()), float(x.max())
    if log:
        margin = (high / low) ** 0.02 if high > low else 1.5
        return low / margin, high * margin
    gap = 0.02 * (high - low) or 0.5
    return low - gap, high + gap


def find_range(band: pd.DataFrame, log: bool, flat: float = 0.0) -> tuple[float, float]:
    """From the lowest to the highest number of the bands, a little beyond; nan where there is none."""
    values = band[["low", "median", "high"]].to_numpy(float)
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not len(values):
        return float("nan"), float("nan")
    low, high = float(values.min()), float(values.max())
    if not log:
        gap = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
        return low - gap, high + gap
    if flat:
        low, high = min(low, 1 / flat), max(high, flat)
    margin = max(0.04 * np.log10(high / low), 0.02)
    return low / 10**margin, high * 10**margin


def drop_dead(
    band: pd.DataFrame, died: pd.DataFrame | None, backwards: bool = False
) -> tuple[pd.DataFrame, dict[str, summary.Fate]]:
    """The rows of what lives, or all where nothing does; and the fates of what died. `died` as in `plot_lines`."""
    if died is None:
        return band, {}
    every = {
        str(label): summary.find_fate(rows, "max" if backwards else "min")
        for label, rows in died.groupby("label", observed=True)
    }
    dead = {label: fate for label, fate in every.items() if fate.kind}
    living = band[~band["label"].astype(str).isin(list(dead))]
    return living if len(living) else band, dead


def set_log_ticks(ax: Axes, axis: str = "y") -> None:
    """Labelled ticks at 1, 2 and 5 times powers of ten, or at powers of ten alone where there are many."""
    low, high = sorted(ax.get_ylim() if axis == "y" else ax.get_xlim())
    if not (0 < low < high < np.inf):
        return
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    decades = np.log10(high / low)
    step = max(1, int(np.ceil(decades / 7)))
    ticks = [10.0**k for k in range(first, last + 1) if k % step == 0 and low <= 10.0**k <= high]
    for parts in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)) if decades <= 2.5 else ():
        ticks = [part * 10.0**k for k in range(first, last + 1) for part in parts if low <= part * 10.0**k <= high]
        if len(ticks) > 2:
            break
    if len(ticks) < 2:
        ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    where = ax.yaxis if axis == "y" else ax.xaxis
    where.set_major_locator(FixedLocator(ticks))
    where.set_minor_locator(NullLocator())
    where.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}" if 1e-4 < value < 1e5 else f"{value:.2g}"))


def set_layer_ticks(ax: Axes, layers: pd.Series, name: str = "layer") -> None:
    """Whole numbers in steps of 1, 2 or 5 times a power of ten, the last one too."""
    first, last = int(layers.min()), int(layers.max())
    span = max(1, last - first)
    steps = [part * 10**k for k in range(7) for part in (1, 2, 5)]
    step = next(one for one in steps if span / one <= 8)
    ticks = [tick for tick in range(-(-first // step) * step, last + 1, step) if last - tick >= 0.6 * step]
    ax.xaxis.set_major_locator(FixedLocator([*ticks, last]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(name)


def mark_ends(
    ax: Axes,
    band: pd.DataFrame,
    x: str,
    fates: Mapping[str, summary.Fate],
    styles: Styles,
    names: bool,
    backwards: bool = False,
) -> None:
    """A cross on the edge where each signal left, with its name and fate: above for an overflow, below for a zero."""
    low, high = ax.get_ylim()
    left, right = ax.get_xlim()
    count = {"nonfinite": 0, "zero": 0}
    grid = ax.get_subplotspec()
    narrow = grid is not None and grid.get_gridspec().ncols > 2
    for label, fate in sorted(fates.items(), key=lambda one: one[1].at):
        edge = 1.0 if fate.kind == "nonfinite" else 0.0
        rows = band[band["label"] == label]
        rows = rows[rows[x] >= fate.at] if backwards else rows[rows[x] <= fate.at]
        outside = rows[(rows["median"] > high) | (rows["median"] < low)][x]
        start = float(outside.iloc[(outside - fate.at).abs().argmax()]) if len(outside) else fate.at
        colour = styles[label].colour
        across = ax.get_xaxis_transform()
        ax.plot([start, fate.at], [edge, edge], color=colour, linewidth=2.2, transform=across, clip_on=False, zorder=4)
        ax.plot([fate.at], [edge], "X", color=colour, markersize=8, transform=across, clip_on=False, zorder=5)
        away = 1 + count[fate.kind]
        count[fate.kind] += 1
        side = "right" if fate.at > (left + right) / 2 else "left"
        name = f"{label}: " if names else ""
        said = f"{SHORT[fate.kind]}{fate.at:.6g}" if narrow else str(fate)
        ax.annotate(
            name + said, (fate.at, edge), xycoords=across, textcoords="offset points", ha=side,
            xytext=(-8 if side == "right" else 8, (-12 if edge else 12) * away), va="center", fontsize=TEXT,
            color=as_ink(colour), zorder=6,
            bbox={"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.85},
        )  # fmt: skip


def as_ink(colour: Any) -> tuple[float, ...]:
    """A colour that can be read as text on white."""
    return tuple(0.73 * part for part in colour[:3])


def name_lines(ax: Axes, band: pd.DataFrame, x: str, styles: Styles, backwards: bool = False) -> None:
    """The name of each line beside its right end, moved apart where ends are near each other.

    backwards: inside the panel at the left, where a signal that travels downwards ends.
    """
    low, high = ax.get_ylim()
    log = ax.get_yscale() == "log"
    places = []
    for label, rows in band.groupby("label", sort=False):
        alive = rows[np.isfinite(rows["median"]) & ((rows["median"] > 0) | (not log))]
        alive = alive.sort_values(x, ascending=not backwards)
        if len(alive):
            y = float(alive["median"].iloc[-1])
            share = np.log(y / low) / np.log(high / low) if log else (y - low) / (high - low)
            places.append((float(np.clip(share, 0, 1)), str(label)))
    figure = ax.get_figure()
    assert figure is not None
    rows_of_panels = ax.get_subplotspec().get_gridspec().nrows if ax.get_subplotspec() else 1  # type: ignore[union-attr]
    gap = TEXT * 1.3 / (72 * figure.get_figheight() * 0.7 / rows_of_panels)  # type: ignore[union-attr]
    for share, label in zip(
        move_apart([place for place, _ in sorted(places)], gap), [label for _, label in sorted(places)], strict=True
    ):
        place = (0.02, min(share + 0.045, 0.94)) if backwards else (1, share)
        ax.annotate(
            label, place, xycoords="axes fraction", xytext=(5, 0),
            textcoords="offset points", va="center",
            fontsize=TEXT, color=as_ink(styles[label].colour), annotation_clip=False,
        )  # fmt: skip


def move_apart(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places moved apart to at least this gap, each group about where it was."""
    groups: list[list[float]] = []
    for place in places:
        groups.append([place, 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (b, m), (a, n) = groups.pop(), groups.pop()
            groups.append([(a * n + b * m) / (n + m), n + m])
    return [centre + gap * (k - (n - 1) / 2) for centre, n in groups for k in range(int(n))]


def mark_formats(ax: Axes, dtypes: Sequence[str]) -> None:
    """A line at 1, and shades beyond the ends of the number formats where the axis reaches them."""
    low, high = ax.get_ylim()
    for row in map(FORMATS.__getitem__, dtypes):  # an end that is near is shown
        high = row.max * NEAR_END if row.max / NEAR_END < high else high
        low = row.least / NEAR_END if low < row.least * NEAR_END else low
    ax.set_ylim(low, high)
    set_log_ticks(ax)
    if low < 1 < high:
        ax.axhline(1, color="0.45", linestyle="--", linewidth=0.9, zorder=1)
    for dtype in dtypes:
        row = FORMATS[dtype]
        for start, end, text, side in (
            (row.max, high, f"beyond {dtype}", "bottom"),
            (low, row.least, f"0 in {dtype}", "top"),
            (max(low, row.least), row.tiny, f"subnormal in {dtype}", "top"),
        ):
            if start < end and low <= start < high and end > low:
                ax.axhspan(start, min(end, high), color="0.5", alpha=0.12, linewidth=0, zorder=0)
                ax.annotate(
                    text, (0, start if side == "bottom" else min(end, high)), xycoords=("axes fraction", "data"),
                    xytext=(4, 2 if side == "bottom" else -2), textcoords="offset points", va=side,
                    fontsize=TEXT - 1, color="0.35",
                )  # fmt: skip


def plot_theory(ax: Axes, lines: pd.DataFrame, styles: Styles, x: str = "layer") -> None:
    """What theory predicts, inside the panel: dashed with the 95 % band of one network, or circles for several labels.

    The axis follows the band as far as the measured values reach, and a little beyond.
    """
    low, high = ax.get_ylim()
    lines = lines[np.isfinite(lines["predicted"].astype(float))]
    if not len(lines):
        return
    if len(styles) == 1:
        ax.plot(lines[x], lines["predicted"], color="0.1", linestyle=(0, (5, 2)), linewidth=1.4, label="theory")
        ax.fill_between(
            lines[x], lines["low"], lines["high"], facecolor="none", edgecolor="0.72", hatch="////",
            linewidth=0.8, zorder=0.5, label="theory: 95 % of networks",
        )  # fmt: skip
        ends = lines[["low", "high"]].to_numpy()
        ends = ends[np.isfinite(ends) & (ends > 0)]
        if len(ends) and ax.get_yscale() == "log":
            low, high = min(low, max(ends.min(), low / BEYOND)), max(high, min(ends.max(), high * BEYOND))
            ax.set_ylim(low, high)
            set_log_ticks(ax)
    else:
        marks: dict[str, Any] = {"marker": "o", "fillstyle": "none", "markersize": 5, "linestyle": ""}
        for label, mine in lines.groupby("label", observed=True):
            few = mine[mine[x].rank() % max(1, len(mine) // 10) == 0]
            few = few[few["predicted"].between(low, high)]
            ax.plot(few[x], few["predicted"], color=styles[str(label)].colour, **marks)
        ax.plot([], [], color="0.3", label="theory", **marks)
    handles = [pair for pair in zip(*ax.get_legend_handles_labels(), strict=True) if pair[1].startswith("theory")]
    if handles:  # above the panel, where it covers nothing
        grid = ax.get_subplotspec()
        wide = grid is None or grid.get_gridspec().ncols == 1
        ax.legend(
            *zip(*handles, strict=True), loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1, frameon=False,
            ncols=len(handles) if wide else 1, fontsize=TEXT,
        )  # fmt: skip
