"""Finite width for any activation, forward: the law of a batch, layer after layer, as a lognormal one.

Given a layer's input its preactivations are Gaussian, units are independent, and an average over n of them fluctuates
by the moments of one unit over n (`units`). So ln T and ln W of a batch are a Markov chain; their means and covariances
are carried layer by layer, taken over the whole law of the state and not by slopes at its centre alone: a delta method
in log space. Two more numbers are carried to leading order: by how much single pairs of inputs, and single inputs,
differ from the average. Good while L / n is below about 1; beyond, simulate. The way back: `gradients`.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from initlab.signal.activations import Activation
from initlab.signal.laws import (
    NOTHING,
    Array,
    Law,
    Moments,
    lengths,
    ln,
    ln_cov,
    ln_means,
    ln_noise,
    regression,
    relative_to,
    spread,
    symmetric,
    total,
)
from initlab.signal.unit_laws import Grid, Units, saturated, units, zeros


class Layer(NamedTuple):
    """A linear layer of I inputs and O units as its law needs it. Variances of one weight and of one bias."""

    fan_in: int
    fan_out: int
    weight: float
    bias: float = 0.0  # normal
    uniform_bias: float = 0.0
    orthogonal: bool = False


class Step(NamedTuple):
    """A layer passed forward, kept for the way back."""

    layer: Layer
    batch: int
    width: float
    units: Units
    nodes: Array
    weights: Array  # of the nodes
    state: Law
    means: Array  # of a unit's T, W, mean at each node, (G, 3)
    given: Array  # the same given m, (3, G, M)
    jacobian: Array  # of the next state by this one
    noise: Array  # that this layer's units add to it
    next_single: float  # spread of the inputs' squared lengths above
    length_noise: float  # what of it this layer's units have added


def kept(fan_in: float, fan_out: float, orthogonal: bool) -> float:
    """Share of the noise quadratic in z that these weights leave; an isometry keeps every product of two inputs."""
    return max(0.0, 1 - fan_out / fan_in) if orthogonal else 1.0


def forward(
    row: Activation, layer: Layer, state: Law, batch: int, grid: Grid, width: float, seen: int
) -> tuple[Law, Law, Step]:
    """Laws of preactivation and activation, and what the way back needs.

    `width` units average, or infinitely many; `seen` inputs say whether a unit is dead.
    """
    nodes, weights = state.nodes()
    grow = max(NOTHING, ln(layer.weight * layer.fan_in))
    ln_t = np.logaddexp(nodes[:, 0] + grow, ln(layer.bias + layer.uniform_bias))
    ln_w = nodes[:, 1] + grow
    ln_q = np.logaddexp(ln_t, ln_w)
    share = np.exp(ln(layer.uniform_bias) - ln_t)
    damped = np.exp(np.logaddexp(nodes[:, 0], nodes[:, 1]) + grow - ln_q)  # share of q that is not the biases'
    u = units(row, ln_t, ln_w, share, grid)
    remain = kept(layer.fan_in, layer.fan_out, layer.orthogonal)
    means, cov, given = _unit(u, batch, uneven(state.single, batch), math.isinf(width))
    if not state.alone:
        cov[:, 1, 1] += state.pair / 2 * u.over_m(u.curve**2)
    cov = _without_second_chaos(cov, u, given, remain, batch, state.pair) / width
    shift, noise = ln_cov(relative_to(means[:, :2], cov[:, :2, :2]))
    apart, shrink, new = _apart(u, ln_q, means, cov, state, remain, damped, width, batch)
    ln_m = ln_means(means[:, :2], state.alone) + u.ln_scale[:, None] + shift + shrink
    mean, both, own = total(ln_m, noise, weights)
    law = Law(mean, both * np.nan if state.certain else both)
    alive = np.maximum(means[:, :2].sum(-1), 1e-300)
    bent = np.log(np.maximum((means[:, :2] * np.exp(shrink)).sum(-1), 1e-300) / alive)
    x = _activation(row, law, means, cov, u, weights, (batch, seen), width, bent)
    x = replace(x, pair=apart[0], single=apart[1])
    z = _preactivation(row, np.stack([ln_t, ln_w], -1), weights, share, state, damped, remain, u, batch, width)
    jacobian = regression(ln_m, nodes, weights, state.alone)
    return z, x, Step(layer, batch, width, u, nodes, weights, state, means, given, jacobian, own, x.single, new)


def uneven(single: float, batch: int) -> float:
    """So many times fewer inputs are as good, if lengths squared have this relative variance: B sum K^2 / (sum K)^2."""
    return batch * (1 + single) / (batch + single)


def _unit(u: Units, batch: int, worse: float, means_only: bool) -> tuple[Array, Array, Array]:
    """Mean (G, 3) and covariance (G, 3, 3) of one unit's squared batch mean, batch variance and batch mean.

    Also the part of each given m, (3, G, M). The e_a add up to 0, so what is linear in them drops out of averages.
    `worse`: so many times fewer inputs of one length would average as well.
    """
    t = (u.variance - u.along**2) / batch
    given = np.stack([u.mean**2 + t, u.variance - t, u.mean])
    means = u.over_m(given).T
    if means_only:
        return means, np.zeros((len(means), 3, 3)), given
    off = given - means.T[..., None]
    cov = np.einsum("igm,jgm->gij", off * u.weights, off)
    along = (u.third - u.along_square * u.along) / batch
    inside = {
        (0, 0): 4 * u.mean**2 * t + 2 * t**2,
        (1, 1): np.maximum(u.fourth - u.variance**2 - u.along_square**2, 0) * worse / batch,
        (2, 2): t,
        (0, 1): 2 * u.mean * along,
        (0, 2): 2 * u.mean * t,
        (1, 2): along,
    }
    for (i, j), value in inside.items():
        cov[:, i, j] += u.over_m(value)
        cov[:, j, i] = cov[:, i, j]
    return means, cov, given


def _without_second_chaos(cov: Array, u: Units, given: Array, remain: float, batch: int, pair: float) -> Array:
    """What orthogonal weights leave of the noise: they keep all products of inputs, so nothing quadratic in z moves."""
    if remain == 1:
        return cov
    quadratic = u.over_m(given * (u.m**2 - 1))  # (3, G)
    less = cov - (1 - remain) / 2 * np.einsum("ig,jg->gij", quadratic, quadratic)
    less[:, 1, 1] -= (1 - remain) / 2 * u.over_m(u.curve) ** 2 * (1 / batch + pair)
    return possible(less)


def _sane(x: float) -> float:
    """A ratio to a signal that is gone is 0."""
    return float(x) if math.isfinite(x) else 0.0


def possible(cov: Array) -> Array:
    """The nearest thing to these matrices that two variables at a time can have: no variance below 0."""
    root = np.sqrt(np.maximum(np.einsum("gii->gi", cov), 0))
    bound = root[:, :, None] * root[:, None]
    return np.clip(cov, -bound, bound)


def _preactivation(
    row: Activation,
    ln_m: Array,
    weights: Array,
    uniform: Array,
    state: Law,
    damped: Array,
    remain: float,
    u: Units,
    batch: int,
    width: float,
) -> Law:
    """Law of z: given the state Gaussian, so that T is a chi-square average over the units."""
    relative = np.zeros((len(ln_m), 2, 2))
    relative[:, 0, 0] = remain * (2 - 1.2 * uniform**2) / width
    relative[:, 1, 1] = remain * 2 * (1 / max(1, batch - 1) + state.pair) / width * (not state.alone)
    shift, noise = ln_cov(relative)
    mean, both, _ = total(ln_m + shift, noise, weights)
    shares = {
        "frac_zero": (0.0, 0.0),
        "frac_saturated": share_of_units(saturated(row), u, weights, width, batch, state.single),
    }
    law = Law(
        mean,
        both * np.nan if state.certain else both,
        shares=shares,
        pair=state.pair + remain * (1 + state.pair) / width,
    )
    return symmetric(replace(law, single=float(state.single * damped[0])), width)


def share_of_units(
    intervals: tuple[tuple[float, float], ...], u: Units, weights: Array, n: float, batch: int, single: float
) -> Moments:
    """Share of the entries of n units that lie in these intervals.

    Entries of one unit differ given m, less what averages out since the e_a add up to 0; and inputs differ in length.
    """
    key = (intervals, n, batch, single)
    if key not in u.known:
        u.known[key] = _share(intervals, u, weights, n, batch, single)
    return u.known[key]


def _share(
    intervals: tuple[tuple[float, float], ...], u: Units, weights: Array, n: float, batch: int, single: float
) -> Moments:
    p, along = u.probability(intervals)
    mean = u.over_m(p)
    own = np.maximum(u.over_m(p * (1 - p) - along**2), 0) * uneven(single, batch) / batch
    noise = (np.maximum(u.over_m(p**2) - mean**2, 0) + own) / n
    by_length = np.zeros(len(mean))
    for edges, sign in zip(zip(*intervals, strict=True), (1, -1), strict=False):
        for edge in edges:
            x = np.clip(edge / u.scale[:, 0], -40, 40)
            by_length += sign * x * np.exp(-x * x / 2) / math.sqrt(8 * math.pi)
    return spread(mean, weights, noise + single * by_length**2 / batch)


def _activation(
    row: Activation,
    law: Law,
    means: Array,
    cov: Array,
    u: Units,
    weights: Array,
    batches: tuple[int, int],
    width: float,
    bent: Array,
) -> Law:
    """Adds the pooled variance, the pooled mean and the shares to the law of T and W."""
    batch, seen = batches
    pooled, q = means[:, 2], means[:, 0] + means[:, 1]
    var = np.maximum(q - pooled**2 - cov[:, 2, 2], 0)
    of_var = np.stack([np.ones_like(pooled), np.ones_like(pooled), -2 * pooled], -1)
    noise = np.maximum(np.einsum("gi,gij,gj->g", of_var, cov, of_var), 0)
    shift, own = ln_noise(np.where(var > 0, noise / np.maximum(var, 1e-300) ** 2, 0))
    safe = np.where(q > 0, q, 1)
    of_ratio = np.stack([-pooled / (2 * safe), -pooled / (2 * safe), np.ones_like(pooled)], -1)
    wobble = np.maximum(np.einsum("gi,gij,gj->g", of_ratio, cov, of_ratio), 0) / safe
    centre, sd = spread(pooled / np.sqrt(safe), weights, wobble)
    dead = spread(u.over_m(u.probability(zeros(row))[0] ** seen), weights)
    shares = {
        "frac_zero": share_of_units(zeros(row), u, weights, width, batch, law.single),
        "frac_dead": (dead[0], math.sqrt(dead[1] ** 2 + dead[0] * (1 - dead[0]) / width)),
    }
    with np.errstate(divide="ignore"):
        ln_var = spread(np.log(var) + u.ln_scale + shift + bent, weights, own)
    return replace(law, ln_var=ln_var, centre=centre, spread=sd, shares=shares)


def _apart(
    u: Units,
    ln_q: Array,
    means: Array,
    cov: Array,
    state: Law,
    remain: float,
    damped: Array,
    width: float,
    batch: int,
) -> tuple[tuple[float, float], Array, float]:
    """By how much single pairs and single inputs of the next state differ from the average ones.

    Also what lengths do to ln T and ln W at each node, (G, 2): a convex map of q gains or loses by their spread, and
    the part of the layer's noise that is in the lengths is no longer in the directions.
    """
    if state.alone or math.isinf(width):
        return (0.0, 0.0), np.zeros((len(means), 2)), 0.0
    t, w = means[:, 0], means[:, 1]
    inside = u.inside[:, 0]
    slope = u.over_m(u.slope**2)[0] * np.exp(ln_q - u.ln_scale)[0] * inside[0]
    noise = max(0.0, u.over_m(u.variance**2)[0] - (1 - remain) * slope**2) + slope**2 * state.pair * remain
    pair = (slope**2 * state.pair + noise / width) / (w[0] ** 2 + cov[0, 1, 1])
    fourth = u.over_m(u.fourth + 4 * u.third * u.mean + 6 * u.variance * u.mean**2 + u.mean**4)
    square = u.over_m((u.variance + u.mean**2) ** 2)
    own = np.maximum(fourth - square - (1 - remain) / 2 * u.tilt**2 * (1 - (1 - inside) ** 2), 0)
    new = own / (width * (t + w) ** 2)
    before = state.single * damped**2
    single = (1 + (u.tilt[0] / 2) ** 2 * before[0]) * (1 + new[0]) - 1
    common = np.maximum(t - w / (batch - 1), 0) * lengths(new)
    bent = np.log1p(
        np.maximum(u.bend * (before - (1 - remain) * 2 / width) / 8, -0.5)
    )  # an isometry's z has one length
    shrink = np.stack([bent + np.log1p(common / t), bent + np.log1p(-np.minimum(common / w, 0.5))], -1)
    return (_sane(pair), _sane(single)), np.nan_to_num(shrink), float(np.log1p(new[0]))
