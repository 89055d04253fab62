"""Rows -> one figure: initlab's ratios with their quartiles, the bars, and what today's idioms take for the same.

Times on one logarithmic axis, 1 being the unwatched network; rows of networks per second are drawn as time, inverted.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.rows import IDS, Row
from initlab.errors import UsageError

OURS, BAR, PEER = "#0072b2", "#d55e00", "#7f7f7f"  # of the palette for colour-blind readers
LABELS = {"accelerated": "", "plain": "plain PyTorch", "nohist": "no histograms", "every10": "every 10th step"}


def figure(rows: Sequence[Row], title: str) -> Figure:
    """One line for each id and variant, in the order of the table of ids; peers stand on the line of their rival."""
    drawn = [row for row in rows if row.unit == "ratio" and not row.is_peer]
    if not drawn:
        raise UsageError("nothing to draw: no ratio among the results")
    order = {name: place for place, name in enumerate(IDS)}
    drawn.sort(key=lambda row: (order.get(row.id, len(order)), row.id, row.threads, row.variant))
    sheet = Figure(figsize=(9.5, 1.4 + 0.3 * len(drawn)), layout="constrained")
    ax = sheet.subplots()
    ax.set_xscale("log")
    ax.axvline(1, color="0.3", linewidth=1)
    placed: set[tuple[str, int]] = set()
    for y, row in enumerate(drawn):
        _ours(ax, y, row)
        family = _family(row)
        if (family, row.threads) not in placed and row.id in (f"{family}.full", family):
            _peers(ax, y, [peer for peer in rows if _is_peer_of(peer, family, row.threads)])
            placed.add((family, row.threads))
    _frame(ax, drawn, title)
    return sheet


def save(rows: Sequence[Row], path: Path, title: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(rows, title).savefig(path, dpi=150)


def _family(row: Row) -> str:
    """step.deep.full -> step.deep; stack.100 -> stack.100: what its peers' ids begin with."""
    return row.id.removesuffix(".full")


def _is_peer_of(peer: Row, family: str, threads: int) -> bool:
    return peer.unit == "ratio" and peer.threads == threads and peer.id.startswith(f"{family}.peer.")


def _as_time(row: Row, value: float) -> float:
    return 1 / value if row.higher_is_better else value


def _ours(ax: Axes, y: int, row: Row) -> None:
    ends = sorted(_as_time(row, value) for value in (row.q25, row.q75))
    ax.plot(ends, [y, y], color=OURS, linewidth=3, alpha=0.45, solid_capstyle="butt")
    ax.plot(_as_time(row, row.ratio), y, "o", color=OURS, markersize=5, zorder=3)
    if row.bar is not None:
        ax.plot(_as_time(row, row.bar), y, "|", color=BAR, markersize=13, markeredgewidth=2, zorder=2)


def _peers(ax: Axes, y: int, peers: Sequence[Row]) -> None:
    """Their marks on the line, their names above and below in turn, so that neighbours do not cover each other."""
    for place, peer in enumerate(sorted(peers, key=lambda row: row.ratio)):
        ax.plot(peer.ratio, y, "D", color=PEER, markersize=4)
        name = peer.id.rsplit(".", 1)[1].replace("_", " ")
        above = place % 2 == 0
        ax.annotate(
            name,
            (peer.ratio, y),
            (0, 4 if above else -4),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=6.5,
            color="0.35",
        )


def _label(row: Row) -> str:
    said = [LABELS.get(row.variant, row.variant), f"{row.threads} threads" if row.threads > 1 else ""]
    inverted = " (time)" if row.higher_is_better else ""
    return f"{row.id}{inverted}" + "".join(f", {words}" for words in said if words)


def _frame(ax: Axes, drawn: Sequence[Row], title: str) -> None:
    ax.set_yticks(range(len(drawn)), [_label(row) for row in drawn], fontsize=8)
    ax.set_ylim(len(drawn) - 0.4, -0.6)
    ax.set_xlabel("time, as a multiple of the unwatched network's or of the chapter's code")
    ax.set_title(title, loc="left", fontsize=10, wrap=True)
    ax.grid(axis="x", which="major", color="0.9")
    ax.set_axisbelow(True)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for name in ("top", "right"):
        ax.spines[name].set_visible(False)
    ax.plot([], [], "o-", color=OURS, markersize=5, label="initlab, median and quartiles")
    ax.plot([], [], "|", color=BAR, markersize=11, markeredgewidth=2, label="the bar")
    ax.plot([], [], "D", color=PEER, markersize=4, label="other ways to watch or to compute it")
    ax.legend(loc="lower right", fontsize=8, frameon=True)
