"""A plane of networks: against networks one by one, against theory on both sides of the line, and what is refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import initlab
from initlab.errors import UsageError
from initlab.figures.phase_figure import draw_phase
from initlab.meanfield.fixed_points import critical
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import Rule
from initlab.nn.philox import gaussian
from initlab.tasks import phase_points
from initlab.tasks.ensemble.device import Where
from initlab.tasks.phase import Axis, depth_scale, phase, phase_as_text, steps
from initlab.tasks.phase_points import Points, measure_points, schedule
from initlab.tasks.stack import stack

SW, SB = Axis(0.5, 3.0, 5), Axis(0.0, 0.8, 3)
SMALL: dict[str, Any] = {"sigma_w": SW, "sigma_b": SB, "depth": 12, "width": 40, "seeds": [3, 4]}
WEIGHTS = 5e-6  # they are float32, 3e-8 apart, and 12 chaotic layers multiply that by 1.5 each
ROUNDING = 2e-4  # 12 float32 layers, chaotic ones among them, that multiply rounding by 1.5 a layer and more


def table(**options: Any) -> pd.DataFrame:
    return pd.concat(phase(**{**SMALL, **options}), ignore_index=True)


def alone(sw: float, sb: float, seed: int, activation: str, depth: int, width: int, c0: float = 0.5) -> torch.Tensor:
    """The last preactivations (N, O) of one network, from the same numbers, the plain way in float64."""
    row = ACTIVATIONS[activation]
    own, common = (gaussian((n, width), [seed], f"{what}input")[0].double() for n, what in ((8, ""), (1, "common ")))
    x = math.sqrt(1 - c0) * own + math.sqrt(c0) * common
    for layer in range(1, depth + 1):
        w = gaussian((width, width), [seed], "weight", layer)[0].double() / math.sqrt(width)
        z = sw * (x @ w) + sb * gaussian((width,), [seed], "bias", layer)[0].double()
        x = row.phi(z)
    return z


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
def test_a_point_is_the_network_alone(activation: str) -> None:
    found = table(activation=activation, dtype="float64")
    for _, at in found.iterrows():
        z = alone(at.gain, at.sigma_b, int(at.seed), activation, 12, 40)
        slope = ACTIVATIONS[activation].slope(z)
        angle = torch.nn.functional.cosine_similarity(z[:, None], z[None], dim=-1)
        cosine = float((angle.sum() - 8) / 56)
        expected = [z.square().mean(), z.std(correction=0), at.gain**2 * slope.square().mean()]
        found_here = [at.q, at["std"], at.chi_1]
        assert found_here == pytest.approx([float(x) for x in expected], rel=WEIGHTS)
        assert at.cosine == pytest.approx(cosine, abs=WEIGHTS)
    other = alone(1.2, 0.4, 5, activation, 12, 40)
    assert float(other.square().mean()) != pytest.approx(found["q"].iloc[0], rel=0.01)


def test_without_biases_it_is_the_stack() -> None:
    """The same numbers under the same keys: a row of `stats` with that gain."""
    found = table(sigma_b=Axis(0, 0, 1), correlation=0.0, sigma_w=Axis(0.5, 2.0, 3))
    for gain in (0.5, 1.25, 2.0):
        rows = stack(Rule(gain=gain), "tanh", depth=12, width=40, batch=8, seeds=[3, 4], backward=False)
        last = rows[(rows["layer"] == 12) & (rows["tensor"] == "preactivation")].set_index("seed")
        mine = found[found["gain"] == gain].set_index("seed")
        np.testing.assert_allclose(mine["q"], last["q"], rtol=ROUNDING)
        np.testing.assert_allclose(mine["cosine"], last["cosine"], atol=ROUNDING)
        np.testing.assert_allclose(mine["frac_saturated"], last["frac_saturated"], atol=1 / 320)


@pytest.mark.parametrize("weights", ["common", "fresh"])
def test_how_many_go_together_changes_nothing(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = table(weights=weights)
    with monkeypatch.context() as patch:
        patch.setitem(phase_points.CHUNK, "cpu", 1)  # fewer bytes than one point takes: they go one by one
        ones = table(weights=weights)
    pd.testing.assert_frame_equal(
        whole.drop(columns="xi_c"), ones.drop(columns="xi_c"), rtol=20 * ROUNDING, atol=ROUNDING
    )
    few = table(weights=weights, sigma_w=Axis(1.75, 1.75, 1), sigma_b=Axis(0.4, 0.4, 1))
    same = whole[(whole["gain"] == 1.75) & (whole["sigma_b"] == 0.4)]
    np.testing.assert_allclose(few["q"], same["q"], rtol=ROUNDING)  # nor what else is in the plane


def test_drawing_weights_again_for_every_block_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = table()
    monkeypatch.setattr(phase_points, "KEPT", 4 * 40 * 41 * 5)
    monkeypatch.setattr(phase_points, "BLOCK", 8 * 40 * 4 * 4)
    monkeypatch.setitem(phase_points.CHUNK, "cpu", 2 * 8 * 40 * 4)  # two points go together
    pd.testing.assert_frame_equal(whole, table(), rtol=20 * ROUNDING, atol=20 * ROUNDING)


def test_both_sides_of_the_line_are_as_theory_says() -> None:
    """64 networks of width 100 a point. sd of a network's chi_1 is about 0.05 and of its cosine 0.15 in the chaotic
    phase, so that the mean's tolerance is 5 standard errors, beside O(1/n) bias of 2 %.
    """
    found = table(sigma_w=Axis(0.8, 2.4, 3), sigma_b=Axis(0.3, 0.3, 1), depth=40, width=100, seeds=range(64))
    at = found.groupby("gain")[["q", "cosine", "chi_1", "growth"]].mean()
    theory = found.groupby("gain")[["limit_q", "limit_cosine", "limit_chi_1", "predicted_growth"]].first()
    np.testing.assert_allclose(at["q"], theory["limit_q"], rtol=0.06)
    np.testing.assert_allclose(at["chi_1"], theory["limit_chi_1"], rtol=0.05)
    np.testing.assert_allclose(at["growth"], theory["predicted_growth"], rtol=0.05)
    assert abs(at["cosine"] - theory["limit_cosine"]).max() < 0.1
    edge = math.sqrt(critical("tanh", 0.09))
    assert 0.8 < edge < 1.6
    ordered, *chaotic = at.index
    assert at.loc[ordered, "cosine"] > 0.999 and at.loc[ordered, "chi_1"] < 0.9
    assert (at.loc[chaotic, "cosine"] < 0.7).all() and (at.loc[chaotic, "chi_1"] > 1.1).all()
    xi = found[found["gain"] == ordered]["xi_c"]
    assert xi.notna().all() and xi.mean() == pytest.approx(found["predicted_xi_c"].iloc[0], rel=0.1)
    # Between the two others chi_1 is 1.12 with sd 0.06: 2 of 64 are expected below 1, and 5 standard errors are 7.
    wrong = found["phase"] != found["predicted_phase"]
    assert wrong.sum() <= 9 and not wrong[found["gain"] != chaotic[0]].any()


def test_common_and_fresh_weights_agree_in_the_mean() -> None:
    """48 networks at each of two points: means of q differ by less than 5 standard errors; single networks differ."""
    asked = {"sigma_w": Axis(0.9, 2.0, 2), "sigma_b": Axis(0.3, 0.3, 1), "seeds": range(48)}
    common, fresh = table(**asked), table(**asked, weights="fresh")
    for name in ("q", "chi_1", "cosine"):
        one, other = (frame.groupby("gain")[name] for frame in (common, fresh))
        error = np.sqrt((one.var() + other.var()) / 48)
        assert (abs(one.mean() - other.mean()) < 5 * error + 1e-12).all()
    assert not np.allclose(common["q"], fresh["q"], rtol=1e-3)


def test_layers_of_the_plane_depth_are_the_planes_of_that_depth() -> None:
    deep = table(plane="depth", sigma_b=0.4)
    assert set(deep["layer"]) == set(range(1, 13)) and len(deep) == 2 * 5 * 12
    for depth in (1, 7, 12):
        last = table(depth=depth, sigma_b=Axis(0.4, 0.4, 1))
        mine = deep[deep["layer"] == depth]
        for name in ("q", "cosine", "chi_1", "std", "predicted_q", "predicted_cosine", "predicted_growth"):
            np.testing.assert_allclose(mine[name], last[name], rtol=ROUNDING, atol=ROUNDING)


def test_a_dead_signal_is_data() -> None:
    """Overflow in float16, underflow without biases, no weights at all: counted, and nowhere nan."""
    hot = table(activation="relu", dtype="float16", sigma_w=Axis(0, 40, 3), sigma_b=Axis(0, 0, 1), depth=30)
    cold = table(sigma_w=Axis(1e-3, 1e-3, 1), sigma_b=Axis(0, 0, 1), depth=30, activation="tanh")
    for frame in (hot, cold):
        assert not frame.drop(columns=["xi_c", "predicted_xi_c", "limit_cosine"]).isna().any().any()
    assert (hot[hot["gain"] == 0]["died_at"] == 1).all() and (hot[hot["gain"] == 0]["q"] == 0).all()
    above = hot[hot["gain"] > 0]
    assert (above["q"] == math.inf).all() and (above["n_nan"] + above["n_inf"] > 0).all()
    assert above["died_at"].between(2, 6).all() and (above["phase"] == "unbounded").all()
    assert above["cosine"].between(0.3, 1).all() and (above["chi_1"] > 100).all()  # of the last layer seen alive
    assert cold["died_at"].between(14, 17).all() and (cold["q"] == 0).all()  # 1e-45 is float32's smallest
    assert (table()["died_at"] == 0).all()
    assert "died at 100.0%" in phase_as_text(hot)


def test_the_depth_scale_is_found_where_it_shows() -> None:
    layers = np.array(steps(60, 1.35))
    ordered, chaotic = 0.5 * np.exp(-layers / 4.0), 0.6 - 0.3 * np.exp(-layers / 3.0)
    found = depth_scale(np.stack([ordered, chaotic, np.full(len(layers), 0.5)]), np.array([0.8, 1.4, 1.4]), layers)
    assert found[:2] == pytest.approx([4.0, 3.0], rel=5e-3) and math.isnan(found[2])


def test_memory_does_not_grow_with_the_plane() -> None:
    """Bytes of signals and weights at once, 256 x 256 points beside 16 x 16; rows of numbers a point come on top."""
    row = ACTIVATIONS["tanh"]
    for width, fresh in ((200, False), (200, True), (1000, False)):
        small, large = (
            schedule(Points([1.0] * n, [0.1] * n, row, 100, width, 8, fresh=fresh), Where()).held for n in (256, 65536)
        )
        assert large < 0.8e9 and large <= 4 * small + 3e8
    whole = 65536 * 8 * 200 * 4
    assert schedule(Points([1.0] * 65536, [0.1] * 65536, row, 100, 200, 8), Where()).held < 0.2 * whole


def test_closer_looks_are_taken_where_asked() -> None:
    points = Points([1.0, 2.0], [0.1, 0.1], ACTIVATIONS["tanh"], 9, 20, 4)
    done = []
    found = measure_points(points, 0, [1, 4, 9], [9], Where(), done.append)
    assert found.q.shape == found.apart.shape == (2, 3) and found.slope.shape == found.nan.shape == (2, 1)
    assert sum(done) == 18 and found.died_at.tolist() == [0, 0]
    assert steps(9, 2.0) == [1, 2, 4, 8, 9] and steps(1, 2.0) == [1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activation": "tahn"}, "did you mean tanh"),
        ({"plane": "sigmas"}, "phase.plane=sigmas.*did you mean sigma"),
        ({"weights": "new"}, "phase.weights=new: must be one of common, fresh"),
        ({"sigma_w": Axis(0.5, 3, 0)}, "phase.sw.points=0: must be at least 1"),
        ({"sigma_w": Axis(0.5, 3, 257)}, "phase.sw.points=257"),
        ({"sigma_w": Axis(-0.5, 3, 4)}, "phase.sw.min=-0.5"),
        ({"sigma_b": Axis(0, math.nan, 4)}, "phase.sb.max=nan"),
        ({"sigma_b": Axis(2, 1, 4)}, "phase.sb.min=2: must not be above phase.sb.max=1"),
        ({"sigma_b": -1.0, "plane": "depth"}, "phase.sigma_b=-1"),
        ({"batch": 1}, "phase.batch=1: must be at least 2"),
        ({"correlation": 1.0}, "phase.correlation=1"),
        ({"depth": 0}, "depth=0"),
        ({"distribution": "cauchy"}, "init.distribution=cauchy"),
    ],
)
def test_mistakes_are_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        phase(**{**SMALL, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("plane", "title"), [("sigma", "15 points are ordered"), ("depth", "5 points are ordered")])
def test_the_task_writes_its_table_and_draws_it(
    lab: Callable[..., tuple[int, str, str]], plane: str, title: str
) -> None:
    axes = ["phase.sw.points=5", "phase.sb.points=3", "phase.sb.max=0.8"]
    small = [f"phase.plane={plane}", "activation=tanh", "depth=12", "width=20", "seeds=2", "init=orthogonal"]
    code, said, errors = lab("task=phase", *axes, *small, "hydra.run.dir=here")
    assert code == 0 and errors == "" and "measured" in said and "2 network(s) each, 12 layers" in said
    kept = initlab.read("here", table="phase")
    assert len(kept) == (2 * 15 if plane == "sigma" else 2 * 5 * 12)
    assert set(kept["distribution"]) == {"orthogonal"} and set(kept["mode"]) == {"fan_in"}
    assert sorted(kept["gain"].unique()) == [0.5, 1.125, 1.75, 2.375, 3.0]
    assert Path("here/phase.png").stat().st_size > 20_000
    figure = draw_phase(kept)
    assert title in figure.get_suptitle() and len(figure.axes) == 6
    colours = [ax.collections[0].get_clim() for ax in figure.axes[:4]]
    assert colours[0] == colours[1] and colours[2] == colours[3]  # measured and theory in the same colours


@pytest.mark.parametrize("activation", ["relu", "linear", "gelu", "sigmoid"])
def test_every_plane_can_be_drawn(activation: str) -> None:
    """One point, no critical line in sight, signals that died: still a figure with a title."""
    for options in (
        {"sigma_w": Axis(1, 1, 1), "sigma_b": Axis(0, 0, 1)},
        {"sigma_w": Axis(0, 60, 3), "dtype": "float16"},
        {},
    ):
        found = table(activation=activation, **options).assign(activation=activation, width=40)
        assert draw_phase(found).get_suptitle().startswith(f"{activation}, 12 layers of 40 units")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("phase.plane=sigmas", "phase.plane=sigmas: must be one of depth, sigma - did you mean sigma?"),
        ("phase.sw.points=0", "phase.sw.points=0: must be at least 1"),
        ("phase.sw.points=few", "phase.sw.points=few: must be an integer"),
        ("phase.sb.min=2", "phase.sb.min=2: must not be above phase.sb.max=1"),
        ("phase.sw.mni=2", "did you mean phase.sw.min?"),
    ],
)
def test_mistakes_on_the_command_line(lab: Callable[..., tuple[int, str, str]], word: str, said: str) -> None:
    code, _, errors = lab("task=phase", word)
    assert code == 2 and said in errors and errors.count("\n") == 1
    assert not list(Path().glob("outputs/**/phase.parquet"))
