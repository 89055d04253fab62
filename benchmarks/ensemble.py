"""Ensembles: many networks trained in one program against one nn.Module after the other."""

from functools import partial

from benchmarks import bare, peers, subjects
from benchmarks.nets import BOOK, DEEP, NARROW
from benchmarks.race import Asked, Builds, Outcome, Setting, run

ENSEMBLES = {"deep": (DEEP, 8), "book": (BOOK, 16), "narrow": (NARROW, 16)}


def group(setting: Setting) -> Outcome:
    outcome = Outcome()
    for name, (net, count) in ENSEMBLES.items():
        seeds, loop, vmap = range(count), f"{name} x{count}, modules in turn", f"{name} x{count}, vmap"
        builds: Builds = {loop: partial(bare.loop_over_modules, net, seeds), vmap: partial(peers.vmap_step, net, seeds)}
        asked = [Asked(f"ensemble.{name}.peer.vmap", "plain", vmap, loop)]
        for record, suffix, variant in (
            ("accelerated", "", "accelerated"),
            ("plain", "", "plain"),
            (None, ".bare", "plain"),
        ):
            ours = f"{name} x{count}, by hand, {record or 'bare'}"
            builds[ours] = partial(subjects.hand_step, net, seeds, record)
            asked.append(Asked(f"ensemble.{name}{suffix}", variant, ours, loop))
        outcome.add(run(builds, asked, setting))
    return outcome
