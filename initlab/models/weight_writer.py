"""New values for a weight of a model, also where the weight is computed from other parameters.

A parametrization is asked for the parameters that give the new weight (`right_inverse`); torch's older hooks keep them
under other names. Whether the weight that is used then is the one that was wanted is looked at, and said.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from initlab.errors import UsageError, describe_error
from initlab.models.fans import ModelTensor
from initlab.probes.computed_weights import ComputedWeight

ITERATIONS = 15  # with which torch starts spectral_norm
CLOSE = 2e-2  # of the norm of a weight: more than half precision takes away


@contextmanager
def restore_on_error(model: nn.Module) -> Iterator[None]:
    """Within the block parameters and buffers may be written; if anything is raised they are what they were."""
    kept = [(t, t.detach().clone()) for t in [*model.parameters(), *model.buffers()] if not t.is_meta]
    attributes = [(vars(m), {k: v for k, v in vars(m).items() if isinstance(v, Tensor)}) for m in model.modules()]
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    except BaseException:
        with torch.no_grad():
            for tensor, values in kept:
                tensor.data.copy_(values)
        for own, computed in attributes:
            own.update(computed)
        raise


def read_weight(tensor: ModelTensor) -> Tensor:
    """The weight as it is used now."""
    return tensor.values if tensor.computed is None else tensor.computed.compute()


def put_weight(tensor: ModelTensor, values: Tensor) -> str:
    """Make a weight what is wanted, and say in words what came of it where that is not the whole story.

    tensor: of the model. values: of its shape; they take its number format and device.
    """
    if tensor.computed is None:
        tensor.sources[0].data.copy_(values)
        return ""
    op = tensor.computed.op
    wanted = values.to(tensor.values.device, tensor.values.dtype)
    note = put_computed(tensor, tensor.computed, wanted)
    if tensor.computed.is_estimated:
        settle_power_iteration(tensor, tensor.computed)
    found = read_weight(tensor).double()
    if not note and float((found - wanted.double()).norm()) <= CLOSE * float(wanted.double().norm()):
        return f"through {op}"
    return f"{note or op + ' makes another weight of it'}: its std is {float(found.std(correction=0)):.3g}"


def settle_power_iteration(tensor: ModelTensor, computed: ComputedWeight) -> None:
    """The largest singular value that spectral_norm divides by, of the new weight: it moves in training alone."""
    parts = list(computed.source.modules()) if computed.is_chain else [tensor.module]
    before = [part.training for part in parts]
    for part in parts:
        part.training = True
    for _ in range(ITERATIONS):
        computed.source() if computed.is_chain else computed.source(tensor.module, ())
    for part, training in zip(parts, before, strict=True):
        part.training = training


def put_computed(tensor: ModelTensor, computed: ComputedWeight, wanted: Tensor) -> str:
    module, part = tensor.module, tensor.part
    if computed.is_chain:
        try:
            setattr(module, part, wanted)
            return ""
        except Exception as error:  # there is no inverse, or not of this weight
            own = [p for p in tensor.sources if p.shape == wanted.shape]
            if not own:
                raise UsageError(
                    f"{tensor.name}: {computed.op} has no right_inverse ({describe_error(error)}), so the weight "
                    "cannot be set; remove the parametrization first"
                ) from error
            own[0].data.copy_(wanted)
            return f"{computed.op} has no inverse, so what it starts from was set"
    kept = dict(module.named_parameters(recurse=False))
    if f"{part}_v" in kept:  # weight_norm: g v / |v|
        kept[f"{part}_v"].data.copy_(wanted)
        dim = computed.source.dim
        kept[f"{part}_g"].data.copy_(torch.norm_except_dim(wanted, 2, dim))
    elif f"{part}_orig" in kept:
        kept[f"{part}_orig"].data.copy_(wanted)
    vars(module)[part] = computed.compute()
    return ""
