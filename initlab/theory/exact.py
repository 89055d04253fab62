"""Exact and closed laws of finite width: how the second moment of a stack spreads over seeds.

Given a layer's input its preactivations are independent Gaussians, so the second moment is a product (one input) or a
linear recursion (a batch through linear layers) of chi-square averages. Weights are normal with variance
sigma_w^2/fan; other shapes of the same variance differ by O(1/n^2).
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from initlab.errors import UsageError
from initlab.nn.custom_activation import Given, as_activation, name_of
from initlab.theory.batch_law import Array, Moments, digamma, trigamma


def linear_one_input(widths: Sequence[int]) -> Moments:
    """ln(K_L / (sigma_w^(2L) K_0)) for widths (I, n_1, .. n_L), one input: a sum of ln(chi2_n / n), exact.

    Mean sum of psi(n/2) - ln(n/2), variance sum of psi'(n/2).
    """
    half = np.array(widths[1:], dtype=float) / 2
    return float((digamma(half) - np.log(half)).sum()), math.sqrt(trigamma(half).sum())


def relu_one_input(widths: Sequence[int]) -> Moments:
    """ln(K_L / K_0) for sigma_w^2 = 2 and ReLU, one input: (2/n) chi2_k with k ~ Bin(n, 1/2), exact.

    Mean sum of E[psi(k/2)] + ln(4/n), variance sum of E[psi'(k/2)] + Var psi(k/2) (Hanin & Nica 2018 to first order:
    -5/(2n) and 5/n). A layer with no open unit (probability 2^-n) ends the signal; the law is that of the others.
    """
    means, variances = zip(*(_relu_layer(n) for n in widths[1:]), strict=True) if len(widths) > 1 else ((), ())
    return sum(means), math.sqrt(sum(variances))


@lru_cache(maxsize=256)
def _relu_layer(n: int) -> tuple[float, float]:
    k = np.arange(1, n + 1)
    ln_p = math.lgamma(n + 1) - np.array([math.lgamma(j + 1) + math.lgamma(n - j + 1) for j in k])
    p = np.exp(ln_p - n * math.log(2))
    p /= p.sum()
    at = digamma(k / 2)
    return float(p @ at) + math.log(4 / n), float(p @ trigamma(k / 2) + p @ at**2 - (p @ at) ** 2)


def second_moment_variance(activation: Given, widths: Sequence[int], preactivation: bool = False) -> Array:
    """Relative variance over networks of the second moment K_l of one input after each layer, exact.

    activation: a name of the table or an elementwise function that is a line on either side of 0: ReLU, leaky ReLU,
    |z|, the identity. widths: units of the input and of every layer. preactivation: of those, instead of activations.
    Weights are normal, biases 0, and the input is given: Var K_l / (E K_l)^2 = prod (1 + k/n) - 1 over the layers up to
    l with k = E[phi^4] / E[phi^2]^2 - 1, which is 5 for ReLU and 2 for a linear layer or the last preactivation, at
    every gain. An input drawn anew brings a factor 1 + 2/n_0 more. Raises UsageError for other activations.
    Source: Hanin & Rolnick 2018, theorem 5; Hanin & Nica 2018.

    >>> second_moment_variance("relu", [100, 100, 100]).round(6).tolist()  # 1.05 - 1 and 1.05^2 - 1
    [0.05, 0.1025]
    """
    row, ends = as_activation(activation), torch.tensor([[1.0, -1.0], [1e3, -1e3], [7e-4, -7e-4]], dtype=torch.float64)
    slopes = row.phi(ends) / ends.abs()
    if not torch.allclose(slopes, slopes[:1].expand_as(slopes), rtol=1e-12, atol=0):
        raise UsageError(f"activation={name_of(activation)}: the exact variance is known of lines on either side of 0")
    second, fourth = (float((slopes[0] ** k).mean()) for k in (2, 4))
    excess = 3 * fourth / second**2 - 1
    n = np.array(widths[1:], dtype=float)
    passed = np.cumprod(1 + excess / n)
    return np.asarray(passed / (1 + excess / n) * (1 + 2 / n) if preactivation else passed) - 1


def survival(widths: Sequence[int]) -> float:
    """Probability that no ReLU layer has all units closed for one input: product of 1 - 2^-n."""
    return math.prod(1 - 0.5**n for n in widths[1:])


def linear_batch(widths: Sequence[int], batch: int) -> Array:
    """Relative variance of the second moment of a Gaussian batch after each linear layer, the input first, exact.

    a = E (tr A)^2, b = E tr A^2, A = X^T X: a' = m^2 a + 2 m b, b' = m (m + 1) b + m a up to the weights' variance.
    """
    n = widths[0]
    a, b = 1 + 2 / (batch * n), ((batch + 1) * n + n * n) * batch / (batch * n) ** 2
    found = [a - 1]
    for m in widths[1:]:  # a and b in units of (E tr A)^2
        a, b = a + 2 * b / m, (1 + 1 / m) * b + a / m
        found.append(a - 1)
    return np.array(found)


def kappa(c: Array) -> Array:
    """n times the relative covariance of two inputs' second moments after a ReLU layer, correlation c; 5 at c = 1."""
    c = np.clip(c, -1, 1)
    angle = np.pi - np.arccos(c)
    return 2 / np.pi * (3 * c * np.sqrt(1 - c * c) + angle * (1 + 2 * c * c)) - 1


def relu_batch(widths: Sequence[int], batch: int, c: Sequence[float]) -> Array:
    """Relative variance of a batch's second moment after each ReLU layer (sigma_w^2 = 2), the input first; large n.

    (1 - 1/B) (prod (1 + kappa(c_l)/n) - 1) + (1/B) (prod (1 + 5/n) - 1) + 2/(B n), c_l the correlation of the layer's
    preactivations by the infinitely wide map, or one that finite width has lowered.
    """
    n = np.array(widths[1:], dtype=float)
    pairs = np.cumprod(1 + kappa(np.asarray(c, dtype=float)) / n)
    own = np.cumprod(1 + 5 / n)
    found = (1 - 1 / batch) * (pairs - 1) + (own - 1) / batch + 2 / (batch * widths[0])
    return np.concatenate([[2 / (batch * widths[0])], found])


def lognormal(relative_variance: float) -> Moments:
    """Mean and standard deviation of ln X for a lognormal X of mean 1."""
    s2 = math.log1p(relative_variance)
    return -s2 / 2, math.sqrt(s2)
