"""Rows -> one figure: the dozen questions, a row each, with both answers, their quartiles and what others take.

CPU time on one logarithmic axis; 1 is what the row is measured against. Everything else stands in the JSON and in the
printed table.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.questions import PEERS, QUESTIONS, Question, answer, peers
from benchmarks.rows import Row
from initlab.errors import UsageError

COMPILED, PLAIN, OTHERS = "#0072b2", "#d55e00", "0.45"  # colours that also colour-blind readers tell apart
TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
MARKS = dict(zip(PEERS, "^vsPDX", strict=True))


def figure(rows: Sequence[Row], title: str) -> Figure:
    """A row for each question that the results answer, top to bottom; idioms of others on the row of their rival."""
    answers = {one: (answer(rows, one.id, one.compiled), answer(rows, one.id, one.plain)) for one in QUESTIONS}
    found = {one: both for one, both in answers.items() if any(both)}
    if not found:
        raise UsageError("nothing to draw: no ratio among the results")
    sheet = Figure(figsize=(8.5, 1.7 + 0.42 * len(found)), dpi=100, layout="constrained")
    ax = sheet.subplots()
    sheet.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    shown: dict[str, None] = {}
    for y, (one, (compiled, plain)) in enumerate(found.items()):
        for name, row in peers(rows, one).items():
            ax.plot(row.ratio, y, MARKS[name], color=OTHERS, markersize=6, zorder=2)
            shown[name] = None
        _mark(ax, plain, y, PLAIN, -12)
        _mark(ax, compiled, y, COMPILED, 6)
    _style(ax, list(found))
    ax.plot([], [], "o", color=COMPILED, markersize=7, label="initlab, compiled")
    ax.plot([], [], "o", color=PLAIN, markersize=7, label="initlab, plain PyTorch")
    for name in (name for name in PEERS if name in shown):
        ax.plot([], [], MARKS[name], color=OTHERS, markersize=6, label=PEERS[name])
    sheet.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return sheet


def _mark(ax: Axes, row: Row | None, y: int, color: str, above: int) -> None:
    """A dot with its quartiles and its number."""
    if row is None:
        return
    ax.plot([row.q25, row.q75], [y, y], color=color, linewidth=4, alpha=0.35, solid_capstyle="butt")
    ax.plot(row.ratio, y, "o", color=color, markersize=7, zorder=3)
    ax.annotate(
        f"{row.ratio:.2g}", (row.ratio, y), (0, above), textcoords="offset points", ha="center", fontsize=8, color=color
    )


def _style(ax: Axes, asked: Sequence[Question]) -> None:
    ax.set_xscale("log")
    ax.axvline(1, color="0.3", linewidth=1, zorder=1)
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if low / 1.2 <= tick <= high * 1.2]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_yticks(range(len(asked)), [f"{one.text}\nagainst {one.against}" for one in asked], fontsize=8)
    ax.set_ylim(len(asked) - 0.4, -0.7)
    ax.set_xlabel("CPU time over that of what it is measured against: left of 1 is faster", fontsize=9)
    ax.tick_params(axis="x", labelsize=8)
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    for name in ("top", "right", "left"):
        ax.spines[name].set_visible(False)


def save(rows: Sequence[Row], path: Path, title: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(rows, title).savefig(path)
