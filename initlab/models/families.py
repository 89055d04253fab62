"""Whether numbers are uniform, normal or cut normal: one family of densities, exp(a t + b t^2) on their range.

A uniform density is the member with a = b = 0, a normal one the member whose tails end within the range, and every
other one with b < 0 is a normal density that was cut. Numbers are counted in fine bins first, so that all that follows
costs the same however many they are.

A verdict needs three things: the smooth test of Neyman 1937 finds nothing wrong with the family (its part in the
directions of a and b taken off, Thomas & Pierce 1979); the likelihood ratios of the members leave one alone; a
densities that end without a jump, as a triangular one, are less likely.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial.legendre import leggauss, legvander

BINS = 2048
DEGREES = 8  # of the polynomials that the smooth test looks along
WIDEST = 14.0  # standard deviations between the ends: what a float32 generator can give ends at 5.8 on either side
# A law that is right to so much of its density, as a root mean square, is called by its name: rounding to bfloat16 and
# small steps of training stay below it, however many numbers show them.
TOLERANCE = 0.014
DOUBT = 3e-5  # how often 4096 numbers or more of a law may be refused it; oftener the fewer they are
ROUNDED = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)  # powers p of (1 - x^2)^p; 0 stands for 1 - |x|
NEAR = 7.5  # by how much a normal density must be more likely than one that ends without a jump
WIDTHS = (0.97, 0.98, 0.99, 1.0, 1.01, 1.02, 1.03)  # of such a density, in those that its variance asks for
NODES, WEIGHTS = leggauss(160)
NORMAL, UNIFORM, CUT, OTHER, UNKNOWN = "normal", "uniform", "cut normal", "other", "too few to tell"
# A member is possible up to the first log likelihood ratio and excluded from the second on. For normal numbers the
# ratio is as large once in 2e4 draws and once in 6e7: it has the gamma distribution of two ends that are estimated.
# For uniform numbers it is rarer.
POSSIBLE, EXCLUDED = {UNIFORM: 9.0, NORMAL: 12.5}, {UNIFORM: 12.0, NORMAL: 21.0}


class FamilyFit(NamedTuple):
    """A law by name, the mean and standard deviation of the normal density behind it, and why, where it has no name."""

    name: str
    mean: float = math.nan
    std: float = math.nan
    kurtosis: float = math.nan  # E (x - mean)^4 / var^2 of the numbers themselves
    note: str = ""


class _Member(NamedTuple):
    """The most likely density of the family on t in (-1, 1)."""

    slopes: np.ndarray  # a, b
    log_scale: float  # log of the integral of exp(a t + b t^2)


def fit_member(moments: np.ndarray) -> _Member:
    """The member with these means of t and t^2, by Newton's method: the likelihood is concave."""
    powers = np.stack([NODES, NODES**2])
    variance = moments[1] - moments[0] ** 2
    slopes = np.array([moments[0] / variance, -0.5 / variance])

    def evaluate(trial: np.ndarray) -> tuple[float, np.ndarray]:
        height = trial @ powers
        mass = WEIGHTS * np.exp(height - height.max())
        return float(np.log(mass.sum()) + height.max()), mass / mass.sum()

    value, mass = evaluate(slopes)
    for _ in range(60):
        centred = powers - (powers @ mass)[:, None]
        error = moments - powers @ mass
        step = np.linalg.solve((centred * mass) @ centred.T, error)
        if error @ step < 1e-14:
            break
        size = 1.0
        while size > 1e-6:
            trial = slopes + size * step
            new, new_mass = evaluate(trial)
            if new - trial @ moments <= value - slopes @ moments:
                break
            size /= 2
        slopes, value, mass = trial, new, new_mass
    return _Member(slopes, value)


def measure_distance(share: np.ndarray, centres: np.ndarray, member: _Member) -> tuple[float, int]:
    """How far the numbers are from the member, as chi^2 over the count of numbers, and the directions looked along."""
    powers = np.stack([centres, centres**2])
    density = np.exp(member.slopes @ powers - member.log_scale)
    density /= density.sum()
    u = np.cumsum(density) - density / 2
    waves = (legvander(2 * u - 1, DEGREES) * np.sqrt(2 * np.arange(DEGREES + 1) + 1))[:, 1:]
    waves -= density @ waves
    powers = (powers - (powers @ density)[:, None]).T
    # What remains of the waves beside the directions in which the member was fitted.
    waves -= powers @ np.linalg.solve((powers.T * density) @ powers, (powers.T * density) @ waves)
    spread, turn = np.linalg.eigh((waves.T * density) @ waves)
    kept = spread > 0.1
    parts = (share @ waves @ turn[:, kept]) ** 2 / spread[kept]
    return float(parts.sum()), int(kept.sum())


def rescale_kurtosis(kurtosis: float, n: int) -> float:
    """The kurtosis of n normal numbers as a standard normal number (Anscombe & Glynn 1983)."""
    variance = 24 * n * (n - 2) * (n - 3) / ((n + 1) ** 2 * (n + 3) * (n + 5))
    x = (kurtosis - 3 * (n - 1) / (n + 1)) / math.sqrt(variance)
    skewness = 6 * (n * n - 5 * n + 2) / ((n + 7) * (n + 9))
    skewness *= math.sqrt(6 * (n + 3) * (n + 5) / (n * (n - 2) * (n - 3)))
    a = 6 + 8 / skewness * (2 / skewness + math.sqrt(1 + 4 / skewness**2))
    root = 1 + x * math.sqrt(2 / (a - 4))
    return (1 - 2 / (9 * a) - math.copysign(((1 - 2 / a) / abs(root)) ** (1 / 3), root)) / math.sqrt(2 / (9 * a))


def find_rounded_height(share: np.ndarray, centres: np.ndarray, mean: float, variance: float) -> float:
    """The largest mean log density of the numbers under densities that end without a jump: 1 - |x| and (1 - x^2)^p."""
    offset, share = np.abs(centres - mean)[share > 0], share[share > 0]
    found = []
    for power in ROUNDED:
        by_variance = math.sqrt(variance * (2 * power + 3 if power else 6))
        log_scale = math.lgamma(0.5) + math.lgamma(power + 1) - math.lgamma(power + 1.5) if power else 0.0
        for half in {max(by_variance * factor, float(offset.max()) + 1 / BINS) for factor in WIDTHS}:
            x = offset / half
            height = power * np.log1p(-x * x) if power else np.log1p(-x)
            found.append(float(share @ height) - log_scale - math.log(half))
    return max(found)


def reduce_score(score: float, n: int) -> float:
    """A distance in standard errors less what the tolerance allows."""
    return max(0.0, abs(score) - TOLERANCE * math.sqrt(n))


class Evidence(NamedTuple):
    """What the numbers say; all but the ends in units of half their range, from its middle.

    chance: that a member of the family is as far from them. over_uniform, over_normal, over_rounded: log likelihood
    ratios of the best member over the uniform one, the uncut normal one and the densities that end without a jump.
    """

    mean: float
    std: float
    kurtosis: float
    distance: str
    chance: float
    over_uniform: float
    over_normal: float
    over_rounded: float
    parent_mean: float
    parent_std: float


def measure_shape(sample: torch.Tensor, n: int) -> Evidence | None:
    """The evidence of numbers in (-1, 1), some of n; None where they are too far apart for any member."""
    m = len(sample)
    mean, std = float(sample.mean()), float(sample.std(correction=0))
    kurtosis = float(((sample - mean) / std).pow(4).mean())
    if WIDEST * std < 2:
        return None
    counts = torch.histc(sample, BINS, -1, 1).numpy()
    share, centres = counts / counts.sum(), (np.arange(BINS) + 0.5) * (2 / BINS) - 1
    moments = np.array([share @ centres, share @ centres**2])
    variance = moments[1] - moments[0] ** 2
    member = fit_member(moments)
    height = float(member.slopes @ moments - member.log_scale)  # mean log density of the numbers, as all below
    distance, directions = measure_distance(share, centres, member)
    inside = math.erfc((-1 - mean) / std / math.sqrt(2)) / 2 - math.erfc((1 - mean) / std / math.sqrt(2)) / 2
    normal_height = -0.5 * (1 + math.log(2 * math.pi * variance))
    a, b = member.slopes.tolist()
    return Evidence(
        mean,
        std,
        kurtosis,
        distance=f"chi^2 {m * distance:.3g} in {directions} directions",
        chance=measure_chance(directions, reduce_score(math.sqrt(m * distance), m)),
        over_uniform=reduce_score(math.sqrt(2 * m * max(0.0, height + math.log(2))), m) ** 2 / 2,
        over_normal=max(m * (height - normal_height), -n * math.log(inside)),
        over_rounded=m * (height - find_rounded_height(share, centres, moments[0], variance)),
        parent_mean=-a / (2 * b) if b < 0 else math.nan,
        parent_std=math.sqrt(-0.5 / b) if b < 0 else math.inf,
    )


def fit_law(sample: torch.Tensor, low: float, high: float, n: int) -> FamilyFit:
    """Which member of the family numbers are drawn from.

    sample: the numbers, or some of them, float64 (m,). low, high, n: the least and the largest of all, and how many.
    """
    m = len(sample)
    doubt = DOUBT * max(1.0, 4096 / max(m, 1)) ** 3
    if doubt >= 1:
        return FamilyFit(UNKNOWN, note=f"{n} numbers")
    half, middle = high / 2 - low / 2, low / 2 + high / 2
    found = measure_shape(((sample - middle) / half).clamp(-1, 1), n)
    if found is None:
        return FamilyFit(OTHER, note=f"numbers {WIDEST:g} standard deviations apart, or more")

    def leave(chance: float, note: str) -> FamilyFit:
        name = OTHER if chance < DOUBT else UNKNOWN
        return FamilyFit(name, kurtosis=found.kurtosis, note=note if name == OTHER else f"{n} numbers")

    if found.chance < doubt:
        return leave(found.chance, f"neither uniform nor (cut) normal: {found.distance}")
    ratios = {UNIFORM: found.over_uniform, NORMAL: found.over_normal}
    possible = [name for name, ratio in ratios.items() if ratio < POSSIBLE[name]]
    excluded = [name for name, ratio in ratios.items() if ratio > EXCLUDED[name]]
    if len(possible) + len(excluded) < 2 or len(possible) == 2:
        return leave(1.0, "")
    if possible == [UNIFORM]:
        return FamilyFit(UNIFORM, kurtosis=1.8)
    if found.over_rounded < NEAR:
        certain = found.over_rounded < 0 and doubt == DOUBT
        return leave(0.0 if certain else 1.0, "as near to a density that ends without a jump as to a normal one")
    if not possible:
        if not abs(found.parent_mean) <= 1 + 2 * found.parent_std:
            return leave(0.0, "no normal density near the numbers")
        return FamilyFit(CUT, middle + half * found.parent_mean, half * found.parent_std, found.kurtosis)
    tails = reduce_score(rescale_kurtosis(found.kurtosis, m), m)
    farthest = (1 + abs(found.mean)) / found.std
    chance = min(math.erfc(tails / math.sqrt(2)), 3 * n * math.erfc(farthest / math.sqrt(2)))
    if chance < doubt:
        return leave(chance, f"kurtosis {found.kurtosis:.3g}, one number {farthest:.3g} standard deviations away")
    return FamilyFit(NORMAL, middle + half * found.mean, half * found.std, 3.0)


def measure_chance(directions: int, distance: float) -> float:
    """How often so many standard normal numbers are together so far from 0, or farther."""
    half = torch.tensor([directions / 2, distance**2 / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
