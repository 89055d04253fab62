"""On a GPU: a training step, an ensemble, a tensor and ensembles of stacks, against the same work unwatched."""

from functools import partial

from benchmarks import bare, subjects
from benchmarks.nets import DEEP
from benchmarks.race import Asked, Builds, Contestant, NotAvailable, Outcome, Setting, run
from benchmarks.rows import Missing

STACKS, STACKS_IN_TURN = 256, 4  # one after the other takes as long for each
ENSEMBLE = 64
ROWS, UNITS = 2048, 3072
CUDA = "cuda"

IDS = {
    "gpu.step.bare": ("plain",),
    "gpu.step.full": ("accelerated", "plain"),
    "gpu.module.full": ("accelerated",),
    "gpu.ensemble.bare": ("plain",),
    "gpu.ensemble.full": ("accelerated",),
    "gpu.row": ("accelerated", "plain"),
    "gpu.stack.nets": ("accelerated", "philox"),
}


def group(setting: Setting) -> Outcome:
    try:
        subjects.require_gpu()
    except NotAvailable as reason:
        missing = [Missing(name, variant, str(reason)) for name, variants in IDS.items() for variant in variants]
        return Outcome(missing=missing)
    setting = setting._replace(device=CUDA)
    outcome = Outcome()
    for race in (_step, _ensemble, _row, _networks):
        outcome.add(race(setting))
    return outcome


def _step(setting: Setting) -> Outcome:
    module, hand, probed = "deep module", "deep by hand", "deep module probed"
    builds: Builds = {
        module: partial(bare.module_step, DEEP, device=CUDA),
        hand: partial(subjects.bare_step, DEEP, device=CUDA),
        probed: partial(subjects.probed_step, DEEP, "accelerated", device=CUDA),
    }
    asked = [
        Asked("gpu.step.bare", "plain", hand, module),
        Asked("gpu.module.full", "accelerated", probed, module),
    ]
    for variant, record in (("accelerated", "accelerated"), ("plain", "plain_histograms")):
        name = f"{hand}, {record}"
        builds[name] = partial(subjects.recorded_step, DEEP, record, device=CUDA)
        asked.append(Asked("gpu.step.full", variant, name, module))
    return run(builds, asked, setting)


def _ensemble(setting: Setting) -> Outcome:
    """The loop's time does not depend on how many there are: it is timed for one."""
    seeds, loop, ours = range(ENSEMBLE), "deep module, one of many", f"deep x{ENSEMBLE}, by hand"
    builds: Builds = {
        loop: partial(bare.module_step, DEEP, device=CUDA),
        ours: lambda: subjects.bare_step(DEEP, seeds, CUDA)._replace(work=ENSEMBLE),
        f"{ours}, recorded": lambda: subjects.recorded_step(DEEP, "accelerated", seeds, 1, CUDA)._replace(
            work=ENSEMBLE
        ),
    }
    asked = [
        Asked("gpu.ensemble.bare", "plain", ours, loop),
        Asked("gpu.ensemble.full", "accelerated", f"{ours}, recorded", loop),
    ]
    return run(builds, asked, setting)


def _row(setting: Setting) -> Outcome:
    builds: Builds = {"mean and std": partial(bare.mean_and_std, ROWS, UNITS, CUDA)}
    asked = []
    for variant, accelerated in (("accelerated", True), ("plain", False)):
        builds[f"row, {variant}"] = partial(subjects.row_of_tensor, ROWS, UNITS, CUDA, accelerated)
        asked.append(Asked("gpu.row", variant, f"row, {variant}", "mean and std"))
    return run(builds, asked, setting)


def _networks(setting: Setting) -> Outcome:
    """Networks per second are the inverse of seconds a network: the loop's time over ours."""
    loop = f"{STACKS_IN_TURN} networks in turn"
    builds: Builds = {loop: lambda: Contestant(_in_turn, STACKS_IN_TURN)}
    asked = []
    for variant, generator in (("accelerated", "torch"), ("philox", "philox")):
        ours = f"{STACKS} networks in one program, {generator}"
        builds[ours] = partial(subjects.stack_networks, STACKS, False, CUDA, generator)
        asked.append(Asked("gpu.stack.nets", variant, loop, ours))
    return run(builds, asked, setting)


def _in_turn() -> None:
    for seed in range(STACKS_IN_TURN):
        subjects.forward_only("kaiming", seeds=[seed], device=CUDA)
