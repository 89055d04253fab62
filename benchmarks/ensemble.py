"""Ensembles: many networks trained in one program against one nn.Module after the other, bare and recorded."""

from functools import partial

from benchmarks import bare, peers, subjects
from benchmarks.nets import BOOK, DEEP, NARROW
from benchmarks.race import Asked, Builds, Outcome, Setting, run

ENSEMBLES = {"deep": (DEEP, 8), "book": (BOOK, 16), "narrow": (NARROW, 16)}


def group(setting: Setting) -> Outcome:
    outcome = Outcome()
    for name, (net, count) in ENSEMBLES.items():
        seeds, loop, vmap = range(count), f"{name} x{count}, modules in turn", f"{name} x{count}, vmap"
        ours = f"{name} x{count}, by hand"
        builds: Builds = {
            loop: partial(bare.loop_over_modules, net, seeds),
            vmap: partial(peers.vmap_step, net, seeds),
            ours: partial(subjects.bare_step, net, seeds),
        }
        asked = [
            Asked(f"ensemble.{name}", "plain", ours, loop),
            Asked(f"ensemble.{name}.peer.vmap", "plain", vmap, loop),
        ]
        for record in ("accelerated", "nohist", "plain"):
            recorded = f"{ours}, {record}"
            builds[recorded] = partial(subjects.recorded_step, net, record, seeds)
            asked.append(Asked(f"ensemble.{name}.full", record, recorded, loop))
        outcome.add(run(builds, asked, setting))
    return outcome
