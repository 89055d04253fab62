import json
import math

import mpmath
import pytest
import torch
import user_functions
from formulas import formulas

from initlab.errors import UsageError
from initlab.meanfield import maps
from initlab.nn.activations import ACTIVATIONS, gain
from initlab.nn.custom_activation import as_activation
from initlab.stats.quadrature import gaussian_mean, gaussian_means, line, pair_mean
from tests.conftest import ROWS
from tests.long import long_except


def reference(f, q: float, power: int, kinks: tuple[float, ...] = ()) -> float:  # type: ignore[no-untyped-def]
    """E[f(sqrt(q) u)^power] to 30 digits; panels that halve towards 0, where f bends, and end where z = 40 sqrt(q)."""
    with mpmath.workdps(30):
        root = mpmath.sqrt(mpmath.mpf(q))
        edges = [mpmath.mpf(0), *(mpmath.mpf(2) ** k for k in range(-6, 4)), mpmath.mpf(13)]
        edges = sorted({*edges, *(-e for e in edges), *(kink / root for kink in kinks if abs(kink) < 13 * root)})
        total = mpmath.quad(lambda u: f(root * u) ** power * mpmath.npdf(u), edges)
    return float(total)


@pytest.mark.parametrize("q", long_except([0.01, 1.0, 25.0, 400.0], 1.0))
@pytest.mark.parametrize("name", long_except(ROWS, "tanh", "gelu", "selu", "hardswish", "softplus"))
def test_moments_against_thirty_digits(name: str, q: float) -> None:
    row = ACTIVATIONS[name]
    for ours, theirs in zip((row.phi, row.slope), formulas(name), strict=True):
        found = gaussian_mean(lambda z, f=ours: f(z).square(), row.kinks, q)
        assert found == pytest.approx(reference(theirs, q, 2, row.kinks), rel=1e-12)


def test_a_scale_that_the_panels_do_not_have_is_found() -> None:
    """The slope of tanh at 20 u, in panels of unit width in u: the lower order sees it, and they are halved."""
    row = ACTIVATIONS["tanh"]
    expected = reference(formulas("tanh")[1], 400.0, 2)
    u, weights = line(1.0)
    assert float((row.slope(20 * u).square() * weights).sum()) != pytest.approx(expected, rel=1e-9)
    assert gaussian_mean(lambda u: row.slope(20 * u).square()) == pytest.approx(expected, rel=1e-12)


def test_what_does_not_converge_is_said() -> None:
    """exp(z^2/8) has a mean of its square below q = 2 alone; a float32 tanh is rounded to 6e-8; |z|^-0.9 is steep."""
    grows = lambda z: torch.exp(z * z / 8) ** 2  # noqa: E731
    assert gaussian_mean(grows, q=1.0) == pytest.approx(2**0.5, rel=1e-12)
    with pytest.raises(UsageError, match="second moment 4 does not exist"):
        gaussian_mean(grows, q=4.0)
    for f in (lambda z: torch.tanh(z.float()).double() ** 2, lambda z: z.abs() ** -0.9):
        with pytest.raises(UsageError, match=r"second moment 1 has not converged to better than [0-9e.-]+"):
            gaussian_mean(f)
    with pytest.raises(UsageError, match="has not converged"):
        pair_mean(lambda z: torch.sin(1e4 * z), 1.0, 0.5, per_panel=None)


REFERENCES = json.loads(user_functions.TABLE.read_text())


@pytest.mark.parametrize("name", long_except(user_functions.FUNCTIONS, *list(user_functions.FUNCTIONS)[::4]))
def test_means_of_forty_functions_of_ones_own(name: str) -> None:
    """Against mpmath at four second moments, to 1e-8: E[phi], E[phi^2], E[phi'^2], the gains, overlaps, slopes.

    Waves take seconds for one overlap: at q = 0.01 alone. One overlap of |z|^1.5 is refused, with its error.
    """
    row = as_activation(user_functions.FUNCTIONS[name].torch)
    for q, expected in REFERENCES[name].items():
        at = torch.tensor([float(q)], dtype=torch.float64)
        root = expected["square"] ** 0.5
        assert float(maps.moment(row, at, 1)) == pytest.approx(expected["mean"], rel=1e-8, abs=1e-10 * root)
        assert float(maps.moment(row, at)) == pytest.approx(expected["square"], rel=1e-8)
        assert float(maps.slope_moment(row, at)) == pytest.approx(expected["slope"], rel=1e-8)
        if q == "1.0":
            assert gain(row) == pytest.approx(expected["slope"] ** -0.5, rel=1e-8)
            assert gain(row, "rms") == pytest.approx(expected["square"] ** -0.5, rel=1e-8)
            variance = expected["square"] - expected["mean"] ** 2
            assert gain(row, "std") == pytest.approx(variance**-0.5, rel=1e-8)
        if "overlap" in expected and (name not in ("sin", "cos", "snake", "sin 10") or float(q) < 1):
            for found, key in ((maps.overlap, "overlap"), (maps.slope_overlap, "slope_overlap")):
                size = expected["square" if key == "overlap" else "slope"]
                try:
                    found_there = float(found(row, at, user_functions.C))
                except UsageError as refused:
                    assert name == "power 1.5" and "has not converged to better than" in str(refused)
                    continue
                assert found_there == pytest.approx(expected[key], rel=1e-8, abs=1e-11 * size), (q, key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tanh", "hard swish", "sigmoid 50"])
def test_the_references_are_what_mpmath_says(name: str) -> None:
    one, kept = user_functions.FUNCTIONS[name], REFERENCES[name]["1.0"]
    assert user_functions.line_mean(one.slope, 1.0, one.bends, 2) == kept["slope"]
    assert user_functions.plane_mean(one.phi, 1.0, one.bends) == pytest.approx(kept["overlap"], rel=1e-14)


def test_many_at_once_are_each_alone() -> None:
    q = torch.tensor([0.01, 1.0, 7.0, 400.0], dtype=torch.float64)
    for kinks, f in (((), torch.tanh), ((-1.0, 1.0), lambda z: z.clamp(-1, 1))):
        together = gaussian_means(lambda z, u, f=f: f(z) ** 2, q, kinks)
        alone = [gaussian_mean(lambda z, f=f: f(z) ** 2, kinks, float(x)) for x in q]
        assert together.tolist() == pytest.approx(alone, rel=1e-13)


C = torch.tensor([-1.0, -0.7, 0.0, 0.3, 0.9, 0.999, 1 - 1e-9, 1.0], dtype=torch.float64)


def test_pairs_closed_forms() -> None:
    """Arc-cosine kernel (ReLU), arc sine (erf), orthants (a step), all correlations, variances far apart."""
    angle = math.pi - torch.acos(C)
    for q in (0.01, 1.0, 400.0):
        relu = ((1 - C * C).clamp(min=0).sqrt() + C * angle) / (2 * math.pi)
        assert float((pair_mean(torch.relu, q, C, (0.0,)) / q - relu).abs().max()) < 1e-12
        step = 0.25 + torch.asin(C) / (2 * math.pi)
        assert float((pair_mean(lambda z: (z > 0).double(), q, C, (0.0,)) - step).abs().max()) < 1e-12
        erf = 2 / math.pi * torch.asin(2 * q * C / (1 + 2 * q))
        assert float((pair_mean(torch.erf, q, C) - erf).abs().max()) < 1e-11


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("q", long_except([0.01, 1.0, 25.0, 400.0], 25.0))
def test_pairs_of_all_activations(name: str, q: float) -> None:
    """Against twice as many nodes, and against the line where both are one: E[phi^2]."""
    row = ACTIVATIONS[name]
    for f in (row.phi, row.slope):
        found, fine = (pair_mean(f, q, C, row.kinks, n) for n in (20, 36))
        size = float(fine.abs().max())
        assert float((found - fine).abs().max()) < 1e-8 * size
        assert float(found[-1]) == pytest.approx(gaussian_mean(lambda z, f=f: f(z).square(), row.kinks, q), rel=1e-10)
        assert float(found[2]) == pytest.approx(gaussian_mean(f, row.kinks, q) ** 2, rel=1e-9, abs=1e-12 * size)


def test_two_kinks_apart() -> None:
    """A clamp at -1 and 1: kinks of different inputs meet inside the plane. Monte Carlo would say 1e-3 only."""
    clamp = lambda z: z.clamp(-1, 1)  # noqa: E731
    found, fine = (pair_mean(clamp, 4.0, C[1:], (-1.0, 1.0), n) for n in (20, 40))
    assert float((found - fine).abs().max()) < 1e-9
    without = pair_mean(clamp, 4.0, C[1:], ())
    assert float((without - fine).abs().max()) > 1e-7  # the edges do matter
