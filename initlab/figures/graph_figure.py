"""The figure of autograd's graph: the loss on top, the leaves below, a box per node. Lengths are inches."""

import re
import textwrap
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path
from matplotlib.textpath import TextPath

from initlab.figures.axes import NotebookFigure

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
    """Text of a node, or without text the point where a long edge passes a layer."""

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

    def draw(self, ax: Axes) -> None:
        if not self.lines:
            return
        shape: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=0.06", "linewidth": 1.5, "zorder": 2}
        corner = (self.x - self.width / 2, self.top)
        ax.add_patch(FancyBboxPatch(corner, self.width, self.height, facecolor="white", edgecolor=self.colour, **shape))
        for number, (text, how) in enumerate(self.lines):
            y = self.top + PAD + (number + 0.5) * LINE
            ax.text(self.x, y, text, ha="center", va="center", fontsize=SIZE, zorder=3, **how)  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def _width(text: str, bold: bool) -> float:
    font = FontProperties(weight="bold" if bold else "normal", size=SIZE)
    return float(TextPath((0, 0), text, prop=font).get_extents().width) / 72 if text.strip() else 0.0


def draw_graph(nodes: pd.DataFrame, edges: pd.DataFrame, limit: int = 150) -> Figure:
    """Boxes in layers by their longest distance to the loss; arrows are the gradients on their way to the leaves.

    nodes, edges: the tables of a walked graph. A box has the node, its shape and what was saved; beneath it the
    hand-written piece that does the same, in its colour. A graph of more than `limit` nodes is cut off after the first
    ones, and the title says so.
    """
    shown = nodes[nodes["id"] < limit]
    kept = edges[edges["target"] < limit]
    boxes, paths = _arrange(shown, kept)
    leaves, longest = int((nodes["leaf"] != "").sum()), max(_layers(nodes, edges).values())
    count = f"{len(nodes)} nodes, {leaves} of them leaves, at most {longest} steps from the loss"
    text = f"Autograd's graph{_describe_network(nodes)}: {count}"
    cut = f" (the first {len(shown)} nodes are drawn)" if len(shown) < len(nodes) else ""
    title = textwrap.wrap(text + cut, 64)
    left, right = min(b.x - b.width / 2 for b in boxes.values()), max(b.x + b.width / 2 for b in boxes.values())
    spare = max(0.0, max(_width(line, True) for line in title) * 1.3 - (right - left)) / 2
    bottom = max(b.top + b.height for b in boxes.values())
    head = 0.3 * len(title) + 0.25
    size = (right - left + 2 * spare + 2 * ACROSS, bottom + head + ACROSS)
    figure = NotebookFigure(figsize=size)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(left - spare - ACROSS, right + spare + ACROSS), ylim=(bottom + ACROSS, -head))
    ax.axis("off")
    ax.text((left + right) / 2, 0.15 - head, "\n".join(title), ha="center", va="top", fontsize=11, linespacing=1.3)
    for path in paths:
        _draw_arrow(ax, [boxes[key] for key in path])
    for box in boxes.values():
        box.draw(ax)
    return figure


def _describe_network(nodes: pd.DataFrame) -> str:
    """The sizes of a chain of linear layers and its loss, read from the nodes; nothing for another network."""
    if (nodes["in_degree"] > 1).any():
        return ""
    weights = nodes.loc[nodes["leaf"].str.endswith("weight"), "shape"].tolist()[::-1]
    shapes = [[int(size) for size in re.findall(r"\d+", shape)] for shape in weights]
    if not shapes or any(len(s) != 2 for s in shapes) or any(b[1] != a[0] for a, b in pairwise(shapes)):
        return ""
    loss = {"Mse": " and mean squared error", "CrossEntropy": " and cross entropy"}
    first = str(nodes["hand"].iloc[0]).partition(".")[0]
    return f" of {'-'.join(map(str, [shapes[0][1], *(s[0] for s in shapes)]))}{loss.get(first, '')}"


def _layers(nodes: pd.DataFrame, edges: pd.DataFrame) -> dict[int, int]:
    """Longest distance to the loss; ids are in topological order, so one pass settles every node."""
    layer = dict.fromkeys((int(node) for node in nodes["id"]), 0)
    for source, target in edges.sort_values("source")[["source", "target"]].to_numpy():
        layer[int(target)] = max(layer[int(target)], layer[int(source)] + 1)
    return layer


def _lines(row: Mapping[Hashable, object]) -> list[tuple[str, Mapping[str, object]]]:
    """A node's text, top to bottom; the last lines say who does the same by hand."""
    colour = tuple(0.72 * part for part in to_rgb(_colour(row["hand"])))  # letters need more contrast than lines
    by_hand = {"color": colour, "weight": "bold"}
    several = int(str(row["in_degree"])) > 1
    shape = "one number" if row["shape"] == "()" else str(row["shape"])
    # lines break neither inside a shape nor before it
    saved = re.sub(r"(?<=\d), (?=\d+[,)])", ",\u00a0", str(row["saved_tensors"])).replace(" (", "\u00a0(")
    rules = [] if row["leaf"] else str(row["rule"]).split("; ")  # a leaf needs none beside its `p.g += g`
    plain = [
        f"{row['leaf']}, {shape}" if row["leaf"] else shape,
        *([f"{row['in_degree']} gradients arrive and add up"] if several else []),
        *([f"gradient {row['gradient']}"] if row["gradient"] else []),
        *textwrap.wrap(f"saved {saved}" if saved else "", WRAP),
    ]
    return [
        (str(row["node"]), {"weight": "bold"}),
        *((text, {}) for text in plain),
        *((text, by_hand) for text in textwrap.wrap(str(row["hand"]), WRAP)),
        *((text, {"color": "0.35", "style": "italic"}) for rule in rules for text in textwrap.wrap(rule, WRAP + 4)),
    ]


def _colour(hand: object) -> str:
    return next((colour for start, colour in COLOURS.items() if str(hand).startswith(start)), GREY)


def _arrange(nodes: pd.DataFrame, edges: pd.DataFrame) -> tuple[dict[Hashable, _Box], list[list[Hashable]]]:
    """The boxes by node, and the path of every edge; one across several layers gets an empty box in each.

    Layer by layer from the loss: each box beneath the middle of those that point to it, or near it.
    """
    layers = _layers(nodes, edges)
    boxes = {row["id"]: _Box(layers[row["id"]], _lines(row), _colour(row["hand"])) for row in nodes.to_dict("records")}
    paths: list[list[Hashable]] = []
    for number, (source, target) in enumerate(edges[["source", "target"]].to_numpy().tolist()):
        between = range(layers[source] + 1, layers[target])
        boxes |= {("edge", number, passed): _Box(passed) for passed in between}
        paths.append([source, *(("edge", number, passed) for passed in between), target])
    above: dict[Hashable, list[Hashable]] = {}
    for path in paths:
        for upper, lower in pairwise(path):
            above.setdefault(lower, []).append(upper)
    order = {key: number for number, key in enumerate(dict.fromkeys(key for path in paths for key in path))}
    top = 0.0
    for layer in range(1 + max(box.layer for box in boxes.values())):
        wish = {
            key: sum(boxes[upper].x for upper in above.get(key, [])) / max(1, len(above.get(key, [])))
            for key, box in boxes.items()
            if box.layer == layer
        }
        row = sorted(wish, key=lambda key: (round(wish[key], 6), order.get(key, 0)))
        for key, x in zip(row, _spread([wish[key] for key in row], [boxes[key].width for key in row]), strict=True):
            boxes[key].x, boxes[key].top = x, top
        top += max(boxes[key].height for key in row) + DOWN
    return boxes, paths


def _spread(wishes: Sequence[float], widths: Sequence[float]) -> list[float]:
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


def _draw_arrow(ax: Axes, path: Sequence[_Box]) -> None:
    """A curve from box to box, vertical where it leaves and arrives."""
    vertices, codes = [(path[0].x, path[0].top + path[0].height)], [Path.MOVETO]
    for upper, lower in pairwise(path):
        start, end = (upper.x, upper.top + upper.height), (lower.x, lower.top)
        middle = (start[1] + end[1]) / 2
        vertices += [(start[0], middle), (end[0], middle), end]
        codes += [Path.CURVE4] * 3
    shape: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(path=Path(vertices, codes), color="0.45", linewidth=1.1, zorder=1, **shape))
