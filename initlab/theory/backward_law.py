"""The law of a gradient on its way down a stack of finite width, and all laws of a stack.

A layer multiplies the gradient by phi'(z) and by the transposed weights, taken as independent of the forward pass
(exact at infinite width). The state is ln T and ln W of the gradient, as in `forward_law`. It depends on the forward
states of the layers above, which are correlated from layer to layer, so it is carried as
    (ln T, ln W) = P (y - E y) + rest,    y the forward state of the same layer, the rest independent of it.
T and W of a unit are linear in those of the gradient, so that moments of phi' are averaged for all layers first.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from initlab.nn.activations import Activation
from initlab.theory import tensor_law
from initlab.theory.batch_law import (
    NOTHING,
    Array,
    Law,
    combine,
    gaussian_batch,
    ln,
    ln_cov,
    ln_means,
    pool_symmetric_units,
    relative_to,
    slopes,
)
from initlab.theory.forward_law import (
    BatchVariation,
    DenseLayer,
    Step,
    clip_covariance,
    design_effect,
    finite_or_zero,
    forward,
    remove_quadratic_noise,
)
from initlab.theory.tensor_law import Layers, StackLaws
from initlab.theory.unit_moments import zero_slope_intervals


class _Gradient(NamedTuple):
    """State of a gradient: mean of ln T and ln W, and how they depend on the forward state of the same layer."""

    mean: Array
    pair: float
    by_state: Array  # P
    rest: Array
    by_length: float = 0.0  # slope of ln|g|^2 of one input by its ln|x|^2
    own_length: float = 0.0  # variance of ln|g|^2 given ln|x|^2
    alignment: float = 1.0  # width cos^2 angle(g, x); 1 when g is independent of x


class _SlopeMoments(NamedTuple):
    """Moments of phi' over the units of a layer, averaged over m; all layers together have L in front.

    For a gradient with T = t and W = w, those of a unit given m are w X_0 + t X_2 and w X_1 + t X_3. k stands for
    E[phi']^2 given m, k2 for E[phi'^2] given m.
    """

    x: Array  # mean of X, (G, 4)
    xx: Array  # E X X^T, (G, 4, 4)
    t_inside: Array  # coefficients of w^2, w t, t^2 in the variance of T inside a unit, (G, 3)
    fourth: Array  # E phi'^4, (G,)
    k2: Array  # E k2, (G,)
    k2k2: Array  # E k2^2, (G,)
    kk: Array  # E k^2, (G,)
    k2k: Array  # E k2 k, (G,)
    k: Array  # E k, (G,)
    e2_products: Array  # slopes of X_2 and X_3 + X_2 by He2(e): mean of their products given m, (G, 2, 2)
    e2_means: Array  # and their own means, (G, 2)
    by_m: Array  # slopes of X by m^2 - 1, (G, 4)
    forward_x: Array  # E of the forward T and W given m times X, at the centre, (2, 4)
    with_length: Array  # covariance of phi^2 and phi'^2 in a unit, less what isometric weights keep, at the centre, ()
    width: Array
    forward: Array  # E of the forward T and W, at the centre, (2,)
    jacobian: Array  # slopes of the next forward state by this one, (2, 2)
    regressors: Array  # weights that give the slope of anything at the nodes by the state, (G, 2)


def laws(
    row: Activation,
    layers: Sequence[DenseLayer],
    batch: int,
    q0: float = 1.0,
    c0: float = 0.0,
    fixed_input: bool = False,
    data: BatchVariation = BatchVariation(),  # noqa: B008 - a tuple
) -> StackLaws:
    """Laws of all tensors of a stack. The gradient at the top is unit Gaussian and independent for every input.

    `fixed_input`: the input is a batch of second moment q0 and mean cosine c0 that varies as `data` says; else it is
    Gaussian and drawn anew for each network.
    """
    with np.errstate(all="ignore"):  # where a signal is gone, ratios to it are nan or inf: data
        passed = Layers(forward(row, layers, batch, q0, c0, fixed_input, data))
        start = pool_symmetric_units(passed.chain.start, layers[0].fan_in)
        above, below = _descend(passed)
        return StackLaws(start, tensor_law.activations(passed), tensor_law.preactivations(passed), above, below)


def _slopes(layers: Layers) -> _SlopeMoments:
    u, batch = layers.units, layers.batch
    k, k2, along = u.row("slope") ** 2, u.row("slope2"), u.row("e1_slope") ** 2
    wide, own = k2 - k, k2 - k - along
    x = np.stack([wide / batch, k2 - wide / batch, k + own / batch, wide - own / batch])
    first, second = np.triu_indices(4)
    products = u.over_m(x[first] * x[second])
    xx = np.empty((4, 4, *products.shape[1:]))
    xx[first, second] = xx[second, first] = products
    k_wide, k_own, wide2, both, own2, kk, k2k, k2k2, e_k, e_k2, fourth = u.over_m(
        np.stack([k * wide, k * own, wide**2, wide * own, own**2, k * k, k2 * k, k2 * k2, k, k2, u.row("slope4")])
    )
    inside = [2 * wide2 / batch**2, 4 * k_wide / batch + 4 * both / batch**2, 12 * k_own / batch + 6 * own2 / batch**2]
    given = np.concatenate([step.given[:2].reshape(2, -1) for step in layers.chain.steps], -1)
    square = u.row("variance") + u.row("mean") ** 2
    with_length = _centre(layers, "phi2_slope2") - u.over_m(square * k2)[:, 0]
    apart = 1 - np.array([1 - step.units.inside[0, 0] for step in layers.chain.steps]) ** 2
    with_length -= (1 - layers.forward_remain) / 2 * _centre(layers, "h2_phi2") * _centre(layers, "h2_slope2") * apart
    forward_x = np.moveaxis(u.over_m(given[:, None] * x)[..., 0], -1, 0)
    e2 = np.stack([2 * u.row("slope") * u.row("e2_slope"), u.row("e2_slope2")])
    return _SlopeMoments(
        np.moveaxis(u.over_m(x), 0, -1),
        np.moveaxis(xx, (0, 1), (-2, -1)),
        np.stack(inside, -1),
        fourth,
        e_k2,
        k2k2,
        kk,
        k2k,
        e_k,
        np.moveaxis(u.over_m(e2[:, None] * e2), (0, 1), (-2, -1)),
        np.moveaxis(u.over_m(e2), 0, -1),
        np.moveaxis(u.over_m(x * (u.m**2 - 1)), 0, -1),
        forward_x,
        with_length / layers.width,
        layers.width,
        layers.stack("means")[:, 0, :2],
        layers.jacobian,
        layers.regressors,
    )


def _centre(layers: Layers, name: str) -> Array:
    """A moment of `Units` at the first node of each layer, (L,)."""
    return np.array([getattr(step.units, name)[0] for step in layers.chain.steps])


def _descend(layers: Layers) -> tuple[Law, Law]:
    """Laws of the gradients at activations, the input's first, and at preactivations."""
    batch, steps = layers.batch, layers.chain.steps
    by_layer = _slopes(layers)
    back, remain = _Gradient(gaussian_batch(math.inf, batch).mean[0], 0.0, np.zeros((2, 2)), np.zeros((2, 2))), 1.0
    above, below, remains = [], [], []
    for k in range(len(steps) - 1, -1, -1):
        above.append(back)
        remains.append(remain)
        law, back = _backward(layers, k, _SlopeMoments(*(part[k] for part in by_layer)), back, remain)
        below.append(law)
        remain = steps[k].layer.backward_remain
    above = [*above, back][::-1]
    noise, cov = layers.stack("noise"), layers.stack("cov")
    cov = np.concatenate([cov[:1], by_layer.jacobian @ cov @ by_layer.jacobian.mT + noise])
    by = np.array([b.by_state for b in above])
    at_activation = Law(
        np.array([b.mean for b in above]),
        by @ cov @ by.mT + np.array([b.rest for b in above]),
        np.array([b.pair for b in above]),
        np.zeros(len(above)),
    )
    mean, both, pair = (np.array(part[::-1]) for part in zip(*below, strict=True))
    shares = {"frac_zero": layers.share(zero_slope_intervals(layers.chain.row), layers.stack("single"))}
    width = np.append(steps[0].layer.fan_in, layers.width)
    gradients = tensor_law.observe_gaussian(at_activation, batch, width, np.array([*remains, remain][::-1]))
    sd = gradients.ln_var[:, 1]  # a layer multiplies the gradient by a factor that is new to it
    rho = np.append(np.minimum(1.0, np.nan_to_num(sd[1:] / sd[:-1])), 0.0)
    return (
        replace(gradients, rho=rho),
        pool_symmetric_units(Law(mean, both, pair, np.zeros(len(steps)), shares=shares), layers.width),
    )


def _backward(
    layers: Layers, k: int, s: _SlopeMoments, back: _Gradient, remain: float
) -> tuple[tuple[Array, Array, float], _Gradient]:
    """ln T and ln W of dL/dz with their covariance and pair, and the state of the gradient at the activation below."""
    step = layers.chain.steps[k]
    ln_q = np.logaddexp(*back.mean)
    t, w = np.exp(back.mean - ln_q).tolist()
    coefficients = np.array([[w, 0, t, 0], [0, w, 0, t]])
    means = s.x @ coefficients.T
    cov = _unit_cov(layers.batch, step, s, back, coefficients, means, remain)
    shift, noise = ln_cov(relative_to(means, cov))
    long, aligned = _length_effects(step, s, back)
    values = ln_means(means, layers.single_input) + ln_q + shift + long + aligned
    mean, _, own = combine(values, noise, layers.weights)
    kept = _conserved_alignment(layers, k, s, back)
    by_state, rest = _propagate(step.noise, s, back, values, means[0], own, coefficients, layers.weights, kept)
    both = by_state @ step.cov @ by_state.T + rest
    pair = _pair(s, back, means[0], cov[0, 1, 1], t, w, remain)
    lengths = _lengths(step, s, back, t, w, remain)
    below = mean + max(NOTHING, ln(step.layer.weight * step.layer.fan_out))
    if step.layer.is_rescaled:
        scale, by, noise_of_fit = _rescaled_gradient(step, s.regressors, layers)
        below, by_state, rest = mean + scale, by_state + by, rest + noise_of_fit
    along = _next_alignment(step, s, back)
    through = step.layer.backward_remain * (along - 1) / step.layer.fan_in  # the weights depend on x given z
    return (mean, both, pair), _Gradient(below + math.log1p(through), pair, by_state, rest, *lengths, along)


_NONE = np.zeros((2, 2)), np.zeros((2, 2))


def _conserved_alignment(layers: Layers, k: int, s: _SlopeMoments, back: _Gradient) -> tuple[Array, Array]:
    """Slopes of ln q of dL/dz by the gradient above and by the forward state there, from a conserved product.

    For a homogeneous phi the product x . g of an input is the same in all layers, the fit's factor included. So a share
    r of |g|^2 lies along x, 1/n at the top, where phi' multiplies by a factor 1 + eta more; r falls as |x|^2 |g|^2
    rises, which brings |g|^2 back.
    """
    chain = layers.chain
    if not (chain.row.homogeneous and k + 1 < len(chain.steps) and chain.steps[k + 1].layer.is_rescaled):
        return _NONE
    x = chain.steps[k + 1]
    by_g, by_x = (np.exp(state - np.logaddexp(*state)) for state in (back.mean, x.mean))
    risen = float(np.logaddexp(*back.mean) + np.logaddexp(*x.mean) - np.logaddexp(*chain.mean))
    together = by_g @ back.by_state + by_x
    spread = float(together @ x.cov @ together + by_g @ back.rest @ by_g)
    eta = float(chain.steps[k].units.phi2_slope2[0] / s.k2[0]) - 1
    returns = -eta * back.alignment / layers.width[-1] * math.exp(min(0.0, spread / 2 - risen))
    return np.stack([returns * by_g] * 2), np.stack([returns * by_x] * 2)


def _rescaled_gradient(step: Step, by: Array, layers: Layers) -> tuple[float, Array, float]:
    """Mean, slopes by the forward state (2, 2) and own variance of the factor that a fit (LSUV) puts on a gradient's q.

    Fitted weights divide the gradient by the same factor as the forward pass.
    """
    layer, ln_z = step.layer, step.ln_z
    values = np.logaddexp(*ln_z.T) - np.logaddexp(*step.nodes.T)
    t, w = np.exp(ln_z[0] - np.logaddexp(*ln_z[0]))
    own = layer.forward_remain * 2 * (t * t + w * w * (1 / layers.batch + step.pair)) / layer.fan_out
    mean = float(layers.weights @ values) + ln(layer.fan_out / layer.fan_in)
    return mean, slopes(np.stack([values, values], -1), by, layers.weights), float(own)


def _length_effects(step: Step, s: _SlopeMoments, back: _Gradient) -> tuple[float, float]:
    """What the spread of the inputs' lengths, and a gradient's alignment with its input, add to ln q.

    phi'^2 is not linear in q, and the gradient of a long input meets long inputs in every layer. Along x the mean of
    phi'^2 is not the average one, which counts where the alignment is not 1.
    """
    layer, u, k2 = step.layer, step.units, s.k2[0]
    spread = step.single * step.damped[0] ** 2
    bent = u.h4_slope2[0] * (spread - (1 - layer.forward_remain) * 2 / layer.fan_out) / (8 * k2)
    together = back.by_length * (u.h2_phi2[0] / 2 * u.h2_slope2[0] / (2 * k2) * spread + s.with_length / k2)
    eta = u.phi2_slope2[0] / k2 - 1
    aligned = finite_or_zero(np.log1p(eta * (back.alignment - 1) / layer.fan_out))
    return finite_or_zero(np.log1p(max(bent + together, -0.5))), aligned


def _next_alignment(step: Step, s: _SlopeMoments, back: _Gradient) -> float:
    """`_Gradient.alignment` one layer down: g . x below is d . z = g . phi'(z) z; its part along phi(z) stays."""
    u = step.units
    kept = u.u_phi_slope[0] ** 2
    return finite_or_zero((kept * back.alignment + u.u2_slope2[0] - kept) / s.k2[0])


def _unit_cov(
    batch: int, step: Step, s: _SlopeMoments, back: _Gradient, coefficients: Array, means: Array, remain: float
) -> Array:
    """Covariance (G, 2, 2) of T and W of dL/dz over a layer's units."""
    t, w = coefficients[0, 2], coefficients[0, 0]
    ln_length = back.by_length**2 * math.log1p(step.next_single) + back.own_length  # variance of ln |g|^2
    worse = design_effect(np.array(math.expm1(min(50.0, ln_length))), batch)
    squared = coefficients * [0, 0, 1, 1]  # the part of the squared mean of the gradient over the batch
    both = coefficients @ s.xx @ coefficients.T + 2 * squared @ s.xx @ squared.T
    cov = both - means[:, :, None] * means[:, None]
    cov[:, 0, 0] += s.t_inside @ [w * w, w * t, t * t]
    if w > 0:
        fourth = 3 * s.fourth - s.k2k2 * (w * w + 6 * w * t + 3 * t * t)
        cov[:, 1, 1] += np.maximum(fourth, 0) * worse / batch + 2 * back.pair * w * w * s.k2k2
    inputs = np.array([[t, 0], [-t, 1]])  # T and W by `e2_products`
    cov += step.pair / 2 * inputs @ s.e2_products @ inputs.T
    if step.layer.forward_remain < 1:
        bent = inputs @ s.e2_means.T * math.sqrt(design_effect(np.array(step.single), batch) / batch + step.pair)
        cov = remove_quadratic_noise(cov, coefficients @ s.by_m.T, bent, step.layer.forward_remain)
    if remain < 1:
        linear = s.x @ squared.T
        cov -= (1 - remain) * 2 * linear[:, :, None] * linear[:, None]
        cov[:, 1, 1] -= (1 - remain) * 2 * s.k2**2 * w * w * (worse / batch + back.pair)
        cov = clip_covariance(cov)
    found: Array = cov / s.width
    return found


def _pair(s: _SlopeMoments, back: _Gradient, means: Array, var: float, t: float, w: float, remain: float) -> float:
    """Variance of the product of two inputs' gradients over pairs, relative to W^2."""
    if w == 0:
        return 0.0
    kept = (s.k[0] * w) ** 2
    scatter = s.k2k2[0] * (1 + 2 * t * t + 2 * back.pair * w * w) + 3 * t * t * s.kk[0]
    scatter -= back.pair * kept + 2 * s.k2k[0] * (t + 2 * t * t) + (1 - remain) * kept
    return finite_or_zero((kept * back.pair + max(0.0, scatter) / s.width) / (means[1] ** 2 + var))


def _lengths(step: Step, s: _SlopeMoments, back: _Gradient, t: float, w: float, remain: float) -> tuple[float, float]:
    """`by_length` and `own_length` of the gradient one layer down."""
    if w == 0:
        return 0.0, 0.0
    u, k2 = step.units, s.k2[0]
    pairs = s.k2k2[0] * (1 + 2 * t * t + 2 * back.pair * w * w)
    quadratic = (1 - remain) * 2 * k2**2 * (1 - t * t)
    own = max(0.0, 3 * s.fourth[0] - pairs - quadratic) / (k2**2 * s.width)
    slope = back.by_length
    rest = back.own_length + math.log1p(own) + slope**2 * step.length_noise + 2 * slope * s.with_length / k2
    found = float(slope * u.h2_phi2[0] / 2 + u.h2_slope2[0] / (2 * k2)), float(max(0.0, rest))
    return found if all(map(math.isfinite, found)) else (0.0, 0.0)


def _propagate(
    noise: Array,
    s: _SlopeMoments,
    back: _Gradient,
    values: Array,
    means: Array,
    own: Array,
    coefficients: Array,
    weights: Array,
    kept: tuple[Array, Array],
) -> tuple[Array, Array]:
    """Slopes of the new state by the forward state below it, and the covariance of the rest."""
    size = np.where(means > 0, means, 1)
    by_t, by_w = coefficients * [0, 0, 1, 1] @ s.x[0], coefficients * [1, 1, 0, 0] @ s.x[0]
    by_back = np.stack([by_t, by_w], -1) / size[:, None] + kept[0]
    above = by_back @ back.by_state + kept[1]
    ahead = np.where(s.forward > 0, s.forward, 1)
    alive = (s.forward > 0)[:, None] & (means > 0)
    cross = above @ np.where(alive, s.forward_x @ coefficients.T / (ahead[:, None] * size) - 1, 0) / s.width
    rest = above @ noise @ above.T + own + cross + cross.T + by_back @ back.rest @ by_back.T
    return above @ s.jacobian + slopes(values, s.regressors, weights), rest
