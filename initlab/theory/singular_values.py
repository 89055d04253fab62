"""The Jacobian of a stack's activations by its input: its singular values, and what theory says of their moments.

    J_l = J_{l-1} W_l diag(phi'(z_l)),  J_0 = 1                                       (I, O_l), rows: the input's units

carried with a power of two, so that no depth leaves float64. Moments over a random net by a recursion for its traces:
with A = J^T J, D = diag(phi'), M = W^T A W and m units, A' = D M D. Turning the sign of a column of W changes neither
the squares M_ij^2 nor M_ii M_jj, so for linear, ReLU and leaky ReLU nets without biases D is independent of them and
the recursion is exact at every width; for others up to O(1/n). For n -> infinity it is what Pennington, Schoenholz &
Ganguli 2017 derive with free probability: E s^4 / (E s^2)^2 = 1 + L (mu_2 / mu_1^2 - 1 - s_1), mu_k = E phi'^(2k), s_1
= -1 for normal and 0 for orthogonal weights.

Legend: E ensemble, I units of the input, O of a layer.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from initlab.meanfield.maps import moment
from initlab.nn.activations import Activation
from initlab.nn.network import Network, Weights, forward
from initlab.nn.unbounded import UNBOUNDED, Scaled, rescale
from initlab.stats.quadrature import gaussian_means
from initlab.theory.forward_law import DenseLayer
from initlab.theory.request import Request


class _Dual(NamedTuple):
    """A value, (E, 1, units), and its Jacobian by the input, (E, I, units)."""

    value: Scaled
    jacobian: Scaled


class _Forward:
    """The arithmetic of a pass that carries the Jacobian along: differentiation in forward mode."""

    def linear(self, x: _Dual, w: Tensor, b: Tensor | None) -> _Dual:
        return _Dual(UNBOUNDED.linear(x.value, w, b), UNBOUNDED.linear(x.jacobian, w))

    def activate(self, z: _Dual, row: Activation) -> _Dual:
        return _Dual(UNBOUNDED.activate(z.value, row), UNBOUNDED.activate_back(z.jacobian, z.value, row))

    def add(self, a: _Dual, b: _Dual) -> _Dual:
        return _Dual(UNBOUNDED.add(a.value, b.value), UNBOUNDED.add(a.jacobian, b.jacobian))


def jacobians(network: Network, weights: Weights, x: Tensor, visit: Callable[[int, Scaled], object]) -> None:
    """`visit(layer, d a_l / d x)` for every layer's output a_l, (E, I, O), at one input x (E, 1, I) of each network."""
    eye = torch.eye(x.shape[-1], dtype=torch.float64, device=x.device)
    start = _Dual(rescale(x), rescale(eye.expand(len(x), -1, -1)))
    forward(network, weights, start, lambda layer, z, a: visit(layer, a.jacobian), _Forward())


def singular_values(jacobian: Scaled) -> Tensor:
    """log2 of the singular values (E, min(I, O)), largest first; nan where the Jacobian is not finite, -inf for 0.

    In float64: what lies more than 2^-50 below the largest is rounding.
    """
    finite = jacobian.mantissa.isfinite().all(-1).all(-1)
    values = torch.linalg.svdvals(torch.where(finite[:, None, None], jacobian.mantissa, 0.0))
    return torch.where(finite[:, None], values.log2() + jacobian.exponent[:, None], torch.nan)


def log2_power_sums(jacobian: Scaled) -> Tensor:
    """log2 of the sums of s^2 and of s^4 over the singular values, (2, E): ||J||^2 and ||J^T J||^2."""
    m = jacobian.mantissa
    gram = m @ m.mT if m.shape[-2] <= m.shape[-1] else m.mT @ m
    sums = torch.stack([m.square().sum((-2, -1)), gram.square().sum((-2, -1))]).log2()
    return sums + torch.stack([2 * jacobian.exponent, 4 * jacobian.exponent])


class Traces(NamedTuple):
    """Of A = J^T J over networks: ln of t = E tr A, and E (tr A)^2 and E tr A^2 in units of t^2."""

    ln_trace: float
    squared: float
    square: float


def predict_moments(request: Request) -> pd.DataFrame:
    """Predict for each layer the means of s^2 and s^4 over its min(I, O) singular values s, and the variance of s^2.

    `limit_mean_s4` is the mean of s^4 at infinite width and the same ratios of widths.
    """
    inputs = request.widths[0]
    now, limit = Traces(math.log(inputs), 1.0, 1 / inputs), 1 / inputs
    entering, row = request.q0, request.row
    rows = []
    for k, layer in enumerate(request.layers, start=1):
        q = layer.fan_in * layer.weight * entering + layer.bias + layer.uniform_bias
        at = torch.tensor(1.0 if row.homogeneous else q, dtype=torch.float64).clamp(1e-40, 1e40)
        mu_1 = float(gaussian_means(lambda z, u: row.slope(z) ** 2, at, row.kinks))
        mu_2 = float(gaussian_means(lambda z, u: row.slope(z) ** 4, at, row.kinks))
        entering = float(moment(row, q)) if not row.homogeneous else entering
        ratio = mu_2 / mu_1**2 if mu_1 else 1.0
        growth = layer.fan_out * mu_1 * layer.weight
        now = Traces(now.ln_trace + (math.log(growth) if growth else -math.inf), *_next_traces(now, layer, ratio))
        limit += ratio / layer.fan_out - (1 / max(layer.fan_in, layer.fan_out) if layer.orthogonal else 0.0)
        count = min(inputs, layer.fan_out)
        with np.errstate(over="ignore"):
            mean = np.exp(np.float64(now.ln_trace)) / count
            s4, variance = now.square * count * mean**2, (now.square * count - now.squared) * mean**2
            rows.append((k, mean, s4, variance, limit * count * mean**2))
    names = ("mean_s2", "mean_s4", "var_s2")
    return pd.DataFrame(rows, columns=["layer", *(f"predicted_{name}" for name in names), "limit_mean_s4"])


def _next_traces(now: Traces, layer: DenseLayer, ratio: float) -> tuple[float, float]:
    """E (tr A')^2 and E tr A'^2 in units of t'^2; `ratio` is mu_2 / mu_1^2.

    Normal weights: E M_ii^2 = a + 2b, E M_ij^2 = b, E M_ii M_jj = a. An isometry is part of a rotation in n =
    max(I, O) dimensions: E M_ii^2 = (a + 2b)/(n (n + 2)), and what is left of (tr M)^2 = a and of tr M^2 = b lies off
    the diagonal.
    """
    m, own = layer.fan_out, now.squared + 2 * now.square
    if not layer.orthogonal:
        return ((m - 1) * now.squared + ratio * own) / m, ((m - 1) * now.square + ratio * own) / m
    n = max(layer.fan_in, m)
    diagonal, pairs = own / (n + 2), (m - 1) / max(n - 1, 1)
    squared, square = (ratio * diagonal + pairs * (x - diagonal) for x in (now.squared, now.square))
    return squared * n / m, square * n / m
