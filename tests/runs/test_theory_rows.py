import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

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


def words(figure: Figure) -> str:
    legend = figure.axes[0].get_legend()
    return " | ".join([figure.get_suptitle(), *(text.get_text() for text in (legend.get_texts() if legend else []))])


def test_a_profile_is_judged_as_a_whole_and_each_label_by_itself() -> None:
    kept = theory_rows.find_agreement(labelled(run("kaiming"))["theory"])
    assert set(kept) == {"kaiming, relu"}
    assert kept["kaiming, relu"].p > 0.01 and kept["kaiming, relu"].layers == 12
    wrong = theory_rows.find_agreement(labelled(run("lecun", told="kaiming"))["theory"])
    assert wrong["lecun, relu"].p < 1e-9
    both = theory_rows.find_agreement(labelled(run("kaiming"), run("lecun", told="kaiming"))["theory"])
    assert both == kept | wrong


def test_runs_that_differ_in_their_seeds_are_one_ensemble() -> None:
    tables = labelled(run("kaiming"), run("kaiming", seeds=range(4, 8)))
    assert set(tables["theory"]["label"]) == {"kaiming, relu"}
    z = tables["theory"].query("seed < 0 and statistic == 'std' and tensor == 'activation' and direction == 'forward'")
    joint = z.groupby("layer")["z"].mean().drop(0) / np.sqrt(4) / np.sqrt(1 / 8 + theory_rows.KNOWN**2)
    found = theory_rows.find_agreement(tables["theory"])["kaiming, relu"]
    assert (abs(found.z), found.layer) == (pytest.approx(joint.abs().max()), joint.abs().idxmax())


WIDE = {"depth": 12, "width": 100, "batch": 40}
OTHERS = {
    "a gain 3 % too large": ({"init": "kaiming", "gain": 1.03 * 2**0.5}, {"init": "kaiming"}, {}),
    "fans swapped": ({"init": "kaiming", "mode": "fan_out"}, {"init": "kaiming"}, {"inputs": 50}),
    "a bias forgotten": ({"init": "torch_default", "bias": 0.0}, {"init": "torch_default"}, {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_fault_is_found_with_32_networks_and_the_right_rule_is_not_blamed(name: str) -> None:
    wrong, right, shape = OTHERS[name]
    for given, found in ((wrong, True), (right, False)):
        stats = stack(activation="relu", seeds=32, **WIDE, **shape, **given)  # type: ignore[arg-type]
        asked = WIDE | {"inputs": 100} | shape
        theory = compare_stack(stats, right["init"], "relu", method="closed", **asked).assign(label="it")  # type: ignore[arg-type]
        p = theory_rows.find_agreement(theory)["it"].p
        assert (p < 1e-3) if found else (p > 0.01)


def test_the_test_of_a_profile_holds_its_level() -> None:
    """Of 100 ensembles of 8 right networks 5 have p below 0.05, within 4.5 standard errors; a count of layers has no
    such level."""
    shape = {"depth": 20, "width": 40, "batch": 8}
    stats = stack("kaiming", "relu", seeds=800, **shape)  # type: ignore[arg-type]
    stats = stats[stats["tensor"] == "activation"].assign(member=lambda rows: rows["seed"] // 8)
    theory = compare_stack(stats, "kaiming", "relu", inputs=40, method="closed", **shape)  # type: ignore[arg-type]
    theory = theory.assign(label=theory["member"].astype(str))
    for direction in ("forward", "backward"):
        p = np.array([one.p for one in theory_rows.find_agreement(theory, direction).values()])
        assert len(p) == 100 and (p < 0.05).sum() <= 15
        assert 0.35 < p.mean() < 0.65  # of a uniform law 0.5, standard error 0.029


def test_networks_that_die_where_predicted_agree_with_theory() -> None:
    for init, depth in (("naive", 48), ("small", 42)):
        stats = stack(init, "relu", depth=depth, width=100, batch=50, seeds=4)
        theory = compare_stack(stats, init, "relu", depth, 100, 100, 50, method="closed").assign(label="it")
        found = theory_rows.find_agreement(theory)["it"]
        assert found.p > 0.01 and depth - 12 < found.layers < depth
    assert not theory_rows.find_agreement(theory, "backward")  # of values that are 0 there is no gradient to judge
    dead = theory.assign(z=theory["z"].where(theory["layer"] < 20))  # from there on no network has a number
    found = theory_rows.find_agreement(dead)["it"]
    assert (found.p, found.died) == (0.0, 20) and "dead that should live" in str(found)


def test_a_gradient_of_a_linear_stack_is_judged_though_its_values_died() -> None:
    """The figures draw it for the same reason: it does not hang on the values."""
    theory = labelled(run("kaiming"))["theory"]
    gone = (theory["direction"] == "forward") & (theory["layer"] > 3)
    theory = theory.assign(measured=theory["measured"].where(~gone, 0.0))
    assert not theory_rows.find_agreement(theory, "backward")
    linear = theory_rows.find_agreement(theory.assign(activation="linear"), "backward")
    assert [one.layers for one in linear.values()] == [12]


def test_what_is_said_of_an_agreement() -> None:
    one = theory_rows.ProfileTest(0.41, 1.2, 7, 50, 50, np.nan, False)
    assert (str(one), one.short) == ("theory: 50 layers agree, p = 0.41", "p 0.41")
    doubtful = str(one._replace(p=0.02, layers=44, z=-3.0))
    assert doubtful == "theory: doubtful, p = 0.02: 3 standard errors below at layer 7"
    assert str(one._replace(p=0.0, z=12.0)) == "theory: does not agree, p < 0.001: 12 standard errors above at layer 7"
    assert str(one._replace(outside=True)).endswith("theory=simulation knows more")
    assert "no layer lies inside" in str(one._replace(p=np.nan))
    assert theory_rows.describe([one]) == str(one)
    assert theory_rows.describe([one, one]).endswith("in one of 20")
    tables = run("kaiming")
    text = summary.as_text(summary.summarize(tables["stats"], None, None, tables["theory"]))
    assert text.splitlines()[0].split()[-1] == "theory" and " p " in text
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
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["theory at step 0, 95 %"]
    assert {text.get_text() for text in figure.axes[1].texts} == {"layer 1", "layer 2", "layer 3"}
    bare = plots.training_activations({"stats": tables["stats"]})
    assert bare is not None and not [line for line in bare.axes[1].lines if line.get_marker() == "D"]


@pytest.mark.parametrize("name", ["activation_std", "gradient_std"])
def test_figures_show_the_prediction_beside_the_measurement(name: str) -> None:
    one = plots.FIGURES[name](labelled(run("kaiming")))
    assert one is not None
    assert "theory" in words(one) and "theory: 95 % of networks" in words(one)
    assert "theory: 12 layers agree, p = " in words(one).replace("\n", " ")
    lines = {line.get_label(): line for line in one.axes[0].lines}
    theory = lines["theory"].get_ydata()
    assert np.asarray(theory)[-1] == pytest.approx(1.0, abs=0.3) and lines["theory"].is_dashed()
    several = plots.COMPARING[name](labelled(run("kaiming"), run("lecun")))
    assert several is not None and "95 % of networks" not in words(several)
    circles = [line for line in several.axes[0].lines if line.get_marker() == "o"]
    assert len(circles) == 3  # one for each run, one for the legend
    bare = plots.FIGURES[name]({"stats": labelled(run("kaiming"))["stats"]})
    assert bare is not None and "theory" not in words(bare).lower()
