"""The figure of a model: network order, powers of two, the limits of number formats, marks where a signal died."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import initlab
from initlab.figures.model_figure import draw_model
from initlab.figures.model_rows import find_prefix, place_rows, shorten_path
from initlab.stats.dtypes import FORMATS


def mlp(depth: int, std: float | None, width: int = 32) -> nn.Sequential:
    """ReLU layers with N(0, std^2) weights, Kaiming's for None."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layer = nn.Linear(width, width, bias=False)
        nn.init.normal_(layer.weight, std=(2 / width) ** 0.5 if std is None else std)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 5))


def rows_of(model: nn.Module, batch: int = 16, width: int = 32) -> pd.DataFrame:
    loss = nn.functional.cross_entropy
    return initlab.measure(model, torch.randn(batch, width), torch.arange(batch) % 5, loss)


def text_of(figure: Figure) -> str:
    return " | ".join(text.get_text() for ax in figure.axes for text in ax.texts)


def test_places_follow_the_network() -> None:
    rows = place_rows(rows_of(mlp(4, None)))
    values = rows[rows["is_output"] & (rows["series"] == "values")]
    assert values["text"].tolist()[:5] == ["input", "0 Linear", "1 ReLU", "2 Linear", "3 ReLU"]
    assert values["place"].tolist() == list(range(10))
    weights = rows[~rows["is_output"] & (rows["series"] == "values")]
    assert weights["text"].tolist() == ["0 Linear", "2 Linear", "4 Linear", "6 Linear", "8 Linear"]
    gradients = rows[rows["is_output"] & (rows["series"] == "gradients")].set_index("text")["place"]
    assert all(values.set_index("text")["place"][name] == place for name, place in gradients.items())


def test_magnitudes_are_powers_of_two_of_the_rows() -> None:
    frame = rows_of(mlp(2, None))
    rows = place_rows(frame)
    one = frame[(frame["name"] == "2") & (frame["tensor"] == "preactivation") & (frame["direction"] == "forward")]
    mine = rows[(rows["text"] == "2 Linear") & rows["is_output"] & (rows["series"] == "values")].iloc[0]
    assert np.isclose(2 ** mine["middle"], one["rms"].iloc[0], rtol=1e-12)
    assert np.isclose(2 ** mine["high"], max(-one["min"].iloc[0], one["max"].iloc[0]), rtol=1e-12)
    assert np.isnan(mine["low"])  # of both signs, and no histogram was recorded


def test_weights_times_k_move_the_values_by_log2_k_and_nothing_else() -> None:
    torch.manual_seed(1)
    model = mlp(1, None)
    x = torch.randn(16, 32)
    before = place_rows(initlab.measure(model, x))
    with torch.no_grad():
        model[0].weight.mul_(8)
    after = place_rows(initlab.measure(model, x))
    moved = after.set_index(["is_output", "text"])["middle"] - before.set_index(["is_output", "text"])["middle"]
    assert np.allclose(moved[True][["0 Linear", "1 ReLU"]], 3, atol=1e-6)
    assert np.allclose(moved[False][["0 Linear"]], 3, atol=1e-6) and moved[True]["input"] == 0


@pytest.mark.parametrize(
    ("std", "title", "mark"),
    [
        (None, "Values keep their size from input", ""),
        (1.0, "Values grow", ""),
        (30.0, "Values are inf from ", "inf from here on"),
        (1e-6, "Values are exactly 0 from ", "exactly 0 from here on"),
    ],
)
def test_the_title_and_a_mark_say_where_the_signal_dies(std: float | None, title: str, mark: str) -> None:
    torch.manual_seed(0)
    model = mlp(20, std)
    with torch.no_grad():
        model[-1].bias.zero_()
    figure = draw_model(rows_of(model))
    assert title in figure.get_suptitle().replace("\n", " ")
    assert mark in text_of(figure) and (mark or "from here on" not in text_of(figure))


def test_the_first_dead_layer_is_named() -> None:
    """30 sqrt(32 / 2) = 2^6.9 a layer: the 19th product of 20 is the first beyond 2^128."""
    torch.manual_seed(0)
    frame = rows_of(mlp(20, 30.0))
    lost = frame[(frame["n_inf"] + frame["n_nan"] > 0) & (frame["direction"] == "forward")]
    first = f"{lost['name'].iloc[0]} {lost['op'].iloc[0]}"
    assert f"Values are inf from {first} on" in draw_model(frame).get_suptitle()


def test_the_ruler_shows_what_formats_hold() -> None:
    figure = draw_model(rows_of(mlp(20, 10.0)))
    ruler, _, panel, _ = figure.axes
    low, high = panel.get_xlim()
    names = [text.get_text() for text in ruler.get_yticklabels()]
    assert names == ["fp32", "bf16", "fp16", "fp8 e4m3", "fp8 e5m2"]
    ends = {line.get_xdata()[0] for line in panel.lines if line.get_linestyle() not in ("-", "None")}
    for name in ("float16", "float8_e4m3", "float8_e5m2"):
        end = float(np.log2(FORMATS[name].max))
        assert not low < end < high or any(np.isclose(end, one, rtol=1e-12) for one in ends)


def test_of_several_steps_the_first_and_the_last_are_shown_and_said() -> None:
    model = mlp(2, None)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with initlab.probe(model, optimizer=optimizer, histograms=True) as p:
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.randn(16, 32)), torch.arange(16) % 5).backward()
            optimizer.step()
    frame, octaves = p.frame(), p.histograms()
    assert draw_model(frame).get_suptitle().startswith("Step 4 (hollow: step 0). ")
    rows = place_rows(frame, octaves)
    assert sorted(rows["step"].unique()) == [0, 4]
    alive = rows[(rows["state"] == "") & np.isfinite(rows["low"])]
    assert len(alive) > 20 and (alive["low"] <= alive["middle"]).all() and (alive["middle"] <= alive["high"]).all()
    assert {"update"} == set(rows["series"]) - {"values", "gradients"}


@pytest.mark.parametrize("depth", [60, 200])
def test_deep_nets_stay_readable(depth: int) -> None:
    """A picture of bounded height, and names that do not touch: an inch has room for six at most."""
    figure = draw_model(rows_of(mlp(depth, None)))
    inches = figure.get_size_inches()[1]
    names = [text for text in figure.axes[2].get_yticklabels() if text.get_text()]
    assert inches < 19 and 10 < len(names) < 6.5 * inches
    assert all("Linear" in name.get_text() for name in names)  # the modules that can be at fault


class Shared(nn.Module):
    """A layer that is called twice, a function, a parameter of the root, one that passes its input on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(6, 6), nn.Dropout(0.0)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(torch.relu(self.layer(torch.relu(self.layer(x)))) * self.scale)


def test_calls_functions_and_parameters_have_names() -> None:
    texts = set(place_rows(initlab.measure(Shared(), torch.randn(4, 6), loss=lambda out: out.sum()))["text"])
    assert {"input", "layer", "layer #2", "relu", "relu.1", "scale"} == texts
    assert not any("drop" in text for text in texts), "what passes its input on says nothing"


def test_names_are_short_and_still_tell_modules_apart() -> None:
    assert find_prefix(["model.encoder.a", "model.encoder.b"]) == "model.encoder."
    assert find_prefix(["a.x", "b.x"]) == find_prefix(["a"]) == find_prefix([]) == ""
    assert find_prefix(["layers.0.a", "layers.0.b"]) == "layers."
    long = "a.very.long.path.of.many.modules.inside.each.other.weight"
    assert shorten_path(long).endswith("other.weight") and len(shorten_path(long)) <= 36
    assert shorten_path("conv1") == "conv1"


def hard_rows(**changes: Any) -> pd.DataFrame:
    return rows_of(mlp(3, None)).assign(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"rms": np.inf}, {"rms": np.nan, "max": np.nan, "min": np.nan}, {"n_nan": 1}, {"frac_zero": 1.0}, {"rms": 1e308}],
)
def test_any_numbers_are_drawn(changes: dict[str, Any]) -> None:
    figure = draw_model(hard_rows(**changes))
    figure._repr_png_()  # type: ignore[attr-defined]
    assert figure.get_suptitle()


def test_rows_without_outputs_are_drawn_or_refused() -> None:
    frame = rows_of(mlp(3, None))
    weights = frame[frame["tensor"] == "weight"]
    assert [ax.get_title() for ax in draw_model(weights).axes[:1]] == ["parameters"]
    with pytest.raises(initlab.UsageError, match="no output and no parameter"):
        draw_model(frame[frame["tensor"] == "loss"])


def test_theory_lies_beneath_the_values() -> None:
    model = mlp(3, None)
    theory = initlab.predict("kaiming", "relu", depth=4, width=32, inputs=32, batch=16)
    with_band, without = (initlab.plot({"stats": rows_of(model), **more}) for more in ({"theory": theory}, {}))
    assert (
        len(with_band.axes[2].collections) == len(without.axes[2].collections) + 3
    )  # bars of two kinds, and a shade of one
