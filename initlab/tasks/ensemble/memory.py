"""How much memory there is, and how much a call holds at its peak."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on the device; inf where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    found = [math.inf]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
        # What control groups (version 2) leave of their limit.
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        found += [] if limit == "max" else [float(limit) - float(used)]
    except OSError:
        pass
    return min(found)


def readable(count: float) -> str:
    """Bytes with a decimal prefix: 7.84 GB."""
    power = min(4, max(0, int(math.log10(max(count, 1)) / 3))) if math.isfinite(count) else 0
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def peak_bytes(call: Callable[[], object], device: torch.device) -> float:
    """Most bytes that an untimed call holds at once beyond what was held before.

    On a GPU by the allocator's own count. On a CPU by the memory events of torch's profiler: every allocation of a
    tensor, temporaries inside an operation included; not what Python objects or the scratch space of a library take.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - start)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes to standard error
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    results = profile.kineto_results
    if results is None:
        return math.nan
    events = sorted((e.start_ns(), k, e.nbytes()) for k, e in enumerate(results.events()) if e.name() == "[memory]")
    live = np.cumsum([0, *(size for *_, size in events)])
    return float(live.max())


def is_out_of_memory(fault: Exception) -> bool:
    """On a CPU torch raises a plain RuntimeError, which only its text tells apart."""
    texts = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    return isinstance(fault, (torch.OutOfMemoryError, MemoryError)) or any(text in str(fault) for text in texts)
