import numpy as np
import pandas as pd
import pytest

from initlab.figures import plots
from initlab.runs import summary, theory_rows
from initlab.runs.labels import add_labels
from initlab.tasks.data import load
from initlab.tasks.stack import stack
from initlab.tasks.train import train
from initlab.theory.z_scores import compare_stack, compare_training, measure_input

SHAPE = {"depth": 12, "width": 60, "inputs": 60, "batch": 30}


def run(init: str, told: str | None = None, seeds: range = range(4)) -> dict[str, pd.DataFrame]:
    """A run of one rule, compared with what another predicts."""
    stats = stack(init, "relu", seeds=seeds, **SHAPE)
    theory = compare_stack(stats, told or init, "relu", **SHAPE, method="closed")
    columns = {"init": init, "activation": "relu", "dtype": "float32", "run": f"{init} {seeds}"}
    return {name: frame.assign(**columns) for name, frame in (("stats", stats), ("theory", theory))}


def labelled(*runs: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    return add_labels({name: pd.concat([one[name] for one in runs], ignore_index=True) for name in runs[0]})


def words(figure: object) -> str:
    ax = figure.axes[0]  # type: ignore[attr-defined]
    return " | ".join([figure.get_suptitle(), *(text.get_text() for text in ax.get_legend().get_texts())])  # type: ignore[attr-defined]


def test_layers_within_their_band_are_counted() -> None:
    kept = theory_rows.count_in_band(labelled(run("kaiming"))["theory"])
    assert set(kept) == {"kaiming, relu"}
    count = int(kept["kaiming, relu"].split(" of 12")[0])
    assert count >= 6
    assert theory_rows.count_in_band(labelled(run("lecun", told="kaiming"))["theory"]) == {"lecun, relu": "0 of 12"}
    both = theory_rows.count_in_band(labelled(run("kaiming"), run("lecun", told="kaiming"))["theory"])
    assert both == kept | {"lecun, relu": "0 of 12"}


def test_runs_that_differ_in_their_seeds_are_one_ensemble() -> None:
    tables = labelled(run("kaiming"), run("kaiming", seeds=range(4, 8)))
    assert set(tables["theory"]["label"]) == {"kaiming, relu"}
    z = tables["theory"].query("seed < 0 and statistic == 'std' and tensor == 'activation' and direction == 'forward'")
    joint = z.groupby("layer")["z"].sum().drop(0) / np.sqrt(2)
    assert theory_rows.count_in_band(tables["theory"]) == {"kaiming, relu": f"{(joint.abs() <= 1.9953933).sum()} of 12"}


def test_the_line_beneath_the_table() -> None:
    assert theory_rows.describe(["49 of 50"]).startswith("theory: 49 of 50 layers within the 95 % band (std")
    assert ", outside its range: theory=simulation knows more (std" in theory_rows.describe(
        ["49 of 50, outside its range"]
    )
    assert theory_rows.describe(["1 of 2", "2 of 2"]).startswith("theory: layers within the 95 % band")
    assert theory_rows.describe(["1 of 2", "2 of 2, outside its range"]).endswith("theory=simulation knows more")
    tables = run("kaiming")
    text = summary.as_text(summary.summarize(tables["stats"], None, None, tables["theory"]))
    assert text.splitlines()[0].split()[-1] == "theory" and " of 12" in text
    assert "theory" not in summary.as_text(summary.summarize(tables["stats"], None, None))


def test_a_training_shows_what_is_predicted_of_its_first_step() -> None:
    """A mark and a bar for each layer left of step 0, in both panels, none without a prediction."""
    data = load("digits")
    stats = train(data, "kaiming", "relu", 2, 30, 32, steps=3, seeds=range(3))["stats"]
    theory = compare_training(stats, [30, 30, 10], measure_input(data.x.numpy(), 32), 32, "kaiming", "relu", "closed")
    tables = {name: frame.assign(label="kaiming, relu") for name, frame in (("stats", stats), ("theory", theory))}
    figure = plots.training_activations(tables)
    assert figure is not None
    for ax, statistic in zip(figure.axes, ("mean", "std"), strict=False):
        known = theory_rows.start(theory, statistic).set_index("layer")
        assert list(known.index) == [1, 2, 3]
        marks = [line for line in ax.lines if line.get_marker() == "D" and len(line.get_xdata())]
        assert [float(line.get_ydata()[0]) for line in marks] == list(known["predicted"])
        assert all(line.get_xdata()[0] < 0 for line in marks)
        bars = [
            list(line.get_ydata()) for line in ax.lines if line.get_marker() == "None" and max(line.get_xdata()) < 0
        ]
        assert bars == known[["low", "high"]].to_numpy().tolist()
    legend = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert legend == ["1", "2", "3", "theory at step 0, 95 %"] and figure.axes[0].get_legend() is None
    bare = plots.training_activations({"stats": tables["stats"]})
    assert bare is not None and not [line for line in bare.axes[1].lines if line.get_marker() == "D"]


@pytest.mark.parametrize("name", ["activation_std", "gradient_std"])
def test_figures_show_the_prediction_beside_the_measurement(name: str) -> None:
    one = plots.FIGURES[name](labelled(run("kaiming")))
    assert one is not None
    assert "theory" in words(one) and "theory: 95 % of networks" in words(one)
    assert "of 12 layers within the 95 % band" in words(one).replace("\n", " ")
    lines = {line.get_label(): line for line in one.axes[0].lines}
    theory = lines["theory"].get_ydata()
    assert np.asarray(theory)[-1] == pytest.approx(1.0, abs=0.3) and lines["theory"].is_dashed()
    several = plots.COMPARING[name](labelled(run("kaiming"), run("lecun")))
    assert several is not None and "95 % of networks" not in words(several)
    circles = [line for line in several.axes[0].lines if line.get_marker() == "o"]
    assert len(circles) == 3  # one for each run, one for the legend
    bare = plots.FIGURES[name]({"stats": labelled(run("kaiming"))["stats"]})
    assert bare is not None and "theory" not in words(bare).lower()
