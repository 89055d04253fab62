"""The names beginning with an underscore that initlab takes from torch, each with its reason; no other file has any.

`ConvNd`, `NormBase`: what all convolutions, and all norms over a batch, have in common; torch names it nowhere else.
`global_forward_hooks`: whether somebody watches every module, so that a layer's output may change after its own hooks.
"""

from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.nn.modules.module import _global_forward_hooks as global_forward_hooks

__all__ = ["ConvNd", "NormBase", "global_forward_hooks"]
