"""The names beginning with an underscore that initlab takes from torch, each with its reason; no other file has any.

`ConvNd`, `NormBase`: what all convolutions, and all norms over a batch, have in common; torch names it nowhere else.
`in_backward`: whether autograd is at work in this thread; torch says that nowhere else.
"""

import torch
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd

__all__ = ["ConvNd", "NormBase", "in_backward"]


def in_backward() -> bool:
    """Whether a backward pass is under way in this thread."""
    return torch._C._current_graph_task_id() != -1
