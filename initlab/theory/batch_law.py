"""The law of a tensor over networks: ln T and ln W of a batch as a normal pair, and the statistics that follow from it.

T is the mean over units of the squared batch mean, W the mean over units of the batch variance; T + W is the second
moment. Everything is carried as a logarithm. Legend: G nodes of a law.
"""

import math
from dataclasses import dataclass, field, fields, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Moments: TypeAlias = tuple[float, float]  # mean and standard deviation


@dataclass(frozen=True)
class Law:
    """The law of K tensors, the layers of a stack: ln T and ln W are jointly normal.

    `ln_var` is mean and sd of ln of the pooled variance; the pooled mean is exp(ln q / 2) (centre + lean eta +
    spread xi), eta and xi standard normal, eta that of ln q itself; `shares` are fractions, mean and sd. Inputs differ
    in squared length by the relative variance `single`; T and W are those of inputs of one length, `as_measured` has
    the lengths in. `pair`: variance of a pair's product, over W^2.
    """

    mean: Array  # (K, 2)
    cov: Array  # (K, 2, 2)
    pair: Array  # (K,)
    single: Array  # (K,)
    ln_var: Array = field(default_factory=lambda: np.full((1, 2), np.nan))  # (K, 2)
    centre: Array = field(default_factory=lambda: np.zeros(1))  # (K,)
    spread: Array = field(default_factory=lambda: np.zeros(1))  # (K,)
    lean: Array = field(default_factory=lambda: np.zeros(1))  # (K,)
    shares: dict[str, Array] = field(default_factory=dict)  # (K, 2)
    # correlation over networks of ln q with that of the tensor before, in the direction of travel; nan is not known
    rho: Array = field(default_factory=lambda: np.full(1, np.nan))  # (K,)

    @property
    def single_input(self) -> bool:
        """Whether the batch is a single input, for which W = 0."""
        return bool((self.mean[..., 1] == -np.inf).all())

    @property
    def ln_q(self) -> Array:
        """ln q at the law's centre."""
        return np.logaddexp(self.mean[..., 0], self.mean[..., 1])

    @property
    def within_share(self) -> Array:
        """W / (T + W) at the centre."""
        return np.exp(self.mean[..., 1] - self.ln_q)

    @property
    def is_deterministic(self) -> bool:
        """Whether nothing fluctuates, as at infinite width."""
        return math.isnan(self.cov[(0,) * self.cov.ndim])

    def split(self) -> list["Law"]:
        """A list of K laws of one tensor each; without their shares."""
        names = ("mean", "cov", "pair", "single", "ln_var", "centre", "spread", "lean")
        return [Law(*(getattr(self, name)[k : k + 1] for name in names)) for k in range(len(self.mean))]

    def skip_first(self) -> "Law":
        """The law of all tensors but the first, of two at least."""
        kept = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "shares"}
        kept = {name: part[len(part) > 1 :] for name, part in kept.items()}  # of length 1: the same for all
        return replace(self, **kept, shares={name: share[1:] for name, share in self.shares.items()})

    def nodes(self) -> tuple[Array, Array]:
        """Nodes (..., G, 2) and weights (G,), exact for polynomials of degree 3 (Julier & Uhlmann 1997)."""
        if self.is_deterministic:
            return self.mean[..., None, :], np.ones(1)
        return sigma_points(self.mean, self.cov, self.single_input)

    def as_measured(self, batch: int) -> "Law":
        """The same law with T and W as they are measured: differences in length count as variance inside the batch."""
        if self.single_input or self.is_deterministic or not np.any(self.single):
            return self
        nodes, weights = self.nodes()
        ln_t, ln_w = nodes[..., 0], nodes[..., 1]
        alike = np.maximum(1 - np.exp(ln_w - ln_t) / (batch - 1), 0)  # of T, what pairs have in common
        common = alike * length_variance(self.single)[..., None]
        moved = np.log(np.maximum(common, 1e-300)) + ln_t
        total_w = np.logaddexp(ln_w, moved)
        noise = np.zeros((*ln_t.shape, 2, 2))
        own = 2 / (batch - 1) + self.single**2 / 3  # the last term is fitted, on ReLU stacks
        noise[..., 1, 1] = np.exp(2 * (moved - total_w)) * own[..., None]
        mean, cov, _ = combine(np.stack([ln_t + np.log1p(-common), total_w], -1), noise, weights)
        same = self.single == 0
        return replace(
            self, mean=np.where(same[..., None], self.mean, mean), cov=np.where(same[..., None, None], self.cov, cov)
        )

    def of_batch(self, batch: int) -> "Law":
        """The law for `batch` inputs of an infinite batch: 1/B of W goes into the batch mean."""
        ln_t = np.logaddexp(self.mean[..., 0], self.mean[..., 1] - math.log(batch))
        return replace(self, mean=np.stack([ln_t, self.mean[..., 1] + ln(1 - 1 / batch)], -1))

    def ln_second_moment(self) -> Array:
        """ln(T + W), mean and sd: (..., 2)."""
        if self.is_deterministic:
            return np.stack([self.ln_q, np.zeros_like(self.ln_q)], -1)
        nodes, weights = self.nodes()
        return mean_and_sd(np.logaddexp(nodes[..., 0], nodes[..., 1]), weights)


_STEP = math.sqrt(3)
_POINTS = {
    True: _STEP * np.array([[0, 0], [1, 0], [-1, 0]]),
    False: _STEP * np.array([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1]]),
}
_POINT_WEIGHTS = {single: np.array([1 - (len(p) - 1) / 6, *[1 / 6] * (len(p) - 1)]) for single, p in _POINTS.items()}


def sigma_points(mean: Array, cov: Array, single: bool) -> tuple[Array, Array]:
    """Nodes (..., G, 2) of a normal pair and their weights (G,); the W of a single input does not vary."""
    root = np.zeros(cov.shape)
    root[..., 0, 0] = first = np.sqrt(np.maximum(cov[..., 0, 0], 1e-10))
    if not single:
        root[..., 0, 1] = low = cov[..., 0, 1] / first
        root[..., 1, 1] = np.sqrt(np.maximum(cov[..., 1, 1] - low * low, 1e-10))
    return mean[..., None, :] + _POINTS[single] @ root, _POINT_WEIGHTS[single]


def length_variance(single: float | Array) -> Array:
    """Var |x| / E |x|^2 for lognormal |x|^2 of this relative variance; a quarter of it while small."""
    return np.asarray(1 - (1 + np.asarray(single)) ** -0.25)


CERTAIN = np.full((2, 2), np.nan)


NOTHING = -1e6  # ln of a signal that is gone: below any format, and finite, so that the rest can be computed


def ln(x: float) -> float:
    """ln of a number that may be 0."""
    return math.log(x) if x > 0 else -math.inf


def ln_means(means: Array, single: bool) -> Array:
    """ln of T and W, (G, 2): NOTHING for a signal that is gone, -inf for the W of a single input."""
    found = np.where(means > 0, np.log(np.maximum(means, 1e-300)), NOTHING)
    if single:
        found[:, 1] = -np.inf
    return found


def mean_and_sd(values: Array, weights: Array, noise: Array | float = 0.0) -> Array:
    """Mean and standard deviation (..., 2) of values at nodes (..., G); `noise` is a further variance at each node."""
    mean = values @ weights
    sd = np.sqrt(np.maximum(((values - mean[..., None]) ** 2 + noise) @ weights, 0))
    finite_or_zero = np.isfinite(values).all(-1)
    return np.stack([np.where(finite_or_zero, mean, values[..., 0]), np.where(finite_or_zero, sd, np.nan)], -1)


_UP_TO_8 = np.arange(8.0)


def digamma(x: Array) -> Array:
    """psi(x), x > 0, absolute error below 1e-13: recurrence to x >= 8, then the asymptotic series."""
    return _gammas(x)[0]


def trigamma(x: Array) -> Array:
    """psi'(x), x > 0, likewise."""
    return _gammas(x)[1]


def _gammas(x: Array) -> tuple[Array, Array]:
    below = 1 / (x[..., None] + _UP_TO_8)
    shifted = x + 8
    powers = shifted[..., None] ** _POWERS
    return np.log(shifted) + powers @ _DIGAMMA - below.sum(-1), powers @ _TRIGAMMA + (below * below).sum(-1)


_POWERS = -np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13])
_DIGAMMA = np.array([-1 / 2, -1 / 12, 0, 1 / 120, 0, -1 / 252, 0, 1 / 240, 0, -1 / 132, 0, 691 / 32760, 0])
_TRIGAMMA = np.array([1, 1 / 2, 1 / 6, 0, -1 / 30, 0, 1 / 42, 0, -1 / 30, 0, 5 / 66, 0, -691 / 2730])


def ln_noise(relative: Array) -> tuple[Array, Array]:
    """Mean and variance of ln X for X of mean 1 and this variance, as if a gamma variable (means of squares are)."""
    small = np.clip(relative, 1e-300, 1e6)
    shape = 1 / np.maximum(small, 1e-5)
    wide = small < 1e-5
    psi, slope = _gammas(shape)
    return np.where(wide, -small / 2, psi - np.log(shape)), np.where(wide, small, slope)


def ln_cov(relative: Array) -> tuple[Array, Array]:
    """The same for two variables, relative covariances (..., 2, 2): shifts (..., 2) and covariances (..., 2, 2)."""
    diagonal = relative[..., _BOTH, _BOTH]
    shift, var = ln_noise(diagonal)
    stretch = np.sqrt(np.where(diagonal > 0, var / np.maximum(diagonal, 1e-300), 1))
    return shift, relative * (stretch[..., :, None] * stretch[..., None, :])


_BOTH = np.arange(2)


def relative_to(means: Array, cov: Array) -> Array:
    """Covariances (..., 2, 2) divided by the products of the means (..., 2); 0 where a mean is 0."""
    product = means[..., :, None] * means[..., None, :]
    return np.where(product > 0, cov / np.where(product > 0, product, 1), 0)


def combine(values: Array, noise: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Mean (..., 2) and covariance of values (..., G, 2) with noise at each node, and the part that is noise."""
    alive = np.where(np.isfinite(values), values, 0)
    mean = weights @ alive
    off = alive - mean[..., None, :]
    own = (noise * weights[:, None, None]).sum(-3)
    first = values[..., 0, :]
    return np.where(np.isfinite(first), mean, first), own + (off * weights[:, None]).mT @ off, own


def regressors(nodes: Array, weights: Array, single: bool) -> Array:
    """R (..., G, 2) such that values^T R are the slopes of values, centred, by the state over its whole law."""
    dims = 1 if single else 2
    off = nodes[..., :dims] - nodes[..., :1, :dims]  # the first node is the centre
    weighted = off * weights[:, None]
    found = np.zeros(nodes.shape)
    found[..., :dims] = weighted @ np.linalg.inv(weighted.mT @ off)
    return found


def slopes(values: Array, by: Array, weights: Array) -> Array:
    """Slopes of values (..., G, 2) by the state, (..., 2, 2), for the regressors `by`."""
    alive = np.where(np.isfinite(values), values, 0)
    return (alive - (weights @ alive)[..., None, :]).mT @ by


def pool_symmetric_units(law: Law, n: Array | float) -> Law:
    """Add the pooled mean and pooled variance of a tensor whose n units are symmetric about 0."""
    share = 1 - law.within_share
    ln_var = law.ln_second_moment()
    ln_var[..., 0] -= share / n
    ln_var[..., 1] = np.sqrt(ln_var[..., 1] ** 2 + 2 * (share / n) ** 2)  # a squared mean is chi-square
    return replace(law, ln_var=ln_var, centre=0 * share, lean=0 * share, spread=np.sqrt(share / n))


def gaussian_batch(n: float, batch: int, q0: float = 1.0, c0: float = 0.0, exact: bool = False) -> Law:
    """A batch whose n units are independent and normal, of variance q0 and correlation c0 between inputs; K = 1.

    `exact`: one batch of just these moments, which does not fluctuate.
    """
    between, inside = q0 * (c0 + (1 - c0) / batch), q0 * (1 - c0) * (1 - 1 / batch)
    mean = np.array([ln(between), ln(inside)])
    if exact or math.isinf(n):
        return Law(mean[None], (CERTAIN if math.isinf(n) else np.zeros((2, 2)))[None], np.zeros(1), np.zeros(1))
    shift, cov = ln_cov(np.diag([2 / n, 2 / (n * max(1, batch - 1)) if inside > 0 else 0.0]))
    some = batch > 1
    return Law((mean + shift)[None], cov[None], np.array([some / n]), np.array([some * 2 * (1 - c0**2) / n]))
