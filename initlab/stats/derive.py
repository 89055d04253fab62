"""From rows to statistics, and how far two tensors are apart.

Rows are float64 and carry a power of two, so that a float32 tensor of 1e30 or 1e-40 has a finite rms other than 0.
Legend: E ensemble, N batch, C units, F fields of a row, S statistics.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from initlab.stats.reference import FIELDS, power_of_two
from initlab.stats.statistics import SATURATED, STATISTICS


def derive(rows: Tensor, names: Iterable[str] = STATISTICS) -> Tensor:
    """The statistics (S, ...) of rows (F, ...): those that are named, or all in the order of STATISTICS.

    std = sqrt(m2 / n) 2^e, rms = sqrt(m2 / n + mean^2) 2^e, n finite entries. All are as exact as the row as long as
    float64 holds them: q = rms^2 is inf beyond an rms of 1e154 and 0 below 1e-162. The cosine is a difference: its
    error is a rounding of the larger of itself and 1 / (k - 1), what k vectors reach that cancel.
    """
    fields = dict(zip(FIELDS, rows, strict=False))
    fields["finite"] = fields["count"] - fields["n_nan"] - fields["n_inf"]
    fields["scale"] = power_of_two(fields["exponent"])
    fields["root"] = (fields["m2"] / fields["finite"] + fields["mean"].square()).sqrt()
    return torch.stack([STATISTICS[name].formula(fields) for name in names])


def saturated_share(slope: Tensor, largest: float) -> Tensor:
    """Share of |phi'(z)| below 5 % of its largest value, (..., N, C) -> (...)."""
    return (slope.abs() < SATURATED * largest).double().mean((-2, -1))


def relative_error(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """||a - b|| / ||b|| over the last two dimensions, and how many entries of either are not finite.

    0/0 is 0: two tensors of zeros agree. Where anything is not finite the error is nan.
    """
    wide_a, wide_b = a.double(), b.double()
    n_bad = torch.zeros(a.shape[:-2], dtype=torch.int64, device=a.device)
    # On a CPU a finite sum shows that all entries are finite; a GPU is not waited for.
    if a.device.type != "cpu" or not bool((wide_a.sum() + wide_b.sum()).isfinite()):
        n_bad = (wide_a.isfinite() & wide_b.isfinite()).logical_not_().sum((-2, -1))
    if a.dtype == torch.float64:  # squares of float64 leave float64; quotients do not
        peak = torch.maximum(wide_a.abs(), wide_b.abs()).amax((-2, -1), keepdim=True)
        scale = torch.where((peak > 0) & peak.isfinite(), peak, 1)
        wide_a, wide_b = wide_a / scale, wide_b / scale
    difference, reference = (torch.linalg.vector_norm(t, dim=(-2, -1)) for t in (wide_a - wide_b, wide_b))
    error = torch.where(difference == 0, 0, difference / reference)
    return torch.where(n_bad > 0, torch.nan, error), n_bad
