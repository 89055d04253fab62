"""Every gain from one pass: in a homogeneous stack the scale of the weights is a factor, known without being run.

With phi(k z) = k phi(z) and no biases, weights times c make layer l's signal c^l times as large, and every pattern of
signs the same. Rules that draw the same random numbers and differ in their std alone are then one measured curve and
straight lines added to it. Knows nothing of what a number format does to the signal: that is what `stack` measures.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from initlab.errors import choose
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import RULES, Rule, draw
from initlab.nn.unbounded import log2_moments, scaled
from initlab.stats.dtypes import resolve_dtype
from initlab.stats.summarize import FIELDS, compiled, summarize
from initlab.tasks.ensemble.networks import Shape, name_of, rules_of
from initlab.tasks.ensemble.unbounded_twin import NUMBERS
from initlab.tasks.stack import stack

SCALINGS = ("naive", "small", "lecun", "xavier", "kaiming")
_COUNT, _MEAN, _M2 = (list(FIELDS).index(name) for name in ("count", "mean", "m2"))  # between them are counts
KEYS = ["stage", "implementation", "seed", "step", "layer", "tensor", "direction"]


def gain_curves(
    inits: Sequence[str | Rule] = SCALINGS,
    activation: str = "relu",
    depth: int = 50,
    width: int = 100,
    inputs: int | None = None,
    batch: int = 200,
    **how: Any,
) -> pd.DataFrame:
    """`log2_rms_true` and `log2_std_true` of every layer under each rule, from one run of `stack` for all that share.

    The column `derived_from` names the rule whose run a curve was derived from; it is empty where the rule itself was
    run: one of those that share their random numbers, the one nearest to kaiming, and all that share theirs with none
    or have another kind of activation. A derived curve is the directly measured one to 1e-6 forward; backward too, but
    where the other rounding of a weight moves a preactivation over a kink. `how` goes to `stack`: seeds, dtype,
    device, backward, progress. Only what rms and std need is measured.
    """
    shape = Shape(depth, width, width if inputs is None else inputs, batch)
    rules, names = rules_of(inits, len(inits)), [name_of(one) for one in inits]
    shares = choose(ACTIVATIONS, activation, "activation").homogeneous
    number = resolve_dtype(how.get("dtype", "float32"))
    scales = [_scales(one, activation, shape, number) for one in rules]
    kept = _scales(RULES["kaiming"], activation, shape, number)[1]
    nearest = sorted(range(len(rules)), key=lambda k: abs(scales[k][1] - kept))  # it stays in range for longest
    bases: dict[object, int] = {}
    families = [
        _family(one, scale, k) if shares else k for k, (one, scale) in enumerate(zip(rules, scales, strict=True))
    ]
    for k in nearest:
        bases.setdefault(families[k], k)
    on_cpu = how.get("device", "cpu") == "cpu"
    compiles = on_cpu and compiled(torch.empty(1, 1, dtype=number))  # then whole rows cost less than these
    how["producer"] = summarize if number == torch.float64 or compiles else _sizes
    runs = {k: stack(rules[k], activation, **shape._asdict(), **how) for k in bases.values()}
    rows = next(iter(runs.values()))  # all have the same keys
    logs = {k: np.stack([frame[name].to_numpy() for name in NUMBERS]) for k, frame in runs.items()}
    ran_by = [bases[family] for family in families]
    curves = [
        logs[base] + (0.0 if base == k else _shift(rows, scales[k], scales[base], depth))
        for k, base in enumerate(ran_by)  # whoever ran itself may have a scale that is no finite number
    ]
    sources = ["" if base == k else names[base] for k, base in enumerate(ran_by)]
    columns = {name: _tiled(rows[name], len(rules)) for name in KEYS} | {
        "init": _repeated(names, len(rows)),
        "gain": np.repeat([one.gain_for(activation) for one in rules], len(rows)),
        "derived_from": _repeated(sources, len(rows)),
    }
    return pd.DataFrame(columns | dict(zip(NUMBERS, np.concatenate(curves, 1), strict=True)))


def _tiled(column: pd.Series, times: int) -> np.ndarray | pd.Categorical:
    if isinstance(column.dtype, pd.CategoricalDtype):
        return pd.Categorical.from_codes(np.tile(column.cat.codes, times), dtype=column.dtype)
    return np.tile(column.to_numpy(), times)


def _repeated(words: Sequence[str], times: int) -> pd.Categorical:
    codes, found = pd.factorize(np.array(words, dtype=object))
    return pd.Categorical.from_codes(np.repeat(codes, times), list(found))


def _sizes(x: Tensor) -> Tensor:
    """The row of (..., N, C) as far as rms and std need it; squares must not leave float64.

    Nothing is counted: an entry that is not finite shows in the mean.
    """
    wide, sides = x.to(torch.float64, copy=True), (-2, -1)
    row = wide.new_full((len(FIELDS), *x.shape[:-2]), torch.nan)
    row[:_MEAN] = 0.0
    row[_COUNT] = wide.shape[-2] * wide.shape[-1]
    mean = wide.mean(sides, keepdim=True)
    row[_MEAN], row[_M2] = mean[..., 0, 0], torch.linalg.vector_norm(wide.sub_(mean), dim=sides).square()
    return row


def _scales(one: Rule, activation: str, shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """log2 of the rms of the weights of layer 1 and of those above it.

    Measured, not taken from the formula: std itself is rounded to float32, in every layer alike.
    """
    drawn = (draw(one, activation, shape.of(layer), [0], layer, dtype)[0] for layer in (1, 2))
    first, other = (float(log2_moments(scaled(w))[0]) for w in drawn)
    return first, other


def _family(one: Rule, scales: tuple[float, float], alone: int) -> object:
    """Rules of one family scale the same random numbers; whoever has biases, no finite scale or asks data is alone."""
    return alone if one.bias or one.attempts or not np.isfinite(scales).all() else one.distribution


def _shift(rows: pd.DataFrame, ours: tuple[float, float], theirs: tuple[float, float], depth: int) -> np.ndarray:
    """What other scales of the weights add to log2 of each row, (rows,): forward up to its layer, backward above."""
    first, other = np.subtract(ours, theirs)
    layer = rows["layer"].to_numpy()
    forward = np.where(layer == 0, 0.0, first + (layer - 1) * other)
    return np.where(rows["direction"] == "forward", forward, (depth - layer) * other)
