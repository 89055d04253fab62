"""What theory predicts for a stack: every layer, every statistic, at infinite width and with bands at a finite one.

The names are those of the measured table. A stack as `tasks.stack` measures it: a unit-Gaussian batch in, a
unit-Gaussian gradient at the top. Knows rules, activations and laws; no networks are built but in simulated laws.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from initlab.errors import UsageError
from initlab.meanfield.maps import growth, moment
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.custom_activation import Given, name_of, numerical
from initlab.nn.init import Rule
from initlab.stats.dtypes import format_of
from initlab.theory.backward_law import laws
from initlab.theory.bands import EDGES, IN_ORDER, Block, bands, frame, scaled, simulated
from initlab.theory.batch_law import Array, Law, Moments, ln
from initlab.theory.exact import linear_batch, linear_one_input, lognormal, relu_one_input
from initlab.theory.forward_law import Data, Layer
from initlab.theory.infinite_width import infinite_laws
from initlab.theory.lsuv_law import fit_noise, ln_weight
from initlab.theory.quantiles import IN_LN
from initlab.theory.request import Case, case_of
from initlab.theory.simulate import simulate
from initlab.theory.tensor_law import Stack, shift_lengths

METHODS = {
    "auto": "closed laws where they hold, simulation elsewhere if it costs seconds; `method` says what was done",
    "closed": "exact laws where there are some, else the lognormal closure",
    "simulation": "networks drawn from the exact law of the stack",
}
SPREAD = 1.0  # sum of 1/width up to which `auto` trusts the closure where phi is homogeneous
SPREAD_WITH_SCALE = 0.6  # the same where phi has a scale of its own
WANDERS = 0.3  # standard deviation of ln q over networks up to which an activation with a scale is trusted too
SURE = 3  # standard deviations between a fitted layer's variance and the tolerance that decides what becomes of it
BUDGET = 3e10  # multiplications in float64 that `auto` spends on a simulation: below 10 s
FLOAT32_IS_FASTER = 3  # times, measured
NETWORKS = (100, 1000)  # fewest and most networks of a simulation that chooses for itself


def predict(
    init: str | Rule = "kaiming",
    activation: Given = "relu",
    depth: int = 50,
    width: int = 100,
    dtype: str = "float32",
    **options: Any,
) -> pd.DataFrame:
    """One row per layer, tensor and direction; statistics under their measured names are those of infinite width.

    `ln_q`, `ln_rms`, `ln_std`, `ln_std_within`, `ln_norm`: the same in ln, where nothing overflows. For each of them
    `ln_..._mean` and `ln_..._sd` over seeds at the width given. `band_low`, `band_high` (2.3 and 97.7 %) and
    `band68_low`, `band68_high` (16 and 84 %) are of `std`; `predict_bands` has those of all. `method` says where the
    finite-width numbers come from, `slope` whether phi' was given or differentiated numerically. Arithmetic is exact:
    `dtype` is kept as a column; where a format ends is `formats.limits`' business. Options: see `predict_bands`.
    """
    dtype = format_of(dtype).name
    long = predict_bands(init, activation, depth, width, **options)
    at = long.groupby(_KEYS).ngroup().to_numpy()
    first = np.unique(at, return_index=True)[1]
    columns: dict[str, Any] = {name: long[name].to_numpy()[first] for name in _KEYS}
    statistics = long["statistic"].to_numpy()

    def put(name: str, column: str, rows: NDArray[np.intp]) -> None:
        columns[name] = np.full(len(first), np.nan)
        columns[name][at[rows]] = long[column].to_numpy()[rows]

    for name in (name for name in IN_ORDER if name in set(statistics)):
        rows = np.flatnonzero(statistics == name)
        put(name, "limit", rows)
        if name in IN_LN:
            for column, source in (("ln_{}", "ln_limit"), ("ln_{}_mean", "mean"), ("ln_{}_sd", "sd")):
                put(column.format(name), source, rows)
        if name == "std":
            for edge in EDGES:
                put(edge, edge, rows)
            columns |= {name: long[name].to_numpy()[rows[at[rows].argsort()]] for name in ("method", "slope")}
    return pd.DataFrame(columns).assign(dtype=dtype)


def predict_bands(
    init: str | Rule = "kaiming",
    activation: Given = "relu",
    depth: int = 50,
    width: int = 100,
    *,
    widths: Sequence[int] | None = None,
    inputs: int | None = None,
    batch: int = 200,
    q0: float = 1.0,
    c0: float = 0.0,
    fixed_input: bool = False,
    sb2: float = 0.0,
    method: str = "auto",
    networks: int | None = None,
    seed: int = 0,
    outputs: bool = False,
    data: Data = Data(),  # noqa: B008 - a tuple
    **rule_fields: Any,
) -> pd.DataFrame:
    """One row per layer, tensor, direction and statistic, with `scale` (ln or linear), the columns of `bands.NUMBERS`,
    `method` and `slope`. `predicted`, `limit` and the bands mean what they mean in a run's table `theory`.

    `widths` gives every layer's units and replaces depth and width; `inputs` the input's. The input has second moment
    q0 and mean cosine c0, is drawn for each network or, if `fixed_input`, is a batch of just these moments, which
    wander as `data` say (`closure.Data`). `sb2` adds normal biases of this variance. `outputs`: the last layer is that
    of a trained network, as `mup` draws it. `mode`, `gain`, `gain_kind`, `distribution` and `bias` replace the rule's
    own. `method`: auto, closed or simulation, the last with so many `networks` and this `seed`.
    """
    shape = depth, width, widths, inputs, batch
    case = case_of(init, activation, *shape, q0, c0, fixed_input, sb2, rule_fields, outputs, data)
    if method not in METHODS:
        raise UsageError(f"method={method}: must be one of {', '.join(METHODS)}")
    if networks is not None and networks < 2:
        raise UsageError(f"networks={networks}: must be at least 2")
    shaky = method != "simulation" and not trusted(case)
    if method == "simulation" or (method == "auto" and shaky and _affordable(case)):
        found = _simulated(case, networks or _affordable(case) or NETWORKS[0], seed)
    else:
        found = _closed(case, "log-delta, outside its range" if shaky else "log-delta")
    return frame([*found, *_parameters(case)]).assign(
        activation=name_of(activation), slope="numerical derivative" if numerical(case.row) else "given"
    )


_KEYS = ["layer", "tensor", "direction"]


# --- closed laws -----------------------------------------------------------------------------------------------------


class _Tensor(NamedTuple):
    """One kind of tensor in all its layers."""

    tensor: str
    direction: str
    layers: NDArray[np.int64]
    law: Law
    limit: Law
    units: NDArray[np.int64]


def _tensors(case: Case, laws: Stack) -> Iterator[_Tensor]:
    """Every tensor of a stack, in the order of the measured table."""
    every, widths = np.arange(len(case.widths)), np.array(case.widths)
    for law, limit, tensor, direction, at in zip(laws, _infinite(case), *zip(*_KINDS, strict=True), strict=True):
        yield _Tensor(tensor, direction, every[at], law, limit, widths[at])


_KINDS = (
    ("activation", "forward", slice(0, 1)),
    ("activation", "forward", slice(1, None)),
    ("preactivation", "forward", slice(1, None)),
    ("activation", "backward", slice(1, None)),
    ("preactivation", "backward", slice(1, None)),
)


def _infinite(case: Case) -> Stack:
    layers, up = _of_any_gain(case)
    return shift_lengths(_known_infinite(case.row, layers, case.batch, case.q0, case.c0), up)


def finite_laws(case: Case) -> Stack:
    """The laws at finite width."""
    layers, up = _of_any_gain(case)
    return shift_lengths(_known(case.row, layers, case.batch, case.q0, case.c0, case.fixed_input, case.data), up)


_known, _known_infinite = lru_cache(maxsize=32)(laws), lru_cache(maxsize=32)(infinite_laws)


def _of_any_gain(case: Case) -> tuple[tuple[Layer, ...], Array]:
    """A homogeneous stack without biases is that of any other gain but for ln q: its layers with lengths kept, and what
    is to be added to ln q layer by layer, (L,). So a sweep over the gain costs one prediction."""
    layers = case.layers
    plain = all(one.weight > 0 and not (one.bias or one.uniform_bias or one.fitted) for one in layers)
    if not (case.row.homogeneous and plain):
        return layers, np.zeros(len(layers))
    kept = tuple(one._replace(weight=1 / one.fan_in) for one in layers)
    return kept, np.array([ln(one.weight * one.fan_in) for one in layers])


def _closed(case: Case, otherwise: str) -> Iterator[Block]:
    for kind in _tensors(case, finite_laws(case)):
        second, better = kind.law.ln_second_moment(), [otherwise] * len(kind.layers)
        if kind.direction == "forward":
            limits = kind.limit.ln_q
            for k, layer in enumerate(kind.layers.tolist()):
                known = _exact(case, layer, kind.tensor)
                if known:
                    (shift, sd), better[k] = known
                    second[k] = limits[k] + shift, sd
        for rows in bands(kind.law, kind.limit, case.batch, kind.units, second):
            of_length = rows.statistic in IN_LN and rows.statistic != "std_within"
            yield Block(kind.layers, kind.tensor, kind.direction, rows, better if of_length else otherwise)


def _exact(case: Case, layer: int, tensor: str) -> tuple[Moments, str] | None:
    """Law of ln q over its limit where it is known better: linear stacks, and ReLU with one input.

    Normal weights and no biases.
    """
    relu = case.row is ACTIVATIONS["relu"]
    if case.c0 or case.fixed_input or not (relu or case.row is ACTIVATIONS["linear"]):
        return None
    if any(one.orthogonal or one.bias or one.uniform_bias for one in case.layers[:1]):
        return None
    if case.batch > 1:
        return None if relu else (lognormal(_linear_batch(tuple(case.widths), case.batch)[layer]), "linear-batch")
    if not layer:
        return None
    widths, of = tuple(case.widths), relu_one_input if relu else linear_one_input
    last = of if tensor == "activation" else linear_one_input
    parts = linear_one_input([1, widths[0]]), of(widths[:layer]), last(widths[layer - 1 : layer + 1])
    law = sum(m for m, _ in parts), math.sqrt(sum(s * s for _, s in parts))
    return law, "exact-relu" if relu else "exact-linear"


_linear_batch = lru_cache(maxsize=32)(linear_batch)


def _parameters(case: Case) -> Iterator[Block]:
    """Weights and biases themselves, and the gradients of the sum over the batch with respect to them."""
    every = np.arange(1, len(case.widths))
    i, o = (np.array([getattr(layer, name) for layer in case.layers], dtype=float) for name in ("fan_in", "fan_out"))

    def blocks(tensor: str, direction: str, limit: Array, law: Array, count: Array) -> Iterator[Block]:
        for rows in scaled(limit, law, count):
            yield Block(every, tensor, direction, rows, "log-delta")

    noise = 0 / i if case.layers[0].orthogonal else _fourth(case.rule) / (i * o)
    size = np.array([ln(layer.weight) for layer in case.layers])
    law = np.stack([size - noise / 2, np.sqrt(noise)], -1)
    pinned = np.array([layer.is_rescaled for layer in case.layers])
    if pinned.any():
        law[pinned] = _as_fitted(case)[pinned]
    yield from blocks("weight", "forward", size, law, i * o)
    bias = np.array([ln(layer.bias + layer.uniform_bias) for layer in case.layers])
    if np.isfinite(bias).all():
        var = (2 if case.layers[0].bias else 0.8) / o
        yield from blocks("bias", "forward", bias, np.stack([bias - var / 2, np.sqrt(var)], -1), o)
    limits = _parameter_gradients(_infinite(case), case.batch)
    found = _parameter_gradients(finite_laws(case), case.batch)
    for tensor, limit, law, count in zip(("weight", "bias"), limits, found, (i * o, o), strict=True):
        yield from blocks(tensor, "backward", limit[:, 0], law, count)


def _as_fitted(case: Case) -> Array:
    """ln q of weights that are fitted to data, mean and sd (L, 2): they are as small as their input was large."""
    x = finite_laws(case)
    below = _below(x.input.ln_second_moment(), x.activations.ln_second_moment())
    enter = list(zip(case.layers, [*x.input.split(), *x.activations.split()], strict=False))  # none above the last
    noise = np.array([fit_noise(layer, law.mean[0], float(law.pair[0]), case.batch) for layer, law in enter])
    centre = np.concatenate([ln_weight(layer, law.mean) for layer, law in enter])
    return np.stack([centre + noise / 2, np.sqrt(below[:, 1] ** 2 + noise)], -1)


def _fourth(scaling: Rule) -> float:
    """E w^4 / (E w^2)^2 - 1 of a weight."""
    return {"uniform": 0.8, "truncated_normal": 1.0634}.get(scaling.distribution, 2.0)


def _parameter_gradients(stack: Stack, batch: int) -> tuple[Array, Array]:
    """ln q of dL/dW and of dL/db, mean and sd, (L, 2) each; L summed over the batch.

    ||dW||^2 = sum_ab (x_a . x_b)(d_a . d_b): B^2 T_x T_d from what inputs have in common, B W_x W_d from the rest.
    """
    x, d = stack.activations, stack.preactivation_gradients
    below = _below(stack.input.mean, x.mean)
    common, rest = (below + d.mean).T
    var = d.ln_second_moment()[:, 1] ** 2
    own = np.zeros(len(var)) if d.is_deterministic else np.sqrt(np.maximum(d.cov[:, 0, 0], 0))
    var += _below(stack.input.ln_second_moment(), x.ln_second_moment())[:, 1] ** 2
    centre = 2 * math.log(batch) + np.logaddexp(common, rest - math.log(max(1, batch - 1)))
    return np.stack([centre, np.sqrt(var)], -1), np.stack([2 * math.log(batch) + d.mean[:, 0], own], -1)


def _below(start: Array, x: Array) -> Array:
    """Of the tensor that enters each layer."""
    return np.concatenate([start, x[:-1]])


# --- simulated laws --------------------------------------------------------------------------------------------------


def _cost(case: Case) -> float:
    """Multiplications of one network, forward and backward, statistics included."""
    return sum(
        case.batch * (layer.fan_in + layer.fan_out) * (20 + 2 * min(layer.fan_in, 2 * case.batch))
        for layer in case.layers
    )


def _affordable(case: Case) -> int:
    """How many networks the budget allows; 0 if they are too few to be of use or the chain does not know the input."""
    networks = int(min(NETWORKS[1], BUDGET * (FLOAT32_IS_FASTER if float32_will_do(case) else 1) / _cost(case)))
    return networks if networks >= NETWORKS[0] and not case.fixed_input else 0


def float32_will_do(case: Case) -> bool:
    """Whether all signals stay well inside its range, six standard deviations included, and inputs apart."""
    for kind in _tensors(case, finite_laws(case)):
        ln_q, spread = kind.law.ln_second_moment().T
        apart = kind.limit.single_input or bool((kind.limit.within_share > 1e-3).all())
        if not apart or not bool((np.abs(ln_q) / 2 + 3 * spread < 60).all()):
            return False
    return True


def trusted(case: Case) -> bool:
    """Whether the closure holds: more width than depth, and no second moment wandering over phi's curved parts."""
    if case.batch == 1 and case.row in (ACTIVATIONS["linear"], ACTIVATIONS["relu"]):
        return True
    at = torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64)
    scale_free = bool((2 * growth(case.row, at) * at / moment(case.row, at) - 2).abs().max() < 1e-9)
    if not _decided(case):
        return False
    if sum(1 / layer.fan_out for layer in case.layers) > (SPREAD if scale_free else SPREAD_WITH_SCALE):
        return False
    return scale_free or bool((finite_laws(case).activations.ln_second_moment()[:, 1] < WANDERS).all())


def _decided(case: Case) -> bool:
    """Whether nearly all networks agree on which layers a fit leaves alone; biases make a fit what it is not here."""
    fitted = [layer.fitted for layer in case.layers]
    if not any(fitted):
        return True
    laws = finite_laws(case)
    enters = _below(laws.input.ln_second_moment(), laws.activations.ln_second_moment())
    for fit, layer, (ln_q, sd) in zip(fitted, case.layers, enters, strict=True):
        if fit is None or layer.bias + layer.uniform_bias:
            return fit is None
        low, high = (ln(fit.drawn * layer.fan_in) + ln_q + k * SURE * sd for k in (-1, 1))
        edges = ln(1 - fit.tolerance), ln(1 + fit.tolerance)
        if any(low <= edge <= high for edge in edges):
            return False
    return True


def _simulated(case: Case, networks: int, seed: int) -> Iterator[Block]:
    limits: dict[tuple[int, str, str], dict[str, Array]] = {}
    for kind in _tensors(case, _infinite(case)):
        for rows in bands(kind.law, kind.limit, case.batch, kind.units):
            for layer, numbers in zip(kind.layers.tolist(), rows.numbers, strict=True):
                limits.setdefault((layer, kind.tensor, kind.direction), {})[rows.statistic] = numbers[:2]
    number = torch.float32 if float32_will_do(case) else torch.float64
    moments = case.q0, case.c0
    found = simulate(case.row, case.layers, case.batch, networks, *moments, case.rule.distribution, seed, number)
    for key, block in found.items():
        for rows in simulated(block, limits[key]):
            yield Block(np.array(key[:1]), *key[1:], rows, "simulation")
