"""Lengths, correlations and slopes layer by layer against the maps themselves and against the fixed points."""

import pytest
import torch

from initlab.meanfield import maps
from initlab.meanfield.fixed_points import phase
from initlab.meanfield.trajectories import trajectory
from initlab.nn.activations import ACTIVATIONS

SIGMA_W = torch.tensor([0.55, 1.0, 1.3, 1.6, 3.0], dtype=torch.float64)
SIGMA_B = torch.tensor([0.0, 0.2, 0.55, 1.0, 0.1], dtype=torch.float64)


@pytest.mark.parametrize("name", ["linear", "relu", "leaky_relu", "tanh"])
def test_every_layer_is_the_maps_of_the_one_before(name: str) -> None:
    """To the table's interpolation: 1e-5 of q and chi_1, 2e-3 of 1 - c while that is not rounding of the maps."""
    row, depth, c0 = ACTIVATIONS[name], 8, 0.5
    found = trajectory(row, SIGMA_W, SIGMA_B, depth, c0)
    s, b = SIGMA_W**2, SIGMA_B**2
    q, c = s + b, (s * c0 + b) / (s + b)
    for k in range(depth):
        torch.testing.assert_close(found.q[:, k], q, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.chi_1[:, k], maps.chi(row, q, SIGMA_W), rtol=1e-5, atol=0)
        seen = 1 - c > 1e-6
        torch.testing.assert_close(found.apart[:, k][seen], (1 - c)[seen], rtol=2e-3, atol=0)
        after = maps.length_map(row, q, SIGMA_W, SIGMA_B)
        q, c = after, (s * maps.overlap(row, q, c) + b) / after


def test_deep_down_it_is_at_the_fixed_point() -> None:
    found = trajectory(ACTIVATIONS["tanh"], SIGMA_W[1:4], SIGMA_B[1:4], 400, 0.2)
    for k in range(3):
        at = phase("tanh", float(SIGMA_W[1 + k]), float(SIGMA_B[1 + k]))
        assert float(found.q[k, -1]) == pytest.approx(at.q, rel=1e-5)
        assert float(1 - found.apart[k, -1]) == pytest.approx(at.c, abs=1e-3)
        assert float(found.chi_1[k, -1]) == pytest.approx(at.chi_1, rel=1e-5)


def test_an_ordered_difference_keeps_shrinking_far_below_rounding() -> None:
    """1 - c falls by chi_1 a layer, also where c is 1 in float64; in the chaotic phase it does not."""
    weights, biases = torch.tensor([0.9, 2.5], dtype=torch.float64), torch.full((2,), 0.3, dtype=torch.float64)
    found = trajectory(ACTIVATIONS["tanh"], weights, biases, 300, 0.5)
    chi_1 = phase("tanh", 0.9, 0.3).chi_1
    assert 0 < float(found.apart[0, -1]) < 1e-40
    assert float(found.apart[0, -1] / found.apart[0, -2]) == pytest.approx(chi_1, rel=1e-4)
    assert float(found.apart[1, -1] / found.apart[1, -2]) == pytest.approx(1, rel=1e-6)


def test_nothing_is_nan_at_the_ends() -> None:
    """No weights, no biases, neither; a signal that overflows float64."""
    sigma_w = torch.tensor([0.0, 0.0, 0.03, 1e2], dtype=torch.float64)
    sigma_b = torch.tensor([0.0, 0.5, 0.0, 0.0], dtype=torch.float64)
    for name in ("relu", "tanh"):
        found = trajectory(ACTIVATIONS[name], sigma_w, sigma_b, 200, 0.5)
        assert not any(bool(values.isnan().any()) for values in found)
        assert float(found.q[0, -1]) == 0 and float(found.q[1, -1]) == 0.25 and float(found.apart[1, -1]) == 0
    assert float(trajectory(ACTIVATIONS["relu"], sigma_w, sigma_b, 200, 0.5).q[3, -1]) == torch.inf
