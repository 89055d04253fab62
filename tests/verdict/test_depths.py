"""What a verdict says of depth: where number formats end for values and gradients, and the scales of its warnings."""

import math

import pytest
import torch
from torch import nn

import initlab
from benchmarks.faults import mlp
from initlab.stats.dtypes import FORMATS
from initlab.verdict.finding import Finding
from initlab.verdict.trends import fit_trend

RELU = 2**0.5
X = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


def test_a_trend_turned_round() -> None:
    """Sizes 2^0, 2^-2, ... down to layer 5: gradients begin at 2^-8 there, and grow by 4 a layer."""
    there = fit_trend([1, 2, 3, 4, 5], [0.0, -2.0, -4.0, -6.0, -8.0])
    back = there.reverse()
    assert (back.rate, back.start) == (2.0, -8.0) and back.reverse() == there
    assert there.count_steps("float16") == 12  # 2^-24 is its least number
    assert back.count_steps("float16") == 11  # from 2^-8 to just below 2^16
    assert there.count_steps("float32") is None and there._replace(rate=0.0).count_steps("float16") is None


def find(name: str, depth: int, width: int = 64, gain: float = RELU) -> Finding:
    torch.manual_seed(0)
    verdict = initlab.diagnose(mlp(depth, width, nn.ReLU, gain), X[:, :width])
    return next(one for one in verdict if one.rule == name)


@pytest.mark.parametrize("gain", [0.35, 5.6])
def test_formats_end_where_they_are_said_to(gain: float) -> None:
    """The depth is told from 8 layers; 1 in 4 octaves a layer of error leaves it within a layer or two."""
    finding = find("vanishing" if gain < RELU else "exploding", 8, gain=gain)
    depth = finding.evidence["depth_float16"] if gain < RELU else finding.evidence["leaves_float16"]
    deeper = initlab.measure(mlp(20, 64, nn.ReLU, gain), X)
    rows = deeper[(deeper["tensor"] == "preactivation") & (deeper["direction"] == "forward")].set_index("layer")["rms"]
    row = FORMATS["float16"]
    gone = rows < row.least if gain < RELU else rows > row.max
    assert abs(int(gone.idxmax()) - depth) <= 2, finding.detail
    assert "of gradients float16" in finding.detail


def test_where_gradients_end() -> None:
    """Ten of 21 layers down: measured, and said; of one example nothing differs, so that only gradients tell."""
    torch.manual_seed(0)
    model = mlp(20, 64, nn.ReLU, 1, "torch")
    verdict = initlab.diagnose(model, X[:1])
    (finding,) = verdict.errors
    rows = verdict.frame[(verdict.frame["tensor"] == "preactivation") & (verdict.frame["direction"] == "backward")]
    lost = rows[rows["rms"] < FORMATS["float16"].least]["layer"]
    assert finding.rule == "gradient-vanishing" and abs(finding.evidence["leaves_float16"] - lost.max()) <= 2
    assert finding.evidence["depth_float32"] > 21 and "float32 would end with" in finding.detail


@pytest.mark.parametrize(("width", "depth"), [(32, 40), (64, 60)])
def test_the_depth_scale_of_a_width(width: int, depth: int) -> None:
    """One standard deviation of ln(rms) is sqrt(5 L / 4 n) for ReLU, up to the last layer: e at 0.8 n layers."""
    finding = find("finite-width", depth, width)
    assert finding.evidence["depth_scale"] == pytest.approx(0.8 * width, rel=0.05)
    assert finding.evidence["std_ln_rms"] == pytest.approx(math.sqrt(depth / (0.8 * width)), rel=0.03)
    assert f"{finding.evidence['depth_scale']:.3g} layers" in finding.cause


def test_the_depth_over_which_inputs_become_alike() -> None:
    """xi_c of the rule found, by theory; ReLU at its critical gain has none, and a chaotic net does not collapse."""
    torch.manual_seed(0)
    model = mlp(40, 300, nn.Tanh, 1.4)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.bias, 0, 0.5)
    x = torch.randn(32, 300)
    (finding,) = [one for one in initlab.diagnose(model, x) if one.rule == "correlation-collapse"]
    known = initlab.phase("tanh", 1.4, 0.5)
    assert finding.evidence["xi_c"] == pytest.approx(known.xi_c, rel=0.2) and math.isfinite(known.xi_c)
    assert f"{finding.evidence['xi_c']:.3g} layers" in finding.cause
    half = finding.evidence["layers_per_halving"] / (2 * math.log(2) * known.xi_c)  # of the angle, sqrt(1 - c)
    assert 0.4 < half < 1.1  # the first layers, far from the fixed point, are faster
    critical = find("correlation-collapse", 50)
    assert critical.evidence["xi_c"] == math.inf and "infinite" in critical.cause
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 3 / 300**0.5)
    assert "correlation-collapse" not in [one.rule for one in initlab.diagnose(model, x)]
