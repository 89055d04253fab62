"""Panels of lines: degenerate settings, each drawn, and the rules that every one of them keeps."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from initlab.figures import lines, plots
from initlab.figures.lines import MOST, PANELS, move_apart, share_panels
from initlab.runs import summary
from initlab.runs.labels import labels, shorten_labels
from initlab.tasks.stack import stack
from initlab.theory.z_scores import compare_stack
from tests.long import long_except

SHAPE = {"width": 16, "batch": 8}


Settings = list[tuple[str, str, float | None]]


def tables(settings: Settings, depth: int = 12, **options: object) -> dict[str, pd.DataFrame]:
    """Stacks of these rules, activations and gains as one sweep."""
    frames = []
    for init, activation, gain in settings:
        asked = {**SHAPE, "seeds": 3, **options}
        frame = stack(init, activation, depth=depth, gain=gain, **asked)  # type: ignore[arg-type]
        names = {"init": init, "activation": activation, "gain": gain or 0.0, "dtype": "float32"}
        frames.append(frame.assign(**names, run=f"{init}{activation}{gain}"))
    found = pd.concat(frames, ignore_index=True)
    return {"stats": found.assign(label=labels(found))}


def series(n: int) -> Settings:
    return [("kaiming", "relu", round(1 + 0.1 * k, 1)) for k in range(n)]


GALLERY = {
    "1 series": (series(1), {}),
    "2 series": (series(2), {}),
    "8 series": (series(8), {}),
    "13 series": (series(13), {}),
    "30 series": (series(30), {"seeds": 1}),
    "dead by overflow": ([("naive", "linear", None)], {"depth": 70}),
    "dead by underflow": ([("small", "linear", None)], {"depth": 70}),
    "both, and one that lives": (
        [("naive", "relu", None), ("small", "relu", None), ("kaiming", "relu", None)],
        {"depth": 100, "width": 32},
    ),
    "gradients alone": ([("naive", "relu", None), ("small", "relu", None)], {"depth": 100}),
    "depth 1": (series(2), {"depth": 1}),
    "depth 1000": ([("kaiming", "relu", None)], {"depth": 1000, "width": 10, "batch": 4, "backward": False}),
    "one network": (series(2), {"seeds": 1}),
    "two axes": ([(i, a, g) for i in ("naive", "kaiming") for a in ("relu", "tanh") for g in (0.5, 1.5)], {}),
}  # fmt: skip


@pytest.fixture(scope="module", params=long_except(GALLERY, *list(GALLERY)[::4]))
def drawn(request: pytest.FixtureRequest) -> tuple[dict[str, pd.DataFrame], Figure]:
    settings, options = GALLERY[request.param]
    found = tables(settings, **options)  # type: ignore[arg-type]
    figure = plots.draw_stack(found, ("forward",))
    assert figure is not None
    figure.draw_without_rendering()
    return found, figure


def test_a_figure_is_as_wide_as_a_page_and_names_every_line(drawn: tuple[dict[str, pd.DataFrame], Figure]) -> None:
    found, figure = drawn
    assert figure.get_figwidth() * figure.dpi == 850
    short, _ = shorten_labels(list(dict.fromkeys(found["stats"]["label"].astype(str))))
    said = {text.get_text().split(": ")[0] for ax in figure.axes for text in ax.texts}
    ticks = {text.get_text() for ax in figure.axes for text in ax.get_yticklabels()}
    if len(short) > 1:
        assert set(short.values()) <= said | ticks


def test_a_panel_has_at_most_six_lines_and_each_its_colour_and_dashes(
    drawn: tuple[dict[str, pd.DataFrame], Figure],
) -> None:
    _, figure = drawn
    for ax in figure.axes:
        named = [line for line in ax.lines if not str(line.get_label()).startswith(("_", "theory"))]
        assert len(named) <= MOST
        dashes = {str(line._dash_pattern) for line in named}  # type: ignore[attr-defined]
        assert len({line.get_color() for line in named}) == len(dashes) == len(named)


def test_the_last_layer_is_labelled_and_ticks_are_readable(drawn: tuple[dict[str, pd.DataFrame], Figure]) -> None:
    found, figure = drawn
    last = str(found["stats"]["layer"].max())
    panels = [ax for ax in figure.axes if ax.lines or ax.collections]
    assert any(last in [text.get_text() for text in ax.get_xticklabels()] for ax in panels)
    for ax in figure.axes:
        if ax.get_yscale() == "log":
            low, high = ax.get_ylim()
            ticks = [tick for tick in ax.get_yticks() if low <= tick <= high]
            assert 2 <= len(ticks) <= 12
            for tick in ticks:
                assert min(abs(tick / 10 ** np.floor(np.log10(tick) + 1e-9) - part) for part in range(1, 10)) < 0.51


def test_a_mark_stands_on_the_edge_where_the_signal_left(drawn: tuple[dict[str, pd.DataFrame], Figure]) -> None:
    """Above for what is not finite, below for zeros, at the layer of the middle network; none for what lives."""
    found, figure = drawn
    died = summary.first_dead_layer(found["stats"])
    fates = [summary.find_fate(rows) for _, rows in died.groupby("label", observed=True)]
    wanted = sorted((fate.at, 1.0 if fate.kind == "nonfinite" else 0.0) for fate in fates if fate.kind)
    marks = [line for ax in figure.axes for line in ax.lines if line.get_marker() == "X"]
    assert sorted((float(one.get_xdata()[0]), float(one.get_ydata()[0])) for one in marks) == wanted  # type: ignore[index]


def test_what_died_does_not_squeeze_what_lives() -> None:
    settings, options = GALLERY["both, and one that lives"]
    figure = plots.draw_stack(tables(settings, **options), ("forward",))  # type: ignore[arg-type]
    assert figure is not None
    low, high = figure.axes[0].get_ylim()
    assert high / low < 1e6  # the dead ones span eighty decades
    alone = plots.draw_stack(tables(settings[:1], **options), ("forward",))  # type: ignore[arg-type]
    assert alone is not None and alone.axes[0].get_ylim()[1] > 1e38  # nothing else is to be seen: it has the axis


def test_dead_values_have_no_gradient_and_the_words_say_so() -> None:
    settings, options = GALLERY["gradients alone"]
    found = tables(settings, **options)  # type: ignore[arg-type]
    assert plots.gradient_std(found) is None
    said = summary.end_of_signal(found["stats"], "backward")
    assert all(text.startswith("no gradient, the values are ") for text in said.values())
    linear = tables([("small", "linear", None)], depth=70)  # a linear gradient does not hang on the values
    assert plots.gradient_std(linear) is not None


def test_settings_that_differ_in_training_alone_are_one_line() -> None:
    found = tables(series(2))["stats"]
    twice = pd.concat([found.assign(lr=rate, run=f"{rate}") for rate in (0.1, 0.2)])
    twice = twice.assign(label=labels(twice))
    assert twice["label"].nunique() == 4
    figure = plots.draw_stack({"stats": twice}, ("forward",))
    assert figure is not None
    assert len([line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")]) == 2


def test_networks_that_differ_are_never_merged() -> None:
    """What is swept may have no name in a label: the folder tells such runs apart, and both are drawn."""
    found = tables(series(1))["stats"]
    other = found.assign(run="other", std=found["std"] * 1.5)
    both = pd.concat([found, other]).assign(label=lambda rows: labels(rows))
    assert both["label"].nunique() == 2
    figure = plots.draw_stack({"stats": both}, ("forward",))
    assert figure is not None
    assert len([line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")]) == 2


def test_nothing_is_drawn_outside_a_theorys_range() -> None:
    shape = {"depth": 60, "width": 10, "batch": 8}
    found = stack("kaiming", "relu", seeds=2, **shape)  # type: ignore[arg-type]
    theory = compare_stack(found, "kaiming", "relu", inputs=10, method="closed", **shape)  # type: ignore[arg-type]
    columns = {"init": "kaiming", "activation": "relu", "dtype": "float32", "label": "kaiming, relu"}
    figure = plots.draw_stack({"stats": found.assign(**columns), "theory": theory.assign(**columns)}, ("forward",))
    assert figure is not None and figure.axes[0].get_legend() is None
    assert "no formula holds here" in figure.get_suptitle().replace("\n", " ")


def test_names_do_not_overlap() -> None:
    moved = move_apart([0.1, 0.1, 0.11, 0.9], 0.05)
    assert np.diff(moved).min() >= 0.05 - 1e-12 and moved[-1] == 0.9
    assert np.mean(moved[:3]) == pytest.approx(np.mean([0.1, 0.1, 0.11]))


@pytest.mark.parametrize("n", [1, 2, 6, 7, 12, 13, 24])
def test_panels_share_their_lines(n: int) -> None:
    groups = share_panels([str(k) for k in range(n)])
    assert [name for one in groups for name in one] == [str(k) for k in range(n)]
    assert all(0 < len(one) <= MOST for one in groups) and len(groups) == -(-n // MOST) <= PANELS
    assert max(map(len, groups)) - min(map(len, groups)) <= len(groups)


@pytest.mark.parametrize(("low", "high"), [(0.3, 0.5), (0.9, 1.1), (2.1, 5.4), (1e-8, 1.0), (1e-45, 1e38), (0.1, 30)])
def test_every_axis_has_readable_ticks(low: float, high: float) -> None:
    ax = Figure().subplots()
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    lines.set_log_ticks(ax)
    ticks = [tick for tick in ax.get_yticks() if low <= tick <= high]
    assert 2 <= len(ticks) <= 12
    assert all(a != b for a, b in combinations([text.get_text() for text in ax.get_yticklabels()], 2))
