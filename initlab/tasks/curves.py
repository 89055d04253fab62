"""Every gain from one pass: in a homogeneous stack the scale of the weights is a factor, known without being run.

With phi(k z) = k phi(z) and no biases, weights times c make layer l's signal c^l times as large, and every pattern of
signs the same. Rules that draw the same random numbers and differ in their std only are then one measured curve and
straight lines added to it.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from initlab.nn.custom_activation import Given
from initlab.nn.init import Rule, draw, rule, rule_name
from initlab.nn.unbounded import log2_moments, rescale
from initlab.stats.keys import KEY_COLUMNS, Seeds
from initlab.stats.statistics import TRUE_COLUMNS
from initlab.tasks.ensemble.device import Where
from initlab.tasks.ensemble.networks import Net
from initlab.tasks.stack import stack

SCALINGS = ("naive", "small", "lecun", "xavier", "kaiming")


def gain_curves(
    inits: Sequence[str | Rule] = SCALINGS,
    activation: Given = "relu",
    depth: int = 50,
    width: int = 100,
    inputs: int | None = None,
    batch: int = 200,
    seeds: Seeds = 8,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    generator: str = "philox",
    backward: bool = True,
    progress: bool = False,
) -> pd.DataFrame:
    """`log2_rms_true` and `log2_std_true` of every layer under each rule, from one run of `stack` for all that share.

    inits: rules, by name or as `Rule`; every other parameter is that of `stack`. The column `derived_from` names the
    rule whose run a curve was derived from; it is empty where the rule itself was run: one of those that share their
    random numbers, the one nearest to kaiming, and all that share theirs with none or have another kind of activation.
    A derived curve is the directly measured one to 1e-6 forward; backward too, but where the other rounding of a weight
    moves a preactivation over a kink.

    >>> curves = gain_curves(["naive", "lecun"], "relu", depth=2, width=8, seeds=1)
    >>> curves["derived_from"].unique().tolist()
    ['lecun', '']
    """
    net, where = Net.resolve(activation, depth, width, inputs, batch), Where.resolve(dtype, device, generator)
    rules, names = [rule(one) for one in inits], [rule_name(one) for one in inits]
    scales = [weight_scales(one, net, where) for one in rules]
    kept = math.log2(rule("kaiming").std_for(net.activation, (net.width, net.width)))
    homogeneous = net.activation.homogeneous
    families: list[object] = [  # rules of one family scale the same random numbers
        one.distribution if homogeneous and np.isfinite(both).all() and not one.has_biases and not one.attempts else k
        for k, (one, both) in enumerate(zip(rules, scales, strict=True))
    ]
    bases: dict[object, int] = {}
    for k in sorted(range(len(rules)), key=lambda k: abs(scales[k][1] - kept)):  # the first stays in range for longest
        bases.setdefault(families[k], k)
    shape: dict[str, Any] = {"depth": depth, "width": width, "inputs": inputs, "batch": batch, "seeds": seeds}
    how: dict[str, Any] = {"dtype": where.dtype, "device": where.device, "generator": generator}
    how |= {"backward": backward, "progress": progress}
    runs = {k: stack(rules[k], net.activation, **shape, **how) for k in bases.values()}
    rows = next(iter(runs.values()))  # all have the same keys
    curves = []
    for k, family in enumerate(families):
        base = bases[family]
        logs = np.stack([runs[base][name].to_numpy() for name in TRUE_COLUMNS])
        curves.append(logs if base == k else logs + log2_shift(rows, scales[k], scales[base], depth))
    sources = ["" if bases[family] == k else names[bases[family]] for k, family in enumerate(families)]
    columns: dict[str, Any] = {
        name: pd.Categorical.from_codes(np.tile(rows[name].cat.codes, len(rules)), dtype=rows[name].dtype)
        if isinstance(rows[name].dtype, pd.CategoricalDtype)
        else np.tile(rows[name].to_numpy(), len(rules))
        for name in KEY_COLUMNS
    }
    columns["init"] = pd.Categorical(names, list(dict.fromkeys(names))).repeat(len(rows))
    columns["gain"] = np.repeat([one.gain_for(net.activation) for one in rules], len(rows))
    columns["derived_from"] = pd.Categorical(sources, list(dict.fromkeys(sources))).repeat(len(rows))
    return pd.DataFrame(columns | dict(zip(TRUE_COLUMNS, np.concatenate(curves, 1), strict=True)))


def weight_scales(one: Rule, net: Net, where: Where) -> tuple[float, float]:
    """log2 of the rms of the weights of layer 1 and of those above it.

    Measured, not taken from the formula: std itself is rounded to float32, in every layer alike.
    """
    scales = {}
    for shape in {net.shape(1), net.shape(net.depth)}:
        w, _ = draw(one, net.activation, shape, [0], 1, where.dtype, generator=where.generator)
        scales[shape] = float(log2_moments(rescale(w))[0])
    return scales[net.shape(1)], scales[net.shape(net.depth)]


def log2_shift(rows: pd.DataFrame, a: tuple[float, float], b: tuple[float, float], depth: int) -> np.ndarray:
    """What weights of scales `a` instead of `b` add to log2 of each row, (rows,): forward up to its layer, backward
    above it."""
    first, other = np.subtract(a, b)
    layer = rows["layer"].to_numpy()
    forward = np.where(layer == 0, 0.0, first + (layer - 1) * other)
    return np.where(rows["direction"] == "forward", forward, (depth - layer) * other)
