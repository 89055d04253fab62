"""The row of a tensor in exact arithmetic, and how near a measured one must be."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import torch
from torch import Tensor

from initlab.stats.reference import FIELDS

EXACT = 1e-12
SINGLE = 2e-6  # of sums in float32: see summarize.py; a square's error is twice that of its root


def tolerance(x: Tensor, plain: bool) -> float:
    """How near the row of x must be; the plain backend adds up in float32 what has no more digits."""
    return SINGLE if plain and x.dtype != torch.float64 else EXACT


def named(fields: Tensor) -> dict[str, float]:
    return dict(zip(FIELDS, fields.tolist(), strict=True))


def decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def mean_and_m2(values: list[Fraction]) -> tuple[Fraction, Fraction]:
    mean = sum(values, Fraction(0)) / len(values)
    return mean, sum((v * v for v in values), Fraction(0)) - len(values) * mean * mean


def exact(x: Tensor) -> dict[str, Fraction]:
    """mean, m2 and within of (N, C) in rational arithmetic, the resultant to 60 digits; without the power of two."""
    rows = [[Fraction(v) if math.isfinite(v) else None for v in line] for line in x.double().tolist()]
    finite = [v for line in rows for v in line if v is not None]
    units = [[v for v in unit if v is not None] for unit in zip(*rows, strict=True)]
    variances = [mean_and_m2(unit)[1] / len(unit) for unit in units if unit]
    heading = [Decimal(0)] * x.shape[1]
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 60, 10**6, -(10**6)
        for line in rows:
            length = decimal(sum((v * v for v in line if v is not None), Fraction(0))).sqrt()
            if length:
                heading = [h + decimal(v or Fraction(0)) / length for h, v in zip(heading, line, strict=True)]
        resultant = sum((h * h for h in heading), Decimal(0))
    mean, m2 = mean_and_m2(finite)
    within = sum(variances, Fraction(0)) / len(variances)
    return {"mean": mean, "m2": m2, "within": within, "resultant": Fraction(resultant), "n": Fraction(len(finite))}


def agree(found: dict[str, float], true: dict[str, Fraction], tolerance: float = EXACT) -> None:
    """Compared as fractions: squares of what float64 holds leave float64."""
    scale = Fraction(2) ** int(found["exponent"])
    second = true["m2"] / true["n"] + true["mean"] ** 2
    r = Fraction(tolerance)
    assert (Fraction(found["mean"]) * scale - true["mean"]) ** 2 <= r**2 * second
    assert abs(Fraction(found["m2"]) * scale**2 - true["m2"]) <= r * true["m2"]
    assert abs(Fraction(found["within"]) * scale**2 - true["within"]) <= r * true["within"]
    # The cosine is (resultant - k) / (k (k - 1)): k is its scale where the vectors are nearly orthogonal or cancel.
    assert abs(Fraction(found["resultant"]) - true["resultant"]) <= r * max(true["resultant"], int(found["alive"]))
