"""What is truly there where a number format prints nan or 0, against references that never leave their range."""

import math

import mpmath
import numpy as np
import pandas as pd
import pytest
import torch

from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import Rule, draw, rule
from initlab.nn.philox import gaussian
from initlab.stats.statistics import TRUE_COLUMNS as NUMBERS
from initlab.tasks import stack as stacking
from initlab.tasks.stack import stack
from tests.long import long_except

# Rounding of float32 in a sum over 100 units and over 20000 entries is far below this, in log2.
LIMIT = 1e-6
KEYS = ["layer", "tensor", "direction"]
Logs = dict[tuple[int, str, str], tuple[float, float]]


def logs(frame: pd.DataFrame, seed: int = 0) -> Logs:
    rows = frame[frame["seed"] == seed]
    return {tuple(row[:3]): tuple(row[3:]) for row in rows[[*KEYS, *NUMBERS]].itertuples(index=False)}  # type: ignore


def moments(x: np.ndarray, log: float) -> tuple[float, float]:
    with np.errstate(divide="ignore"):
        return log + float(np.log2(np.sqrt(np.mean(x * x)))), log + float(np.log2(np.std(x)))


def reference(init: str | Rule, activation: str, depth: int, width: int = 100, batch: int = 200) -> Logs:
    """A homogeneous stack of seed 0 in float64, divided by its largest entry after every layer."""
    slope = {"linear": 1.0, "relu": 0.0, "leaky_relu": 0.01}[activation]
    scaling, found = rule(init) if isinstance(init, str) else init, {}
    x, log, masks, weights = gaussian((batch, width), [0], "input")[0].double().numpy(), 0.0, [], []
    found[0, "activation", "forward"] = moments(x, log)
    for layer in range(1, depth + 1):
        weights.append(draw(scaling, activation, (width, width), [0], layer)[0][0].double().numpy())
        z = x @ weights[-1]
        peak = np.abs(z).max()
        z, log = z / peak, log + math.log2(peak)
        found[layer, "preactivation", "forward"] = moments(z, log)
        masks.append(np.where(z > 0, 1.0, slope))
        x = z * masks[-1]
        found[layer, "activation", "forward"] = moments(x, log)
    g, log = gaussian((batch, width), [0], "gradient")[0].double().numpy(), 0.0
    for layer in range(depth, 0, -1):
        found[layer, "activation", "backward"] = moments(g, log)
        g = g * masks[layer - 1]
        found[layer, "preactivation", "backward"] = moments(g, log)
        g = g @ weights[layer - 1].T
        peak = np.abs(g).max()
        g, log = g / peak, log + math.log2(peak)
    return found


def apart(found: Logs, wanted: Logs) -> float:
    assert found.keys() == wanted.keys()
    return float(max(np.abs(np.subtract(found[key], wanted[key])).max() for key in wanted))


def only(direction: str, found: Logs) -> Logs:
    return {key: value for key, value in found.items() if key[2] == direction}


@pytest.mark.parametrize("activation", ["linear", "relu", "leaky_relu"])
@pytest.mark.parametrize("init", ["naive", "small"])
def test_a_homogeneous_stack_is_right_at_every_layer(init: str, activation: str) -> None:
    frame = stack(init, activation, seeds=[0])
    assert apart(logs(frame), reference(init, activation, 50)) < LIMIT
    died = (frame["n_nan"] + frame["n_inf"] > 0).any() or (frame["frac_zero"] == 1).any()
    assert died  # else nothing would have been tested


def test_inside_the_range_the_masks_are_those_of_the_dtype() -> None:
    """Rounding moves a preactivation over ReLU's kink now and then, and one mask in 20000 moves a gradient by 1e-4."""
    found, wanted = logs(stack("kaiming", "relu", seeds=[0])), reference("kaiming", "relu", 50)
    assert apart(only("forward", found), only("forward", wanted)) < LIMIT
    assert apart(only("backward", found), only("backward", wanted)) < 1e-2


@pytest.mark.long
@pytest.mark.parametrize(("init", "activation"), [("naive", "relu"), ("small", "linear"), ("small", "leaky_relu")])
def test_and_four_hundred_layers_down(init: str, activation: str) -> None:
    """Beyond float64 too: 100^(400/2) is 1e400."""
    wanted = reference(init, activation, 400)
    assert max(abs(value[0]) for value in wanted.values()) > 1074
    assert apart(logs(stack(init, activation, depth=400, seeds=[0])), wanted) < LIMIT


# Networks of tanh and sigmoid at N(0, 1) never leave the range, and rounding grows in them to the size of the signal.
OTHERS = [("small", name) for name in ("tanh", "sigmoid", "gelu", "silu", "selu")]
OTHERS += [("naive", name) for name in ("gelu", "silu", "selu")]


@pytest.mark.parametrize(("init", "activation"), long_except(OTHERS, OTHERS[0], OTHERS[-1]))
def test_other_activations_go_on_as_float64_does(init: str, activation: str) -> None:
    """Fifty layers of 1e-2 to 10 each stay inside float64. selu's constants round, 3e-8 each, in every layer alike."""
    short, wide = (stack(init, activation, seeds=[0], dtype=dtype) for dtype in ("float32", "float64"))
    assert apart(logs(short), logs(wide)) < (50 * 2 * 3e-8 if activation == "selu" else LIMIT)
    np.testing.assert_array_equal(wide["log2_rms_true"], np.log2(wide["rms"]))


def test_biases_go_on_as_float64_does() -> None:
    scaling = rule("torch_default", gain=20.0, bias=3.0)
    short, wide = (stack(scaling, "linear", seeds=[0], dtype=dtype) for dtype in ("float32", "float64"))
    assert (short["n_nan"] > 0).any()
    assert apart(logs(short), logs(wide)) < LIMIT


def gelu(z: mpmath.mpf) -> mpmath.mpf:
    return z * mpmath.ncdf(z) if abs(z) < 1000 else max(z, mpmath.mpf(0))  # beyond, mpmath itself overflows


def exact(scaling: Rule, depth: int, width: int, batch: int) -> Logs:
    """The forward pass of seed 0 through gelu, with 40 digits and no range."""
    mpmath.mp.dps = 40
    x = mpmath.matrix(gaussian((batch, width), [0], "input")[0].tolist())
    found = {}
    for layer in range(1, depth + 1):
        w, b = draw(scaling, "gelu", (width, width), [0], layer)
        z = x * mpmath.matrix(w[0].tolist())
        for n in range(batch):
            for o in range(width):
                z[n, o] += b[0, o].item()
        x = z.apply(gelu)
        for tensor, values in (("preactivation", list(z)), ("activation", list(x))):
            mean = sum(values) / len(values)
            sizes = (mpmath.sqrt(sum((v - m) ** 2 for v in values) / len(values)) for m in (0, mean))
            found[layer, tensor, "forward"] = tuple(float(mpmath.log(size, 2)) for size in sizes)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(
    "scaling", [rule("naive", gain=50.0), rule("naive", gain=1e-3), rule("naive", gain=50.0, bias=1.0)]
)
def test_float64_itself_is_outlived(scaling: Rule) -> None:
    """Eight units are enough that no layer is negative throughout: there gelu is exp(-z^2) small, and no double."""
    frame = stack(scaling, "gelu", depth=200, width=8, batch=2, seeds=[0], dtype="float64", backward=False)
    found = {key: value for key, value in logs(frame).items() if key[0] > 0}
    wanted = exact(scaling, 200, 8, 2)
    assert max(abs(value[0]) for value in wanted.values()) > 1100
    assert apart(found, wanted) < 1e-10


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_inside_the_range_nothing_is_added(dtype: str) -> None:
    frame = stack("kaiming", "relu", seeds=[0, 1], dtype=dtype)
    for true, held in zip(NUMBERS, ("rms", "std"), strict=True):
        np.testing.assert_allclose(frame[true], np.log2(frame[held]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_keeps_its_rounding_and_loses_its_range(dtype: str) -> None:
    """Each of 30 layers rounds at random by 2^-8 at most, which the moments of 20000 entries average."""
    half, wide = (logs(stack("small", "relu", depth=60, seeds=[0], dtype=d)) for d in (dtype, "float64"))
    assert apart(half, wide) < 30 * 2.0**-8
    assert apart(half, wide) > 1e-5  # and it does round


@pytest.mark.parametrize("window", [1, 7, 50])
def test_where_the_windows_end_does_not_matter(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = logs(stack("naive", "relu", seeds=[0]))
    monkeypatch.setattr(stacking, "WINDOW", window)
    assert apart(logs(stack("naive", "relu", seeds=[0])), usual) < LIMIT


@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_a_network_that_stays_is_not_touched_by_one_that_leaves(activation: str) -> None:
    """Rules that live and rules that die in one chunk, each as when it is alone."""
    rules = ["kaiming", "naive", "lecun", "small"]
    together = stack(rules, activation, seeds=[0, 1, 2, 3])
    for seed, init in enumerate(rules):
        alone = stack(init, activation, seeds=[seed])
        mine = together[together["seed"] == seed].reset_index(drop=True)
        held = [name for name in alone if name not in NUMBERS]
        pd.testing.assert_frame_equal(mine[held], alone[held], check_exact=True)
        assert apart(logs(mine, seed), logs(alone, seed)) < 1e-12


def test_a_true_zero_is_told_from_an_underflow() -> None:
    frame = stack(rule("naive", gain=0.0), "relu", depth=3, seeds=[0])
    rows = frame[(frame["layer"] > 0) & (frame["direction"] == "forward")]
    assert (rows["log2_rms_true"] == -math.inf).all()
    gone = stack("small", "relu", seeds=[0])
    assert (gone[gone["rms"] == 0]["log2_rms_true"] > -math.inf).all() and (gone["rms"] == 0).any()


def test_weights_that_are_not_numbers_are_data() -> None:
    frame = stack(rule("naive", gain=1e150), "tanh", depth=3, width=8, seeds=[0])
    assert frame[frame["layer"] == 3]["n_nan"].max() > 0  # inf - inf in the first layer


def test_every_activation_runs_where_its_numbers_end() -> None:
    for activation in ACTIVATIONS:
        frame = stack(rule("naive", gain=1e30), activation, depth=12, width=10, batch=5, seeds=[0])
        assert len(frame) == 1 + 4 * 12 and torch.isfinite(torch.tensor(frame["log2_rms_true"][1:25].to_numpy())).all()
