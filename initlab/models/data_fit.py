"""Layer-sequential unit variance for the layers of any module (Mishkin & Matas 2015, algorithm 1).

Layer by layer in the order of the flow of data: while the variance of what a layer gives for the batch is further than
`tolerance` from 1, and attempts are left, its weight is divided by the standard deviation. nn/lsuv.py does the same for
the networks of initlab, ensembles at once.
"""

import math
from typing import Any

import torch
from torch import nn

from initlab.errors import UsageError
from initlab.models.fans import ModelTensor
from initlab.models.weight_writer import put_weight, read_weight
from initlab.nn.init import Rule
from initlab.nn.lsuv import GIVEN_UP
from initlab.probes.snapshot import all_tensors, left_as_it_was, run_model
from initlab.stats.measure import measure
from initlab.stats.statistics import STATISTICS

_STD = list(STATISTICS).index("std")


class _Reached(Exception):
    """The layer has run: the rest of the pass is not needed."""


def find_output_std(model: nn.Module, module: nn.Module, x: Any) -> float | None:
    """The standard deviation of what a module gives in a pass of a batch; None where the pass does not call it."""
    found: list[float] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        tensor = next(all_tensors(output), None)
        if tensor is not None and tensor.is_floating_point():
            found.append(float(measure(tensor.detach().reshape(1, -1), batched=False)[_STD]))
            raise _Reached

    handle = module.register_forward_hook(look)
    batch = list(all_tensors(x))
    try:
        with left_as_it_was(model, batch):
            run_model(model, x, batch)
    except (_Reached, UsageError):
        if not found:
            raise
    finally:
        handle.remove()
    return found[0] if found else None


def fit_weight(model: nn.Module, tensor: ModelTensor, module: nn.Module, x: Any, rule: Rule) -> str:
    """Scale one weight until what its layer gives has unit variance; says what came of it.

    module: whose output counts, the owner of the weight or what calls it. x: the batch. rule: with `attempts` and
    `tolerance`.
    """
    factor, std = 1.0, math.nan
    for attempt in range(rule.attempts + 1):
        found = find_output_std(model, module, x)
        if found is None:
            return "not called in the pass: not fitted to the batch"
        std = found
        if abs(std**2 - 1) < rule.tolerance:
            return f"times {factor:.4g}, so that its output has std {std:.3g}"
        if not math.isfinite(std) or std == 0:
            return f"not fitted: {GIVEN_UP['zero' if std == 0 else 'not finite']}"
        if attempt < rule.attempts:
            before = read_weight(tensor).double()
            factor /= std
            put_weight(tensor, before / std)
            after = read_weight(tensor).double()
            if not torch.allclose(after.norm(), before.norm() / std, rtol=1e-2):
                return (
                    f"not fitted: {tensor.computed.op if tensor.computed else 'its number format'} decides on its scale"
                )
    return f"times {factor:.4g}, its output has std {std:.3g}: {GIVEN_UP['attempts']}"
