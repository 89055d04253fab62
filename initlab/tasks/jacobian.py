"""The singular values of a stack from its input to every layer, measured at one input of each network and predicted.

They say what becomes of small differences and of gradients in every direction at once; second moments say it on
average alone. In arithmetic without a range, from the weights of the stack's own number format.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from initlab.nn.custom_activation import Given
from initlab.nn.init import Rule, rule
from initlab.nn.unbounded import Scaled
from initlab.stats.keys import Seeds
from initlab.tasks.ensemble.device import Where
from initlab.tasks.ensemble.networks import Ensemble, Frames, Net, Networks
from initlab.tasks.ensemble.plan import CACHED, split
from initlab.terminal import Bar
from initlab.theory.request import parse_request
from initlab.theory.singular_values import jacobians, log2_power_sums, predict_moments, singular_values

# Column of the means over the networks -> how it is headed where they are printed.
SHOWN = {
    "layer": "layer", "mean_s2": "E s^2", "predicted_mean_s2": "theory", "var_s2": "Var s^2",
    "predicted_var_s2": "of theory", "mean_s4": "E s^4", "predicted_mean_s4": "theory's",
    "limit_mean_s4": "infinite width", "max": "largest s", "min": "smallest s",
}  # fmt: skip


def jacobian(
    init: str | Rule = "kaiming",
    activation: Given = "relu",
    depth: int = 50,
    width: int = 100,
    inputs: int | None = None,
    batch: int = 200,
    seeds: Seeds = 8,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    generator: str = "philox",
    progress: bool = False,
    **rule_fields: Any,
) -> Frames:
    """The singular values of every layer's Jacobian by the input: two tables, `jacobian` and `singular_values`.

    init, activation, depth, width, inputs, batch, seeds, dtype, device, generator, progress, rule_fields: as in
    `stack`; one rule for all networks. The Jacobian is taken at the first input of each network's batch; `batch`
    matters only to a rule that is fitted to data.

    `jacobian` has the mean and the variance of the squared singular values s^2 of every layer, measured and predicted;
    `singular_values` all of them, at layers 1, 2, 5, 10, 20, 50, ... and the last. The prediction is the mean over all
    networks, so that a single network's difference to it is spread and no error.

    >>> tables = jacobian("orthogonal", "linear", depth=2, width=3, seeds=1)
    >>> tables["singular_values"]["singular_value"].round(5).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    net, where = Net.resolve(activation, depth, width, inputs, batch), Where.resolve(dtype, device, generator)
    scaling = rule(init, **rule_fields)
    ensemble = Ensemble.resolve(scaling, seeds, net.activation)
    sums, spectra = [], []
    with Bar(total=depth * len(ensemble), desc="jacobian", unit="layer", disable=None if progress else True) as bar:
        for chunk in split(len(ensemble), CACHED):
            nets = Networks(net, ensemble.part(chunk), where)

            def keep(layer: int, found: Scaled, seeds: Sequence[int] = nets.ensemble.seeds) -> None:
                sums.append(moments_frame(layer, seeds, log2_power_sums(found), min(net.inputs, width)))
                if layer in shown_layers(depth):
                    spectra.append(spectrum_frame(layer, seeds, singular_values(found)))
                bar.update(len(seeds))

            jacobians(net.network, nets.weights, nets.gaussian(net.inputs, "input")[:, :1], keep)
    theory = predict_moments(parse_request(scaling, activation, depth, width, inputs=net.inputs, batch=1))
    moments = pd.concat(sums, ignore_index=True).merge(theory, on="layer")
    return {
        "jacobian": moments.sort_values(["seed", "layer"], ignore_index=True),
        "singular_values": pd.concat(spectra).sort_values(["seed", "layer", "rank"], ignore_index=True),
    }


def shown_layers(depth: int) -> list[int]:
    """Layers whose singular values are kept: 1, 2, 5, 10, ... and the last.

    >>> shown_layers(30)
    [1, 2, 5, 10, 20, 30]
    """
    steps = [k * 10**power for power in range(len(str(depth))) for k in (1, 2, 5)]
    return [*(layer for layer in steps if layer < depth), depth]


def moments_frame(layer: int, seeds: Sequence[int], log2: Tensor, count: int) -> pd.DataFrame:
    """A row per network: means of s^2 and s^4 over `count` singular values, from log2 of their sums (2, E)."""
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


def spectrum_frame(layer: int, seeds: Sequence[int], log2: Tensor) -> pd.DataFrame:
    """A row per network and singular value, from their log2 (E, count), largest first."""
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
    """Means over the networks at the layers whose singular values are kept, and what theory expects of them."""
    moments, spectra = frames["jacobian"], frames["singular_values"]
    of_layer = moments.groupby("layer").mean(numeric_only=True).loc[sorted(spectra["layer"].unique())]
    ends = spectra.groupby("layer")["singular_value"].agg(["max", "min"])
    table = of_layer.join(ends).reset_index()[list(SHOWN)].rename(columns=SHOWN)
    return str(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
