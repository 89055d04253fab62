"""How each row of a prediction is found: by a closed law where it was seen to hold, else from simulated networks.

The bounds were set by 95 % bands over up to 1,200 fresh networks of every activation, batches of 1 to 200.
"""

from enum import IntEnum
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from initlab.meanfield.maps import growth, moment
from initlab.nn.activations import ACTIVATIONS
from initlab.stats.statistics import IN_LN
from initlab.theory.batch_law import Array, ln
from initlab.theory.request import Request
from initlab.theory.stack_laws import TensorKind, enter_layers, finite_laws, tensor_kinds
from initlab.theory.unit_moments import Intervals, normal_cdf, rounded_slope_intervals, rounded_zero_intervals

METHODS = {
    "auto": "closed laws where they hold, simulation elsewhere; `method` says what was done, row by row",
    "closed": "exact laws where there are some, else the lognormal closure",
    "simulation": "networks drawn from the exact law of the stack",
}


class Level(IntEnum):
    """How far a row of the closure is trusted."""

    ROUNDED = -2  # hangs on the number format: no law, simulated or not
    UNKNOWN = -1  # no law, and none that a simulation is started for
    NEVER = 0  # not shown: simulated, or without a band
    IF_NEEDED = 1  # simulated where that is done anyway
    HOLDS = 2  # shown


SPREAD = 1.0  # sum of 1/width up to which the closure is trusted where phi is homogeneous
SPREAD_WITH_SCALE = 0.6  # the same where phi has a scale of its own
EARLY = 0.07  # the same for any phi
ONE_WAY = 0.15  # the same for gradients and saturated shares where phi has a scale of its own
NARROW = 0.03  # 1/width above which the closure does not hold for what inputs have apart, where it was not simulated
WANDERS = 0.3  # standard deviation of ln q over networks up to which an activation with a scale is trusted too
SURE = 3  # standard deviations between a fitted layer's variance and the tolerance that decides what becomes of it
FEW = 16  # inputs up to which a mean over the batch is no sum of many
REPRESENTATIVES = 48  # inputs that a simulation carries: the whole batch, or some that stand for it
NETWORKS = (300, 1000)  # fewest and most networks of a simulation that chooses for itself
QUICK, AFFORDABLE = 1.5e8, 3.6e8  # entries of all networks: that take a second, and that are worth waiting for
COSTLY = 200  # units of a layer whose product costs as much as all else that is done to an entry
ROUNDED_ENTRIES = 0.01  # of a tensor that are 0 by rounding, from which on the share of zeros has no law
COUNTED = 1000, 5  # entries, or units, that a share must stand for, so that its law is a continuous one
_BY_LENGTH = tuple(name for name in IN_LN if name != "cosine")


def choose_networks(request: Request, inputs: int) -> int:
    """How many networks to simulate with so many inputs: what a second allows, 0 where too few are affordable."""
    entries = inputs * sum(o * (1 + i / COSTLY) for i, o in pairwise(request.widths))
    networks = int(min(NETWORKS[1], max(NETWORKS[0], QUICK / entries)))
    return networks if networks * entries <= AFFORDABLE else 0


def fits_float32(request: Request) -> bool:
    """Whether all signals stay well inside float32, six standard deviations included, and the inputs stay different."""
    for kind in tensor_kinds(request, finite_laws(request)):
        ln_q, spread = kind.law.ln_second_moment().T
        differ = kind.limit.single_input or bool((kind.limit.within_share > 1e-3).all())
        if not differ or not bool((np.abs(ln_q) / 2 + 3 * spread < 60).all()):
            return False
    return True


def is_scale_free(request: Request) -> bool:
    """Whether phi takes signals of every size alike."""
    at = torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64)
    return bool((2 * growth(request.row, at) * at / moment(request.row, at) - 2).abs().max() < 1e-9)


def is_trusted(request: Request) -> bool:
    """Whether the closure holds: more width than depth, and no second moment wandering over phi's curved parts."""
    scale_free = is_scale_free(request)
    if sum(1 / layer.fan_out for layer in request.layers) > (SPREAD if scale_free else SPREAD_WITH_SCALE):
        return False
    return scale_free or bool((finite_laws(request).activations.ln_second_moment()[:, 1] < WANDERS).all())


class Trust:
    """Which rows of the closure hold for a request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.decided = _fits_are_decided(request)
        self.trusted = self.decided and is_trusted(request)
        biased = any(layer.bias or layer.uniform_bias for layer in request.layers)
        plain = request.row in (ACTIVATIONS[name] for name in ("linear", "relu", "leaky_relu"))
        self.is_plain = plain and not biased
        one = torch.ones(1, dtype=torch.float64)
        self.odd = float((request.row.phi(one) + request.row.phi(-one)).abs()) < 1e-12
        steps = np.array([1 / layer.fan_out for layer in request.layers])
        self.below = np.concatenate([[0.0], np.cumsum(steps)])  # of layers 0 to L
        self.above = np.cumsum(np.append(steps[::-1], 1 / request.widths[0]))[::-1]  # of layers 0 to L
        self.rounded = {
            ("activation", "forward"): self._find_rounded(rounded_zero_intervals(request.row)),
            ("preactivation", "backward"): self._find_rounded(rounded_slope_intervals(request.row)),
        }

    def _find_rounded(self, intervals: Intervals) -> NDArray[np.bool_]:
        """The layers 1 to L, first not used, where a hundred tensors have an entry whose z lies in the intervals."""
        ln_q, spread = finite_laws(self.request).preactivations.ln_second_moment().T
        deviation = np.exp(np.clip(ln_q / 2 + spread, -300, 300))[:, None]
        edges = normal_cdf(np.array(intervals).reshape(-1, 2) / deviation[:, None])  # (L, intervals, 2)
        share = (edges[..., 1] - edges[..., 0]).sum(-1)
        return np.append(False, share * self.request.batch * np.array(self.request.widths[1:]) > ROUNDED_ENTRIES)

    def judge_rows(self, kind: TensorKind, statistic: str, predicted: Array) -> NDArray[np.int64]:
        """The level of each layer of a tensor; `predicted` is what the closure says there."""
        batch, forward, depth = self.request.batch, kind.direction == "forward", len(self.request.layers)
        passed = (self.below if forward else self.above)[kind.layers]
        if statistic.startswith("frac"):
            entries, least = (kind.units, COUNTED[1]) if statistic == "frac_dead" else (kind.units * batch, COUNTED[0])
            share = np.minimum(predicted, 1 - predicted)
            rare = (share != 0) & (share * entries < least)
        else:
            rare = np.zeros(len(kind.layers), dtype=bool)
        holds = np.full(len(passed), self.trusted) | ((passed <= EARLY) & self.decided & forward)
        if kind.tensor == "activation" and not forward:
            holds |= kind.layers == depth  # the gradient that is put in
        found = np.where(holds, Level.HOLDS, Level.NEVER)
        if self.is_plain:
            if statistic == "mean" and forward and not self.request.row.rectifies:  # too wide, measured
                found = np.where((found == Level.HOLDS) & (passed > ONE_WAY), Level.UNKNOWN, found)
        else:
            found = np.where((found == Level.HOLDS) & (passed > EARLY), Level.IF_NEEDED, found)
            if statistic in (("mean", "frac_saturated") if forward else _BY_LENGTH):
                found = np.where(passed > ONE_WAY, Level.NEVER, found)
            if statistic == "cosine" and forward:
                found = np.where((passed > EARLY) & (not self.odd), Level.NEVER, found)
        narrow = (self.is_plain and bool(self.request.row.kinks)) & (1 / kind.units > NARROW)
        if statistic == "cosine" and forward and kind.tensor == "activation":
            found = np.where((kind.layers == 1) & (narrow | (not self.is_plain)), Level.UNKNOWN, found)
        if statistic in ("cosine", "std_within") and forward:  # too wide, measured
            found = np.where(narrow & (passed > ONE_WAY), Level.UNKNOWN, found)
        if batch <= FEW and not self.request.fixed_input and kind.layers[-1] > 0:
            doubtful = statistic in ("mean", "cosine") or statistic.startswith("frac")
            found = np.minimum(found, Level.NEVER if doubtful else Level.IF_NEEDED)
        if statistic.startswith("frac") and not predicted.any():  # no entry can be
            found[:] = Level.HOLDS
        found = np.where(rare & (found > Level.NEVER), Level.UNKNOWN, found)
        rounded = self.rounded.get((kind.tensor, kind.direction))
        if statistic in ("frac_zero", "frac_dead") and rounded is not None:
            found = np.where(rounded[kind.layers], Level.ROUNDED, found)
        return found

    def judge_parameters(self, direction: str) -> NDArray[np.int64]:
        """The same of all statistics of weights and biases, or of their gradients."""
        holds = np.full(len(self.request.layers), direction == "forward" or self.trusted)
        if direction == "backward" and not self.is_plain:
            holds &= self.above[1:] <= ONE_WAY
        return np.where(holds, Level.HOLDS, Level.NEVER)


def _fits_are_decided(request: Request) -> bool:
    """Whether nearly all networks agree on which layers a fit (LSUV) leaves alone; with biases the answer is no."""
    fitted = [layer.fitted for layer in request.layers]
    if not any(fitted):
        return True
    stack = finite_laws(request)
    entering = enter_layers(stack.input.ln_second_moment(), stack.activations.ln_second_moment())
    for fit, layer, (ln_q, sd) in zip(fitted, request.layers, entering, strict=True):
        if fit is None or layer.bias + layer.uniform_bias:
            return fit is None
        low, high = (ln(fit.drawn * layer.fan_in) + ln_q + k * SURE * sd for k in (-1, 1))
        edges = ln(1 - fit.tolerance), ln(1 + fit.tolerance)
        if any(low <= edge <= high for edge in edges):
            return False
    return True
