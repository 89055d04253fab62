"""Statistics of tensors in simulated networks: of a whole batch, or of a batch as told from some of its inputs.

The inputs of a batch are alike. So the variance over networks of a statistic of b inputs is c + own(b): c, what a
network does to all of them, is the covariance between the statistics of two groups of other inputs, and own(b) falls
with a power of b that groups of two sizes tell. Legend: E networks, b inputs in G groups, n units, F statistics.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from initlab.stats.backend import Backend, Elementwise
from initlab.stats.reference import FIELDS
from initlab.stats.summarize import derive

IN_ORDER = ("q", "rms", "mean", "std", "std_within", "norm", "cosine", "frac_zero", "frac_dead", "frac_saturated")
OF_LENGTH = ("q", "rms", "norm", "std", "std_within")
_LIKE_Q = {"rms": False, "norm": True}  # roots of q, or of its sum
GROUPS = 4  # of the inputs that stand for a batch
SURE = 0.1  # relative standard error of a spread, which moves a 95 % band by 2 %
SKEWED, ALIKE = 1.0, 0.9  # third moment of a law that is no longer drawn together alike, but for a ratio that near 1
ROUNDED = 1e-12  # share of the rms below which inputs differ by rounding


class Sample(NamedTuple):
    """Statistics of one tensor in E networks, (F, E) float64 in the order of IN_ORDER; for each the relative standard
    error of its spread over networks, beyond that of E networks, inf where the law is not known."""

    values: Tensor
    errors: tuple[float, ...]

    def is_known(self, statistic: str) -> bool:
        """Whether the law of the whole batch is known from the inputs that were drawn."""
        return self.errors[IN_ORDER.index(statistic)] < SURE


def find_rows(values: Tensor, backend: Backend, groups: int = 1) -> Tensor:
    """The rows of tensors (E, b, n), (F, E, 1), and of G > 1 groups of their inputs, (F, E, 1 + G)."""
    networks, b, n = values.shape
    return torch.cat([backend.rows(values.view(networks, k, b // k, n)) for k in sorted({1, groups})], -1)


def find_saturated(values: Tensor, activation: Elementwise, groups: int = 1) -> Tensor:
    """Shares of preactivations (E, b, n) that lie where phi is flat, (E, 1), and of groups of inputs, (E, 1 + G)."""
    networks, b, n = values.shape
    share = activation.saturated_share(values.view(networks, groups, b // groups, n))
    return share if groups == 1 else torch.cat([share.mean(1, keepdim=True), share], 1)


def find_rows_of_product(x: Tensor, d: Tensor) -> Tensor:
    """The rows (F, E, 1) of x^T d, for x (E, B, I) and d (E, B, O), of mean and square alone.

    Its square is sum_ab (x_a . x_b)(d_a . d_b).
    """
    second = ((x @ x.mT) * (d @ d.mT)).sum((1, 2)).double() / (x.shape[-1] * d.shape[-1])
    mean = (x.mean(-1) * d.mean(-1)).sum(1).double()
    fields = {"count": torch.ones_like(mean), "mean": mean, "m2": second - mean.square()}
    return torch.stack([fields.get(name, torch.zeros_like(mean)) for name in FIELDS])[..., None]


def _find_statistics(rows: Tensor, size: int, batch: int, n: int) -> Tensor:
    """Statistics (F, ...) as batches of `n` units have them in the mean, from rows (F, ...) of so many inputs.

    Nan where anything is not finite.
    """
    names = ("rms", "mean", "std_within", "cosine", "frac_zero", "frac_dead", "frac_saturated", "n_nan", "n_inf")
    rms, mean, inside, cosine, zeros, dead, saturated, n_nan, n_inf = derive(rows, names)
    second, missing = rms.square(), torch.full_like(mean, math.nan)
    common = second - inside.square()
    apart = inside.square() * (size / (size - 1)) if size > 1 else inside.square()
    within = apart * (1 - 1 / batch)
    variance = within + common - mean.square() - apart * (1 / size - 1 / batch) * (1 - 1 / n)
    found = {
        "q": second,
        "rms": rms,
        "norm": (second * (n * batch)).sqrt(),
        "mean": mean,
        "std": variance.clamp_min(0).sqrt(),
        "frac_zero": zeros,
        "frac_saturated": saturated,
    }
    if size > 1:
        found |= {"std_within": within.sqrt(), "cosine": cosine}
    if size == batch:
        found["frac_dead"] = dead
    statistics = torch.stack([found.get(name, missing) for name in IN_ORDER])
    return statistics.masked_fill_(n_nan + n_inf > 0, math.nan)


def find_samples(rows: Tensor, inputs: int, batch: int, n: int) -> list[Sample]:
    """What networks have on whole batches of n units, from rows (F, K, E, 1 or 1 + G) of K tensors on some inputs."""
    found = _find_statistics(rows[..., :1], inputs, batch, n)
    values = found[..., 0].clone()
    errors = torch.where(values.isfinite().any(-1), 0.0, math.inf).to(values.dtype)
    if rows.shape[-1] > 1:
        found = torch.cat([found, _find_statistics(rows[..., 1:], inputs // GROUPS, batch, n)], -1)
        for at, name in enumerate(IN_ORDER):
            if name in _LIKE_Q:
                continue
            logs = name in OF_LENGTH
            alive = found[at].isfinite().all(-1) & ((found[at] > 0).all(-1) | (not logs))
            whole = alive.all(-1)
            for some in (whole.nonzero().flatten(), *(~whole).nonzero()):  # all at once where every network counts
                if not alive[some].any():
                    errors[at, some] = math.inf
                    continue
                which = alive[some[:1]].flatten()
                known = found[at, some][:, which].log() if logs else found[at, some][:, which]
                moved, errors[at, some] = _move_to_batch(known[..., 0], known[..., 1:], batch / inputs)
                values[at, some[:, None], which.nonzero().flatten()] = moved.exp() if logs else moved
                ends = (known[..., 0] == 0) | (known[..., 0] == 1)
                if name.startswith("frac"):  # counts of few entries
                    errors[at, some[ends.any(-1) & ~ends.all(-1)]] = math.inf
        for name, scale in _LIKE_Q.items():
            at = IN_ORDER.index(name)
            values[at], errors[at] = values[0].sqrt() * (n * batch if scale else 1) ** 0.5, errors[0]
    inside = IN_ORDER.index("std_within")
    errors[inside, (values[inside] < ROUNDED * values[0].sqrt()).any(-1)] = math.inf
    return [Sample(values[:, k], tuple(errors[:, k].tolist())) for k in range(values.shape[1])]


def _move_to_batch(values: Tensor, groups: Tensor, times: float) -> tuple[Tensor, Tensor]:
    """Values (K, E) of b inputs as those of so many times more, and their errors (K,).

    groups: those of G groups of the inputs, (K, E, G).
    """
    middle, middle_of_groups, count = values.mean(-1), groups.mean((1, 2)), groups.shape[-1]
    off, apart = values - middle[:, None], groups - middle_of_groups[:, None, None]
    variance = off.square().mean(-1)
    products = (apart.sum(-1).square() - apart.square().sum(-1)) / (count * (count - 1))
    common = products.mean(-1).clamp_min(0).minimum(variance)
    own, own_of_groups = variance - common, (apart.square().mean((1, 2)) - common).clamp_min(0)
    power = torch.where((own > 0) & (own_of_groups > 0), (own_of_groups / own).log() / math.log(count), 1.0)
    share = times ** -power.clamp(0.5, 2.0)
    ratio = ((common + share * own) / variance).sqrt()
    shift = torch.where(
        own_of_groups == own, 0.0, (middle - middle_of_groups) * (1 - share) * own / (own_of_groups - own)
    )
    squares = (1 - share)[:, None] * products + share[:, None] * off.square()  # in the mean the variance of the batch
    errors = squares.std(-1) / math.sqrt(values.shape[1]) / (2 * ratio.square() * variance)
    skewed = off.pow(3).mean(-1).abs() > SKEWED * variance**1.5
    errors = torch.where(ratio > ALIKE, 0.0, torch.where(skewed, math.inf, errors))
    moved = (middle + shift)[:, None] + off * ratio[:, None]
    fixed = variance == 0
    return torch.where(fixed[:, None], values, moved), errors.masked_fill(fixed, 0.0)
