"""The drawn graph: no box over another, no text beyond its box, every arrow downwards."""

from itertools import combinations

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor, nn

from initlab.figures.graph_figure import _spread, draw_graph
from initlab.scratch.autograd_graph import textbook_example
from initlab.tasks.course.graph import graph

torch.set_num_threads(1)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.a(x).relu()
        return h + self.b(h) * y


@pytest.mark.parametrize(
    ("make", "title"),
    [
        (lambda: graph(loss="mse", width=7), "Autograd's graph of 64-7-1 and mean squared error: 11 nodes"),
        (lambda: graph(depth=2, loss="cross_entropy"), "Autograd's graph of 64-50-50-10 and cross entropy: "),
        (lambda: graph(Residual(), shapes=[[3, 4], [3, 4]]), "Autograd's graph: "),
        (lambda: graph(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))), "Autograd's graph: "),
    ],
)
def test_the_title_names_the_network_that_is_drawn(make, title: str) -> None:
    frames = make()
    shown = draw_graph(frames["nodes"], frames["edges"]).axes[0].texts[0].get_text().replace("\n", " ")
    assert shown.startswith(title)


def _textbook():
    example = textbook_example()
    return {"nodes": example.graph.frame(example.gradients), "edges": example.graph.edges()}


FRAMES = {
    "textbook": _textbook,
    "mse": lambda: graph(loss="mse"),
    "cross_entropy": lambda: graph(loss="cross_entropy"),
    "residual": lambda: graph(Residual(), shapes=[[3, 4], [3, 4]]),
    "norm": lambda: graph(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU())),
}


def _drawn(frames) -> tuple[Figure, list, list]:
    figure = draw_graph(frames["nodes"], frames["edges"])
    FigureCanvasAgg(figure).draw()
    patches = figure.axes[0].patches
    boxes = [patch for patch in patches if isinstance(patch, FancyBboxPatch)]
    return figure, boxes, [patch for patch in patches if isinstance(patch, FancyArrowPatch)]


@pytest.mark.parametrize("name", FRAMES)
def test_a_box_per_node_and_an_arrow_per_edge(name: str) -> None:
    frames = FRAMES[name]()
    _, boxes, arrows = _drawn(frames)
    assert len(boxes) == len(frames["nodes"])
    assert len(arrows) == len(frames["edges"])


@pytest.mark.parametrize("name", FRAMES)
def test_boxes_do_not_touch_and_hold_their_text(name: str) -> None:
    figure, boxes, _ = _drawn(FRAMES[name]())
    extents = [box.get_window_extent() for box in boxes]
    assert not any(a.overlaps(b) for a, b in combinations(extents, 2))
    title, *texts = [text.get_window_extent() for text in figure.axes[0].texts]
    for text in texts:
        assert any(
            box.x0 <= text.x0 and text.x1 <= box.x1 for box in extents if box.y0 <= text.y0 and text.y1 <= box.y1
        )
    assert all(figure.bbox.x0 <= seen.x0 and seen.x1 <= figure.bbox.x1 for seen in [title, *extents])
    assert all(figure.bbox.y0 <= seen.y0 and seen.y1 <= figure.bbox.y1 for seen in [title, *extents])
    assert not any(title.overlaps(box) for box in extents)


def test_hand_written_names_are_on_the_figure() -> None:
    figure, _, _ = _drawn(FRAMES["mse"]())
    said = {text.get_text() for text in figure.axes[0].texts}
    assert {"AddmmBackward0", "Lin.backward", "Relu.backward", "Mse.backward", "p.g += g", "0.weight, (50, 64)"} <= said


def test_a_long_graph_is_cut_off_and_says_so() -> None:
    frames = graph(depth=20, width=4)
    figure = draw_graph(frames["nodes"], frames["edges"], limit=30)
    assert "first 30 nodes" in figure.axes[0].texts[0].get_text().replace("\n", " ")


def test_places_keep_their_distance_and_stay_near_their_wish() -> None:
    assert _spread([0.0, 10.0], [1.0, 1.0]) == [0.0, 10.0]
    left, right = _spread([5.0, 5.0], [1.0, 1.0])
    assert right - left == pytest.approx(1.3)
    assert left + right == pytest.approx(10.0)
