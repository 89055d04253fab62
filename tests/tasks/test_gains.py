"""The table of gains as a task: derived numbers, numbers in use, and what is said of those that deviate."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from initlab.figures.gain_figure import draw_gains
from initlab.meanfield.gain_table import PUBLISHED
from initlab.nn.activations import ACTIVATIONS, GAIN_KINDS, TORCH_HAS, gain
from initlab.tasks.gains import gains, gains_as_text


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return gains()


def test_every_activation_and_kind_once(frame: pd.DataFrame) -> None:
    assert not frame.duplicated(["activation", "kind"]).any()
    own = frame[frame["source"] == ""]
    assert len(own) == len(ACTIVATIONS) * (len(GAIN_KINDS) - 1) and (own["deviation"] == 0).all()
    for row in frame.itertuples():
        assert row.right == gain(row.activation, row.meant)
        assert row.deviation == pytest.approx(row.gain / row.right - 1, abs=1e-15)
    by_torch = frame[frame["kind"] == "torch"].set_index("activation")
    assert tuple(by_torch.index) == tuple(name for name in ACTIVATIONS if name in TORCH_HAS)
    assert by_torch.loc["tanh", "gain"] == 5 / 3 and by_torch.loc["selu", "gain"] == 0.75
    assert np.isnan(frame[frame["activation"] == "gelu"]["torch"]).all()


def test_where_the_numbers_in_use_deviate(frame: pd.DataFrame) -> None:
    """torch: wrong for tanh, sigmoid and selu, right for the rest; the sampled ones all above, by less than 0.1 %."""
    off = frame[frame["deviation"].abs() > 1e-6]
    assert set(off[off["kind"] == "torch"]["activation"]) == {"tanh", "sigmoid", "selu"}
    sampled = frame[(frame["kind"] == "nfnets") & (frame["activation"] != "linear")]
    assert set(sampled["activation"]) == set(PUBLISHED["nfnets"].gains) - {"linear"}
    assert sampled["deviation"].between(3e-4, 9e-4).all()
    small = frame[(frame["kind"] == "slope_at_0") & (frame["activation"] == "sigmoid")]
    assert small["gain"].item() == 4 and small["deviation"].item() == pytest.approx(-0.153, abs=5e-4)
    assert frame[frame["kind"] == "klambauer"]["deviation"].item() == pytest.approx(0, abs=1e-6)


def test_slopes_at_0_are_what_the_source_says() -> None:
    for name, value in PUBLISHED["slope_at_0"].gains.items():
        zero = torch.zeros(1, dtype=torch.float64)
        slope, level = (float(f(zero)) for f in (ACTIVATIONS[name].slope, ACTIVATIONS[name].phi))
        assert value == pytest.approx(1 / slope) and PUBLISHED["kumar"].gains[name] == pytest.approx(
            1 / (slope * (1 + level**2) ** 0.5)
        )


def test_the_text_names_who_is_off_and_who_is_not(frame: pd.DataFrame) -> None:
    text = gains_as_text(frame)
    assert "tanh 1.66667: 13.6 % above chi 1.46741; 5/3 is older" in text
    assert "sigmoid 1: 78.8 % below chi 4.72265" in text and "relu 1.71396: 0.0642 % above std 1.71286" in text
    assert "Right: torch linear, relu, leaky_relu;" in text
    assert all(f"{name} " in text for name in ACTIVATIONS)


def test_the_figure_shows_every_gain_and_hollow_where_it_does_not_last(frame: pd.DataFrame) -> None:
    figure = draw_gains(frame)
    left, right = figure.axes[:2]
    assert [label.get_text() for label in left.get_yticklabels()] == list(ACTIVATIONS)
    for ax, column in ((left, "gain"), (right, "chi_1")):
        marks = [line for line in ax.lines if len(line.get_xdata()) == 1]
        shown = frame[frame["kind"].isin(["chi", "rms", "std", "torch"])]
        assert sorted(float(line.get_xdata()[0]) for line in marks) == sorted(shown[column])
        hollow = {float(line.get_xdata()[0]) for line in marks if line.get_markerfacecolor() == "white"}
        assert hollow == set(shown[shown["stability"].isin(["unstable", "gone"])][column])
    assert "linear, relu, leaky_relu" in figure.get_suptitle()


def test_the_task_prints_and_keeps_it(lab: Callable[..., tuple[int, str, str]]) -> None:
    code, said, _ = lab("task=gains", "hydra.run.dir=here")
    assert code == 0 and "Numbers in use" in said
    kept = pd.read_parquet("here/gains.parquet")
    assert set(kept["activation"]) == set(ACTIVATIONS) and (kept["task"] == "gains").all()
