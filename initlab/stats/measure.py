"""The choice of a backend, and the statistics of a single tensor."""

from collections.abc import Mapping

import torch
from torch import Tensor

from initlab.stats.backend import Backend
from initlab.stats.kernels.cpu import library
from initlab.stats.kernels.cpu_backend import CpuBackend
from initlab.stats.kernels.gpu_backend import GpuBackend, works
from initlab.stats.statistics import Function
from initlab.stats.summarize import derive


def backend_for(
    device: str | torch.device = "cpu", statistics: Mapping[str, Function] | None = None, accelerated: bool = True
) -> Backend:
    """The fastest backend that this machine has for the tensors of a device.

    device: the C++ passes serve a CPU, Triton's kernels a CUDA GPU; plain PyTorch serves where these cannot be had,
    with another number format, or with `accelerated` false. statistics: functions (..., N, C) -> (...) of the user.
    """
    device = torch.device(device)
    if accelerated and device.type == "cpu" and (passes := library()) is not None:
        return CpuBackend(passes, statistics)
    if accelerated and device.type == "cuda" and works(device):
        return GpuBackend(statistics)
    return Backend(statistics)


def measure(x: Tensor, batched: bool = True) -> Tensor:
    """All statistics of (..., N, C) over its last two dimensions: float64 (S, ...), in the order of STATISTICS.

    `batched` says that N counts inputs, so that `frac_dead`, `std_within` and `cosine` have a meaning; else they are
    nan. `frac_saturated` is nan here: it needs phi'.

    >>> from initlab.stats.statistics import STATISTICS
    >>> dict(zip(STATISTICS, measure(torch.tensor([[3.0, -4.0]])).tolist()))["max"]
    3.0
    """
    return derive(backend_for(x.device).rows(x, batched))
