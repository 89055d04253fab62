"""Rows -> one figure: what a user asks of the speed, a row each, with the ratio, its quartiles and what others take.

CPU time on one logarithmic axis; 1 is what the row is measured against. Everything else stands in the JSON and in the
printed table.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.rows import Row
from initlab.errors import UsageError

OURS, OTHERS = "#0072b2", "0.45"  # colours that also colour-blind readers tell apart
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


class Question(NamedTuple):
    """A row of the figure: what is asked, against what, and the result that answers it."""

    text: str
    against: str
    id: str
    variant: str


# In the order of the picture. A row stands for one thread where there are several.
QUESTIONS = (
    Question("Train by hand, all statistics and histograms kept", "bare nn.Module", "step.deep.full", "accelerated"),
    Question("Train by hand, nothing kept", "bare nn.Module", "step.deep.bare", "plain"),
    Question("Your nn.Module under the probe", "without it", "step.module.full", "accelerated"),
    Question("The same, every 10th step", "without it", "step.module.full", "every10"),
    Question("Stack of width 100, all statistics", "the products alone", "stack.100", "accelerated"),
    Question("Stack of width 1000, all statistics", "the products alone", "stack.1000", "accelerated"),
    Question("8 networks together, all kept", "one nn.Module each", "ensemble.deep.full", "accelerated"),
    Question("A plane of 4,096 networks", "one by one", "phase.common", "plain"),
    Question("A sweep by the batched launcher", "Hydra's own", "sweep.single", "plain"),
    Question("Reading 3,000 run folders", "pyarrow to pandas", "collect", "plain"),
    Question("diagnose of a ResNet-18", "a forward-backward pass", "verdict.diagnose", "plain"),
)
# What people write for a few of these numbers, as `peers.py` has it: the last part of an id, its mark and its name.
PEERS = {
    "chapter": ("^", "the chapter's mean and std"),
    "std_mean": ("v", "torch.std_mean in hooks"),
    "course": ("s", "a course's hooks"),
    "retain_grad": ("P", "retain_grad"),
    "makemore": ("D", "makemore's histograms"),
    "vmap": ("X", "torch.func.vmap"),
    "concat": ("h", "pandas concat"),
}


def figure(rows: Sequence[Row], title: str) -> Figure:
    """A row for each question that the results answer, top to bottom; idioms of others on the row of their rival."""
    found = [(one, row) for one in QUESTIONS if (row := _find(rows, one.id, one.variant)) is not None]
    if not found:
        raise UsageError("nothing to draw: no ratio among the results")
    sheet = Figure(figsize=(8.5, 1.5 + 0.37 * len(found)), dpi=100, layout="constrained")
    ax = sheet.subplots()
    sheet.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    for y, (one, row) in enumerate(found):
        ax.plot([row.q25, row.q75], [y, y], color=OURS, linewidth=4, alpha=0.35, solid_capstyle="butt")
        ax.plot(row.ratio, y, "o", color=OURS, markersize=7, zorder=3)
        ax.annotate(
            f"{row.ratio:.2g}", (row.ratio, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8,
            color=OURS,
        )  # fmt: skip
        _mark_peers(ax, rows, one, y)
    ax.set_xscale("log")
    ax.axvline(1, color="0.3", linewidth=1, zorder=1)
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if low / 1.2 <= tick <= high * 1.2]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_yticks(range(len(found)), [f"{one.text}\nagainst {one.against}" for one, _ in found], fontsize=8)
    ax.set_ylim(len(found) - 0.4, -0.7)
    ax.set_xlabel("CPU time over that of what it is measured against: left of 1 is faster", fontsize=9)
    ax.tick_params(axis="x", labelsize=8)
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    shown = {row.id.rsplit(".", 1)[1] for row in rows if row.is_peer}
    for name, (mark, text) in PEERS.items():
        if name in shown:
            ax.plot([], [], mark, color=OTHERS, markersize=6, label=text)
    if shown:
        sheet.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    for name in ("top", "right", "left"):
        ax.spines[name].set_visible(False)
    return sheet


def save(rows: Sequence[Row], path: Path, title: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(rows, title).savefig(path)


def _find(rows: Sequence[Row], name: str, variant: str) -> Row | None:
    """The result of this id, of the variant if there is one, with the fewest threads."""
    named = [row for row in rows if row.id == name and row.unit == "ratio"]
    wanted = [row for row in named if row.variant == variant] or named
    return min(wanted, key=lambda row: row.threads, default=None)


def _mark_peers(ax: Axes, rows: Sequence[Row], one: Question, y: int) -> None:
    """Grey marks with a name: what others write for a few of the same numbers."""
    rival = one.id.removesuffix(".full")
    names = dict.fromkeys(row.id for row in rows if row.id.split(".peer.")[0] == rival and row.is_peer)
    for name in names if one.variant != "every10" and not one.id.endswith(".bare") else ():
        peer = _find(rows, name, "plain")
        mark, _ = PEERS.get(name.rsplit(".", 1)[1], ("", ""))
        if peer is not None and mark:
            ax.plot(peer.ratio, y, mark, color=OTHERS, markersize=6, zorder=2)
