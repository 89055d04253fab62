"""What depth costs a forward-only stack: peak memory of fresh processes, and the time of a layer."""

import json
import resource
import time
from pathlib import Path

from benchmarks.child import python
from benchmarks.race import NotAvailable, Outcome, Setting, row
from benchmarks.rows import Missing

DEEP, SHALLOW = 3000, 10
NETWORKS = 4
SHALLOW_RUNS = 20  # of which the time is taken: one lasts a hundredth of a second


def group(setting: Setting) -> Outcome:
    """In each round one deep and one shallow process."""
    outcome, grown, slower = Outcome(), [], []
    rounds = min(setting.rounds, 3)
    try:
        for _ in range(rounds):
            deep, shallow = (_measured(depth, setting.threads) for depth in (DEEP, SHALLOW))
            grown.append((deep["kib"] - shallow["kib"]) / 1024)
            slower.append(deep["seconds"] / shallow["seconds"])
    except NotAvailable as reason:
        outcome.missing = [Missing("memory.stack", "plain", str(reason))]
        return outcome
    outcome.rows = [
        row("memory.stack", "plain", grown, setting, "MiB"),
        row("memory.stack.time", "plain", slower, setting),
    ]
    return outcome


def _measured(depth: int, threads: int) -> dict[str, float]:
    said: dict[str, float] = json.loads(
        python(["-c", f"from benchmarks import memory; memory.child({depth}, {threads})"], threads)[1]
    )
    return said


def peak_kib() -> float:
    """Peak of this process's memory. Linux counts into `ru_maxrss` what the parent held when it started the process."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def child(depth: int, threads: int) -> None:
    """In a process of its own: say the peak of its memory, in KiB, and the CPU seconds of a layer."""
    import torch

    from benchmarks.subjects import forward_only

    torch.set_num_threads(threads)
    runs = SHALLOW_RUNS if depth == SHALLOW else 1
    forward_only("kaiming", depth=SHALLOW, seeds=range(NETWORKS))
    begun = time.process_time()
    for _ in range(runs):
        forward_only("kaiming", depth=depth, seeds=range(NETWORKS))
    seconds = (time.process_time() - begun) / (runs * depth)
    print(json.dumps({"kib": peak_kib(), "seconds": seconds}))
