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

from initlab.errors import choose
from initlab.signal.activations import ACTIVATIONS
from initlab.signal.exponent import log2_moments, scaled
from initlab.signal.init import RULES, Rule, draw
from initlab.tasks.beyond import NUMBERS
from initlab.tasks.networks import Shape, name_of, rules_of
from initlab.tasks.place import DTYPES
from initlab.tasks.stack import stack

SCALINGS = ("naive", "small", "lecun", "xavier", "kaiming")
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
    device, backward, progress.
    """
    shape = Shape(depth, width, width if inputs is None else inputs, batch)
    rules, names = rules_of(inits, len(inits)), [name_of(one) for one in inits]
    shares = choose(ACTIVATIONS, activation, "activation").homogeneous
    number = choose(DTYPES, how.get("dtype", "float32"), "dtype")
    scales = [_scales(one, activation, shape, number) for one in rules]
    kept = _scales(RULES["kaiming"], activation, shape, number)[1]
    nearest = sorted(range(len(rules)), key=lambda k: abs(scales[k][1] - kept))  # it stays in range for longest
    bases: dict[object, int] = {}
    families = [
        _family(one, scale, k) if shares else k for k, (one, scale) in enumerate(zip(rules, scales, strict=True))
    ]
    for k in nearest:
        bases.setdefault(families[k], k)
    runs = {k: stack(rules[k], activation, **shape._asdict(), **how)[[*KEYS, *NUMBERS]] for k in bases.values()}
    found = []
    for k, one in enumerate(rules):
        base = bases[families[k]]
        curve = runs[base] if base == k else _moved(runs[base], np.subtract(scales[k], scales[base]), depth)
        label = {"init": names[k], "gain": one.gain_for(activation), "derived_from": "" if base == k else names[base]}
        found.append(curve.assign(**label))
    return pd.concat(found, ignore_index=True)


def _scales(one: Rule, activation: str, shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """log2 of the rms of the weights of layer 1 and of those above it.

    Measured, not taken from the formula: std itself is rounded to float32, in every layer alike.
    """
    drawn = (draw(one, activation, shape.of(layer), [0], layer, dtype)[0] for layer in (1, 2))
    first, other = (float(log2_moments(scaled(w))[0]) for w in drawn)
    return first, other


def _family(one: Rule, scales: tuple[float, float], alone: int) -> object:
    """Rules of one family scale the same random numbers; whoever has biases or no finite scale is alone."""
    return alone if one.bias or not np.isfinite(scales).all() else one.distribution


def _moved(rows: pd.DataFrame, factors: np.ndarray, depth: int) -> pd.DataFrame:
    """Rows times 2^factors: forward one factor per layer up to their own, backward one per layer above it."""
    first, other = factors
    layer = rows["layer"].to_numpy()
    forward = np.where(layer == 0, 0.0, first + (layer - 1) * other)
    shift = np.where(rows["direction"] == "forward", forward, (depth - layer) * other)
    return rows.assign(**{name: rows[name] + shift for name in NUMBERS})
