"""The law of a batch on its way up a stack of finite width, as a lognormal law carried layer by layer.

Given a layer's input its preactivations are Gaussian and its units independent, so that an average over n units
fluctuates by the moments of one unit over n (`unit_moments`). ln T and ln W of a batch are a Markov chain; their means
and covariances are carried layer by layer, integrated over the whole law of the state (a delta method in log space).
Two more numbers are carried to leading order: how much single pairs of inputs, and single inputs, differ from the
average. This holds while L / n is below about 1; beyond, `simulate`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from initlab.nn.activations import Activation
from initlab.theory.batch_law import (
    NOTHING,
    Array,
    Law,
    combine,
    gaussian_batch,
    length_variance,
    ln,
    ln_cov,
    ln_means,
    relative_to,
    sigma_points,
)
from initlab.theory.unit_moments import COARSE, Units, units


class Fitted(NamedTuple):
    """How LSUV fits a layer: its weights are drawn with variance `drawn`, then divided by the standard deviation of z
    over batch and units until its square is within `tolerance` of 1, at most `attempts` times (`nn/lsuv.py`)."""

    drawn: float
    tolerance: float
    attempts: int

    def weight(self, fan_in: int, entering: float, bias: float) -> float:
        """Variance of a weight in the end at infinite width, for inputs of second moment `entering`."""
        found = self.drawn
        for _ in range(self.attempts):
            variance = found * fan_in * entering + bias
            if not 0 < variance < math.inf or abs(variance - 1) < self.tolerance:
                break
            found /= variance
        return found


class DenseLayer(NamedTuple):
    """Fan-in, fan-out and the variances of one weight and one bias of a linear layer.

    Where the weights are fitted to data, `weight` is their variance afterwards at infinite width.
    """

    fan_in: int
    fan_out: int
    weight: float
    bias: float = 0.0  # normal
    uniform_bias: float = 0.0
    orthogonal: bool = False
    fitted: Fitted | None = None

    @property
    def is_rescaled(self) -> bool:
        """Whether a fit has given z the variance 1 in each network; within the tolerance it leaves weights as drawn."""
        return self.fitted is not None and self.fitted.drawn != self.weight and not self.bias + self.uniform_bias

    @property
    def forward_remain(self) -> float:
        """Share of the noise quadratic in z that remains; orthogonal weights keep every product of two inputs."""
        return max(0.0, 1 - self.fan_out / self.fan_in) if self.orthogonal else 1.0

    @property
    def backward_remain(self) -> float:
        return max(0.0, 1 - self.fan_in / self.fan_out) if self.orthogonal else 1.0


class BatchVariation(NamedTuple):
    """How inputs and batches of data differ. directions: tr(C)^2 / tr(C^2) of the covariance C of the inputs. wander:
    variance of ln T, covariance of ln T and ln W, variance of ln W over batches."""

    directions: float = math.inf
    wander: tuple[float, float, float] = (0.0, 0.0, 0.0)


class Step(NamedTuple):
    """What the forward pass knows of one layer: G nodes of the state below it, M nodes of a unit's batch mean."""

    layer: DenseLayer
    units: Units
    mean: Array  # of ln T and ln W of the layer's input, (2,)
    cov: Array
    pair: float
    single: float
    nodes: Array  # (G, 2)
    ln_z: Array  # ln T and ln W of the preactivations there, (G, 2)
    uniform: Array  # share of T that a uniform bias makes up, (G,)
    damped: Array  # share of q that is not the biases', (G,)
    means: Array  # of a unit's T, W, mean, (G, 3)
    unit_cov: Array  # of their averages over the layer's units, (G, 3, 3)
    given: Array  # the same given m, (3, G, M)
    ln_x: Array  # ln T and ln W of the activations, (G, 2)
    bent: Array  # what the spread of lengths adds to ln q, (G,)
    noise: Array  # covariance that this layer's units add to the next state, (2, 2)
    next_single: float  # spread of the inputs' squared lengths above
    length_noise: float  # and to the lengths


class Chain(NamedTuple):
    """The forward pass of a stack: its layers, and the state of its last activations."""

    row: Activation
    batch: int
    start: Law
    steps: list[Step]
    mean: Array
    cov: Array
    pair: float
    single: float

    @property
    def weights(self) -> Array:
        """Weights of the nodes, (G,)."""
        return sigma_points(self.mean, self.cov, self.start.single_input)[1]


def forward(
    row: Activation,
    layers: Sequence[DenseLayer],
    batch: int,
    q0: float,
    c0: float,
    fixed_input: bool,
    data: BatchVariation = BatchVariation(),  # noqa: B008 - a tuple
) -> Chain:
    """Carry the law through all layers. The input has second moment q0 and mean cosine c0; `data` as in `Request`."""
    start = gaussian_batch(layers[0].fan_in, batch, q0, c0, exact=fixed_input)
    if fixed_input and batch > 1:
        t, both, w = data.wander
        start = replace(start, pair=np.array([1 / data.directions]), cov=np.array([[[t, both], [both, w]]]))
    mean, cov, pair, single = start.mean[0], start.cov[0], float(start.pair[0]), float(start.single[0])
    steps = []
    for layer in layers:
        step, mean, cov, pair, single = _step(row, layer, batch, (mean, cov, pair, single))
        steps.append(step)
    return Chain(row, batch, start, steps, mean, cov, pair, single)


_State = tuple[Array, Array, float, float]


def _step(row: Activation, layer: DenseLayer, batch: int, state: _State) -> tuple[Step, Array, Array, float, float]:
    mean, cov, pair, single = state
    single_input = bool(mean[1] == -np.inf)
    nodes, weights = sigma_points(mean, cov, single_input)
    ln_z, uniform, damped = preactivations(layer, nodes)
    if single and (damped < 1).any():
        ln_z[:, 1] = np.logaddexp(ln_z[:, 1], _bias_rotation(ln_z, damped, single, batch))
    if layer.is_rescaled:
        ln_z += np.exp(ln_z[:, :1]) / layer.fan_out  # the variance is 1, the second moment that and the mean's square
    u = units(row, ln_z[:, 0], ln_z[:, 1], uniform, COARSE)
    means, unit_cov, given = _unit(u, batch, design_effect(np.array(single), batch), layer, pair)
    unit_cov /= layer.fan_out
    shift, noise = ln_cov(relative_to(means[:, :2], unit_cov[:, :2, :2]))
    (next_pair, next_single), shrink, new = _pair_and_length_spread(
        u, ln_z, means, unit_cov, state, layer, damped, batch
    )
    ln_x = ln_means(means[:, :2], single_input) + u.ln_scale[:, None] + shift + shrink
    next_mean, next_cov, own = combine(ln_x, noise, weights)
    alive = np.maximum(means[:, :2].sum(-1), 1e-300)
    bent = np.log(np.maximum((means[:, :2] * np.exp(shrink)).sum(-1), 1e-300) / alive)
    step = Step(
        layer, u, mean, cov, pair, single, nodes, ln_z, uniform, damped, means, unit_cov, given, ln_x, bent, own,
        next_single, new,
    )  # fmt: skip
    return step, next_mean, next_cov, next_pair, next_single


def preactivations(layer: DenseLayer, nodes: Array) -> tuple[Array, Array, Array]:
    """ln T and ln W of z (G, 2), the share of T that a uniform bias makes up, the share of q that no bias does."""
    if layer.is_rescaled:
        ln_z = nodes - np.logaddexp(nodes[:, :1], nodes[:, 1:])
    else:
        ln_z = nodes + max(NOTHING, ln(layer.weight * layer.fan_in))
    if not layer.bias + layer.uniform_bias:
        return ln_z, np.zeros(len(nodes)), np.ones(len(nodes))
    weighted = np.logaddexp(ln_z[:, 0], ln_z[:, 1])
    ln_z[:, 0] = np.logaddexp(ln_z[:, 0], ln(layer.bias + layer.uniform_bias))
    uniform = np.exp(ln(layer.uniform_bias) - ln_z[:, 0])
    return ln_z, uniform, np.exp(weighted - np.logaddexp(ln_z[:, 0], ln_z[:, 1]))


def _bias_rotation(ln_z: Array, damped: Array, single: float, batch: int) -> Array:
    """ln of the variance within the batch that biases cause, (G,).

    Two inputs of the same direction but different length are no longer parallel after adding b. With e^2 the variance
    of the length and d the share of q due to weights, the extra variance is e^2 d (1 - d) q.
    """
    ln_q = np.logaddexp(ln_z[:, 0], ln_z[:, 1])
    common = np.maximum(np.exp(ln_z[:, 0] - ln_q) - np.exp(ln_z[:, 1] - ln_q) / (batch - 1), 0)
    return np.asarray(np.log(np.maximum(common * length_variance(single) * damped * (1 - damped), 1e-300)) + ln_q)


def design_effect(single: Array, batch: int) -> Array:
    """Factor by which a batch is effectively smaller when squared lengths have relative variance v: B (1+v) / (B+v)."""
    return np.asarray(batch * (1 + single) / (batch + single))


def _unit(u: Units, batch: int, worse: Array, layer: DenseLayer, pair: float) -> tuple[Array, Array, Array]:
    """Mean (G, 3) and covariance (G, 3, 3) of one unit's squared batch mean, batch variance and batch mean.

    Also the part of each given m, (3, G, M). The e_a add up to 0, so what is linear in them drops out of averages.
    `worse` is the design effect of the inputs' lengths.
    """
    t = (u.variance - u.e1**2) / batch
    apart = (pair - (1 - layer.forward_remain) / layer.fan_out) / 2 * u.over_m(u.e2)[:, None] ** 2
    given = np.stack([u.mean**2 + t + apart, u.variance - t - apart, u.mean])
    means = u.over_m(given).T
    off = (given - means.T[..., None]).transpose(1, 0, 2)
    cov = (off * u.weights[:, None]) @ off.mT
    along = (u.third - u.e1_square * u.e1) / batch
    inside = np.stack(
        [
            4 * u.mean**2 * t + 2 * t**2,
            np.maximum(u.fourth - u.variance**2 - u.e1_square**2, 0) * (worse / batch),
            t,
            2 * u.mean * along,
            2 * u.mean * t,
            along,
        ]
    )
    curved = np.stack(
        [2 * u.mean * u.e2, u.e2_square, u.e2]
    )  # slopes by the e_a^2, which pairs' products make go together
    inside += curved[_FIRST] * curved[_SECOND] * (pair / 2)
    cov += u.over_m(inside)[_SYMMETRIC].transpose(2, 0, 1)
    remain, together = layer.forward_remain, float(worse) / batch + pair
    if remain < 1 or layer.is_rescaled:
        of_m, of_e = u.over_m(given * (u.m**2 - 1)), u.over_m(curved)
        if remain < 1:
            cov = remove_quadratic_noise(cov, of_m, of_e * math.sqrt(together), remain)
        if layer.is_rescaled:
            # a fit removes what follows q of z: q varies by the average of t (m^2 - 1) + w (e^2 - 1), and the averages
            # follow it with the slope g
            w = u.inside[:, 0]
            t, g = 1 - w, (of_m + of_e) / 2
            along = t * of_m + w * together * of_e
            noise = _outer(g, along) + _outer(along, g) - (2 * (t * t + w * w * together))[:, None, None] * _outer(g, g)
            cov = clip_covariance(cov - remain * noise)
    return means, cov, given


_SYMMETRIC = np.array([[0, 3, 4], [3, 1, 5], [4, 5, 2]])
_FIRST, _SECOND = np.array([[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]])


def remove_quadratic_noise(cov: Array, of_m: Array, of_e: Array, remain: float) -> Array:
    """The noise (G, S, S) that orthogonal weights leave: they keep all products of inputs, so that averages quadratic
    in z do not vary. `of_m`, `of_e` (S, G): slopes of the S averages by m^2 - 1 and, over the inputs, by e^2 - 1.
    """
    return clip_covariance(cov - (1 - remain) / 2 * (_outer(of_m, of_m) + _outer(of_e, of_e)))


def _outer(x: Array, y: Array) -> Array:
    """(S, G) -> (G, S, S)."""
    found: Array = np.einsum("ig,jg->gij", x, y)
    return found


def finite_or_zero(x: Array | float) -> float:
    """x, or 0 where it is not finite: a ratio to a signal that is gone."""
    return float(x) if math.isfinite(x) else 0.0


def clip_covariance(cov: Array) -> Array:
    """Covariance matrices with no variance below 0 and no correlation beyond 1."""
    root = np.sqrt(np.maximum(np.einsum("gii->gi", cov), 0))
    bound = root[:, :, None] * root[:, None]
    return np.clip(cov, -bound, bound)


def _pair_and_length_spread(
    u: Units, ln_z: Array, means: Array, cov: Array, state: _State, layer: DenseLayer, damped: Array, batch: int
) -> tuple[tuple[float, float], Array, float]:
    """Relative variance of pairs' products and of single inputs' squared lengths in the next state.

    Also what the spread of lengths adds to ln T and ln W at each node, (G, 2), and the layer's own part of it.
    """
    mean, _, pair, single = state
    if mean[1] == -np.inf:
        return (0.0, 0.0), np.zeros((len(means), 2)), 0.0
    width, gone = layer.fan_out, 1 - layer.forward_remain
    t, w = means[:, 0], means[:, 1]
    inside = u.inside[:, 0]
    square = u.variance + u.mean**2
    fourth = u.fourth + 4 * u.third * u.mean + (6 * u.variance + u.mean**2) * u.mean**2
    fourths = u.over_m(fourth - square**2)
    slopes, variances = (np.stack([u.slope[0], u.variance[0]]) ** 2 @ u.weights[0]).tolist()
    slope = slopes * np.exp(np.logaddexp(*ln_z[0]) - u.ln_scale[0]) * inside[0]
    noise = max(0.0, variances - gone * slope**2) + slope**2 * pair * layer.forward_remain
    next_pair = (slope**2 * pair + noise / width) / (w[0] ** 2 + cov[0, 1, 1])
    own = np.maximum(fourths - gone / 2 * u.h2_phi2**2 * (1 - (1 - inside) ** 2), 0)
    new = own / (width * (t + w) ** 2)
    before = single * damped**2
    next_single = (1 + (u.h2_phi2[0] / 2) ** 2 * before[0]) * (1 + new[0]) - 1
    common = np.maximum(t - w / (batch - 1), 0) * length_variance(new)
    bent = np.log1p(np.maximum(u.h4_phi2 * (before - gone * 2 / width) / 8, -0.5))  # an isometry's z has one length
    shrink = np.stack([bent + np.log1p(common / t), bent + np.log1p(-np.minimum(common / w, 0.5))], -1)
    return (finite_or_zero(next_pair), finite_or_zero(next_single)), np.nan_to_num(shrink), float(np.log1p(new[0]))
