"""Where number formats end a stack, as a task: measured beside predicted, told in words and drawn."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

import initlab
from initlab.errors import UsageError
from initlab.figures.format_figure import draw_formats
from initlab.stats.dtypes import DTYPES
from initlab.tasks.formats import HAPPENED, WORDS, formats, formats_as_text
from initlab.theory.format_limits import EVENTS, FORMATS

SHAPE = {"depth": 14, "width": 30, "batch": 20}


@pytest.fixture(scope="module")
def vanishing() -> dict[str, pd.DataFrame]:
    return formats("small", "linear", seeds=range(20), **SHAPE)


def at(frames: dict[str, pd.DataFrame], name: str, event: str) -> pd.Series:
    frame = frames["formats"]
    return frame[(frame["format"] == name) & (frame["event"] == event)].iloc[0]


def test_every_format_and_event_has_its_row(vanishing: dict[str, pd.DataFrame]) -> None:
    assert set(HAPPENED) == set(EVENTS) == set(WORDS)
    assert len(vanishing["formats"]) == len(FORMATS) * len(EVENTS)
    assert len(vanishing["ends"]) == len(DTYPES) * len(EVENTS) * 20
    measured = vanishing["formats"].set_index("format")["measured_share"].notna()
    assert {name for name in FORMATS if measured[name].all()} == set(DTYPES)


def test_what_is_measured_is_what_is_predicted(vanishing: dict[str, pd.DataFrame]) -> None:
    """float16 within a layer of each prediction; float64 holds; what a float16 stack meets comes in order."""
    for event in ("subnormal", "zero", "all_zero"):
        row = at(vanishing, "float16", event)
        assert abs(row["measured"] - row["predicted"]) <= 1 and row["measured_share"] == 1
        assert row["measured_low"] <= row["measured"] <= row["measured_high"]
    assert at(vanishing, "float16", "overflow")["measured_share"] == 0
    assert vanishing["formats"].query("format == 'float64'")["measured"].isna().all()
    ends = vanishing["ends"].query("format == 'float16'").pivot(index="seed", columns="event", values="layer")
    assert (ends["subnormal"] <= ends["zero"]).all() and (ends["zero"] < ends["all_zero"]).all()
    growing = formats("naive", "linear", seeds=range(4), **SHAPE)
    row = at(growing, "float16", "overflow")
    assert abs(row["measured"] - row["predicted"]) <= 1 and row["measured_share"] == 1
    assert at(growing, "float16", "all_zero")["measured_share"] == 0


def test_the_text_and_the_figure_say_where(vanishing: dict[str, pd.DataFrame]) -> None:
    text = formats_as_text(vanishing)
    assert "no end of the format: float64" in text and "first inf" not in text
    zeros = next(
        line for line in text.splitlines() if "float16" in line and "all zero" in line and "bfloat" not in line
    )
    assert f"{at(vanishing, 'float16', 'all_zero')['measured']:.0f}" in zeros and "100 %" in zeros
    frame = vanishing["formats"].assign(init="small", activation="linear", depth=14)
    figure = draw_formats(frame)
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(FORMATS)
    full, hollow = (
        [line for line in ax.lines if len(line.get_xdata()) == 1 and (line.get_markerfacecolor() == "white") is empty]
        for empty in (False, True)
    )
    assert len(full) == frame["predicted"].notna().sum() and len(hollow) == frame["measured"].notna().sum()
    assert sorted(float(line.get_xdata()[0]) for line in hollow) == sorted(frame["measured"].dropna())
    said = figure.get_suptitle().replace("\n", " ")
    assert "small, linear" in said and "float64" in said and "all 14 layers" in said


def test_the_task_prints_and_keeps_it(lab: Callable[..., tuple[int, str, str]]) -> None:
    code, said, err = lab("task=formats", "init=naive", "depth=6", "width=100", "seeds=2", "hydra.run.dir=here")
    assert code == 0, err
    assert "float16" in said and "first inf" in said
    kept = pd.read_parquet("here/formats.parquet")
    assert set(kept["event"].astype(str)) == set(EVENTS) and (kept["depth"] == 6).all()
    assert np.isfinite(pd.read_parquet("here/ends.parquet")["layer"]).any()
    assert (initlab.read("here", table="formats")["init"] == "naive").all()
    code, said, _ = lab("task=formats", "activation._target_=torch.nn.Softsign", "depth=2", "width=10", "seeds=1")
    assert code == 0


def test_from_python_and_mistakes() -> None:
    assert initlab.limits("naive", torch.tanh, 3, 20)["layer"].notna().any()
    for options, said in (({"init": "naiv"}, "did you mean naive"), ({"depth": 0}, "depth=0")):
        with pytest.raises(UsageError, match=said):
            formats(**options)  # type: ignore[arg-type]
