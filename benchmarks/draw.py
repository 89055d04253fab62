"""Rows -> one figure: initlab's ratios with their quartiles, the bars, and what today's idioms take for the same.

Times on one logarithmic axis, 1 being the unwatched network; rows of networks per second are drawn as time, inverted.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.rows import BARS, Row, place
from initlab.errors import UsageError

OURS, BAR, OTHERS = "#0072b2", "#d55e00", "0.45"  # colours that also colour-blind readers tell apart
VARIANTS = {"plain": "plain PyTorch", "nohist": "no histograms", "every10": "every 10th step"}
MARKS = {
    "chapter": "^",
    "course": "s",
    "makemore": "D",
    "std_mean": "v",
    "retain_grad": "P",
    "vmap": "X",
    "outer": "*",
    "functions": "h",
}


def figure(rows: Sequence[Row], title: str) -> Figure:
    """One line for each id and variant, in the order of the table of ids; peers stand on the line of their rival."""
    drawn = sorted((row for row in rows if row.unit == "ratio" and not row.is_peer), key=_order)
    counted = sorted((row for row in rows if row.unit != "ratio" and row.bar is not None), key=_order)
    if not drawn:
        raise UsageError("nothing to draw: no ratio among the results")
    heights = [len(drawn) + 1, len(counted) + 1] if counted else [1]
    sheet = Figure(figsize=(11, 1.6 + 0.27 * (sum(heights) + 3)), layout="constrained")
    axes = sheet.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    sheet.suptitle(title, x=0.01, ha="left", fontsize=11)
    _ratios(axes[0], drawn, [row for row in rows if row.unit == "ratio" and row.is_peer])
    if counted:
        _shares(axes[1], counted)
    return sheet


def save(rows: Sequence[Row], path: Path, title: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(rows, title).savefig(path, dpi=150)


def _order(row: Row) -> tuple[object, ...]:
    return place(row), row.id, row.threads, row.variant


def _ratios(ax: Axes, drawn: Sequence[Row], peers: Sequence[Row]) -> None:
    ax.set_xscale("log")
    ax.axvline(1, color="0.3", linewidth=1)
    placed: set[tuple[str, int]] = set()
    for y, row in enumerate(drawn):
        ends = sorted(_as_time(row, value) for value in (row.q25, row.q75))
        ax.plot(ends, [y, y], color=OURS, linewidth=3, alpha=0.45, solid_capstyle="butt")
        ax.plot(_as_time(row, row.ratio), y, "o", color=OURS, markersize=6, zorder=3)
        if row.bar is not None:
            ax.plot(_as_time(row, row.bar), y, "|", color=BAR, markersize=12, markeredgewidth=2, zorder=4)
        rival = row.id.removesuffix(".full"), row.threads
        if rival not in placed:
            placed.add(rival)
            for peer in peers:
                if (peer.id.split(".peer.")[0], peer.threads) == rival:
                    ax.plot(peer.ratio, y, _mark(peer), color=OTHERS, markersize=5, zorder=2)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _frame(ax, [_label(row) for row in drawn], "time, over that of what the id is measured against (left is faster)")
    _legend(ax, peers)


def _shares(ax: Axes, counted: Sequence[Row]) -> None:
    """Seconds and MiB as shares of their bars."""
    ax.axvline(1, color=BAR, linewidth=2)
    for y, row in enumerate(counted):
        bar = row.bar or 1.0
        ax.plot([row.q25 / bar, row.q75 / bar], [y, y], color=OURS, linewidth=3, alpha=0.45, solid_capstyle="butt")
        ax.plot(row.ratio / bar, y, "o", color=OURS, markersize=6)
    ax.set_xscale("symlog", linthresh=2)
    ax.set_xlim(0, max(2.0, 1.3 * max(row.q75 / (row.bar or 1.0) for row in counted)))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    labels = [f"{_label(row)}: {row.ratio:.3g} of {row.bar:g} {row.unit}" for row in counted]
    _frame(ax, labels, "share of the bar (left is better)")


def _as_time(row: Row, value: float) -> float:
    return 1 / value if row.higher_is_better else value


def _mark(peer: Row) -> str:
    return MARKS.get(peer.id.rsplit(".", 1)[1], "d")


def _label(row: Row) -> str:
    """The id; its variant where there may be several; the threads where they are not one."""
    several = row.id.endswith((".full", ".tables", ".cost")) or any(
        name == row.id and variant != "plain" for name, variant, _ in BARS
    )
    variant = VARIANTS.get(row.variant, "" if row.variant == "accelerated" else row.variant) if several else ""
    said = [variant, f"{row.threads} threads" if row.threads > 1 else ""]
    return row.id + (" (time)" if row.higher_is_better else "") + "".join(f", {words}" for words in said if words)


def _frame(ax: Axes, labels: Sequence[str], axis: str) -> None:
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.set_xlabel(axis, fontsize=9)
    ax.tick_params(axis="x", labelsize=8)
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    for name in ("top", "right", "left"):
        ax.spines[name].set_visible(False)


def _legend(ax: Axes, peers: Sequence[Row]) -> None:
    ax.plot([], [], "o-", color=OURS, markersize=6, label="initlab: median, quartiles")
    ax.plot([], [], "|", color=BAR, markersize=11, markeredgewidth=2, linestyle="none", label="the bar")
    for name in MARKS:
        if any(peer.id.endswith(f".{name}") for peer in peers):
            ax.plot([], [], MARKS[name], color=OTHERS, markersize=5, linestyle="none", label=name.replace("_", " "))
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False, title="in the same run")
