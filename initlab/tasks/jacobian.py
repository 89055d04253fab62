"""The singular values of a stack from its input to every layer, measured at one input of each network, beside theory.

They say what becomes of small differences and of gradients in every direction at once; second moments say it on
average alone. In arithmetic without a range, from the weights of the stack's own number format.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import Tensor
from tqdm import tqdm

from initlab.errors import check, choose
from initlab.nn.activations import ACTIVATIONS
from initlab.nn.init import Rule
from initlab.stats.dtypes import resolve_dtype
from initlab.tasks.ensemble.device import find_device
from initlab.tasks.ensemble.networks import CACHED, Networks, Shape, rules_of
from initlab.theory.request import parse_request
from initlab.theory.singular_values import jacobians, log2_power_sums, predict_moments, singular_values

Frames = dict[str, pd.DataFrame]


def jacobian(
    init: str | Rule = "kaiming",
    activation: str = "relu",
    depth: int = 50,
    width: int = 100,
    inputs: int | None = None,
    batch: int = 200,
    seeds: Sequence[int] = range(8),
    dtype: str = "float32",
    device: str = "cpu",
    generator: str = "torch",
    progress: bool = False,
) -> Frames:
    """`jacobian`: mean and variance of the squared singular values s^2 of every layer, measured and predicted;
    `singular_values`: all of them, at layers 1, 2, 5, 10, 20, 50, ... and the last.

    At the first input of each network's batch; `batch` matters to a rule that is fitted to data alone. A difference
    of a network's mean of s^2 to the prediction, which is one over all networks, is spread and not an error.
    """
    shape = Shape(depth, width, width if inputs is None else inputs, batch)
    check(depth=depth, width=width, batch=batch, inputs=shape.inputs, seeds=len(seeds))
    row, number, place = (
        choose(ACTIVATIONS, activation, "activation"),
        resolve_dtype(dtype),
        find_device(device),
    )
    rule = rules_of(init, 1)[0]
    sums, spectra = [], []
    with tqdm(total=depth * len(seeds), desc="jacobian", unit="layer", disable=None if progress else True) as bar:
        for group in (seeds[start : start + CACHED] for start in range(0, len(seeds), CACHED)):
            nets = Networks([rule] * len(group), activation, shape, group, number, place, generator=generator)
            x = nets.gaussian(shape.inputs, "input")[:, :1]
            layers = (nets.weights(layer) for layer in range(1, depth + 1))
            for layer, found in enumerate(jacobians(layers, x, row), start=1):
                sums.append(_sums(layer, group, log2_power_sums(found), min(shape.inputs, width)))
                if layer in shown(depth):
                    spectra.append(_spectrum(layer, group, singular_values(found)))
                bar.update(len(group))
    theory = predict_moments(parse_request(rule, activation, depth, width, inputs=shape.inputs, batch=1))
    moments = pd.concat(sums, ignore_index=True).merge(theory, on="layer")
    return {
        name: frame.sort_values(["seed", *keys], ignore_index=True)
        for name, frame, keys in (
            ("jacobian", moments, ["layer"]),
            ("singular_values", pd.concat(spectra, ignore_index=True), ["layer", "rank"]),
        )
    }


def shown(depth: int) -> list[int]:
    """Layers whose singular values are kept: 1, 2, 5, 10, ... and the last.

    >>> shown(30)
    [1, 2, 5, 10, 20, 30]
    """
    steps = [k * 10**power for power in range(len(str(depth))) for k in (1, 2, 5)]
    return [*(layer for layer in steps if layer < depth), depth]


def _sums(layer: int, seeds: Sequence[int], log2: Tensor, count: int) -> pd.DataFrame:
    means = log2.cpu().numpy() - np.log2(count)
    with np.errstate(over="ignore", invalid="ignore"):
        s2, s4 = np.exp2(means)
        apart = np.exp2(means[1] - 2 * means[0]) - 1  # relative variance: what is left where s^4 leaves float64
        return pd.DataFrame(
            {
                "seed": list(seeds), "layer": layer, "log2_mean_s2": means[0], "mean_s2": s2, "mean_s4": s4,
                "var_s2": np.where(s2 > 0, np.maximum(apart, 0) * s2**2, 0.0),
            }
        )  # fmt: skip


def _spectrum(layer: int, seeds: Sequence[int], log2: Tensor) -> pd.DataFrame:
    count = log2.shape[-1]
    logs = log2.cpu().numpy().reshape(-1)
    with np.errstate(over="ignore"):
        values = np.exp2(logs)
    return pd.DataFrame(
        {
            "seed": np.repeat(list(seeds), count), "layer": layer, "rank": np.tile(np.arange(1, count + 1), len(seeds)),
            "singular_value": values, "log2_singular_value": logs,
        }
    )  # fmt: skip


def jacobian_as_text(frames: Frames) -> str:
    """Means over the networks at the layers whose singular values are kept, beside what theory expects of them."""
    moments, spectra = frames["jacobian"], frames["singular_values"]
    of_layer = moments.groupby("layer").mean(numeric_only=True).loc[sorted(spectra["layer"].unique())]
    ends = spectra.groupby("layer")["singular_value"].agg(["max", "min"])
    table = pd.DataFrame(
        {
            "layer": of_layer.index,
            "E s^2": of_layer["mean_s2"],
            "theory": of_layer["predicted_mean_s2"],
            "Var s^2": of_layer["var_s2"],
            "of theory": of_layer["predicted_var_s2"],
            "E s^4": of_layer["mean_s4"],
            "theory's": of_layer["predicted_mean_s4"],
            "infinite width": of_layer["limit_mean_s4"],
            "largest s": ends["max"],
            "smallest s": ends["min"],
        }
    )
    return str(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
