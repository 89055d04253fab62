"""Stacks: watched against matmul and ReLU alone, networks per second, and the chapter's four scalings."""

from functools import partial

from benchmarks import bare, peers, subjects
from benchmarks.nets import stack_input, stack_weights
from benchmarks.race import Asked, Builds, Contestant, Outcome, Setting, run

NETWORKS = 16  # more than are computed together on a CPU

PRODUCERS = {"accelerated": True, "plain": False}


def group(setting: Setting) -> Outcome:
    outcome = Outcome()
    for width in (100, 1000):
        outcome.add(_of_width(width, setting))
    outcome.add(_networks(setting))
    return outcome


def chapter(setting: Setting) -> Outcome:
    """`chapter.four`: drawn, stacked and measured."""
    theirs = "the chapter's four scalings"
    builds: Builds = {theirs: lambda: Contestant(peers.chapter_four)}
    asked = []
    for variant, accelerated in PRODUCERS.items():
        ours = f"four scalings, {variant}"
        builds[ours] = partial(subjects.four_scalings, accelerated)
        asked.append(Asked("chapter.four", variant, ours, theirs))
    return run(builds, asked, setting)


def _of_width(width: int, setting: Setting) -> Outcome:
    weights, x = stack_weights(width), stack_input(width)
    alone = f"stack {width}, matmul and ReLU alone"
    builds: Builds = {alone: partial(bare.stack_pass, weights, x)}
    asked = []
    for variant, accelerated in PRODUCERS.items():
        name = f"stack {width}, {variant}"
        builds[name] = partial(subjects.watched_stack, weights, x, accelerated)
        asked.append(Asked(f"stack.{width}", variant, name, alone))
    for peer, build in peers.STACK.items():
        name = f"stack {width}, peer {peer}"
        builds[name] = partial(build, weights, x)
        asked.append(Asked(f"stack.{width}.peer.{peer}", "plain", name, alone))
    return run(builds, asked, setting)


def _networks(setting: Setting) -> Outcome:
    """Networks per second are the inverse of seconds a network: the chapter's time over ours."""
    loop = "one network, the chapter's loop"
    builds: Builds = {loop: lambda: Contestant(partial(peers.chapter_loop, *peers.SCALINGS[-1]))}
    asked = []
    for variant, accelerated in PRODUCERS.items():
        ours = f"{NETWORKS} networks, {variant}"
        builds[ours] = partial(subjects.stack_networks, NETWORKS, accelerated)
        asked.append(Asked("stack.nets", variant, loop, ours))
    return run(builds, asked, setting)
