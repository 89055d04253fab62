"""On a GPU: the step replayed from a CUDA graph, and ensembles of stacks; timed by the device's own events."""

from functools import partial

from benchmarks import bare, subjects
from benchmarks.nets import DEEP
from benchmarks.race import Asked, Builds, Contestant, NotAvailable, Outcome, Setting, run
from benchmarks.rows import Missing

NETWORKS = 256
IN_TURN = 4  # one after the other takes as long for each

IDS = {
    "gpu.step.cost": ("width100", "width1000"),
    "gpu.step.full": ("accelerated",),
    "gpu.stack.nets": ("accelerated",),
}


def group(setting: Setting) -> Outcome:
    try:
        subjects.require_gpu()
    except NotAvailable as reason:
        missing = [Missing(name, variant, str(reason)) for name, variants in IDS.items() for variant in variants]
        return Outcome(missing=missing)
    outcome = Outcome()
    there = setting._replace(device="cuda")
    for width in (100, 1000):
        outcome.add(_step(width, there))
    outcome.add(_networks(there))
    return outcome


def _step(width: int, setting: Setting) -> Outcome:
    net = DEEP._replace(width=width)
    full, replay, eager = f"replay {width}, everything", f"replay {width}, bare", f"eager {width}, module"
    builds: Builds = {
        full: partial(subjects.replayed, net, "accelerated"),
        replay: partial(subjects.replayed, net, None),
    }
    asked = [Asked("gpu.step.cost", f"width{width}", full, replay)]
    if width == 100:
        builds[eager] = partial(bare.module_step, net, device="cuda")
        asked.append(Asked("gpu.step.full", "accelerated", full, eager))
    return run(builds, asked, setting)


def _networks(setting: Setting) -> Outcome:
    """Networks per second are the inverse of seconds a network: the loop's time over ours."""
    loop, ours = f"{IN_TURN} networks in turn", f"{NETWORKS} networks in one program"
    builds: Builds = {
        loop: lambda: Contestant(_in_turn, IN_TURN),
        ours: partial(subjects.stack_networks, NETWORKS, False, "cuda"),
    }
    return run(builds, [Asked("gpu.stack.nets", "accelerated", loop, ours)], setting)


def _in_turn() -> None:
    for seed in range(IN_TURN):
        subjects.forward_only("kaiming", seeds=[seed], device="cuda")
