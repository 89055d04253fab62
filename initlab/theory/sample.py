"""The law of a batch from a few of its inputs, in simulated networks.

The inputs of a batch are alike, so that the variance of an average over the batch follows from that of one input and
the covariance of two; of pairs, from one pair, two that share an input and two that do not (Hoeffding 1948). Legend: E
networks, b inputs that were drawn, F statistics.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IN_ORDER = ("q", "rms", "mean", "std", "std_within", "norm", "cosine", "frac_zero", "frac_dead", "frac_saturated")
OF_LENGTH = ("q", "rms", "norm", "std", "std_within")
NARROWER, HARDLY_NARROWER, ALIKE = 0.28, 0.7, 0.9  # deviations of the batch to those of its representatives
SKEWED = 0.7  # third moment of a law that is no longer drawn together alike on both sides
SCATTERED = 1.6  # standard deviation of logarithms in a network from which on they are not those of normal values
DOMINATED = 0.33  # share of the largest of 16 lengths, in the mean, from which on few inputs make the whole of a batch
ALMOST_ORTHOGONAL = 0.1  # mean cosine below which differences are as long as the inputs


class Sums(NamedTuple):
    """What is kept of a tensor of b inputs: inner products over n of the first and its differences from the others,
    (E, b, b); means over units and shares of zero and saturated entries, (E, b); None for what it does not have."""

    gram: Tensor
    mean: Tensor
    zero: Tensor | None
    saturated: Tensor | None
    units: int


class Sample(NamedTuple):
    """Statistics of one tensor in E networks, (F, E) float64 in the order of IN_ORDER; for each the standard deviation
    over networks of the whole batch to that of the inputs that were drawn, 1 where these are all and 0 where inputs
    are so unlike that these tell nothing of the rest."""

    values: Tensor
    ratios: tuple[float, ...]

    def is_known(self, statistic: str) -> bool:
        """Whether the law of the whole batch can be told from the inputs that were drawn: it is hardly narrower, or of
        a length, whose logarithm is symmetric."""
        at = IN_ORDER.index(statistic)
        values, ratio = self.values[at], self.ratios[at]
        if ratio == 1:
            return not bool(values.isnan().all())
        if ratio < (NARROWER if statistic in OF_LENGTH else HARDLY_NARROWER):
            return False
        values = values[values.isfinite()]
        values = values.log() if statistic in OF_LENGTH else values
        off = values - values.mean()
        skewed = float(off.pow(3).mean().abs() / off.square().mean() ** 1.5)
        return skewed < SKEWED or ratio > ALIKE


def estimate_squared_mean(means: Tensor, batch: int) -> Tensor:
    """The square (E,) of the mean over a batch, estimated from means (E, b) of its representatives."""
    b = means.shape[1]
    own = (means * means).mean(-1)
    if b == 1:
        return own
    common = (b * means.mean(-1) ** 2 - own) / (b - 1)
    return own / batch + common * (1 - 1 / batch)


def find_statistics(
    values: Tensor, zero: Tensor | None = None, saturated: Tensor | None = None, batched: bool = True
) -> Tensor:
    """Statistics of tensors (E, B, n), of a whole batch unless `batched` is False: (F, E); nan for what is not given.

    zero, saturated: which entries are 0, and which lie where phi is flat."""
    networks, batch, n = values.shape
    missing = torch.full((networks,), math.nan, dtype=torch.float64)
    second = values.square().mean((1, 2)).double()
    mean = values.mean((1, 2)).double()
    rows = {
        "q": second,
        "rms": second.sqrt(),
        "mean": mean,
        "std": (values - mean.to(values.dtype)[:, None, None]).square().mean((1, 2)).double().sqrt(),
        "norm": (second * (n * batch)).sqrt(),
    }
    if batched and batch > 1:
        rows["std_within"] = (values - values.mean(1, keepdim=True)).square().mean((1, 2)).double().sqrt()
        pointing = values * values.square().sum(-1, keepdim=True).rsqrt()
        rows["cosine"] = (pointing.sum(1).square().sum(-1).double() - batch) / (batch * (batch - 1))
    if zero is not None:
        rows["frac_zero"] = zero.to(values.dtype).mean((1, 2)).double()
        rows["frac_dead"] = zero.bool().all(1).double().mean(-1)
    if saturated is not None:
        rows["frac_saturated"] = saturated.to(values.dtype).mean((1, 2)).double()
    return torch.stack([rows.get(name, missing) for name in IN_ORDER])


def find_statistics_of_product(x: Tensor, d: Tensor) -> Tensor:
    """The same (F, E) of x^T d, for x (E, B, I) and d (E, B, O): its square is sum_ab (x_a . x_b)(d_a . d_b)."""
    count = x.shape[-1] * d.shape[-1]
    second = ((x @ x.mT) * (d @ d.mT)).sum((1, 2)).double() / count
    mean = (x.mean(-1) * d.mean(-1)).sum(1).double()
    std = (second - mean.square()).clamp_min(0).sqrt()
    rows = {"q": second, "rms": second.sqrt(), "mean": mean, "std": std, "norm": (second * count).sqrt()}
    return torch.stack([rows.get(name, torch.full_like(mean, math.nan)) for name in IN_ORDER])


def find_sample(parts: Sequence[Tensor | Sums], batch: int) -> Sample:
    """What networks have on the whole batch: as measured there, or as a sample of the same law."""
    whole = [part for part in parts if isinstance(part, Tensor)]
    if whole:
        return Sample(torch.cat(whole, -1), (1.0,) * len(IN_ORDER))
    sums = [part for part in parts if isinstance(part, Sums)]
    gram, means = (torch.cat([getattr(part, name) for part in sums]).double() for name in ("gram", "mean"))
    shares = {
        f"frac_{name}": torch.cat([getattr(part, name) for part in sums]).double()
        for name in ("zero", "saturated")
        if getattr(sums[0], name) is not None
    }
    (networks, b), n = means.shape, sums[0].units
    diagonal, apart = gram.diagonal(dim1=-2, dim2=-1), gram.clone()
    apart[:, 0] = apart[:, :, 0] = 0  # inner products of the differences from the first input
    first = gram[:, 0].clone()  # x_0 . (x_a - x_0)
    first[:, 0] = 0
    products = apart + gram[:, :1, :1] + first[:, :, None] + first[:, None]  # of the inputs themselves
    lengths, squares = (one.diagonal(dim1=-2, dim2=-1) for one in (products, apart))
    second = lengths.mean(-1)
    within = ((diagonal[:, 1:].sum(-1) - apart.sum((-2, -1)) / b) / (b - 1) * (1 - 1 / batch)).clamp_min(0)
    variance = (second - estimate_squared_mean(means, batch)).clamp_min(0)
    scale = lengths.rsqrt()
    cosines = products * scale[:, :, None] * scale[:, None]
    cosine = (cosines.sum((-2, -1)) - b) / (b * (b - 1))
    of_length = _compare_lengths(lengths, batch)
    ratios = dict.fromkeys(IN_ORDER, 1.0) | dict.fromkeys(OF_LENGTH, of_length)
    ratios |= {"mean": _compare_inputs(means, batch), "cosine": _compare_pairs(cosines, batch)}
    if not float(cosine.nan_to_num().mean().abs()) < ALMOST_ORTHOGONAL:
        distances = squares[:, :, None] + squares[:, None] - 2 * apart
        ratios["std_within"] = _compare_pairs(distances.log(), batch, True)
        if not _is_alike(distances.log()[:, ~torch.eye(b, dtype=torch.bool)]):
            ratios["std_within"] = 0.0
    q = _scale_deviation(second.log(), ratios["q"], True).exp()
    rows = {
        "q": q,
        "rms": q.sqrt(),
        "mean": _scale_deviation(means.mean(-1), ratios["mean"]),
        "std": _scale_deviation(variance.log(), ratios["std"], True).exp().sqrt(),
        "std_within": _scale_deviation(within.log(), ratios["std_within"], True).exp().sqrt(),
        "norm": (q * (n * batch)).sqrt(),
        "cosine": _scale_deviation(cosine, ratios["cosine"]),
    }
    for name, share in shares.items():
        ratios[name] = _compare_inputs(share, batch)
        rows[name] = _scale_deviation(share.mean(-1), ratios[name])
    missing = torch.full((networks,), math.nan, dtype=torch.float64)
    return Sample(torch.stack([rows.get(name, missing) for name in IN_ORDER]), tuple(ratios[name] for name in IN_ORDER))


def _scale_deviation(values: Tensor, ratio: float, in_ln: bool = False) -> Tensor:
    """Values (E,) with this ratio of their standard deviation, drawn together towards the median.

    in_ln: they are logarithms of what keeps its mean, so that the median rises as the spread falls."""
    alive = values[values.isfinite()]
    if ratio == 1 or not len(alive):
        return values
    shift = float(alive.var()) * (1 - ratio**2) / 2 if in_ln and len(alive) > 1 else 0.0
    median = alive.median()
    return torch.where(values.isfinite(), median + shift + (values - median) * ratio, values)


def _is_alike(logs: Tensor) -> bool:
    """Whether values of a network, by their logarithms (E, K), scatter so little that these can be taken as normal."""
    alive = _select_finite(logs)
    return not len(alive) or float(alive.var(1).mean()) < SCATTERED**2


def _compare_lengths(lengths: Tensor, batch: int) -> float:
    """`_compare_inputs` of squared lengths (E, b): 0 where a few scattered ones make much of it."""
    if _is_alike(lengths.log()):
        return _compare_inputs(lengths.log(), batch, True)
    longest = float((lengths.amax(1) / lengths.sum(1)).nanmean())
    ratio = _compare_inputs(lengths, batch)
    return ratio if longest < DOMINATED and ratio > HARDLY_NARROWER else 0.0


def _select_finite(values: Tensor) -> Tensor:
    """The networks (E, ...) whose numbers are all finite."""
    known = values.flatten(1).sum(1).isfinite()
    return values if bool(known.all()) else values[known]


def _compare_inputs(values: Tensor, batch: int, in_ln: bool = False) -> float:
    """Standard deviation of the mean over the batch to that over its representatives, from the values (E, b) of inputs.

    in_ln: the values are logarithms, normal together, and so is the deviation."""
    alive, b = _select_finite(values), values.shape[1]
    if not len(alive):
        return 1.0
    off = alive - alive.mean()
    squares = off.square().sum(1)
    one = float(squares.mean()) / b
    two = max(0.0, float((off.sum(1) ** 2 - squares).mean()) / (b * (b - 1)))
    return _compare_variances({1: one, 0: two}, [{1: 1 / k, 0: 1 - 1 / k} for k in (b, batch)], in_ln)


def _compare_pairs(values: Tensor, batch: int, in_ln: bool = False) -> float:
    """The same of a mean over pairs, from the values of pairs (E, b, b): the variance of a pair, the covariances of two
    pairs that share an input and of two that do not."""
    b = values.shape[1]
    apart = ~torch.eye(b, dtype=torch.bool)
    alive = _select_finite(torch.where(apart, values, 0.0))
    if not len(alive):
        return 1.0
    off = torch.where(apart, alive - alive.sum() / (len(alive) * b * (b - 1)), 0.0)
    sums = off.sum(-1)
    squares = float(off.square().sum((-2, -1)).mean())
    share = 4 * (float(sums.square().sum(-1).mean()) - squares)
    rest = max(0.0, float(sums.sum(-1).square().mean()) - 2 * squares - share)
    pairs = b * (b - 1)
    levels = {2: squares / pairs, 1: share / (4 * pairs * (b - 2)), 0: rest / (pairs * (b - 2) * (b - 3))}
    shares = [
        {2: 2 / (k * (k - 1)), 1: 4 * (k - 2) / (k * (k - 1)), 0: (k - 2) * (k - 3) / (k * (k - 1))} for k in (b, batch)
    ]
    return _compare_variances(levels, shares, in_ln)


def _compare_variances(levels: dict[int, float], shares: Sequence[dict[int, float]], in_ln: bool) -> float:
    """Of the standard deviations of two averages; levels: covariances by the inputs two values share, shares: of such
    pairs of values in either average."""
    if in_ln:
        levels = {k: math.expm1(min(max(x, -1.0), 300.0)) for k, x in levels.items()}
    here, there = (max(0.0, sum(levels[k] * x for k, x in share.items())) for share in shares)
    if in_ln:
        here, there = math.log1p(here), math.log1p(there)
    return math.sqrt(there / here) if here > 0 else 1.0
