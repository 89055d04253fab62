"""Finite width for any activation, backward: the law of a gradient on its way down, and a stack's laws altogether.

A layer multiplies the gradient by phi'(z) and by the weights' transpose, taken as independent of the forward pass
(exact at infinite width). The state is again ln T and ln W; it depends on the forward states that it has come through,
which are correlated from layer to layer, so it is carried as
    (ln T, ln W) = P (y - E y) + rest,    y the forward state of the same layer, the rest independent of it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from initlab.signal.activations import Activation
from initlab.signal.closure import Layer, Step, forward, kept, possible, share_of_units, uneven
from initlab.signal.laws import (
    CERTAIN,
    NOTHING,
    Array,
    Law,
    gaussian_batch,
    ln,
    ln_cov,
    ln_means,
    regression,
    relative_to,
    symmetric,
    total,
)
from initlab.signal.unit_laws import COARSE, FINE, closed

MANY = 2**60  # inputs of a batch without end, whose T is what pairs have in common


class Stack(NamedTuple):
    """Laws by layer; of the activations the first is the input's, else index 0 is layer 1."""

    activations: list[Law]
    preactivations: list[Law]
    activation_gradients: list[Law]
    preactivation_gradients: list[Law]


class _Back(NamedTuple):
    """State of a gradient: centre, and its dependence on the forward state."""

    mean: Array
    pair: float
    by_state: Array  # P
    rest: Array
    single: tuple[float, float] = (0.0, 0.0)  # one input's ln|g|^2 about the average: by its ln|x|^2, and the rest


def laws(
    row: Activation,
    layers: Sequence[Layer],
    batch: int,
    q0: float = 1.0,
    c0: float = 0.0,
    fixed_input: bool = False,
    infinite: bool = False,
) -> Stack:
    """Laws of all tensors; the gradient at the top is unit Gaussian and independent for every input.

    `fixed_input`: the input is one batch of second moment q0 and mean cosine c0, else drawn anew for each network.
    `infinite`: the limit in which all widths grow together.
    """
    with np.errstate(all="ignore"):  # where a signal is gone, ratios to it are nan or inf: data
        found = _through(row, layers, MANY if infinite else batch, batch, q0, c0, fixed_input, infinite)
    return Stack(*([law.of_batch(batch) for law in part] for part in found)) if infinite else found


def _through(
    row: Activation,
    layers: Sequence[Layer],
    inputs: int,
    batch: int,
    q0: float,
    c0: float,
    fixed_input: bool,
    infinite: bool,
) -> Stack:
    """Up and down again with so many `inputs`; `batch` of them say whether a unit is dead."""
    first = math.inf if infinite else layers[0].fan_in
    state = gaussian_batch(first, inputs, q0, c0, exact=fixed_input)
    activations, preactivations, steps = [symmetric(state, first)], [], []
    for layer in layers:
        width = math.inf if infinite else layer.fan_out
        z, x, step = forward(row, layer, activations[-1], inputs, FINE if infinite else COARSE, width, batch)
        preactivations.append(z)
        activations.append(x)
        steps.append(step)
    above, below = _down(row, steps, inputs)
    return Stack(activations, preactivations, above, below)


def _down(row: Activation, steps: list[Step], batch: int) -> tuple[list[Law], list[Law]]:
    top = gaussian_batch(math.inf, batch)
    back, remain = _Back(top.mean, 0.0, np.zeros((2, 2)), np.zeros((2, 2))), 1.0
    above, below = [], []
    for step in reversed(steps):
        cov = back.by_state @ np.nan_to_num(_next_cov(step)) @ back.by_state.T + back.rest
        above.append(
            _seen(Law(back.mean, CERTAIN if step.state.certain else cov, pair=back.pair), batch, step.width, remain)
        )
        law, back = _backward(row, step, back, remain)
        below.append(law)
        remain = kept(step.layer.fan_out, step.layer.fan_in, step.layer.orthogonal)
    return above[::-1], below[::-1]


def _next_cov(step: Step) -> Array:
    """Covariance of the forward state above a layer, by its dependence on the one below."""
    return step.jacobian @ step.state.cov @ step.jacobian.T + step.noise


def _seen(law: Law, batch: int, n: float, remain: float) -> Law:
    """The gradient at an activation, as n Gaussian units show it."""
    wobble = 0.0 if law.alone else 2 * (1 / (batch - 1) + law.pair) / n
    shift, noise = ln_cov(remain * np.diag([2 / n, wobble])[None])
    found = Law(
        law.mean + shift[0],
        law.cov + noise[0],
        shares={"frac_zero": (0.0, 0.0)},
        pair=law.pair + remain * (1 + law.pair) / n,
    )
    return symmetric(found, n)


def _parts(step: Step, t: float, w: float) -> tuple[Array, Array]:
    """One unit's T and W given m, (2, G, M): parts without and with the squared mean of the gradient."""
    u, batch = step.units, step.batch
    k1, k2 = u.slope**2, u.slope2
    a, b = w * (k2 - k1) / batch, t * (k2 - k1 - u.slope_along**2) / batch
    return np.stack([a, k2 * w - a]), np.stack([k1 * t + b, (k2 - k1) * t - b])


def _unit(step: Step, back: _Back, t: float, w: float, remain: float) -> tuple[Array, Array, Array, Array]:
    """Means (G, 2) and covariance of one unit's T and W of dL/dz; the parts given m."""
    u, batch = step.units, step.batch
    lengths = math.expm1(min(50.0, back.single[0] ** 2 * math.log1p(step.next_single) + back.single[1]))
    worse = uneven(lengths, batch)
    free, squared = _parts(step, t, w)
    both = free + squared
    means = u.over_m(both).T
    if math.isinf(step.width):
        return means, np.zeros((len(means), 2, 2)), both, free
    cov = np.einsum("igm,jgm->gij", both * u.weights, both) - means[:, :, None] * means[:, None]
    cov += 2 * np.einsum("igm,jgm->gij", squared * u.weights, squared)
    k1, k2 = u.slope**2, u.slope2
    a, b = w * (k2 - k1), t * (k2 - k1 - u.slope_along**2)
    cov[:, 0, 0] += u.over_m(4 * k1 * t * (a + 3 * b) / batch + 2 * (a * a + 2 * a * b + 3 * b * b) / batch**2)
    if w > 0:
        fourth = 3 * u.slope4 - k2**2 * (w * w + 6 * w * t + 3 * t * t)
        cov[:, 1, 1] += np.maximum(u.over_m(fourth), 0) * worse / batch + 2 * back.pair * w * w * u.over_m(k2**2)
    if remain < 1:
        linear = u.over_m(squared)
        cov -= (1 - remain) * 2 * np.einsum("ig,jg->gij", linear, linear)
        cov[:, 1, 1] -= (1 - remain) * 2 * u.over_m(k2) ** 2 * w * w * (1 / batch + back.pair)
        cov = possible(cov)
    return means, cov / step.width, both, free


def _backward(row: Activation, step: Step, back: _Back, remain: float) -> tuple[Law, _Back]:
    """Law of dL/dz and the state of the gradient at the activation below."""
    u, width = step.units, step.width
    ln_q = np.logaddexp(*back.mean)
    t, w = np.exp(back.mean - ln_q).tolist()
    means, cov, both, _ = _unit(step, back, t, w, remain)
    shift, noise = ln_cov(relative_to(means, cov))
    values = ln_means(means, step.state.alone) + ln_q + shift
    mean, _, own = total(values, noise, step.weights)
    by_state, rest = _carried(step, back, values, means, own, both, t, w)
    single = _single(step, back, t, w, remain)
    cov_all = by_state @ np.nan_to_num(step.state.cov) @ by_state.T + rest
    share = share_of_units(closed(row), u, step.weights, width, step.batch, step.state.single)
    pair = _pair(step, back, means, cov, t, w, remain)
    law = Law(mean, CERTAIN if step.state.certain else cov_all, shares={"frac_zero": share}, pair=pair)
    return symmetric(law, width), _Back(
        mean + max(NOTHING, ln(step.layer.weight * step.layer.fan_out)), pair, by_state, rest, single
    )


def _pair(step: Step, back: _Back, means: Array, cov: Array, t: float, w: float, remain: float) -> float:
    """By how much the product of two inputs' gradients differs from that of the average two, over W^2."""
    if w == 0 or math.isinf(step.width):
        return 0.0
    u = step.units
    k1, k2 = u.slope**2, u.slope2
    scatter = u.over_m(k2**2)[0] * (1 + 2 * t * t + 2 * back.pair * w * w) + 3 * t * t * u.over_m(k1**2)[0]
    scatter -= (
        back.pair * (u.over_m(k1)[0] * w) ** 2
        + 2 * u.over_m(k2 * k1)[0] * (t + 2 * t * t)
        + (1 - remain) * (u.over_m(k1)[0] * w) ** 2
    )
    size = means[0, 1] ** 2 + cov[0, 1, 1]
    pair = float(((u.over_m(k1)[0] * w) ** 2 * back.pair + max(0.0, scatter) / step.width) / size)
    return pair if math.isfinite(pair) else 0.0


def _single(step: Step, back: _Back, t: float, w: float, remain: float) -> tuple[float, float]:
    """The same recursion for one input's own part: elasticity by its ln|x|^2 below, and variance of the rest."""
    if w == 0 or math.isinf(step.width):
        return 0.0, 0.0
    u = step.units
    k2 = u.over_m(u.slope2)[0]
    pairs = u.over_m(u.slope2**2)[0] * (1 + 2 * t * t + 2 * back.pair * w * w)
    quadratic = (1 - remain) * 2 * k2**2 * (1 - t * t)
    own = max(0.0, 3 * u.over_m(u.slope4)[0] - pairs - quadratic) / (k2**2 * step.width)
    square = u.variance[0] + u.mean[0] ** 2
    cross = (u.slope_square[0] - (square * u.slope2[0] * u.weights[0]).sum()) / (k2 * step.width)
    elasticity, rest = back.single
    rest += math.log1p(own) + elasticity**2 * step.length_noise + 2 * elasticity * cross
    found = float(elasticity * u.tilt[0] / 2 + u.slope_tilt[0] / (2 * k2)), float(max(0.0, rest))
    return found if all(map(math.isfinite, found)) else (0.0, 0.0)


def _carried(
    step: Step, back: _Back, values: Array, means: Array, own: Array, both: Array, t: float, w: float
) -> tuple[Array, Array]:
    """How the new state depends on the forward state below, and the covariance of the rest."""
    if math.isinf(step.width):
        return np.zeros((2, 2)), np.zeros((2, 2))
    u = step.units
    direct = regression(values, step.nodes, step.weights, step.state.alone)
    by_t, by_w = (u.over_m(np.add(*_parts(step, *share)))[:, 0] for share in ((t, 0.0), (0.0, w)))
    size = np.where(means[0] > 0, means[0], 1)
    by_back = np.stack([by_t, by_w], -1) / size[:, None]
    above = by_back @ back.by_state
    forward_size = np.where(step.means[0, :2] > 0, step.means[0, :2], 1)
    off_forward = step.given[:2, 0] / forward_size[:, None] - (step.means[0, :2] > 0)[:, None]
    off_back = both[:, 0] / size[:, None] - (means[0] > 0)[:, None]
    cross = (off_forward * u.weights[0]) @ off_back.T / step.width
    rest = above @ step.noise @ above.T + own + above @ cross + (above @ cross).T + by_back @ back.rest @ by_back.T
    return above @ step.jacobian + direct, rest
