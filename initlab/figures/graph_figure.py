"""The two frames of autograd's graph -> figure: the loss on top, the leaves below, a box per node.

Takes `nodes` and `edges` as they come out of a walked graph and computes nothing but where the boxes stand. Lengths
are inches.
"""

import re
import textwrap
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path
from matplotlib.textpath import TextPath

SIZE, LINE, PAD = 8.5, 0.165, 0.09  # font size in points, height of a line, space around the text
ACROSS, DOWN = 0.3, 0.42  # space between neighbours and between layers
WRAP = 32  # characters

# What a hand-written piece begins with -> colour (seaborn's palette for the colour-blind); grey without a piece.
COLOURS: dict[str, str] = {
    "Lin": "#0173b2",
    "Relu": "#de8f05",
    "pull_back": "#de8f05",
    "Mse": "#cc78bc",
    "CrossEntropy": "#cc78bc",
    "p.g": "#029e73",
}
GREY = "#949494"


@dataclass
class _Box:
    """Text of a node, or with no text the place where a long edge passes a layer."""

    layer: int
    lines: list[tuple[str, Mapping[str, object]]] = field(default_factory=list)  # text and how it is set
    colour: str = GREY
    x: float = 0.0
    top: float = 0.0

    @property
    def width(self) -> float:
        widths = [_width(text, how.get("weight") == "bold") for text, how in self.lines]
        return max(widths) + 2 * PAD if widths else 0.0

    @property
    def height(self) -> float:
        return len(self.lines) * LINE + 2 * PAD if self.lines else 0.0


@lru_cache(maxsize=4096)
def _width(text: str, bold: bool) -> float:
    font = FontProperties(weight="bold" if bold else "normal", size=SIZE)
    return float(TextPath((0, 0), text, prop=font).get_extents().width) / 72 if text.strip() else 0.0


def draw_graph(nodes: pd.DataFrame, edges: pd.DataFrame, limit: int = 150) -> Figure:
    """Boxes in layers by their longest distance to the loss: node, leaf, shape, what was saved; beneath it the work by
    hand, in its colour.

    Arrows are the gradients on their way from the loss to the leaves. A graph of more than `limit` nodes is cut off
    after the first ones, and the title says so.
    """
    shown = nodes[nodes["id"] < limit]
    kept = edges[edges["target"] < limit]
    boxes, ways = _boxes(shown, kept)
    _place(boxes, ways)
    title = _title(nodes, edges, len(shown))
    left, right = min(b.x - b.width / 2 for b in boxes.values()), max(b.x + b.width / 2 for b in boxes.values())
    spare = max(0.0, max(_width(line, True) for line in title) * 1.3 - (right - left)) / 2
    bottom = max(b.top + b.height for b in boxes.values())
    head = 0.3 * len(title) + 0.25
    size = (right - left + 2 * spare + 2 * ACROSS, bottom + head + ACROSS)
    figure = Figure(figsize=size)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(left - spare - ACROSS, right + spare + ACROSS), ylim=(bottom + ACROSS, -head))
    ax.axis("off")
    ax.text((left + right) / 2, 0.15 - head, "\n".join(title), ha="center", va="top", fontsize=11, linespacing=1.3)
    for way in ways:
        _draw_way(ax, [boxes[key] for key in way])
    for box in boxes.values():
        _draw_box(ax, box)
    return figure


def _title(nodes: pd.DataFrame, edges: pd.DataFrame, shown: int) -> list[str]:
    leaves = int((nodes["leaf"] != "").sum())
    longest = max(_layers(nodes, edges).values())
    said = f"Autograd's graph: {len(nodes)} nodes, {leaves} of them leaves, at most {longest} steps from the loss"
    cut = f" (the first {shown} nodes are drawn)" if shown < len(nodes) else ""
    return textwrap.wrap(said + cut, 64)


def _layers(nodes: pd.DataFrame, edges: pd.DataFrame) -> dict[int, int]:
    """Longest distance to the loss; ids are in topological order, so one pass settles every node."""
    layer = dict.fromkeys((int(node) for node in nodes["id"]), 0)
    for source, target in edges.sort_values("source")[["source", "target"]].to_numpy():
        layer[int(target)] = max(layer[int(target)], layer[int(source)] + 1)
    return layer


def _boxes(nodes: pd.DataFrame, edges: pd.DataFrame) -> tuple[dict[Hashable, _Box], list[list[Hashable]]]:
    """The boxes by node, and the way of every edge; an edge across several layers gets a place in each of them."""
    layer = _layers(nodes, edges)
    boxes: dict[Hashable, _Box] = {}
    for row in nodes.to_dict("records"):
        boxes[row["id"]] = _Box(layer[row["id"]], _lines(row), _colour(row["hand"]))
    ways: list[list[Hashable]] = []
    for number, (source, target) in enumerate(edges[["source", "target"]].to_numpy().tolist()):
        between = range(layer[source] + 1, layer[target])
        boxes |= {("edge", number, passed): _Box(passed) for passed in between}
        ways.append([source, *(("edge", number, passed) for passed in between), target])
    return boxes, ways


def _lines(row: Mapping[Hashable, object]) -> list[tuple[str, Mapping[str, object]]]:
    """A node's text, top to bottom; the last lines say who does the same by hand."""
    by_hand = {"color": _darker(_colour(row["hand"])), "weight": "bold"}
    several = int(str(row["in_degree"])) > 1
    shape = "one number" if row["shape"] == "()" else str(row["shape"])
    plain = [
        f"{row['leaf']}, {shape}" if row["leaf"] else shape,
        *([f"{row['in_degree']} gradients arrive and add up"] if several else []),
        *([f"gradient {row['gradient']}"] if row["gradient"] else []),
        *_wrapped_saved(str(row["saved_tensors"])),
    ]
    return [
        (str(row["node"]), {"weight": "bold"}),
        *((text, {}) for text in plain),
        *((text, by_hand) for text in textwrap.wrap(str(row["hand"]), WRAP)),
        *((text, {"color": "0.35", "style": "italic"}) for text in _wrapped_rule(row)),
    ]


def _wrapped_saved(saved: str) -> list[str]:
    """Lines that break neither inside a shape nor before it."""
    unbroken = re.sub(r"(?<=\d), (?=\d+[,)])", ",\u00a0", saved).replace(" (", "\u00a0(")
    return textwrap.wrap(f"saved {unbroken}" if saved else "", WRAP)


def _darker(colour: str) -> tuple[float, ...]:
    """Letters need more contrast than lines."""
    return tuple(0.72 * part for part in to_rgb(colour))


def _wrapped_rule(row: Mapping[Hashable, object]) -> list[str]:
    """A line per gradient; a leaf needs none beside its `p.g += g`."""
    parts = [] if row["leaf"] else str(row["rule"]).split("; ")
    return [line for part in parts for line in textwrap.wrap(part, WRAP + 4)]


def _colour(hand: object) -> str:
    return next((colour for start, colour in COLOURS.items() if str(hand).startswith(start)), GREY)


def _place(boxes: Mapping[Hashable, _Box], ways: Sequence[Sequence[Hashable]]) -> None:
    """Layer by layer from the loss: each box beneath the middle of those that point to it, or near it."""
    above: dict[Hashable, list[Hashable]] = {}
    for way in ways:
        for upper, lower in pairwise(way):
            above.setdefault(lower, []).append(upper)
    order = {key: number for number, key in enumerate(dict.fromkeys(key for way in ways for key in way))}
    top = 0.0
    for layer in range(1 + max(box.layer for box in boxes.values())):
        wish = {
            key: sum(boxes[upper].x for upper in above.get(key, [])) / max(1, len(above.get(key, [])))
            for key, box in boxes.items()
            if box.layer == layer
        }
        row = sorted(wish, key=lambda key: (round(wish[key], 6), order.get(key, 0)))
        for key, x in zip(row, _apart([wish[key] for key in row], [boxes[key].width for key in row]), strict=True):
            boxes[key].x, boxes[key].top = x, top
        top += max(boxes[key].height for key in row) + DOWN


def _apart(wishes: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Positions nearest to the wishes (least squares) at which neighbours do not touch: pool adjacent violators."""
    offsets = [0.0]
    for left, right in pairwise(widths):
        offsets.append(offsets[-1] + (left + right) / 2 + ACROSS)
    pools: list[tuple[float, int]] = []  # mean and size
    for wish, offset in zip(wishes, offsets, strict=True):
        mean, size = wish - offset, 1
        while pools and pools[-1][0] > mean:
            before, count = pools.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    settled = [mean for mean, size in pools for _ in range(size)]
    return [mean + offset for mean, offset in zip(settled, offsets, strict=True)]


def _draw_box(ax: Axes, box: _Box) -> None:
    if not box.lines:
        return
    ax.add_patch(
        FancyBboxPatch(
            (box.x - box.width / 2, box.top),
            box.width,
            box.height,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor="white",
            edgecolor=box.colour,
            linewidth=1.5,
            zorder=2,
        )
    )
    for number, (text, how) in enumerate(box.lines):
        y = box.top + PAD + (number + 0.5) * LINE
        ax.text(box.x, y, text, ha="center", va="center", fontsize=SIZE, zorder=3, **how)  # type: ignore[arg-type]


def _draw_way(ax: Axes, way: Sequence[_Box]) -> None:
    """A curve from box to box, vertical where it leaves and arrives."""
    vertices, codes = [(way[0].x, way[0].top + way[0].height)], [Path.MOVETO]
    for upper, lower in pairwise(way):
        start, end = (upper.x, upper.top + upper.height), (lower.x, lower.top)
        middle = (start[1] + end[1]) / 2
        vertices += [(start[0], middle), (end[0], middle), end]
        codes += [Path.CURVE4] * 3
    ax.add_patch(
        FancyArrowPatch(
            path=Path(vertices, codes),
            arrowstyle="-|>",
            mutation_scale=9,
            color="0.45",
            linewidth=1.1,
            zorder=1,
            shrinkA=0,
            shrinkB=0,
        )
    )
