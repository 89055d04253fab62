"""One door for all tables: every producer has a figure with something drawn in it, and what has none is one line."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import initlab
from initlab.figures.plot import KINDS
from initlab.runs import schema
from initlab.runs.schema import TABLES
from initlab.scratch.agreement import compare_gradients
from initlab.tasks.course.explain import explain
from initlab.tasks.course.graph import graph
from initlab.tasks.course.timing import time_ladder
from initlab.tasks.curves import gain_curves
from initlab.tasks.formats import formats
from initlab.tasks.gains import gains
from initlab.tasks.jacobian import jacobian
from initlab.tasks.phase import Axis, phase
from initlab.tasks.seeded import seeded_stack
from initlab.theory.z_scores import compare_stack
from tests.long import long_except

CROSS_ENTROPY = nn.functional.cross_entropy
SMALL: dict[str, Any] = {"depth": 3, "width": 10, "batch": 8}


def probed(**options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with initlab.probe(model, optimizer=optimizer, **options) as p:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(6, 4)).square().mean().backward()
            optimizer.step()
    return p


def measured() -> pd.DataFrame:
    return initlab.measure(nn.Sequential(nn.Linear(4, 5), nn.ReLU()), torch.randn(6, 4), loss=lambda out: out.mean())


@cache
def trained() -> dict[str, pd.DataFrame]:
    return initlab.train("digits", depth=2, width=10, steps=3, seeds=2, histograms=True)


def with_theory() -> pd.DataFrame:
    return compare_stack(
        initlab.stack(**SMALL, seeds=2), init="kaiming", activation="relu", inputs=10, depth=3, width=10, batch=8
    )


def plane(kind: str, sigma_b: Any) -> pd.DataFrame:
    return pd.concat(list(phase(kind, Axis(1, 2, 3), sigma_b, seeds=1, depth=3, width=10, batch=4)))


def lsuv_attempts() -> pd.DataFrame:
    layers = [{"layer": layer, "attempt": k, "std": 2.0**-k, "outcome": "fits"} for layer in (1, 2) for k in (0, 1)]
    return pd.DataFrame(layers).assign(stage="stack", seed=0, factor=1.0)


# What a public function or a task returns -> how it is made.
PRODUCERS: dict[str, Callable[[], Any]] = {
    "stack": lambda: initlab.stack(**SMALL, seeds=2),
    "train": trained,
    **{f"train: {name}": lambda name=name: trained()[name] for name in ("stats", "losses", "parity", "histograms")},
    "measure": measured,
    "probe": lambda: probed().frame(),
    "probe, the object": probed,
    "probe: histograms": lambda: probed(histograms=True).histograms(),
    "probe: formats": lambda: probed(formats=["float16", "float8_e4m3"]).formats(),
    "measure: formats": lambda: initlab.measure(nn.Linear(4, 3), torch.randn(5, 4), formats=["float16"]),
    "probe: merged": lambda: probed(merged=True).merged(),
    "predict": lambda: initlab.predict(depth=3),
    "limits": lambda: initlab.limits("naive"),
    "theory": with_theory,
    "compare_gradients": lambda: compare_gradients({"w": torch.ones(3)}, {"w": 2 * torch.ones(3)}),
    "gains": gains,
    "curves": lambda: gain_curves(["naive", "kaiming"], **SMALL, seeds=1),
    "seeded": lambda: seeded_stack(depth=2, width=10),
    "jacobian": lambda: jacobian(depth=3, width=10, seeds=2),
    "jacobian: moments": lambda: jacobian(depth=3, width=10, seeds=2)["jacobian"],
    "jacobian: values": lambda: jacobian(depth=3, width=10, seeds=2)["singular_values"],
    "formats": lambda: formats("naive", **SMALL, seeds=2),
    "formats: ends": lambda: formats("naive", **SMALL, seeds=2)["ends"],
    "phase": lambda: plane("sigma", Axis(0, 0.4, 3)),
    "phase over depth": lambda: plane("depth", 0.1),
    "graph": graph,
    "graph: nodes": lambda: graph()["nodes"],
    "explain": lambda: explain().steps,
    "matmul": lambda: ladder(),
    "lsuv": lsuv_attempts,
    "coordinate_check": lambda: widened(),
    "audit": lambda: initlab.audit(nn.Sequential(nn.Linear(40, 50), nn.GELU(), nn.Linear(50, 2))),
    "diagnose": lambda: initlab.diagnose(nn.Linear(4, 2), torch.randn(6, 4), torch.arange(6) % 2, CROSS_ENTROPY),
}


def ladder() -> pd.DataFrame:
    versions = {"abs": torch.ones(9).abs, "exp": torch.ones(9).exp}
    return time_ladder(versions, "9x9", rounds=2).assign(rows=9)


def widened() -> Any:
    """A coordinate check of a net of one hidden layer."""
    return initlab.coordinate_check(
        lambda width: nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1)), [8, 16, 32],
        torch.randn(6, 4), loss=lambda out: out.mean(), optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1),
        steps=2,
    )  # fmt: skip


@cache
def make(name: str) -> Any:
    return PRODUCERS[name]()


def drawn(figure: Figure) -> int:
    """Points of lines, patches and collections that are numbers: what a reader sees of the data."""
    points = [np.asarray(line.get_xydata(), float) for ax in figure.axes for line in ax.lines]
    found = sum(int(np.isfinite(xy).all(1).sum()) for xy in points)
    return found + sum(len(ax.collections) + len(ax.patches) for ax in figure.axes)


def render(figure: Figure) -> None:
    """Everything that drawing does, but for the search for the best layout, which takes most of the time."""
    figure.set_layout_engine("none")
    figure.draw_without_rendering()


@pytest.mark.parametrize("name", long_except(PRODUCERS, *list(PRODUCERS)[::3]))
def test_every_producer_has_a_figure_with_its_data(name: str) -> None:
    before = dict(mpl.rcParams)
    figure = initlab.plot(make(name))
    render(figure)
    assert isinstance(figure, Figure) and drawn(figure) > 1
    assert plt.get_fignums() == [] and dict(mpl.rcParams) == before


def test_a_figure_shows_itself_in_a_notebook() -> None:
    for name in ("measure", "graph"):
        image = initlab.plot(make(name))._repr_png_()
        assert image[:4] == b"\x89PNG"


def test_every_table_of_the_schema_has_its_kind() -> None:
    """The local rules of a pass, the findings of a verdict and the examples of broadcasting are words alone."""
    assert set(TABLES) - set(KINDS) == {schema.RULES, schema.FINDINGS, schema.EXAMPLES}


# One producer of each kind of table.
HARD = (
    "stack", "train: stats", "train: losses", "train: parity", "train: histograms", "probe", "probe: histograms",
    "probe: formats", "predict", "limits", "gains", "curves", "jacobian: moments", "jacobian: values",
    "formats: ends", "formats", "phase", "graph: nodes", "explain", "matmul", "lsuv",
)  # fmt: skip


@pytest.mark.parametrize("name", long_except(HARD, "stack", "train: losses", "probe: histograms", "formats"))
def test_one_row_no_row_and_no_number_are_a_figure_or_a_line(name: str) -> None:
    made = make(name)
    frame = next(iter(made.values())) if isinstance(made, dict) else made
    numbers = [column for column in frame if frame[column].dtype.kind == "f"]
    for hard in (
        frame[:1],
        frame.assign(**dict.fromkeys(numbers, np.nan)),
        frame.assign(**dict.fromkeys(numbers, 0.0)),
    ):
        try:
            render(initlab.plot(hard))
        except initlab.UsageError as error:
            assert "no number in the table can be drawn" in str(error)
    with pytest.raises(initlab.UsageError, match="the table has no rows"):
        initlab.plot(frame[:0])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (pd.DataFrame({"a": [1], "b": [2]}), "a table of a, b, ... has no figure; these have one: model, stats, "),
        (pd.DataFrame(), "has no figure"),
        (3, "frame=3: must be a table that initlab returns"),
        ({}, "must be a table that initlab returns"),
        ("stats", "frame='stats': must be a table"),
        (pd.DataFrame({"source": [0], "target": [1], "position": [0]}), "edges alone have no nodes; give both tables"),
    ],
)
def test_what_has_no_figure_is_one_line(given: Any, text: str) -> None:
    with pytest.raises(initlab.UsageError) as error:
        initlab.plot(given)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_path_is_checked(tmp_path: Path) -> None:
    frame = initlab.stack(**SMALL, seeds=1)
    initlab.plot(frame, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(initlab.UsageError, match=r"x.pgn: must end in .*did you mean png"):
        initlab.plot(frame, tmp_path / "x.pgn")
    with pytest.raises(initlab.UsageError, match="cannot be written"):
        initlab.plot(frame, tmp_path / "nowhere" / "x.png")


def test_tables_of_runs_are_told_apart_by_their_settings() -> None:
    """Two rules in one frame are two lines; the same frame without settings is one."""
    both = pd.concat(
        [initlab.stack(init, **SMALL, seeds=2).assign(init=init, activation="relu") for init in ("naive", "kaiming")]
    )
    title = initlab.plot(both).get_suptitle()
    assert "(relu): naive: std" in title and "kaiming: std" in title
    losses = pd.concat([trained()["losses"].assign(init=init, activation="relu") for init in ("naive", "kaiming")])
    assert "Lowest loss" in initlab.plot(losses).get_suptitle()
    training = pd.concat([trained()["stats"].assign(init=init, activation="relu") for init in ("naive", "kaiming")])
    assert initlab.plot(training).get_suptitle().startswith("The first of 2 settings. naive, relu")
