"""Weights that a hook of torch computes before each use: parametrizations, weight_norm, spectral_norm, pruning."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PARAMETRIZED = "parametrizations"  # the child in which torch keeps what computes a module's weights


class ComputedWeight(NamedTuple):
    """A weight of a module that is no parameter: its name there, and the class of what computes it."""

    part: str
    op: str
    source: Any  # what computes it
    compute: Callable[[], Tensor]  # what it would be now; nothing is moved

    def is_made_of(self, parameter: str) -> bool:
        """Whether a parameter of the module, by its name there, is what this weight is computed from."""
        return parameter.startswith(f"{PARAMETRIZED}.{self.part}.") or parameter.rpartition("_")[0] == self.part

    @property
    def is_estimated(self) -> bool:
        """Whether it hangs on an iteration that goes on in training, as that of spectral_norm."""
        return "SpectralNorm" in self.op

    @property
    def is_chain(self) -> bool:
        """Whether it is computed whenever it is asked for, by a module; else once before a call, by a hook."""
        return isinstance(self.source, nn.Module)


def find_computed(module: nn.Module) -> Iterator[ComputedWeight]:
    """The computed weights of a module, by parametrizations and by torch's older hooks."""
    chains = dict(module.named_children()).get(PARAMETRIZED)
    for name, chain in () if chains is None else chains.named_children():
        op = type(list(chain.children())[-1]).__name__
        yield ComputedWeight(name, op, chain, partial(_run_chain, chain))
    for hook in module._forward_pre_hooks.values():
        part: Any = getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
        if isinstance(part, str) and isinstance(vars(module).get(part), Tensor):
            yield ComputedWeight(part, type(hook).__name__, hook, partial(_run_hook, module, hook, part))


@torch.no_grad()
def _run_chain(chain: nn.Module) -> Tensor:
    training = [module for module in chain.modules() if module.training]
    for module in training:  # a power iteration moves its vectors in training
        module.training = False
    try:
        weight: Tensor = chain()
        return weight
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def _run_hook(module: nn.Module, hook: Callable[..., Any], part: str) -> Tensor:
    kept, training = vars(module)[part], module.training
    module.training = False
    try:
        hook(module, ())
        weight: Tensor = vars(module)[part]
        return weight
    finally:
        module.training = training
        vars(module)[part] = kept
