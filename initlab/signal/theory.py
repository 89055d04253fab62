"""What theory predicts for a stack: every layer, every statistic, at infinite width and with bands at a finite one.

The names are those of the measured table. A stack as `tasks.stack` measures it: a unit-Gaussian batch in, a
unit-Gaussian gradient at the top. Knows rules, activations and laws; no networks are built but in simulated laws.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import pandas as pd
import torch

from initlab.errors import UsageError
from initlab.signal.activations import ACTIVATIONS
from initlab.signal.bands import IN_LN, Band, bands, means, scaled, simulated
from initlab.signal.case import Case, case_of
from initlab.signal.custom import Given, name_of, numerical
from initlab.signal.finite_width import linear_batch, linear_one_input, lognormal, relu_one_input
from initlab.signal.gradients import Stack, laws
from initlab.signal.gram_chain import simulate
from initlab.signal.init import Rule
from initlab.signal.laws import Law, Moments
from initlab.signal.maps import growth, moment

METHODS = {
    "auto": "closed laws where they hold, simulation elsewhere if it costs seconds; `method` says what was done",
    "closed": "exact laws where there are some, else the lognormal closure",
    "simulation": "networks drawn from the exact law of the stack",
}
SPREAD = 1.0  # sum of 1/width up to which `auto` trusts the closure where phi is homogeneous
SPREAD_WITH_SCALE = 0.6  # the same where phi has a scale of its own
WANDERS = 0.3  # standard deviation of ln q over networks up to which an activation with a scale is trusted too
BUDGET = 4e10  # multiplications that `auto` spends on a simulation
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
    long = predict_bands(init, activation, depth, width, **options)
    rows: dict[tuple[int, str, str], dict[str, Any]] = {}
    for (*key, band), said, slope in zip(_bands_of(long), long["method"], long["slope"], strict=True):
        row = rows.setdefault(tuple(key), dict(zip(_COLUMNS, key, strict=False)))  # type: ignore[arg-type]
        name = band.statistic
        row[name] = band.predicted
        if band.scale == "ln":
            row |= {f"ln_{name}": band.ln_predicted, f"ln_{name}_mean": band.mean, f"ln_{name}_sd": band.sd}
        if name == "std":
            row |= {edge: getattr(band, edge) for edge in EDGES} | {"method": said, "slope": slope}
    found = pd.DataFrame(list(rows.values())).assign(dtype=dtype)
    return found.sort_values(["layer", "tensor", "direction"], ignore_index=True)


EDGES = ("band68_low", "band68_high", "band_low", "band_high")


def _bands_of(long: pd.DataFrame) -> Iterator[tuple[int, str, str, Band]]:
    fields = [long[name].tolist() for name in _COLUMNS[:-1]]
    for layer, tensor, direction, *band in zip(*fields, strict=True):
        yield layer, tensor, direction, Band(*band)


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
    **rule_fields: Any,
) -> pd.DataFrame:
    """One row per layer, tensor, direction and statistic, with the fields of `bands.Band`, `method` and `slope`.

    `widths` gives every layer's units and replaces depth and width; `inputs` the input's. The input has second moment
    q0 and mean cosine c0, is drawn for each network or, if `fixed_input`, is one batch of just these moments. `sb2`
    adds normal biases of this variance. `mode`, `gain`, `gain_kind`, `distribution` and `bias` replace the rule's own.
    `method`: auto, closed or simulation, the last with so many `networks` and this `seed`.
    """
    case = case_of(init, activation, depth, width, widths, inputs, batch, q0, c0, fixed_input, sb2, rule_fields)
    if method not in METHODS:
        raise UsageError(f"method={method}: must be one of {', '.join(METHODS)}")
    if networks is not None and networks < 2:
        raise UsageError(f"networks={networks}: must be at least 2")
    shaky = method != "simulation" and not trusted(case)
    if method == "simulation" or (method == "auto" and shaky and _affordable(case)):
        rows = list(_simulated(case, networks or _affordable(case) or NETWORKS[0], seed))
    else:
        rows = list(_closed(case, "log-delta, outside its range" if shaky else "log-delta"))
    frame = pd.DataFrame([(*key, *band, said) for key, band, said in rows], columns=_COLUMNS)
    return frame.assign(
        activation=name_of(activation), slope="numerical derivative" if numerical(case.row) else "given"
    )


def stack_laws(
    init: str | Rule, activation: Given, depth: int, width: int, **options: Any
) -> tuple[list[Law], list[int], int]:
    """Laws of the preactivations, their widths, and the batch, for options as in `predict_bands`."""
    names = ("widths", "inputs", "batch", "q0", "c0", "fixed_input", "sb2")
    own = {"widths": None, "inputs": None, "batch": 200, "q0": 1.0, "c0": 0.0, "fixed_input": False, "sb2": 0.0}
    fields = {name: value for name, value in options.items() if name not in (*names, "method")}
    given = {**own, **{name: value for name, value in options.items() if name in names}}
    case = case_of(init, activation, depth, width, rule_fields=fields, **given)
    return finite_laws(case).preactivations, case.widths[1:], case.batch


_COLUMNS = ["layer", "tensor", "direction", *Band._fields, "method"]
_Row = tuple[tuple[int, str, str], Band, str]


# --- closed laws -----------------------------------------------------------------------------------------------------


def _tensors(stack: Stack, widths: Sequence[int]) -> Iterator[tuple[tuple[int, str, str], Law, int]]:
    """Every tensor of a stack with its key and its number of units, in the order of the measured table."""
    yield (0, "activation", "forward"), stack.activations[0], widths[0]
    for layer in range(1, len(widths)):
        n = widths[layer]
        yield (layer, "preactivation", "forward"), stack.preactivations[layer - 1], n
        yield (layer, "activation", "forward"), stack.activations[layer], n
        yield (layer, "activation", "backward"), stack.activation_gradients[layer - 1], n
        yield (layer, "preactivation", "backward"), stack.preactivation_gradients[layer - 1], n


@lru_cache(maxsize=32)
def _infinite(case: Case) -> Stack:
    return laws(case.row, case.layers, case.batch, case.q0, case.c0, case.fixed_input, infinite=True)


@lru_cache(maxsize=32)
def finite_laws(case: Case) -> Stack:
    """The laws at finite width."""
    return laws(case.row, case.layers, case.batch, case.q0, case.c0, case.fixed_input)


def _closed(case: Case, otherwise: str) -> Iterator[_Row]:
    better = _exact(case)
    finite = list(_tensors(finite_laws(case), case.widths))
    limits = [limit for _, limit, _ in _tensors(_infinite(case), case.widths)]
    seconds = [better[key][0] if key in better else law.ln_second_moment() for key, law, _ in finite]
    pooled = means([law for _, law, _ in finite], limits, seconds)
    for (key, law, n), limit, second, mean in zip(finite, limits, seconds, pooled, strict=True):
        said = better[key][1] if key in better else otherwise
        for band in (*bands(law, limit, case.batch, n, second), mean):
            yield key, band, said if band.statistic in IN_LN and band.statistic != "std_within" else otherwise
    yield from _parameters(case)


def _exact(case: Case) -> dict[tuple[int, str, str], tuple[Moments, str]]:
    """Laws of ln q that are known better: linear stacks, and ReLU with one input; normal weights and no biases."""
    plain = not any(layer.orthogonal or layer.bias or layer.uniform_bias for layer in case.layers)
    if not plain or case.c0 or case.fixed_input:
        return {}
    limits = {key: law.ln_q for key, law, _ in _tensors(_infinite(case), case.widths)}
    widths, alone = case.widths, case.batch == 1
    linear, relu = (case.row is ACTIVATIONS[name] for name in ("linear", "relu"))
    found: dict[tuple[int, str, str], tuple[Moments, str]] = {}
    if linear and not alone:
        for layer, relative in enumerate(linear_batch(widths, case.batch)):
            for tensor in ("activation", "preactivation") if layer else ("activation",):
                mean, sd = lognormal(float(relative))
                key = (layer, tensor, "forward")
                found[key] = (limits[key] + mean, sd), "linear-batch"
    elif alone and (linear or relu):
        of = linear_one_input if linear else relu_one_input
        start = linear_one_input([1, widths[0]])
        for layer in range(1, len(widths)):
            for tensor, last in (("activation", of), ("preactivation", linear_one_input)):
                parts = [start, of(widths[:layer]), last(widths[layer - 1 : layer + 1])]
                key = (layer, tensor, "forward")
                law = limits[key] + sum(m for m, _ in parts), math.sqrt(sum(s * s for _, s in parts))
                found[key] = law, "exact-linear" if linear else "exact-relu"
    return found


def _parameters(case: Case) -> Iterator[_Row]:
    """Weights and biases themselves, and the gradients of the sum over the batch with respect to them."""
    infinite, finite = _infinite(case), finite_laws(case)
    for k, layer in enumerate(case.layers):
        count = layer.fan_in * layer.fan_out
        noise = 0.0 if layer.orthogonal else _fourth(case.rule) / count
        size = math.log(layer.weight) if layer.weight else -math.inf
        for band in scaled(size, size - noise / 2, math.sqrt(noise), count):
            yield (k + 1, "weight", "forward"), band, "log-delta"
        bias = layer.bias + layer.uniform_bias
        if bias:
            spread = math.sqrt((2 if layer.bias else 0.8) / layer.fan_out)
            for band in scaled(math.log(bias), math.log(bias) - spread**2 / 2, spread, layer.fan_out):
                yield (k + 1, "bias", "forward"), band, "log-delta"
        limits = _parameter_gradients(infinite.activations[k], infinite.preactivation_gradients[k], case.batch)
        found = _parameter_gradients(finite.activations[k], finite.preactivation_gradients[k], case.batch)
        for tensor, limit, law, n in (
            ("weight", limits[0], found[0], count),
            ("bias", limits[1], found[1], layer.fan_out),
        ):
            for band in scaled(limit[0], *law, n):
                yield (k + 1, tensor, "backward"), band, "log-delta"


def _fourth(scaling: Rule) -> float:
    """E w^4 / (E w^2)^2 - 1 of a weight."""
    return {"uniform": 0.8, "truncated_normal": 1.0634}.get(scaling.distribution, 2.0)


def _parameter_gradients(x: Law, d: Law, batch: int) -> tuple[Moments, Moments]:
    """ln q of dL/dW and of dL/db, L summed over the batch.

    ||dW||^2 = sum_ab (x_a . x_b)(d_a . d_b): B^2 T_x T_d from what inputs have in common, B W_x W_d from the rest.
    """
    rest = (x.mean[1] + d.mean[1]) - (0 if x.alone else math.log(batch - 1))
    centre = 2 * math.log(batch) + float(_sum(x.mean[0] + d.mean[0], rest))
    spreads = [0.0 if law.certain else law.ln_second_moment()[1] ** 2 for law in (x, d)]
    own = 0.0 if d.certain else math.sqrt(max(0.0, d.cov[0, 0]))
    return (centre, math.sqrt(sum(spreads))), (2 * math.log(batch) + float(d.mean[0]), own)


def _sum(a: float, b: float) -> float:
    high = max(a, b)
    return high if high == -math.inf else high + math.log(math.exp(a - high) + math.exp(b - high))


# --- simulated laws --------------------------------------------------------------------------------------------------


def _cost(case: Case) -> float:
    """Multiplications of one network, forward and backward, statistics included."""
    return sum(
        case.batch * (layer.fan_in + layer.fan_out) * (20 + 2 * min(layer.fan_in, 2 * case.batch))
        for layer in case.layers
    )


def _affordable(case: Case) -> int:
    """How many networks the budget allows; 0 if they are too few to be of use or the chain does not know the input."""
    networks = int(min(NETWORKS[1], BUDGET / _cost(case)))
    return networks if networks >= NETWORKS[0] and not case.fixed_input else 0


def trusted(case: Case) -> bool:
    """Whether the closure holds: more width than depth, and no second moment wandering over phi's curved parts."""
    if case.batch == 1 and case.row in (ACTIVATIONS["linear"], ACTIVATIONS["relu"]):
        return True
    at = torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64)
    scale_free = bool((2 * growth(case.row, at) * at / moment(case.row, at) - 2).abs().max() < 1e-9)
    if sum(1 / layer.fan_out for layer in case.layers) > (SPREAD if scale_free else SPREAD_WITH_SCALE):
        return False
    return scale_free or all(law.ln_second_moment()[1] < WANDERS for law in finite_laws(case).activations)


def _simulated(case: Case, networks: int, seed: int) -> Iterator[_Row]:
    limits: dict[tuple[int, str, str], dict[str, tuple[float, float]]] = {}
    tensors = list(_tensors(_infinite(case), case.widths))
    certain = [law for _, law, _ in tensors]
    pooled = means(certain, certain, [law.ln_second_moment() for law in certain])
    for (key, law, n), mean in zip(tensors, pooled, strict=True):
        every = (*bands(law, law, case.batch, n), mean)
        limits[key] = {band.statistic: (band.predicted, band.ln_predicted) for band in every}
    found = simulate(case.row, case.layers, case.batch, networks, case.q0, case.c0, case.rule.distribution, seed)
    for key, block in found.items():
        for band in simulated(block, limits[key]):
            yield key, band, "simulation"
    yield from _parameters(case)
