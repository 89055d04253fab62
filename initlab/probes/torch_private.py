"""The names beginning with an underscore that initlab takes from torch, each with its reason; no other file has any.

`ConvNd`, `NormBase`: what all convolutions, and all norms over a batch, have in common; torch names it nowhere else.
"""

from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd

__all__ = ["ConvNd", "NormBase"]
