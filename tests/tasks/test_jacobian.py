"""Singular values of stacks: against autograd, against Pennington et al. 2017, and the recursion that predicts them."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from initlab.errors import UsageError
from initlab.figures.jacobian_figure import draw_jacobian
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import draw, rule
from initlab.nn.network import dense
from initlab.nn.unbounded import Scaled, rescale
from initlab.tasks.jacobian import jacobian, jacobian_as_text, shown_layers
from initlab.theory.request import parse_request
from initlab.theory.singular_values import jacobians, log2_power_sums, predict_moments, singular_values
from tests.long import long_except

F64 = {"dtype": "float64"}


def theory(
    init: str, activation: str, depth: int, width: int, inputs: int | None = None, **fields: object
) -> pd.Series:
    request = parse_request(init, activation, depth, width, inputs=inputs or width, batch=1, **fields)
    return predict_moments(request).iloc[-1]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_product_is_autograds_jacobian(activation: str) -> None:
    """For two networks at once, with biases, of rectangular layers."""
    row, sizes = ACTIVATIONS[activation], [(6, 9), (9, 9), (9, 4)]
    layers = [
        draw(rule("torch_default", gain=1.5), activation, s, [0, 3], k, torch.float64) for k, s in enumerate(sizes)
    ]
    x = torch.randn(2, 1, 6, dtype=torch.float64)
    found: list[Scaled] = []
    jacobians(
        dense([6, 9, 9, 4], row), lambda layer: layers[layer - 1], x, lambda layer, jacobian: found.append(jacobian)
    )
    last = found[-1]
    for k in range(2):

        def net(inp: torch.Tensor, k: int = k) -> torch.Tensor:
            for w, b in layers:
                inp = row.phi(inp @ w[k] + b[k])
            return inp

        expected = torch.autograd.functional.jacobian(net, x[k, 0]).mT
        ours = last.mantissa[k] * 2.0 ** last.exponent[k]
        assert (ours - expected).norm() <= 1e-13 * expected.norm()


def test_moments_are_those_of_the_singular_values() -> None:
    found = rescale(torch.randn(3, 7, 5, dtype=torch.float64) * 1e200, 3000.0)
    logs = singular_values(found)
    s = (logs - found.exponent[:, None]).exp2()
    sums = log2_power_sums(found)
    torch.testing.assert_close((sums[0] - 2 * found.exponent).exp2(), s.square().sum(-1), rtol=1e-10, atol=0)
    torch.testing.assert_close((sums[1] - 4 * found.exponent).exp2(), s.pow(4).sum(-1), rtol=1e-10, atol=0)
    broken = found.mantissa.clone()
    broken[1, 0, 0] = torch.nan
    logs = singular_values(Scaled(broken, found.exponent))
    assert logs[1].isnan().all() and logs[[0, 2]].isfinite().all()


def test_linear_gaussian_stacks_are_pennington_et_al() -> None:
    """L = 5, n = 200: E s^4 = 6.077, at infinite width 1 + L = 6; a network's mean has sd 0.41, 40 tell L."""
    found = jacobian("lecun", "linear", depth=5, width=200, seeds=range(40), **F64)["jacobian"]
    last = found[found["layer"] == 5]
    assert last["predicted_mean_s4"].iloc[0] == pytest.approx(6.08, abs=0.005)
    assert last["limit_mean_s4"].iloc[0] == pytest.approx(6, rel=1e-12)
    assert last["mean_s4"].mean() == pytest.approx(6.077, abs=5 * 0.41 / math.sqrt(40))
    assert last["mean_s4"].std() == pytest.approx(0.41, rel=5 / math.sqrt(80))
    assert last["mean_s2"].mean() == pytest.approx(1, abs=0.02)
    np.testing.assert_allclose(last["var_s2"], last["mean_s4"] - last["mean_s2"] ** 2, rtol=1e-12)


def test_orthogonal_linear_stacks_are_isometries() -> None:
    found = jacobian("orthogonal", "linear", depth=50, seeds=range(2))["singular_values"]
    assert (found["singular_value"] - 1).abs().max() < 1e-5
    other = jacobian("lecun", "linear", depth=50, seeds=range(2))["singular_values"]
    assert (other["singular_value"] - 1).abs().max() > 0.9


@pytest.mark.parametrize("init", ["kaiming", "orthogonal"])
@pytest.mark.parametrize(("activation", "slack"), [("linear", 0.0), ("relu", 0.0), ("leaky_relu", 0.0), ("tanh", 0.04)])
@pytest.mark.parametrize(("width", "inputs"), long_except([(20, 20), (20, 30), (30, 20)], (20, 30)))
def test_the_recursion_is_the_mean_over_networks(
    init: str, activation: str, slack: float, width: int, inputs: int
) -> None:
    """Five standard errors of 200 networks, and where the recursion is not exact what 1/n may be."""
    found = jacobian(init, activation, depth=3, width=width, inputs=inputs, seeds=range(200), **F64)["jacobian"]
    last = found[found["layer"] == 3]
    for name in ("mean_s2", "mean_s4", "var_s2"):
        expected, values = last[f"predicted_{name}"].iloc[0], last[name]
        error = 5 * values.std() / math.sqrt(len(values)) + slack * expected + 1e-6  # float32 draws an isometry
        assert abs(values.mean() - expected) < error, name
        if (init, name) == ("kaiming", "mean_s4"):  # the opposite: with a gain 10 % off it shows
            wrong = theory(init, activation, 3, width, inputs, gain=1.1 * rule(init).gain_for(activation))
            assert abs(values.mean() - wrong[f"predicted_{name}"]) > error


@pytest.mark.parametrize(("init", "free"), [("kaiming", 1.0), ("orthogonal", 0.0)])
@pytest.mark.parametrize(("activation", "ratio"), [("linear", 1.0), ("relu", 2.0)])
def test_the_limit_is_pennington_et_al(init: str, free: float, activation: str, ratio: float) -> None:
    """E s^4 = 1 + L (mu_2/mu_1^2 - 1 - s_1), and the recursion tends to it as L/n."""
    for depth in (1, 4, 10):
        wide, narrow = (theory(init, activation, depth, n) for n in (10**6, 10**3))
        assert wide["limit_mean_s4"] == pytest.approx(1 + depth * (ratio - 1 + free), rel=1e-9)
        assert wide["predicted_mean_s4"] == pytest.approx(wide["limit_mean_s4"], rel=1e-3)
        apart = [abs(row["predicted_mean_s4"] / row["limit_mean_s4"] - 1) for row in (narrow, wide)]
        assert apart[0] == 0 or apart[0] > 100 * apart[1] - 1e-9


def test_what_leaves_float64_is_data() -> None:
    """400 layers of naive weights: 10^400; the logarithm goes on, and zeros are -inf."""
    found = jacobian("naive", "linear", depth=400, width=100, seeds=[0])
    last = found["jacobian"].iloc[-1]
    assert last["mean_s2"] == np.inf == last["predicted_mean_s2"]
    assert last["log2_mean_s2"] == pytest.approx(400 * math.log2(100), rel=0.02)
    top = found["singular_values"].query("layer == 400 and rank == 1").iloc[0]
    assert top["log2_singular_value"] == pytest.approx(200 * math.log2(100), rel=0.02)
    dead = jacobian(rule("kaiming", gain=0.0), depth=2, width=5, seeds=[0])
    assert (dead["jacobian"]["mean_s2"] == 0).all() and (dead["jacobian"]["predicted_mean_s4"] == 0).all()
    assert (dead["singular_values"]["log2_singular_value"] == -np.inf).all()
    assert draw_jacobian(*(frame.assign(label="dead") for frame in dead.values())).get_suptitle()


@pytest.mark.parametrize("init", ["kaiming", "lsuv"])
def test_a_member_is_the_single_run(init: str) -> None:
    together = jacobian(init, "relu", depth=4, seeds=range(10))
    alone = jacobian(init, "relu", depth=4, seeds=[9])
    for name, keys in (("jacobian", ["mean_s2", "mean_s4"]), ("singular_values", ["rank"])):
        mine = together[name][together[name]["seed"] == 9].reset_index(drop=True)
        np.testing.assert_allclose(mine[keys], alone[name][keys], rtol=1e-12)


def test_which_layers_are_kept() -> None:
    assert shown_layers(1) == [1] and shown_layers(50) == [1, 2, 5, 10, 20, 50] and shown_layers(7) == [1, 2, 5, 7]
    frames = jacobian(depth=7, width=6, inputs=4, seeds=[0, 1])
    assert sorted(frames["singular_values"]["layer"].unique()) == shown_layers(7)
    assert len(frames["jacobian"]) == 14 and len(frames["singular_values"]) == 2 * 4 * 4
    assert len(jacobian_as_text(frames).splitlines()) == 5
    ranked = frames["singular_values"].groupby(["seed", "layer"])["singular_value"]
    assert ranked.apply(lambda s: bool((s.diff().dropna() <= 0).all())).all()


@pytest.mark.long
def test_the_task_draws_one_run_and_compares_several(lab: Callable[..., tuple[int, str, str]]) -> None:
    code, said, _ = lab("task=jacobian", "depth=5", "width=20", "seeds=3", "hydra.run.dir=here")
    assert code == 0 and "infinite width" in said
    kept = pd.read_parquet("here/singular_values.parquet")
    assert set(kept["init"].astype(str)) == {"kaiming"} and len(kept) == 3 * 20 * 3
    code, _, _ = lab("-m", "task=jacobian", "init=kaiming,orthogonal", "depth=3", "width=20", "hydra.sweep.dir=there")
    assert code == 0
    assert pd.io.common.file_exists("there/jacobian.png") and pd.io.common.file_exists("here/jacobian.png")


def test_the_figure_draws_what_is_resolved() -> None:
    frames = jacobian("kaiming", "relu", depth=20, width=30, seeds=range(3))
    figure = draw_jacobian(*(frame.assign(label="kaiming, relu") for frame in frames.values()))
    left, right = figure.axes
    named = [text.get_text() for text in left.get_legend().get_texts()]
    assert named == [str(layer) for layer in shown_layers(20)]
    assert all((np.asarray(line.get_ydata()) > 0).all() for line in left.lines) and left.get_yscale() == "log"
    assert max(line.get_xdata()[-1] for line in left.lines[:-1]) < 0.8  # half of ReLU's singular values are 0
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["kaiming, relu", "predicted"]
    assert figure.get_suptitle().startswith("After 20 layers the singular values are: kaiming, relu: largest")


def test_mistakes_are_one_line() -> None:
    for options, said in (
        ({"activation": "rellu"}, "did you mean relu"),
        ({"width": 0}, "width=0"),
        ({"dtype": "float31"}, "float32"),
        ({"depth": 0}, "depth=0"),
    ):
        with pytest.raises(UsageError, match=said):
            jacobian(**options)  # type: ignore[arg-type]
