"""A plane of networks as one program, against the same networks one by one, with shared and with fresh weights."""

from functools import partial

from benchmarks import bare, subjects
from benchmarks.race import Asked, Builds, Outcome, Setting, row, run

SIDE, DEPTH, WIDTH, BATCH = 64, 100, 200, 8
ALONE = 16  # networks one by one; each takes as long as the next
OWN = 32  # points with weights of their own: they are not cheaper together


def group(setting: Setting) -> Outcome:
    together = f"plane of {SIDE} x {SIDE}"
    shape = (DEPTH, WIDTH, BATCH)
    builds: Builds = {
        together: partial(subjects.plane, SIDE * SIDE, *shape),
        f"{OWN} points, fresh weights": partial(subjects.plane, OWN, *shape, fresh=True),
        "one by one, shared weights": partial(bare.networks_one_by_one, ALONE, *shape),
        "one by one, fresh weights": partial(bare.networks_one_by_one, ALONE, *shape, fresh=True),
    }
    _, own, shared, fresh = builds
    outcome = run(
        builds,
        [
            Asked("phase.common", "plain", together, shared),
            Asked("phase.fresh", "plain", together, fresh),
            Asked("phase.fresh.own", "plain", own, fresh),
        ],
        setting,
    )
    if together in outcome.seconds:
        outcome.rows.append(
            row("phase.common.seconds", "plain", [SIDE * SIDE * outcome.seconds[together]], setting, "s")
        )
    return outcome
