"""On a GPU: ensembles of stacks, timed by the device's own events."""

from functools import partial

from benchmarks import subjects
from benchmarks.race import Asked, Builds, Contestant, NotAvailable, Outcome, Setting, run
from benchmarks.rows import Missing

NETWORKS = 256
IN_TURN = 4  # one after the other takes as long for each

IDS = {
    "gpu.stack.nets": ("accelerated",),
}


def group(setting: Setting) -> Outcome:
    try:
        subjects.require_gpu()
    except NotAvailable as reason:
        missing = [Missing(name, variant, str(reason)) for name, variants in IDS.items() for variant in variants]
        return Outcome(missing=missing)
    return _networks(setting._replace(device="cuda"))


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
