"""What theory predicts for a stack: every layer and statistic, at its own width with bands, and at infinite width.

The stack is the one that `tasks.stack` measures: a unit-Gaussian batch enters, a unit-Gaussian gradient comes from the
top. Names are those of the measured table.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from initlab.errors import check, choose, library_call
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.custom_activation import Given, name_of, slope_source
from initlab.nn.init import Rule
from initlab.stats.keys import TENSOR_COLUMNS, LayerTensor
from initlab.stats.statistics import IN_LN
from initlab.theory.bands import NUMBERS, Rows, TensorBands, bands, correlate_sizes, frame, sample_numbers, size_bands
from initlab.theory.batch_law import Array, Moments, ln
from initlab.theory.exact import linear_batch, linear_one_input, lognormal, relu_one_input
from initlab.theory.lsuv_law import fit_noise, ln_weight
from initlab.theory.method import (
    METHODS,
    NETWORKS,
    REPRESENTATIVES,
    Level,
    Trust,
    choose_networks,
    fits_float32,
)
from initlab.theory.quantiles import NO_LAW, OUTSIDE
from initlab.theory.request import Request, parse_request
from initlab.theory.sample import IN_ORDER, Sample
from initlab.theory.simulate import simulate
from initlab.theory.stack_laws import enter_layers, finite_laws, limit_laws, tensor_kinds
from initlab.theory.tensor_law import StackLaws

_KEYS = list(TENSOR_COLUMNS)
_UNKNOWN = np.array([np.nan])
CLOSURE = "log-delta"


@library_call
def predict(
    init: str | Rule = "kaiming",
    activation: Given = "relu",
    depth: int = 50,
    width: int = 100,
    *,
    wide: bool = False,
    method: str = "auto",
    networks: int | None = None,
    seed: int = 0,
    **options: Any,
) -> pd.DataFrame:
    """Predict every statistic of every tensor of a stack, with the bands that hold 68 and 95 % of all networks.

    init: a rule's name or a `Rule`; its fields (gain, mode, distribution, sigma_b, ...) can be given as options.
    activation: a name of the table, or an elementwise function. depth, width: layers, and units of each.
    wide: one row per tensor instead of one per statistic, see below. method: auto, closed (formulas) or simulation.
    networks, seed: how many networks a simulation draws, and from which seed.
    Further options: widths (units of each layer, replaces depth and width), inputs (units of the input, `width` unless
    given), batch (number of inputs, 200), q0 and c0 (second moment and mean cosine of the inputs, 1 and 0), fixed_input
    (the batch has just these moments instead of being drawn anew for each network), data (how such batches wander, a
    `forward_law.BatchVariation`), outputs (the last layer is that of a trained network, as `mup` draws it),
    input_gradient (rows of the gradient at the input too: activation, layer 0, backward).

    Returns a row per layer, tensor, direction and statistic, in the words of a run's table `theory`: `predicted` is the
    median at this width, `band_low` to `band_high` hold 95 % of the networks, `band68_low` to `band68_high` 68 %,
    `limit` is infinite width. `mean` and `sd` are those of ln of the statistic where `scale` is ln, else of itself.
    `rho` is the correlation over networks of ln std with that of the same tensor one layer before, in the direction of
    travel. `method` says where the numbers come from, `slope` where phi' does: given, autograd or numerical derivative.
    With `wide` a row per layer, tensor and direction: for every statistic S the columns S (its median at this width),
    S_low, S_high (95 %) and S_limit, and, for those on a ln scale, ln_S_mean, ln_S_sd and ln_S_limit.

    Raises UsageError for what cannot be asked. Sources: see `meanfield.maps`, `theory.exact`, `theory.forward_law`.

    >>> table = predict("kaiming", "relu", depth=50, width=100, wide=True)
    >>> last = table[(table["layer"] == 50) & (table["tensor"] == "activation") & (table["direction"] == "forward")]
    >>> round(last["std"].item(), 2), round(last["std_limit"].item(), 2)
    (0.48, 0.83)
    """
    seed, wide = check(seed=seed, wide=wide)
    choose(METHODS, method, "method")
    [networks] = check(networks=networks)
    request = parse_request(init, activation, depth, width, **options)
    long = frame(_blocks(request, method, networks, seed)).assign(
        activation=name_of(activation), slope=slope_source(request.row)
    )
    return _pivot(long) if wide else long


def _pivot(long: pd.DataFrame) -> pd.DataFrame:
    """One row per tensor, with the columns of `predict(wide=True)`."""
    sources = {"": "predicted", "_low": "band_low", "_high": "band_high", "_limit": "limit"}
    by = [*_KEYS, "activation", "slope"]
    table = long.groupby(by, sort=False, observed=True)["method"].first().reset_index()
    for name in (name for name in IN_ORDER if name in set(long["statistic"])):
        columns = {f"{name}{end}": source for end, source in sources.items()}
        if name in IN_LN:
            columns |= {
                f"ln_{name}_{end}": source for end, source in (("mean", "mean"), ("sd", "sd"), ("limit", "ln_limit"))
            }
        rows = long[long["statistic"] == name]
        table = table.merge(rows[_KEYS].assign(**{new: rows[old] for new, old in columns.items()}), "left", _KEYS)
    return table


# --- closed laws -----------------------------------------------------------------------------------------------------


def _blocks(request: Request, method: str, networks: int | None, seed: int) -> list[TensorBands]:
    """All rows of a prediction: by closed laws, where these do not hold from simulated networks, or without a band."""
    trust = Trust(request)
    blocks = [*_closed_blocks(request, trust), *_parameter_blocks(request, trust)]
    if method == "closed":
        return blocks
    every = method == "simulation"
    wanted = Level.HOLDS + every
    fitted = any(layer.fitted for layer in request.layers)  # to what the whole batch is
    inputs = request.batch if every or fitted else min(request.batch, REPRESENTATIVES)
    samples: dict[LayerTensor, Sample] = {}
    if (every or any((block.trust == Level.NEVER).any() for block in blocks)) and not request.fixed_input:
        networks = networks or choose_networks(request, inputs) or (NETWORKS[0] if every else 0)
        if networks:
            due: dict[tuple[str, str], set[str]] = {}
            for block in blocks:
                doubtful = (block.trust > Level.ROUNDED) & (block.trust < wanted)
                if doubtful.any():
                    due.setdefault((block.tensor, block.direction), {"std"}).add(block.rows.statistic)
            number = torch.float32 if fits_float32(request) else torch.float64
            how = request.q0, request.c0, request.distribution, seed, number, inputs, due
            samples = simulate(request.row, request.layers, request.batch, networks, *how, request.input_gradient)
    label = "simulation" if inputs == request.batch else f"simulation, {inputs} inputs"
    return [_replace_doubtful(block, samples, wanted, label) for block in blocks]


def _replace_doubtful(block: TensorBands, samples: dict[LayerTensor, Sample], wanted: int, label: str) -> TensorBands:
    """Rows of less trust than `wanted` from samples; where there are none as they are, or without a band."""
    numbers, method, rho = block.rows.numbers.copy(), list(block.method), block.rho.copy()
    step = -1 if block.direction == "forward" else 1
    name = block.rows.statistic
    at = IN_ORDER.index(name)
    for k, (layer, trust) in enumerate(zip(block.layers.tolist(), block.trust.tolist(), strict=True)):
        if trust >= wanted or (trust == Level.IF_NEEDED and numbers[k, NUMBERS.index("sd")] == 0):
            continue  # a signal that is gone does not vary
        sample = samples.get((layer, block.tensor, block.direction))
        if sample is not None and trust > Level.ROUNDED and sample.is_known(name):
            numbers[k, 2:] = sample_numbers(name, sample.values[at].numpy())
            method[k] = label
            before = samples.get((layer + step, block.tensor, block.direction))
            rho[k] = np.nan
            if before is not None and before.is_known("std") and _has_rho(name):
                rho[k] = correlate_sizes(sample.values, before.values)
        elif trust <= Level.NEVER:
            numbers[k, 2:], method[k], rho[k] = np.nan, NO_LAW, np.nan
    return block._replace(rows=Rows(name, numbers), method=method, rho=rho)


def _name_closure(trust: NDArray[np.int64]) -> list[str]:
    """The column `method` of rows of the closure at these levels of trust."""
    return [CLOSURE if level > Level.NEVER else f"{CLOSURE}, {OUTSIDE}" for level in trust.tolist()]


def _has_rho(statistic: str) -> bool:
    return statistic in IN_LN and statistic != "std_within"


def _closed_blocks(request: Request, trust: Trust) -> Iterator[TensorBands]:
    for kind in tensor_kinds(request, finite_laws(request)):
        second, better = kind.law.ln_second_moment(), [""] * len(kind.layers)
        if kind.direction == "forward":
            limits = kind.limit.ln_q
            for k, layer in enumerate(kind.layers.tolist()):
                known = _exact_law(request, layer, kind.tensor)
                if known:
                    (shift, sd), better[k] = known
                    second[k] = limits[k] + shift, sd
        for rows in bands(kind.law, kind.limit, request.batch, kind.units, second):
            sure = trust.judge_rows(kind, rows.statistic, rows.numbers[:, 4])
            exact = better if _has_rho(rows.statistic) else [""] * len(sure)
            sure = np.where([bool(one) for one in exact], Level.HOLDS, sure)
            method = [one or closed for one, closed in zip(exact, _name_closure(sure), strict=True)]
            rho = kind.law.rho if _has_rho(rows.statistic) else _UNKNOWN
            rho = np.broadcast_to(rho, len(sure))
            yield TensorBands(kind.layers, kind.tensor, kind.direction, rows, method, rho, sure)


def _exact_law(request: Request, layer: int, tensor: str) -> tuple[Moments, str] | None:
    """Law of ln q over its limit where it is known better: linear stacks, and ReLU with one input.

    Normal weights and no biases.
    """
    relu = request.row is ACTIVATIONS["relu"]
    if request.c0 or request.fixed_input or not (relu or request.row is ACTIVATIONS["linear"]):
        return None
    if any(one.orthogonal or one.bias or one.uniform_bias for one in request.layers[:1]):
        return None
    if request.batch > 1:
        return None if relu else (lognormal(_linear_batch(tuple(request.widths), request.batch)[layer]), "linear-batch")
    if not layer:
        return None
    widths, of = tuple(request.widths), relu_one_input if relu else linear_one_input
    last = of if tensor == "activation" else linear_one_input
    parts = linear_one_input([1, widths[0]]), of(widths[:layer]), last(widths[layer - 1 : layer + 1])
    law = sum(m for m, _ in parts), math.sqrt(sum(s * s for _, s in parts))
    return law, "exact-relu" if relu else "exact-linear"


_linear_batch = lru_cache(maxsize=32)(linear_batch)


def _parameter_blocks(request: Request, trust: Trust) -> Iterator[TensorBands]:
    """Weights and biases themselves, and the gradients of the sum over the batch with respect to them."""
    every = np.arange(1, len(request.widths))
    i, o = (np.array([getattr(layer, name) for layer in request.layers], dtype=float) for name in ("fan_in", "fan_out"))

    def blocks(tensor: str, direction: str, limit: Array, law: Array, count: Array) -> Iterator[TensorBands]:
        sure = trust.judge_parameters(direction)
        for rows in size_bands(limit, law, count):
            yield TensorBands(every, tensor, direction, rows, _name_closure(sure), np.full(len(every), np.nan), sure)

    excess = {"uniform": 0.8, "truncated_normal": 1.0634}.get(request.distribution, 2.0)  # E w^4 / (E w^2)^2 - 1
    noise = 0 / i if request.layers[0].orthogonal else excess / (i * o)
    size = np.array([ln(layer.weight) for layer in request.layers])
    law = np.stack([size - noise / 2, np.sqrt(noise)], -1)
    rescaled = np.array([layer.is_rescaled for layer in request.layers])
    if rescaled.any():
        # the larger its input, the smaller a weight becomes
        x = finite_laws(request)
        entering = enter_layers(x.input.ln_second_moment(), x.activations.ln_second_moment())
        inputs = list(zip(request.layers, [*x.input.split(), *x.activations.split()], strict=False))
        own = np.array([fit_noise(layer, one.mean[0], float(one.pair[0]), request.batch) for layer, one in inputs])
        centre = np.concatenate([ln_weight(layer, one.mean) for layer, one in inputs])
        law[rescaled] = np.stack([centre + own / 2, np.sqrt(entering[:, 1] ** 2 + own)], -1)[rescaled]
    yield from blocks("weight", "forward", size, law, i * o)
    bias = np.array([ln(layer.bias + layer.uniform_bias) for layer in request.layers])
    if np.isfinite(bias).all():
        var = (2 if request.layers[0].bias else 0.8) / o
        yield from blocks("bias", "forward", bias, np.stack([bias - var / 2, np.sqrt(var)], -1), o)
    limits = _parameter_gradients(limit_laws(request), request.batch)
    found = _parameter_gradients(finite_laws(request), request.batch)
    for tensor, limit, law, count in zip(("weight", "bias"), limits, found, (i * o, o), strict=True):
        yield from blocks(tensor, "backward", limit[:, 0], law, count)


def _parameter_gradients(stack: StackLaws, batch: int) -> tuple[Array, Array]:
    """ln q of dL/dW and of dL/db, mean and sd, (L, 2) each; L summed over the batch.

    ||dW||^2 = sum_ab (x_a . x_b)(d_a . d_b): B^2 T_x T_d from what inputs have in common, B W_x W_d from the rest.
    """
    x, d = stack.activations, stack.preactivation_gradients
    below = enter_layers(stack.input.mean, x.mean)
    common, rest = (below + d.mean).T
    var = d.ln_second_moment()[:, 1] ** 2
    own = np.zeros(len(var)) if d.is_deterministic else np.sqrt(np.maximum(d.cov[:, 0, 0], 0))
    var += enter_layers(stack.input.ln_second_moment(), x.ln_second_moment())[:, 1] ** 2
    centre = 2 * math.log(batch) + np.logaddexp(common, rest - math.log(max(1, batch - 1)))
    return np.stack([centre, np.sqrt(var)], -1), np.stack([2 * math.log(batch) + d.mean[:, 0], own], -1)
