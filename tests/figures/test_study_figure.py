"""What a study's figure shows, and that it can be drawn."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from initlab.errors import UsageError
from initlab.figures.figure_spec import FigureSpec, bands, find_predictions, first_dead, parse_figure, select_rows
from initlab.figures.study_figure import draw_study, share_limits
from initlab.runs.schema import own_columns
from initlab.runs.select import NothingFound


def stats(**columns: Any) -> pd.DataFrame:
    """Two settings, five networks each, ten layers; std of `a` is 2^layer times the seed + 1, of `b` a tenth of it."""
    one = {"layer": np.tile(np.arange(1, 11), 5), "seed": np.repeat(np.arange(5), 10), "dtype": "float32"}
    frames = [
        pd.DataFrame({"run": name, "init": name, **one, "std": scale * 2.0 ** one["layer"] * (one["seed"] + 1)})
        for name, scale in (("b", 0.1), ("a", 1.0))
    ]
    return pd.concat(frames, ignore_index=True).assign(activation="relu", n_nan=0, n_inf=0, width=8, **columns)


LINES = FigureSpec("layer", "std", by="init", y_scale="log")


def test_a_band_is_over_networks_in_the_order_of_the_rows() -> None:
    rows = select_rows(LINES, {"stats": stats()})
    band = bands(rows)
    assert list(rows["label"].cat.categories) == ["b", "a"] and len(band) == 20
    last = band[(band["label"] == "a") & (band["x"] == 10)].iloc[0]
    assert last["median"] == 3 * 2**10 and last["low"] == pytest.approx(1.64 * 2**10)  # ranks 0.16 * 4 of 1, 2, ...
    assert bands(select_rows(FigureSpec("layer", "ln std", by="init"), {"stats": stats()}))["median"].iloc[
        -1
    ] == math.log(3072)


def test_numbers_are_named_and_ascend_and_words_keep_their_order() -> None:
    wide = pd.concat([stats(), stats().assign(run="w", width=4)])
    rows = select_rows(FigureSpec("init", "std", by="width", where={"layer": 3}), {"stats": wide})
    assert list(rows["label"].cat.categories) == ["width 4", "width 8"]
    assert list(dict.fromkeys(bands(rows)["x"])) == ["b", "a"]
    panels = select_rows(FigureSpec("layer", "std", col="init"), {"stats": stats()})
    assert list(panels["panel"].cat.categories) == ["b", "a"] and list(panels["label"].unique()) == [
        "b, relu",
        "a, relu",
    ]


def test_a_death_is_where_the_first_entry_is_lost_not_where_the_last_is() -> None:
    frame = stats()
    frame.loc[(frame["init"] == "a") & (frame["layer"] >= 7) & (frame["seed"] == 2), "n_inf"] = 1
    frame.loc[(frame["init"] == "b") & (frame["layer"] >= 9), "std"] = 0.0
    rows = select_rows(LINES, {"stats": frame})
    died = first_dead(rows, LINES).groupby("label", observed=True)[["nonfinite", "zero"]].min()
    assert died.loc["a", "nonfinite"] == 7 and math.isnan(died.loc["a", "zero"])
    assert died.loc["b", "zero"] == 9 and math.isnan(died.loc["b", "nonfinite"])
    assert first_dead(rows, FigureSpec("layer", "std"))["zero"].isna().all()  # a linear axis shows a 0
    back = FigureSpec("layer", "std", by="init", where={"direction": "backward"}, y_scale="log")
    died = first_dead(rows, back).groupby("label", observed=True)["nonfinite"].max()
    assert died["a"] == 10  # the gradient comes from there


def test_theory_has_the_rows_of_the_figure() -> None:
    frame = stats(tensor="activation")
    theory = frame.assign(statistic="std", predicted=1.0, band_low=0.5, band_high=2.0)
    other = theory.assign(statistic="mean", predicted=9.0)
    whole = theory.assign(seed=-1, predicted=9.0)
    one = FigureSpec("layer", "std", where={"tensor": "activation", "n_nan": 0}, by="init", theory=True)
    lines = find_predictions(one, {"stats": frame, "theory": pd.concat([theory, other, whole])})
    assert len(lines) == 20 and set(lines["predicted"]) == {1.0} and set(lines["high"]) == {2.0}
    assert not len(find_predictions(one, {"stats": frame}))


@pytest.mark.parametrize(
    "one",
    [
        LINES,
        FigureSpec("layer", "ln std", col="init"),
        FigureSpec("init", "std", where={"layer": 2}),
        FigureSpec("layer", "std", where={"layer": {"min": 2}}, by="seed", col="init", x_scale="log", theory=True),
    ],
)
def test_every_kind_of_figure_is_drawn(one: FigureSpec) -> None:
    frame = stats(statistic="std", predicted=1.0, band_low=0.5, band_high=2.0)
    frame.loc[frame["layer"] > 8, "std"] = math.nan
    figure = draw_study(one, {"stats": frame, "theory": frame}, "Is it so? " * 30, "1 of 1 expectations hold")
    figure.draw_without_rendering()
    axes = [ax for ax in figure.axes if ax.get_visible()]
    assert len(axes) == (2 if one.col else 1) and figure.get_suptitle().endswith("\n1 of 1 expectations hold")
    assert any(ax.lines for ax in axes)
    said = " ".join(text.get_text() for ax in axes for text in ax.texts)
    assert ("not finite from layer 9" in said) == (one.x == "layer")


def test_what_the_source_gives_is_drawn_in_its_panel() -> None:
    expected = [
        {"panel": "a", "y": 2.0, "text": "twice"},
        {"x": 3, "label": "seed 0"},
        {"x": 2, "y": 1.5, "text": "here"},
    ]
    one = FigureSpec("layer", "std", by="seed", col="init", expected=expected)
    panels = {ax.get_title(loc="left"): ax for ax in draw_study(one, {"stats": stats()}, "").axes}
    assert "twice" in {text.get_text() for text in panels["a"].texts} - {text.get_text() for text in panels["b"].texts}
    for ax in panels.values():
        assert [line for line in ax.lines if list(line.get_xdata()) == [3, 3]]
        assert [line for line in ax.lines if list(line.get_xdata()) == [2] and list(line.get_ydata()) == [1.5]]


def test_a_ratio_of_two_columns_is_an_axis() -> None:
    frame = stats().assign(width=5)
    rows = select_rows(FigureSpec("layer / width", "std"), {"stats": frame})
    assert rows["x"].tolist() == (frame["layer"] / 5).tolist()
    with pytest.raises(UsageError, match="did you mean width"):
        select_rows(FigureSpec("layer / widht", "std"), {"stats": frame})


def test_panels_have_one_axis_or_their_own() -> None:
    """A common axis may be so much longer than what a panel needs, and no longer."""
    assert share_limits({"a": (1.0, 10.0), "b": (0.5, 20.0)}, log=True) == {"a": (0.5, 20.0), "b": (0.5, 20.0)}
    own = {"a": (1.0, 2.0), "b": (1e-9, 1.0)}
    assert share_limits(own, log=True) == own and share_limits(own, log=False) == {"a": (1e-9, 2.0), "b": (1e-9, 2.0)}


def test_the_whole_way_of_what_dies_is_shown_where_it_is_asked_for() -> None:
    dying = stats().query("init == 'a'").assign(init="z", run="z", std=lambda rows: 10.0 ** (rows["layer"] * 4.2))
    frame = pd.concat([stats(), dying], ignore_index=True)
    frame.loc[(frame["init"] == "z") & (frame["layer"] > 9), "n_inf"] = 1
    part = draw_study(FigureSpec("layer", "std", by="init", y_scale="log"), {"stats": frame}, "").axes[0].get_ylim()
    whole = FigureSpec("layer", "std", by="init", y_scale="log", whole=True)
    assert draw_study(whole, {"stats": frame}, "").axes[0].get_ylim()[1] > 1e37 > 1e6 > part[1]


KNOWN: dict[str, Any] = {"stats": {*(own_columns("stats") or ()), "init", "run"}, "gains": None}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"y": "stdd", "x": "layer"}, "did you mean std"),
        ({"y": "std", "x": "laier"}, "did you mean layer"),
        ({"y": "std", "x": "layer", "by": "inti"}, "did you mean init"),
        ({"y": "std", "x": "layer", "where": {"tensr": "bias"}}, "did you mean tensor"),
        ({"y": "std", "x": "layer", "where": {"layer": {"most": 3}}}, "a range has min and max"),
        ({"y": "std"}, "has no `x`"),
        ({"y": "std", "x": "layer", "expected": [{"z": 1}]}, "must be one of label, panel, text, x, y"),
        ({"x": "layer"}, "has x, but no `y`"),
        ({"y": "std", "x": "layer", "y_scale": "logg"}, "did you mean log"),
        ({"y": "std", "x": "layer", "table": "gainz"}, "did you mean gains"),
        ({"y": "gain", "x": "kind", "table": "gains", "theory": True}, "of the table stats only"),
    ],
)
def test_a_figure_that_cannot_be_drawn_is_a_mistake_beforehand(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        parse_figure(fields, KNOWN)
    assert str(caught.value).startswith("study.figure: ")


def test_a_figure_of_its_own_or_none() -> None:
    assert parse_figure({"y": None, "table": "stats", "y_scale": "log", "where": {}}, KNOWN) is None
    assert parse_figure({"y": "std", "x": "layer", "by": None}, KNOWN) == FigureSpec("layer", "std")


def test_rows_that_are_not_told_apart_are_a_mistake() -> None:
    twice = pd.concat([stats(tensor="activation"), stats(tensor="weight")])
    with pytest.raises(UsageError, match="several rows at one layer; say tensor in `where`"):
        select_rows(LINES, {"stats": twice})
    with pytest.raises(NothingFound, match="layer=99"):
        select_rows(FigureSpec("layer", "std", where={"layer": 99}), {"stats": stats()})
    with pytest.raises(UsageError, match="did you mean std"):
        select_rows(FigureSpec("layer", "stdd"), {"stats": stats()})


def test_a_panel_of_one_number_format_shows_the_ends_of_that_one() -> None:
    both = {"stats": pd.concat([stats(), stats().assign(run="h", dtype="float16")]).assign(std=lambda f: f["std"] * 10)}
    figure = draw_study(FigureSpec("layer", "std", by="init", col="dtype", y_scale="log"), both, "")
    said = [{text.get_text() for text in ax.texts} for ax in figure.axes]
    assert not any("float16" in text for text in said[0]) and "beyond float16" in said[1]
    (mixed,) = draw_study(FigureSpec("layer", "std", by="dtype", where={"init": "a"}, y_scale="log"), both, "").axes
    assert "beyond float16" in {text.get_text() for text in mixed.texts}
