"""From the states of a stack to the laws of its tensors: the statistics that n units have in a given state.

All layers are computed at once. Legend: L layers, G nodes of a state, K nodes of all units.
"""

from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from initlab.theory.batch_law import (
    Array,
    Law,
    combine,
    ln_cov,
    ln_noise,
    mean_and_sd,
    pool_symmetric_units,
    regressors,
    slopes,
)
from initlab.theory.forward_law import Chain, design_effect
from initlab.theory.lsuv_law import p_not_rescaled
from initlab.theory.unit_moments import Intervals, JoinedUnits, saturated_intervals, zero_intervals


class StackLaws(NamedTuple):
    """Laws of all tensors of a stack, with a leading dimension of layers, layer 1 first; of length 1 for the input.

    Gradients at activations begin with that at the input, layer 0.
    """

    input: Law
    activations: Law
    preactivations: Law
    activation_gradients: Law
    preactivation_gradients: Law


def shift_lengths(stack: StackLaws, up: Array) -> StackLaws:
    """The laws of a stack whose layers multiply q by a further factor exp(up), (L,), forward and backward."""
    if not up.any():
        return stack
    forward, backward = np.cumsum(up), np.append(np.cumsum(up[::-1])[::-1], 0.0)
    by = forward, forward, backward, backward[1:]
    return StackLaws(
        stack.input,
        *(
            replace(law, mean=law.mean + x[:, None], ln_var=law.ln_var + np.stack([x, 0 * x], -1))
            for law, x in zip(stack[1:], by, strict=True)
        ),
    )


class Layers:
    """The numbers of all steps of a chain as arrays with leading dimension L."""

    def __init__(self, chain: Chain) -> None:
        self.chain, self.batch, self.single_input = chain, chain.batch, chain.start.single_input
        self.weights = chain.weights
        self.width = np.array([step.layer.fan_out for step in chain.steps], dtype=float)
        self.forward_remain = np.array([step.layer.forward_remain for step in chain.steps])
        self.is_rescaled = np.array([step.layer.is_rescaled for step in chain.steps])

    def stack(self, name: str) -> Array:
        return np.array([getattr(step, name) for step in self.chain.steps])

    def stack_above(self, name: str) -> Array:
        """A number of the state that leaves each layer."""
        return np.array([*(getattr(step, name) for step in self.chain.steps[1:]), getattr(self.chain, name)])

    @cached_property
    def jacobian(self) -> Array:
        """Slopes of the state that leaves each layer by the one that enters it, (L, 2, 2)."""
        return slopes(self.stack("ln_x"), self.regressors, self.weights)

    @cached_property
    def regressors(self) -> Array:
        """Weights that give the slope of anything at the nodes of a layer by its entering state, (L, G, 2)."""
        return regressors(self.stack("nodes"), self.weights, self.single_input)

    def correlate(self) -> Array:
        """Correlation of ln q of each layer's activations with that of the activations before, (L,)."""
        cov = np.concatenate([self.stack("cov"), self.chain.cov[None]])
        mean = np.concatenate([self.stack("mean"), self.chain.mean[None]])
        by = np.exp(mean - np.logaddexp(mean[:, :1], mean[:, 1:]))  # slopes of ln q by the state, (L + 1, 2)
        var = np.einsum("ki,kij,kj->k", by, cov, by)
        both = np.einsum("ki,kij,kjl,kl->k", by[1:], self.jacobian, cov[:-1], by[:-1])
        return np.asarray(np.clip(np.nan_to_num(both / np.sqrt(var[1:] * var[:-1])), 0, 1))

    @cached_property
    def units(self) -> JoinedUnits:
        return JoinedUnits([step.units for step in self.chain.steps])

    @cached_property
    def ln_scale(self) -> Array:
        return np.array([step.units.ln_scale for step in self.chain.steps])

    def share(self, intervals: Intervals, single: Array) -> Array:
        """Share of a layer's entries that lie in these intervals, mean and sd over networks: (L, 2).

        Its variance has three parts. Entries of one unit differ given m, less what averages out since the e_a add up to
        0. Entries of two inputs vary together as far as the inputs' product differs from the average one. Orthogonal
        weights keep all products of inputs and remove what is quadratic in z.
        """
        u, remain = self.units, self.forward_remain[:, None]
        p, along, curve = u.probability(intervals)
        mean, pair = u.over_m(p), self.stack("pair")[:, None]
        own = (
            np.maximum(u.over_m(p * (1 - p) - along**2), 0) * (design_effect(single, self.batch) / self.batch)[:, None]
        )
        together = u.over_m(curve**2) * pair / 2
        quadratic = u.over_m(p * (u.m**2 - 1)) ** 2 + u.over_m(curve) ** 2 * (1 / self.batch + pair)
        unit = np.maximum(u.over_m(p**2) - mean**2, 0) + own + together - (1 - remain) / 2 * quadratic
        noise = np.maximum(unit, 0) / self.width[:, None]
        return mean_and_sd(mean, self.weights, noise)


def preactivations(layers: Layers) -> Law:
    """Given the state z is Gaussian, so that T is a chi-square average over the units."""
    remain, pair, single = layers.forward_remain, layers.stack("pair"), layers.stack("single")
    relative = np.zeros((*layers.stack("ln_z").shape, 2))
    relative[..., 0, 0] = (remain / layers.width)[:, None] * (2 - 1.2 * layers.stack("uniform") ** 2)
    if not layers.single_input:
        relative[..., 1, 1] = (remain / layers.width * 2 * (1 / (layers.batch - 1) + pair))[:, None]
    ln_z, rescaled = layers.stack("ln_z"), layers.is_rescaled
    if rescaled.any():  # the variance is 1: what varies is T/W, and the squared pooled mean
        share = np.exp(ln_z - np.logaddexp(ln_z[..., :1], ln_z[..., 1:]))
        off = np.eye(2) - share[..., None, :]
        centre = 2 * (share[..., :1, None] / layers.width[:, None, None, None]) ** 2
        relative[rescaled] = (off @ relative @ off.mT + centre)[rescaled]
    shift, noise = ln_cov(relative)
    mean, cov, _ = combine(ln_z + shift, noise, layers.weights)
    law = Law(mean, cov, pair + remain * (1 + pair) / layers.width, single * layers.stack("damped")[:, 0])
    shares = {
        "frac_zero": np.zeros((len(mean), 2)),
        "frac_saturated": layers.share(saturated_intervals(layers.chain.row), single),
    }
    found = pool_symmetric_units(replace(law, shares=shares), layers.width)
    # ln of the pooled variance of a rescaled layer is 0, but where the fit had nothing to do
    steps = layers.chain.steps
    p_drawn = np.array([p_not_rescaled(s.layer, s.mean, s.cov, s.pair, layers.batch) for s in steps])
    within = np.array([s.layer.fitted.tolerance if s.layer.fitted else 0.0 for s in steps]) / np.sqrt(3)
    found.ln_var[rescaled] = np.stack([0 * within, np.sqrt(p_drawn) * within], -1)[rescaled]
    return found


def activations(layers: Layers) -> Law:
    """Law of the activations: T and W, pooled variance, pooled mean and shares."""
    u, weights = layers.units, layers.weights
    means, cov = layers.stack("means"), layers.stack("unit_cov")
    pooled, q = means[..., 2], means[..., 0] + means[..., 1]
    var = np.maximum(q - pooled**2 - cov[..., 2, 2], 0)
    one = np.ones_like(pooled)
    noise = _quadratic(cov, np.stack([one, one, -2 * pooled], -1))
    shift, own = ln_noise(np.where(var > 0, noise / np.maximum(var, 1e-300) ** 2, 0))
    safe = np.where(q > 0, q, 1)
    off = -pooled / (2 * safe)
    of_ratio, of_ln_q = np.stack([off, off, one], -1), np.stack([one, one, 0 * one], -1) / safe[..., None]
    ratio, ln_q = pooled / np.sqrt(safe), np.log(safe) + layers.ln_scale
    pooled_mean = mean_and_sd(ratio, weights, _quadratic(cov, of_ratio) / safe)
    law = Law(
        layers.stack_above("mean"), layers.stack_above("cov"), layers.stack_above("pair"), layers.stack_above("single")
    )
    together = np.einsum("...i,...ij,...j->...", of_ratio, cov, of_ln_q) / np.sqrt(safe)
    together += (ratio - (ratio @ weights)[:, None]) * (ln_q - (ln_q @ weights)[:, None])
    lean = np.nan_to_num((together @ weights) / law.ln_second_moment()[:, 1])
    lean = np.clip(lean, -pooled_mean[:, 1], pooled_mean[:, 1])
    p = u.probability(zero_intervals(layers.chain.row))[0]
    dead = mean_and_sd(u.over_m(p**layers.batch), weights)
    dead[:, 1] = np.sqrt(dead[:, 1] ** 2 + dead[:, 0] * (1 - dead[:, 0]) / layers.width)
    return replace(
        law,
        ln_var=mean_and_sd(np.log(var) + layers.ln_scale + shift + layers.stack("bent"), weights, own),
        centre=pooled_mean[:, 0],
        lean=lean,
        spread=np.sqrt(np.maximum(pooled_mean[:, 1] ** 2 - lean**2, 0)),
        shares={
            "frac_zero": layers.share(zero_intervals(layers.chain.row), np.zeros(len(means))),
            "frac_dead": dead,
        },
        rho=layers.correlate(),
    )


def _quadratic(cov: Array, by: Array) -> Array:
    """by^T cov by, (..., 3, 3) and (..., 3), at least 0."""
    return np.asarray(np.maximum(np.einsum("...i,...ij,...j->...", by, cov, by), 0))


def observe_gaussian(law: Law, batch: int, width: Array, remain: Array) -> Law:
    """The law of the gradient at an activation, measured on `width` Gaussian units."""
    relative = np.zeros_like(law.cov)
    relative[:, 0, 0] = remain * 2 / width
    if not law.single_input:
        relative[:, 1, 1] = remain * 2 * (1 / (batch - 1) + law.pair) / width
    shift, noise = ln_cov(relative)
    pair = law.pair + remain * (1 + law.pair) / width
    shares = {"frac_zero": np.zeros((len(width), 2))}
    return pool_symmetric_units(
        replace(law, mean=law.mean + shift, cov=law.cov + noise, pair=pair, shares=shares), width
    )
