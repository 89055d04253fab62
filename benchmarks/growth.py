"""How cost grows: the exponents of initlab's CPU time over depth, width, batch, networks, steps, jobs; the products'.

An exponent is the slope of a straight line through log(seconds) over log(size). What a product needs is what a network
needs at least: depth, batch, networks, steps and jobs to the power 1, width to the power 2. A sweep of jobs runs in a
process of its own, as it is typed.
"""

import json
import math
import time
from collections.abc import Callable, Sequence

from benchmarks import bare, subjects
from benchmarks.child import python, type_command
from benchmarks.nets import Net, stack_input, stack_weights
from benchmarks.race import NotAvailable, Outcome, Setting, row
from benchmarks.rows import Missing

ROUNDS = 3
STEPS_NET = Net(784, 10, 100, 10, 128)
# Axis -> the sizes, smallest first; the other sizes are those of START.
AXES: dict[str, Sequence[int]] = {
    "depth": (25, 50, 100, 200),
    "width": (100, 200, 400, 800),
    "batch": (100, 200, 400, 800),
    "networks": (2, 4, 8, 16),
    "steps": (5, 10, 20, 40),
}
JOBS = (6, 12, 24)
SWEEP = ("-m", "hydra/launcher=batched", "task=stack", "seeds=1")  # of the default stack, which is START
START = {"depth": 50, "width": 100, "batch": 200, "networks": 1}


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of log(seconds) over log(size), by least squares.

    >>> exponent([1, 2, 4], [3.0, 12.0, 48.0])
    2.0
    """
    x, y = [math.log(size) for size in sizes], [math.log(each) for each in seconds]
    middle, height = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def group(setting: Setting) -> Outcome:
    """Ours and the products alone, size by size in turn."""
    outcome = Outcome()
    for axis, sizes in AXES.items():
        ours, alone = ([call(axis, size) for size in sizes] for call in (_ours, _alone))
        found: tuple[list[float], list[float]] = ([], [])
        for _ in range(min(setting.rounds, ROUNDS)):
            for calls, exponents in zip((ours, alone), found, strict=True):
                exponents.append(exponent(sizes, [_seconds(call, setting) for call in calls]))
        outcome.rows.append(row(f"growth.{axis}", subjects.fastest(), found[0], setting, "power"))
        outcome.rows.append(row(f"growth.{axis}.products", "plain", found[1], setting, "power"))
    outcome.add(grow_sweeps(setting))
    return outcome


def grow_sweeps(setting: Setting) -> Outcome:
    """Sweeps of more and more jobs in a fresh process each round, and the products of as many networks."""
    program, alone = ["-c", "from benchmarks import growth; growth.child()"], [_alone("networks", n) for n in JOBS]
    ours, products = list[float](), list[float]()
    try:
        for _ in range(min(setting.rounds, 2)):
            ours.append(exponent(JOBS, json.loads(python(program, setting.threads)[1])))
            products.append(exponent(JOBS, [_seconds(call, setting) for call in alone]))
    except NotAvailable as reason:
        return Outcome(missing=[Missing("growth.jobs", "plain", str(reason))])
    rows = (("growth.jobs", subjects.fastest(), ours), ("growth.jobs.products", "plain", products))
    return Outcome([row(name, variant, found, setting, "power") for name, variant, found in rows])


def child() -> None:
    """In a process of its own: say the CPU seconds of a sweep of each size; the first one loads what all need."""
    spent = []
    for jobs in (2, *JOBS):
        begun = time.process_time()
        type_command([*SWEEP, f"seed=range(0,{jobs})"])
        spent.append(time.process_time() - begun)
    print(json.dumps(spent[1:]))


def _seconds(call: Callable[[], object], setting: Setting) -> float:
    """The least of a few calls: what others do on the machine only adds."""
    spent = []
    for _ in range(4):  # the first one allocates
        begun = setting.clock()
        call()
        spent.append(setting.clock() - begun)
    return min(spent)


def _ours(axis: str, size: int) -> Callable[[], object]:
    """A stack, or steps of a training, drawn before and recorded in full."""
    if axis == "steps":
        hand = subjects.Hand(STEPS_NET, record="nohist" if subjects.fastest() == "accelerated" else "plain")
        return lambda: [hand.recorded() for _ in range(size)]
    sizes = {**START, axis: size}
    return lambda: subjects.forward_only(
        "kaiming", "relu", sizes["depth"], sizes["width"], sizes["batch"], range(sizes["networks"])
    )


def _alone(axis: str, size: int) -> Callable[[], object]:
    """The products of the same networks, or as many steps of a bare module."""
    if axis == "steps":
        step = bare.module_step(STEPS_NET).call
        return lambda: [step() for _ in range(size)]
    sizes = {**START, axis: size}
    weights, x = stack_weights(sizes["width"], sizes["depth"]), stack_input(sizes["width"], sizes["batch"])
    forward = bare.stack_pass(weights, x).call
    return lambda: [forward() for _ in range(sizes["networks"])]
