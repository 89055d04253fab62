"""Statistics of tensors in simulated networks: of a whole batch, or of a batch as told from some of its inputs.

The inputs of a batch are alike. So the variance over networks of a statistic of b inputs is c + own(b): c, what a
network does to all of them, is the covariance between the statistics of two groups of other inputs, and own(b) falls
with a power of b that groups of two sizes tell. Legend: E networks, b inputs in G groups, n units, F statistics.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IN_ORDER = ("q", "rms", "mean", "std", "std_within", "norm", "cosine", "frac_zero", "frac_dead", "frac_saturated")
SUMS = ("second", "mean", "common", "within", "resultant", "zeros", "dead", "saturated")
OF_LENGTH = ("q", "rms", "norm", "std", "std_within")
_LIKE_Q = {"rms": False, "norm": True}  # roots of q, or of its sum
GROUPS = 4  # of the inputs that stand for a batch
SURE = 0.1  # relative standard error of a spread, which moves a 95 % band by 2 %
SKEWED, ALIKE = 1.0, 0.9  # third moment of a law that is no longer drawn together alike, but for a ratio that near 1
ROUNDED = 1e-12  # share of the rms below which inputs differ by rounding
CANCELS = {torch.float32: 1e-3, torch.float64: 1e-8}  # share of a variance in q below which a difference loses digits


class Sample(NamedTuple):
    """Statistics of one tensor in E networks, (F, E) float64 in the order of IN_ORDER; for each the relative standard
    error of its spread over networks, beyond that of E networks, inf where the law is not known."""

    values: Tensor
    errors: tuple[float, ...]

    def is_known(self, statistic: str) -> bool:
        """Whether the law of the whole batch is known from the inputs that were drawn."""
        return self.errors[IN_ORDER.index(statistic)] < SURE


def find_sums(
    values: Tensor,
    zero: Callable[[], Tensor] | None = None,
    saturated: Callable[[], Tensor] | None = None,
    wanted: Collection[str] = IN_ORDER,
    groups: int = 1,
) -> Tensor:
    """Of tensors (E, b, n) the numbers of SUMS, (S, E, 1), and of G > 1 groups of their inputs, (S, E, 1 + G).

    zero, saturated: find which entries are 0, and which lie where phi is flat; without `zero` none is 0. wanted:
    statistics that are asked for; nan for what only others need.
    """
    networks, b, n = values.shape
    parts = values.view(networks * groups, b // groups, n)
    units = parts.new_full((len(parts), 1, b // groups), groups / b) @ parts  # means of the units: faster than `mean`
    second = torch.linalg.vector_norm(parts, dim=(1, 2)).double().square() * (groups / (b * n))

    def split(found: Tensor) -> Tensor:
        return found.view(networks, groups, -1)

    def join_groups(found: Tensor) -> Tensor:
        """What has a mean over inputs (E G, k) -> of all inputs and of groups, (E, 1 + G, k)."""
        of_groups = split(found)
        return of_groups if groups == 1 else torch.cat([of_groups.mean(1, keepdim=True), of_groups], 1)

    centre = join_groups(units).double()
    rows = {"second": join_groups(second)[..., 0], "mean": centre.mean(-1), "common": centre.square().mean(-1)}
    within = rows["second"] - rows["common"]
    if not bool((within > CANCELS[values.dtype] * rows["second"]).all()):
        own = split((parts - units).square().mean((1, 2)).double())[..., 0]
        both = own.mean(1, keepdim=True) + (centre[:, 1:] - centre[:, :1]).square().mean((1, 2))[:, None]
        within = own if groups == 1 else torch.cat([both, own], 1)
    rows["within"] = within
    if b > 1 and "cosine" in wanted:
        scale = torch.linalg.vector_norm(parts, dim=-1, keepdim=True).reciprocal()
        rows["resultant"] = join_groups((scale.mT @ parts)[:, 0] * (groups / b)).double().square().sum(-1)
    if not {"frac_zero", "frac_dead"}.isdisjoint(wanted):
        zeros = zero().to(values.dtype).view(len(parts), -1, n).mean(1) if zero else torch.zeros_like(units[:, 0])
        share = join_groups(zeros)
        rows |= {"zeros": share.mean(-1).double(), "dead": (share == 1).double().mean(-1)}
    if saturated and "frac_saturated" in wanted:
        rows["saturated"] = join_groups(saturated().to(values.dtype).view(len(parts), -1).mean(-1))[..., 0].double()
    return torch.stack([rows.get(name, torch.full_like(within, math.nan)) for name in SUMS])


def find_sums_of_product(x: Tensor, d: Tensor) -> Tensor:
    """The same (S, E, 1) of x^T d, for x (E, B, I) and d (E, B, O): its square is sum_ab (x_a . x_b)(d_a . d_b)."""
    second = ((x @ x.mT) * (d @ d.mT)).sum((1, 2)).double() / (x.shape[-1] * d.shape[-1])
    mean = (x.mean(-1) * d.mean(-1)).sum(1).double()
    rows = {"second": second, "mean": mean, "common": second, "within": 0 * second}
    return torch.stack([rows.get(name, torch.full_like(mean, math.nan)) for name in SUMS])[..., None]


def _find_statistics(sums: Tensor, size: int, batch: int, n: int) -> Tensor:
    """Statistics (F, ...) as batches of `n` units have them in the mean, from sums (S, ...) of so many inputs."""
    sum_ = dict(zip(SUMS, sums, strict=True))
    second, mean, missing = sum_["second"], sum_["mean"], torch.full_like(sums[0], math.nan)
    apart = sum_["within"] * (size / (size - 1)) if size > 1 else sum_["within"]
    within = apart * (1 - 1 / batch)
    variance = within + sum_["common"] - mean.square() - apart * (1 / size - 1 / batch) * (1 - 1 / n)
    rows = {
        "q": second,
        "rms": second.sqrt(),
        "norm": (second * (n * batch)).sqrt(),
        "mean": mean,
        "std": variance.clamp_min(0).sqrt(),
        "frac_zero": sum_["zeros"],
        "frac_saturated": sum_["saturated"],
    }
    if size > 1:
        rows |= {"std_within": within.sqrt(), "cosine": (sum_["resultant"] * size - 1) / (size - 1)}
    if size == batch:
        rows["frac_dead"] = sum_["dead"]
    return torch.stack([rows.get(name, missing) for name in IN_ORDER])


def find_sample(parts: Sequence[Tensor], inputs: int, batch: int, n: int, networks: int) -> Sample:
    """What networks have on the whole batch of n units, from the sums (S, E, 1 or 1 + G) of groups of networks."""
    sums = torch.cat(list(parts), 1)[:, :networks]
    found = _find_statistics(sums[..., :1], inputs, batch, n)
    values = found[..., 0].clone()
    errors = [0.0 if bool(one.isfinite().any()) else math.inf for one in values]
    if sums.shape[-1] > 1:
        found = torch.cat([found, _find_statistics(sums[..., 1:], inputs // GROUPS, batch, n)], -1)
        for at, name in enumerate(IN_ORDER):
            if name in _LIKE_Q:
                continue
            logs = name in OF_LENGTH
            alive = found[at].isfinite().all(-1) & ((found[at] > 0).all(-1) | (not logs))
            if not bool(alive.any()):
                errors[at] = math.inf
                continue
            known = found[at, alive].log() if logs else found[at, alive]
            moved, errors[at] = _move_to_batch(known[:, 0], known[:, 1:], batch / inputs)
            values[at, alive] = moved.exp() if logs else moved
            ends = (known[:, 0] == 0) | (known[:, 0] == 1)
            if name.startswith("frac") and bool(ends.any()) and not bool(ends.all()):  # counts of few entries
                errors[at] = math.inf
        for name, scale in _LIKE_Q.items():
            at = IN_ORDER.index(name)
            values[at], errors[at] = values[0].sqrt() * (n * batch if scale else 1) ** 0.5, errors[0]
    inside = IN_ORDER.index("std_within")
    if bool((values[inside] < ROUNDED * values[0].sqrt()).any()):
        errors[inside] = math.inf
    return Sample(values, tuple(errors))


def _move_to_batch(values: Tensor, groups: Tensor, times: float) -> tuple[Tensor, float]:
    """Values (E,) of b inputs as those of so many times more, from those of groups (E, G) of them, and their error."""
    off, apart = values - values.mean(), groups - groups.mean()
    count, variance = groups.shape[1], float(off.square().mean())
    if variance == 0:
        return values, 0.0
    products = (apart.sum(1).square() - apart.square().sum(1)) / (count * (count - 1))
    common = min(max(0.0, float(products.mean())), variance)
    own, own_of_groups = variance - common, max(0.0, float(apart.square().mean()) - common)
    power = math.log(own_of_groups / own) / math.log(count) if own > 0 and own_of_groups > 0 else 1.0
    share = times ** -min(max(power, 0.5), 2.0)
    ratio = math.sqrt((common + share * own) / variance)
    shift = float(values.mean() - groups.mean()) * (1 - share) * own / (own_of_groups - own or math.inf)
    squares = (1 - share) * products + share * off.square()  # in the mean the variance of the batch
    error = float(squares.std()) / math.sqrt(len(values)) / (2 * ratio**2 * variance)
    if ratio > ALIKE:
        error = 0.0
    elif abs(float(off.pow(3).mean())) > SKEWED * variance**1.5:
        error = math.inf
    return values.mean() + shift + off * ratio, error
