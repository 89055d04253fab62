"""The laws of a stack's tensors when all widths grow together: nothing fluctuates, each law is a single state.

The integrals are those of `forward_law` on a finer grid: lengths and correlations by their maps, gradients by moments
of phi'. An infinite batch is carried, whose T is what pairs of inputs have in common; the law of the batch that was
asked for follows from it. Source: Poole et al. 2016; Schoenholz et al. 2017.
"""

import math
from collections.abc import Sequence

import numpy as np

from initlab.nn.activations import Activation
from initlab.theory.batch_law import CERTAIN, NOTHING, Array, Law, gaussian_batch, ln
from initlab.theory.forward_law import DenseLayer, preactivations
from initlab.theory.tensor_law import StackLaws
from initlab.theory.unit_moments import (
    FINE,
    JoinedUnits,
    saturated_intervals,
    units,
    zero_intervals,
    zero_slope_intervals,
)

MANY = 2**60  # inputs of a batch that counts as infinite


def infinite_laws(
    row: Activation, layers: Sequence[DenseLayer], batch: int, q0: float = 1.0, c0: float = 0.0
) -> StackLaws:
    """Laws of all tensors of a batch; the gradient at the top is unit Gaussian and independent for every input."""
    with np.errstate(all="ignore"):  # where a signal is gone, ratios to it are nan or inf: data
        state = gaussian_batch(math.inf, MANY, q0, c0).mean[0]
        start, ln_z, ln_x, passed = state, [], [], []
        for layer in layers:
            z, uniform, _ = preactivations(layer, state[None])
            passed.append(units(row, z[:, 0], z[:, 1], uniform, FINE))
            u = passed[-1]
            inside = float(u.over_m(u.variance)[0])
            t = float(u.over_m(u.mean**2)[0]) + inside / MANY
            logs = [max(NOTHING, ln(x)) for x in (t, inside * (1 - 1 / MANY))]
            state = np.array(logs) + float(u.ln_scale[0])
            ln_z.append(z[0])
            ln_x.append(state)
        z, x, every = np.array(ln_z), np.array(ln_x), JoinedUnits(passed)
        mean = every.over_m(every.row("mean"))[:, 0]
        ln_scale = np.array([u.ln_scale[0] for u in passed])
        size = np.exp(np.logaddexp(x[:, 0], x[:, 1]) - ln_scale)
        ln_var = np.log(np.maximum(size - mean**2, 0)) + ln_scale
        centre = mean / np.sqrt(np.where(size > 0, size, 1))
        p_zero, p_saturated, p_no_slope = (
            every.probability(intervals(row))[0]
            for intervals in (zero_intervals, saturated_intervals, zero_slope_intervals)
        )
        zero, dead, saturated, no_slope = every.over_m(np.stack([p_zero, p_zero**batch, p_saturated, p_no_slope]))[
            ..., 0
        ]
        above, below = _descend(layers, every)
        none = np.zeros(len(layers))
        return StackLaws(
            _law(start[None], batch),
            _law(x, batch, {"frac_zero": zero, "frac_dead": dead}, ln_var, centre),
            _law(z, batch, {"frac_zero": none, "frac_saturated": saturated}),
            _law(above, batch, {"frac_zero": np.zeros(len(above))}),
            _law(below, batch, {"frac_zero": no_slope}),
        )


def _law(
    mean: Array,
    batch: int,
    shares: dict[str, Array] | None = None,
    ln_var: Array | None = None,
    centre: Array | None = None,
) -> Law:
    """Pooled variance and mean are those of a symmetric tensor unless given."""
    ln_q = np.logaddexp(mean[..., 0], mean[..., 1])
    none = np.zeros_like(ln_q)
    return Law(
        mean,
        np.broadcast_to(CERTAIN, (*none.shape, 2, 2)),
        none,
        none,
        ln_var=np.stack([ln_q if ln_var is None else ln_var, none], -1),
        centre=none if centre is None else centre,
        spread=none,
        lean=none,
        shares={name: np.stack([share, none], -1) for name, share in (shares or {}).items()},
    ).of_batch(batch)


def _descend(layers: Sequence[DenseLayer], every: JoinedUnits) -> tuple[Array, Array]:
    """ln T and ln W of the gradients at activations, the input's first, (L + 1, 2), and at preactivations, (L, 2)."""
    k, k2 = every.over_m(np.stack([every.row("slope") ** 2, every.row("slope2")]))[..., 0]
    state = gaussian_batch(math.inf, MANY).mean[0]
    above, below = [], []
    for layer, common, both in zip(layers[::-1], k[::-1].tolist(), k2[::-1].tolist(), strict=True):
        above.append(state)
        ln_q = float(np.logaddexp(*state))
        t, w = np.exp(state - ln_q).tolist()
        apart = both - common
        pair = t * common + (w + t) * apart / MANY, w * (both - apart / MANY) + t * (apart - apart / MANY)
        state = np.array([max(NOTHING, ln(x)) for x in pair]) + ln_q
        below.append(state)
        state = state + max(NOTHING, ln(layer.weight * layer.fan_out))
    above.append(state)
    return np.array(above[::-1]), np.array(below[::-1])
