"""The stack that circulates in course material, number for number: torch's one stream of random numbers, in its order.

`torch.manual_seed(seed)`; `depth` layers `nn.Linear(width, width, bias=False)` are built, whose default initialization
consumes the stream; they are initialized again, in order, by torch.nn.init; then the input is drawn. Everywhere else a
tensor's numbers depend on (seed, what, layer) only (nn/init.py); here they depend on all that was drawn before.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from initlab.errors import UsageError, check, choose
from initlab.nn.custom_activation import Given, as_activation
from initlab.nn.init import Rule, rule
from initlab.nn.network import PLAIN, Network, dense, forward
from initlab.stats.buffer import RowBuffer
from initlab.stats.dtypes import resolve_dtype
from initlab.stats.keys import KEY_COLUMNS, Seeds, TensorKey, resolve_seeds
from initlab.stats.measure import measure
from initlab.stats.statistics import STATISTICS, TORCH_COLUMN

# Distribution of a rule -> how torch fills a weight with numbers of this standard deviation.
FILL: dict[str, Callable[[Tensor, float], Tensor]] = {
    "normal": lambda w, std: nn.init.normal_(w, std=std),
    "uniform": lambda w, std: nn.init.uniform_(w, -std * math.sqrt(3), std * math.sqrt(3)),
}


def seeded_stack(
    init: str | Rule = "lecun",
    activation: Given = "linear",
    depth: int = 100,
    width: int = 256,
    batch: int = 16,
    seeds: Seeds = (1,),
    dtype: str | torch.dtype = "float32",
    **rule_fields: Any,
) -> pd.DataFrame:
    """The `stats` rows of such a stack, implementation `module`, and `std_torch`: torch's own std of the tensor.

    init: a rule's name or a `Rule`, `rule_fields` fields of it. activation: a name, a row, or an elementwise function.
    depth, width, batch: of the stack, whose input has `width` units. seeds: torch's seeds, or how many from 0 on.
    dtype: a name or torch's. torch's std divides by n - 1, accumulates in the number format itself, and is what the
    material prints. Drawn in float32 and converted; on the CPU; forward only. torch's generator is left as it was.
    Errors: a rule that has biases, or that torch.nn.init has no one-line counterpart for.

    >>> frame = seeded_stack("lecun", "linear", depth=1, width=256, batch=16, seeds=[1])
    >>> frame["std_torch"].round(4).tolist()
    [1.024, 1.0162, 1.0162]
    """
    check(depth=depth, width=width, batch=batch)
    scaling = rule(init, **rule_fields)
    choose(FILL, scaling.distribution, "init.distribution")
    if scaling.has_biases:
        option = "bias" if scaling.bias else "sigma_b"
        raise UsageError(f"init.{option}={getattr(scaling, option):g}: the seeded stack has no biases")
    phi, number = as_activation(activation), resolve_dtype(dtype)
    network = dense([width] * (depth + 1), phi)
    std = scaling.std_for(phi, (width, width))
    frames = []
    for seed in resolve_seeds(seeds):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(seed)
            layers = [nn.Linear(width, width, bias=False) for _ in range(depth)]
            for layer in layers:
                FILL[scaling.distribution](layer.weight, std)
            x = torch.randn(batch, width).to(number)
            frames.append(measure_network(network, [layer.weight.mT.to(number) for layer in layers], x, seed))
    return pd.concat(frames, ignore_index=True)


def measure_network(network: Network, weights: Sequence[Tensor], x: Tensor, seed: int) -> pd.DataFrame:
    """Rows of one network, the input's first."""
    rows = RowBuffer([seed], KEY_COLUMNS, [*STATISTICS, TORCH_COLUMN])

    def put(layer: int, tensor: str, values: Tensor) -> None:
        torch_std = values.std() if values.numel() > 1 else values.new_tensor(math.nan)
        block = torch.cat([measure(values), torch_std.double()[None]])
        rows.put([TensorKey("stack", "module", layer, tensor, "forward")], block[:, None, None])

    put(0, "activation", x)

    def visit(layer: int, z: Tensor, a: Tensor) -> None:
        put(layer, "preactivation", z)
        put(layer, "activation", a)

    forward(network, lambda layer: (weights[layer - 1], None), x, visit, PLAIN)
    return rows.frame()
