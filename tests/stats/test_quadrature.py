import math

import mpmath
import pytest
import torch
from formulas import formulas

from initlab.nn.activations import ACTIVATIONS
from initlab.stats.quadrature import gaussian_mean, gaussian_means, pair_mean


def reference(f, q: float, power: int, kinks: tuple[float, ...] = ()) -> float:  # type: ignore[no-untyped-def]
    """E[f(sqrt(q) u)^power] to 30 digits; panels that halve towards 0, where f bends, and end where z = 40 sqrt(q)."""
    with mpmath.workdps(30):
        root = mpmath.sqrt(mpmath.mpf(q))
        edges = [mpmath.mpf(0), *(mpmath.mpf(2) ** k for k in range(-6, 4)), mpmath.mpf(13)]
        edges = sorted({*edges, *(-e for e in edges), *(kink / root for kink in kinks if abs(kink) < 13 * root)})
        total = mpmath.quad(lambda u: f(root * u) ** power * mpmath.npdf(u), edges)
    return float(total)


@pytest.mark.parametrize("q", [0.01, 1.0, 25.0, 400.0])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_moments_against_thirty_digits(name: str, q: float) -> None:
    row = ACTIVATIONS[name]
    for ours, theirs in zip((row.phi, row.slope), formulas(name), strict=True):
        found = gaussian_mean(lambda z, f=ours: f(z).square(), row.kinks, q)
        assert found == pytest.approx(reference(theirs, q, 2, row.kinks), rel=1e-12)


def test_the_reference_is_not_the_quadrature_itself() -> None:
    """Without the refinement near 0 the slope of tanh at q = 400 would be off."""
    row = ACTIVATIONS["tanh"]
    plain = gaussian_mean(lambda u: row.slope(20 * u).square())  # panels of unit width in u
    assert plain != pytest.approx(reference(formulas("tanh")[1], 400.0, 2), rel=1e-9)


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


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("q", [0.01, 1.0, 25.0, 400.0])
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
