from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from initlab.figures import plots
from initlab.figures.pictures import draw_pictures
from initlab.runs.labels import labels
from initlab.tasks.data import load
from initlab.tasks.stack import stack
from initlab.tasks.train import train
from tests.long import long_except

Tables = dict[str, pd.DataFrame]


def words(figure: Figure) -> str:
    """Everything that is written into a figure."""
    found = [figure.get_suptitle()]
    for ax in figure.axes:
        found += [ax.get_title(), ax.get_xlabel(), ax.get_ylabel(), *(text.get_text() for text in ax.texts)]
        found += [text.get_text() for text in (ax.get_legend().get_texts() if ax.get_legend() else [])]
    return " | ".join(found)


def run(init: str, activation: str = "relu", **options: object) -> Tables:
    frames = train(load("digits"), init, activation, steps=4, seeds=range(3), **options)  # type: ignore[arg-type]
    frames["stats"] = pd.concat([frames["stats"], stack(init, activation, seeds=range(3))], ignore_index=True)
    return {
        name: frame.assign(init=init, activation=activation, dtype="float32", run=init)
        for name, frame in frames.items()
    }


def labelled(*runs: Tables) -> Tables:
    joined = {name: pd.concat([one[name] for one in runs], ignore_index=True) for name in runs[0]}
    return {name: frame.assign(label=labels(frame)) for name, frame in joined.items()}


@pytest.fixture(scope="module")
def kaiming() -> Tables:
    return run("kaiming")


@pytest.fixture(scope="module")
def naive() -> Tables:
    return run("naive", "linear")


OF_A_RUN = ["activation_std", "gradient_std", "training_activations", "gradient_norm", "loss"]


@pytest.mark.parametrize("name", OF_A_RUN)
def test_every_figure_states_its_finding(name: str, kaiming: Tables) -> None:
    figure = plots.FIGURES[name](labelled(kaiming))
    assert figure is not None
    assert "kaiming, relu" in figure.get_suptitle() and any(c.isdigit() for c in figure.get_suptitle())
    assert all(ax.get_xlabel() or ax.get_ylabel() for ax in figure.axes)


def test_a_death_is_marked_where_it_happened(naive: Tables, kaiming: Tables) -> None:
    died = plots.activation_std(labelled(naive))
    alive = plots.activation_std(labelled(kaiming))
    assert died is not None and alive is not None
    assert "not finite from layer 38" in words(died) and "beyond float32" in words(died)
    assert "not finite" not in words(alive)
    crosses = [line for line in died.axes[0].lines if line.get_marker() == "X"]
    assert [line.get_xdata()[0] for line in crosses] == [38]


def test_several_settings_are_compared(kaiming: Tables, naive: Tables) -> None:
    tables = labelled(kaiming, naive, run("small", "linear"))
    assert plots.COMPARING["jacobian"](tables) is None  # it needs tables of its own
    for name in ("activation_std", "gradient_std", "loss"):
        figure = plots.COMPARING[name](tables)
        assert figure is not None, name
        said = words(figure).replace("\n", " ")
        assert all(label in said for label in ("kaiming, relu", "naive, linear", "small, linear"))
    figure = plots.activation_std(tables)
    assert figure is not None and "exactly 0 from layer 46" in words(figure)


@pytest.mark.parametrize("every", long_except([1, 10], 10))  # with one step there may be nothing to draw
def test_a_training_that_diverged_is_drawn_and_marked(every: int, tmp_path: Path) -> None:
    tables = labelled(run("naive", depth=50, width=100, every=every))
    written = draw_pictures(plots.make_figures(tables), tmp_path, inline=False)
    assert [one.name for one in written] == [name for name in OF_A_RUN if name != "gradient_std"]
    assert plots.gradient_std(tables) is None  # of dead values there is no gradient
    lost, norms = plots.loss(tables), plots.gradient_norm(tables)
    assert lost is not None and "not finite from step 0" in words(lost)
    assert norms is not None and "0 or not finite" in words(norms)


def test_pngs_are_written_and_what_cannot_be_drawn_is_left_out(tmp_path: Path, kaiming: Tables) -> None:
    written = draw_pictures(plots.make_figures(labelled(kaiming)), tmp_path, inline=False)
    assert [one.name for one in written] == OF_A_RUN
    assert all((tmp_path / f"{one.name}.png").read_bytes()[:4] == b"\x89PNG" for one in written)
    stats = labelled(kaiming)["stats"]
    only_stack = stats[stats["stage"] == "stack"]
    written = draw_pictures(plots.make_figures({"stats": only_stack}), tmp_path, inline=False)
    assert [one.name for one in written] == ["activation_std", "gradient_std"]


def test_a_ladder_is_drawn_over_its_sizes() -> None:
    table = pd.DataFrame(
        {"version": ["slow", "fast"] * 2, "shape": ["2x2"] * 2 + ["9x9"] * 2, "rows": [2, 2, 9, 9],
         "median": [0.1, 0.001, float("nan"), 0.01], "q25": 0.001, "q75": 0.1, "ratio": [100.0, 1.0, float("nan"), 1.0],
         "relative_error": 0.0}
    )  # fmt: skip
    figure = plots.timings({"timings": table})
    assert figure is not None
    assert "fast is 100 times as fast as slow at 2x2" in figure.get_suptitle().replace("\n", " ")
    (ax,) = figure.axes
    assert ax.get_xscale() == "log" and [text.get_text() for text in ax.get_yticklabels()] == ["fast", "slow"]
    assert "seconds a call / those of fast" in words(figure)
    assert plots.timings({"timings": table.assign(median=float("nan"))}) is None
