"""Where a benchmark was run: in words for the reader, and as a class of machines for the name of a file of results."""

import os
import platform
from pathlib import Path

import torch

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def machine_class(device: str = "cpu") -> str:
    """Machines whose ratios should be alike: cores, architecture and instruction set, or a GPU's generation."""
    if device == "cuda":
        return "gpu-sm{}{}".format(*torch.cuda.get_device_capability())
    architecture = {"x86_64": "x86", "AMD64": "x86", "aarch64": "arm"}.get(platform.machine(), platform.machine())
    return f"cpu-{cores()}core-{architecture}-{torch.backends.cpu.get_cpu_capability().lower()}"


def describe(threads: list[int], device: str = "cpu") -> list[str]:
    """Lines about the processor, what runs on it and how busy it is."""
    clocks = [f"{n} ({'CPU time' if n == 1 else 'wall time'})" for n in threads]
    lines = [
        f"machine   {machine_class(device)}: {model()}, {cores()} cores; {caches() or 'caches unknown'}",
        f"software  torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}",
        f"threads   {', '.join(clocks)}; load {load()}",
    ]
    if device == "cuda":
        lines.append(f"device    {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    return lines


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def model() -> str:
    """The processor's own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or "unknown processor"


def caches() -> str:
    """Sizes of the first core's caches: L1 32K, L2 1024K, L3 32768K; empty where the system does not say."""
    found = {}
    for folder in sorted(CACHES.glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[level] = size
    return ", ".join(f"L{level} {size}" for level, size in found.items())


def load() -> str:
    """Programs that wanted a core, over the last 1, 5 and 15 minutes."""
    if not hasattr(os, "getloadavg"):
        return "unknown"
    return ", ".join(f"{value:.2f}" for value in os.getloadavg())
