"""Laws of a tensor's statistics: ln T and ln W of a batch as a normal pair, and what follows from it.

T is the mean over units of the squared batch mean, W of the batch variance; T + W is the second moment. Everything is
carried as ln. Knows averages of independent units and normal laws, neither layers nor activations.
Legend: G nodes of a law.
"""

import math
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Moments: TypeAlias = tuple[float, float]  # mean and standard deviation


@dataclass(frozen=True)
class Law:
    """ln T and ln W jointly normal, the rest beside it.

    `ln_var` is ln of the pooled variance; the pooled mean is exp(ln q / 2) (centre + spread xi), xi standard normal;
    `shares` are fractions. Inputs differ in squared length by the relative variance `single`; T and W are those of
    inputs of one length, `reported` has the lengths in. `pair`: variance of a pair's product, over W^2.
    """

    mean: Array  # (2,)
    cov: Array  # (2, 2)
    ln_var: Moments = (math.nan, math.nan)
    centre: float = 0.0
    spread: float = 0.0
    shares: dict[str, Moments] = field(default_factory=dict)
    pair: float = 0.0
    single: float = 0.0

    @property
    def alone(self) -> bool:
        """Whether the batch is a single input, for which W = 0."""
        return bool(self.mean[1] == -np.inf)

    @property
    def ln_q(self) -> float:
        """ln q at the law's centre."""
        return float(np.logaddexp(*self.mean))

    @property
    def within(self) -> float:
        """W / (T + W) at the centre."""
        return float(np.exp(self.mean[1] - self.ln_q))

    def nodes(self) -> tuple[Array, Array]:
        """Nodes (G, 2) and weights, exact for polynomials of degree 3 (Julier & Uhlmann 1997)."""
        dims = 1 if self.alone else 2
        if self.certain:
            return self.mean[None], np.ones(1)
        (a, b), (_, c) = self.cov.tolist()
        first = math.sqrt(max(a, 1e-10))
        low = b / first
        step = math.sqrt(3)
        nodes = np.empty((2 * dims + 1, 2))
        nodes[:] = self.mean
        nodes[1, 0] += step * first
        nodes[dims + 1, 0] -= step * first
        if dims == 2:  # Cholesky's factor by hand: this runs at every layer
            last = math.sqrt(max(c - low * low, 1e-10))
            nodes[1, 1] += step * low
            nodes[3, 1] -= step * low
            nodes[2, 1] += step * last
            nodes[4, 1] -= step * last
        weights = np.full(2 * dims + 1, 1 / 6)
        weights[0] = 1 - dims / 3
        return nodes, weights

    @property
    def certain(self) -> bool:
        """Whether nothing fluctuates, as at infinite width."""
        return bool(np.isnan(self.cov[0, 0]))

    def reported(self, batch: int) -> "Law":
        """The same law with T and W as they are measured.

        Of what inputs of different lengths have in common, the variance of their lengths is variance inside the batch.
        """
        if self.alone or self.certain or self.single == 0:
            return self
        nodes, weights = self.nodes()
        alike = np.maximum(1 - np.exp(nodes[:, 1] - nodes[:, 0]) / (batch - 1), 0)  # of T, what pairs have in common
        common = alike * lengths(self.single)
        ln_w = np.logaddexp(nodes[:, 1], np.log(np.maximum(common, 1e-300)) + nodes[:, 0])
        share = np.exp(np.log(np.maximum(common, 1e-300)) + nodes[:, 0] - ln_w)
        noise = np.zeros((len(nodes), 2, 2))
        noise[:, 1, 1] = share**2 * (2 / (batch - 1) + self.single**2 / 3)  # the last term is fitted, on ReLU stacks
        mean, cov, _ = total(np.stack([nodes[:, 0] + np.log1p(-common), ln_w], -1), noise, weights)
        return replace(self, mean=mean, cov=cov)

    def of_batch(self, batch: int) -> "Law":
        """So many inputs of a batch without end: 1/B of W is in the batch mean then."""
        ln_t = np.logaddexp(self.mean[0], self.mean[1] - math.log(batch))
        return replace(self, mean=np.array([ln_t, self.mean[1] + ln(1 - 1 / batch)]))

    def ln_second_moment(self) -> Moments:
        """ln(T + W)."""
        if self.certain:
            return self.ln_q, 0.0
        nodes, weights = self.nodes()
        return spread(np.logaddexp(nodes[:, 0], nodes[:, 1]), weights)


def lengths(single: float | Array) -> Array:
    """Var |x| / E |x|^2 for lognormal |x|^2 of this relative variance; a quarter of it while small."""
    return np.asarray(1 - (1 + np.asarray(single)) ** -0.25)


CERTAIN = np.full((2, 2), np.nan)


NOTHING = -1e6  # ln of a signal that is gone: below any format, and finite, so that the rest can be computed


def ln(x: float) -> float:
    """ln of a number that may be 0."""
    return math.log(x) if x > 0 else -math.inf


def ln_means(means: Array, alone: bool) -> Array:
    """ln of T and W, (G, 2), where a 0 is a signal that is gone, but for the W of a single input, which never was."""
    found = np.where(means > 0, np.log(np.maximum(means, 1e-300)), NOTHING)
    if alone:
        found[:, 1] = -np.inf
    return found


def spread(values: Array, weights: Array, noise: Array | float = 0.0) -> Moments:
    """Mean and standard deviation of values at nodes with a variance of their own at each."""
    if not np.isfinite(values).all():
        return float(values[0]), math.nan
    mean = weights @ values
    return float(mean), math.sqrt(max(0.0, float(weights @ ((values - mean) ** 2 + noise))))


_UP_TO_8 = np.arange(8.0)


def digamma(x: Array) -> Array:
    """psi(x), x > 0, absolute error below 1e-13: recurrence to x >= 8, then the asymptotic series."""
    shifted = x + 8
    total = (1 / (x[..., None] + _UP_TO_8)).sum(-1)
    r = 1 / shifted**2
    series = r * (1 / 12 - r * (1 / 120 - r * (1 / 252 - r * (1 / 240 - r * (1 / 132 - r * 691 / 32760)))))
    return np.asarray(np.log(shifted) - 0.5 / shifted - series - total)


def trigamma(x: Array) -> Array:
    """psi'(x), x > 0, likewise."""
    shifted = x + 8
    total = (1 / (x[..., None] + _UP_TO_8) ** 2).sum(-1)
    r = 1 / shifted**2
    series = r * (1 / 6 - r * (1 / 30 - r * (1 / 42 - r * (1 / 30 - r * (5 / 66 - r * 691 / 2730)))))
    return np.asarray(1 / shifted + r / 2 + series / shifted + total)


def ln_noise(relative: Array) -> tuple[Array, Array]:
    """Mean and variance of ln X for X of mean 1 and this variance, as if a gamma variable (means of squares are)."""
    small = np.clip(relative, 1e-300, 1e6)
    shape = 1 / np.maximum(small, 1e-5)
    wide = small < 1e-5
    return np.where(wide, -small / 2, digamma(shape) - np.log(shape)), np.where(wide, small, trigamma(shape))


def ln_cov(relative: Array) -> tuple[Array, Array]:
    """The same for two variables, relative covariances (G, 2, 2): shifts (G, 2) and covariances (G, 2, 2)."""
    diagonal = np.einsum("gii->gi", relative)
    shift, var = ln_noise(diagonal)
    stretch = np.sqrt(np.where(diagonal > 0, var / np.maximum(diagonal, 1e-300), 1))
    return shift, relative * stretch[:, :, None] * stretch[:, None]


def relative_to(means: Array, cov: Array) -> Array:
    """Covariances (G, 2, 2) divided by the products of the means (G, 2); 0 where a mean is 0."""
    product = means[:, :, None] * means[:, None]
    return np.where(product > 0, cov / np.where(product > 0, product, 1), 0)


def total(values: Array, noise: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Mean (2,) and covariance of ln M, (G, 2) at the nodes, with this noise at each; the noise's part by itself."""
    alive = np.where(np.isfinite(values), values, 0)
    mean = weights @ alive
    off = alive - mean
    own = np.einsum("g,gij->ij", weights, noise)
    return np.where(np.isfinite(values[0]), mean, values[0]), own + (off * weights[:, None]).T @ off, own


def regression(values: Array, nodes: Array, weights: Array, alone: bool) -> Array:
    """Slopes of the values by the state, (2, 2), over its whole law."""
    slopes, dims = np.zeros((2, 2)), 1 if alone else 2
    if len(nodes) > 1:
        off = nodes[:, :dims] - nodes[0, :dims]  # the first node is the centre
        alive = np.where(np.isfinite(values), values, 0)
        slopes[:, :dims] = (
            ((alive - weights @ alive) * weights[:, None]).T @ off @ np.linalg.inv((off.T * weights) @ off)
        )
    return slopes


def symmetric(law: Law, n: float) -> Law:
    """Adds pooled mean and pooled variance of a tensor whose n units are symmetric about 0."""
    share = 1 - law.within
    mean, sd = law.ln_second_moment()
    return replace(law, ln_var=(mean - share / n, sd), spread=math.sqrt(share / n))


def gaussian_batch(n: float, batch: int, q0: float = 1.0, c0: float = 0.0, exact: bool = False) -> Law:
    """A batch whose n units are independent and normal, of variance q0 and correlation c0 between inputs.

    `exact`: one batch of just these moments, which does not fluctuate.
    """
    between, inside = q0 * (c0 + (1 - c0) / batch), q0 * (1 - c0) * (1 - 1 / batch)
    mean = np.array([ln(between), ln(inside)])
    if exact or math.isinf(n):
        return Law(mean, CERTAIN if math.isinf(n) else np.zeros((2, 2)))
    shift, cov = ln_cov(np.diag([2 / n, 2 / (n * max(1, batch - 1)) if inside > 0 else 0.0])[None])
    some = batch > 1
    return Law(mean + shift[0], cov[0], pair=some / n, single=some * 2 * (1 - c0**2) / n)
