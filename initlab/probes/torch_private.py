"""The names beginning with an underscore that initlab takes from torch, each with its reason; no other file has any.

`ConvNd`, `NormBase`: what all convolutions, and all norms over a batch, have in common; torch names it nowhere else.
`is_differentiating`, `is_transforming`, `has_no_values`: whether autograd, a transform of torch.func, or anything that
makes tensors without values of their own is at work in this thread.
`is_batched`: whether a tensor stands for several, as gradients asked for with `is_grads_batched` do.
`ENGINE`: the function in `torch.autograd` that both `backward` and `grad` call, whoever has kept either.
`remove_mode`: the end of a mode that does not lie on top.
`CALL`: the code of a module's call, by which its frame is known.
`ignore_functions`: a context in which no mode hears of torch's functions, for what is none of the network's work.
"""

import torch
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.overrides import TorchFunctionMode

__all__ = [
    "CALL",
    "ENGINE",
    "ConvNd",
    "NormBase",
    "has_no_values",
    "ignore_functions",
    "is_batched",
    "is_differentiating",
    "is_transforming",
    "remove_mode",
]

is_batched = torch._C._functorch.is_legacy_batchedtensor
CALL = torch.nn.Module._call_impl.__code__
ENGINE = "_engine_run_backward"
ignore_functions = torch._C.DisableTorchFunction


def remove_mode(mode: TorchFunctionMode) -> None:
    """Take a mode away that an exception has left, from below those that were entered since."""
    above = []
    while torch._C._len_torch_function_stack() and (top := torch._C._pop_torch_function_stack()) is not mode:
        above.append(top)
    for one in reversed(above):
        torch._C._push_on_torch_function_stack(one)


def is_differentiating() -> bool:
    """Whether a backward pass is under way in this thread."""
    return torch._C._current_graph_task_id() != -1


def has_no_values() -> bool:
    """Whether tensors stand for others here: in a trace, in a transform of torch.func, or under fake tensors."""
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    return fake or torch._C._is_tracing() or is_transforming()


def is_transforming() -> bool:
    """Whether a transform of torch.func is under way: its tensors have no values of their own."""
    return torch._C._functorch.peek_interpreter_stack() is not None
