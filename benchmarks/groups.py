"""The table of groups: what `python -m benchmarks NAME` runs. A group takes a setting and gives an outcome."""

from collections.abc import Callable

from benchmarks import (
    backward,
    collect,
    ensemble,
    gpu,
    growth,
    memory,
    phase,
    stack,
    startup,
    step,
    sweep,
    train,
    verdict_costs,
)
from benchmarks.race import Outcome, Setting

GROUPS: dict[str, Callable[[Setting], Outcome]] = {
    "stack": stack.group,
    "step": step.group,
    "train": train.group,
    "backward": backward.group,
    "ensemble": ensemble.group,
    "chapter": stack.chapter,
    "startup": startup.group,
    "phase": phase.group,
    "memory": memory.group,
    "collect": collect.group,
    "sweep": sweep.group,
    "verdict": verdict_costs.group,
    "growth": growth.group,
    "gpu": gpu.group,
}
