import math

import mpmath
import pytest
import torch
from formulas import formulas
from torch import Tensor

from initlab.errors import UsageError
from initlab.nn.activations import ACTIVATIONS, GAIN_KINDS, gain
from initlab.stats.quadrature import gaussian_mean
from tests.conftest import ROWS
from tests.long import long_except

EVERYONE = pytest.mark.parametrize("name", ROWS)


def test_swish_is_another_name_of_silu() -> None:
    """And no other row has two names: what holds for each row holds for each name."""
    assert ACTIVATIONS["swish"] is ACTIVATIONS["silu"] and len({id(row) for row in ACTIVATIONS.values()}) == len(ROWS)


def points() -> Tensor:
    """Both sides of every kink, no point on one, tails included."""
    return torch.linspace(-6, 6, 1000, dtype=torch.float64)


@EVERYONE
def test_slope_is_the_derivative_of_phi(name: str) -> None:
    row, z = ACTIVATIONS[name], points().requires_grad_()
    (expected,) = torch.autograd.grad(row.phi(z).sum(), z)
    torch.testing.assert_close(row.slope(z.detach()), expected, rtol=1e-12, atol=1e-14)  # sums of terms up to 10


@EVERYONE
def test_module_is_the_same_function(name: str) -> None:
    z = points()
    torch.testing.assert_close(ACTIVATIONS[name].module()(z), ACTIVATIONS[name].phi(z), rtol=1e-12, atol=1e-15)


@EVERYONE
def test_pull_back_is_autograd_at_kinks_and_beyond_the_numbers(name: str) -> None:
    """Also where a factor is 0 and the other inf: a rectifier's closed units pass 0, not nan, in both."""
    row = ACTIVATIONS[name]
    z = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    for upstream in (1.5, math.inf):
        grad = torch.full((3,), upstream, dtype=torch.float64)
        (expected,) = torch.autograd.grad(row.module()(z), z, grad)
        torch.testing.assert_close(row.pull_back(grad, z.detach()), expected, rtol=1e-12, atol=0)


@EVERYONE
def test_largest_slope_is_reached_and_never_passed(name: str) -> None:
    row = ACTIVATIONS[name]
    grids = [torch.linspace(-end, end, 1_000_001, dtype=torch.float64) for end in (5, 40)]
    slope = row.slope(torch.cat([*grids, torch.tensor(row.kinks, dtype=torch.float64)])).abs().max()
    assert float(slope) == pytest.approx(row.largest_slope, rel=1e-6)


def _reference(name: str, kind: str) -> float:
    """The same gain in 30-digit arithmetic from the textbook's formula of the function."""
    with mpmath.workdps(30):
        phi, slope = formulas(name)
        edges = sorted({-20, -8, -4, -2, -1, 0, 1, 2, 4, 8, 20, *ACTIVATIONS[name].kinks})

        def mean(f):  # type: ignore[no-untyped-def]
            return mpmath.quad(lambda u: f(u) * mpmath.npdf(u), edges)

        if kind == "chi":
            return float(1 / mpmath.sqrt(mean(lambda u: slope(u) ** 2)))
        centre = mean(phi) if kind == "std" else mpmath.mpf(0)
        return float(1 / mpmath.sqrt(mean(lambda u: (phi(u) - centre) ** 2)))


@pytest.mark.parametrize("kind", long_except(["chi", "rms", "std"], "chi"))
@EVERYONE
def test_gain_against_thirty_digits(name: str, kind: str) -> None:
    assert gain(name, kind) == pytest.approx(_reference(name, kind), rel=1e-13)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("linear", "chi", 1.0),
        ("relu", "chi", math.sqrt(2)),
        ("relu", "rms", math.sqrt(2)),
        ("relu", "std", 1 / math.sqrt((1 - 1 / math.pi) / 2)),
        ("leaky_relu", "chi", math.sqrt(2 / (1 + 0.01**2))),
        ("tanh", "torch", 5 / 3),
        ("selu", "torch", 3 / 4),
    ],
)
def test_gain_closed_forms(name: str, kind: str, expected: float) -> None:
    assert gain(name, kind) == pytest.approx(expected, rel=1e-13)


def test_kinds_of_gain_differ_where_theory_says_so() -> None:
    assert gain("relu", "std") > 1.2 * gain("relu", "chi")
    assert gain("tanh", "torch") > 1.1 * gain("tanh", "chi")
    assert set(GAIN_KINDS) == {"chi", "rms", "std", "torch"}


def test_quadrature_sees_kinks_and_scale() -> None:
    """E of ReLU'(sqrt(q) u) is 1/2 and of ReLU^2 q/2, at any q; a jump that is not given is found by halving panels."""
    for q in (0.01, 1.0, 400.0):
        assert gaussian_mean(lambda z: (z > 0).double(), (0.0,), q) == pytest.approx(0.5, rel=1e-13)
        assert gaussian_mean(lambda z: z.clamp(min=0) ** 2, (0.0,), q) == pytest.approx(q / 2, rel=1e-13)
    assert gaussian_mean(lambda z: (z > 0.3).double()) == pytest.approx(0.382088577811047, rel=1e-9)
    assert gaussian_mean(lambda z: (z > 0.3).double(), (0.3,)) == pytest.approx(0.382088577811047, rel=1e-13)


def test_what_has_no_gain_is_said() -> None:
    with pytest.raises(UsageError, match="did you mean relu"):
        gain("rellu")
    with pytest.raises(UsageError, match="chi, rms, std, torch"):
        gain("relu", "stdd")
    with pytest.raises(UsageError, match="no gain for activation=gelu"):
        gain("gelu", "torch")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_homogeneous_or_not(name: str) -> None:
    """Multiplication by a power of two is exact, so that the law holds bit for bit."""
    row, z = ACTIVATIONS[name], torch.linspace(-3, 3, 61)
    assert torch.equal(row.phi(4 * z), 4 * row.phi(z)) == row.homogeneous
    assert torch.equal(row.slope(4 * z), row.slope(z)) == row.homogeneous
