"""Peak memory of fresh processes: a forward-only stack against its depth, a recorded training against its steps."""

import json
import resource
import time
from pathlib import Path

from benchmarks.child import python, type_command
from benchmarks.race import NotAvailable, Outcome, Setting, row
from benchmarks.rows import Missing

DEEP, SHALLOW = 3000, 10
NETWORKS = 4
SHALLOW_RUNS = 20  # of which the time is taken: one lasts a hundredth of a second
LONG, SHORT = 2000, 1000  # steps; what waits to be written has been written by then more than once
TRAINING = ("task=train", "train.depth=10", "seeds=1", "theory=off")


def group(setting: Setting) -> Outcome:
    """In each round one deep and one shallow process, one of a long and one of a short training."""
    outcome, grown, slower, longer = Outcome(), [], [], []
    rounds = min(setting.rounds, 3)
    try:
        for _ in range(rounds):
            deep, shallow = (_measured(f"child({depth}, {setting.threads})", setting) for depth in (DEEP, SHALLOW))
            grown.append((deep["kib"] - shallow["kib"]) / 1024)
            slower.append(deep["seconds"] / shallow["seconds"])
            long, short = (_measured(f"train({steps})", setting) for steps in (LONG, SHORT))
            longer.append((long["kib"] - short["kib"]) / 1024)
    except NotAvailable as reason:
        outcome.missing = [Missing("memory.stack", "plain", str(reason))]
        return outcome
    outcome.rows = [
        row("memory.stack", "plain", grown, setting, "MiB"),
        row("memory.stack.time", "plain", slower, setting),
        row("memory.train", "plain", longer, setting, "MiB"),
    ]
    return outcome


def _measured(call: str, setting: Setting) -> dict[str, float]:
    said: dict[str, float] = json.loads(
        python(["-c", f"from benchmarks import memory; memory.{call}"], setting.threads)[1]
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


def train(steps: int) -> None:
    """In a process of its own: say the peak of its memory, in KiB, when a recorded training has ended."""
    type_command([*TRAINING, f"train.steps={steps}"])
    print(json.dumps({"kib": peak_kib()}))
