"""A training step, watched and bare: the deep network, the book's, and nn.Module under the probe."""

from functools import partial

from benchmarks import bare, peers, subjects
from benchmarks.nets import BOOK, DEEP, Net
from benchmarks.race import Asked, Builds, Outcome, Setting, run

EVERY = 10


def group(setting: Setting) -> Outcome:
    outcome = Outcome()
    for name, net in (("deep", DEEP), ("book", BOOK)):
        builds, asked = _by_hand(name, net)
        for peer, build in peers.STEP.items():
            builds[f"{name} peer {peer}"] = partial(build, net)
            asked.append(Asked(f"step.{name}.peer.{peer}", "plain", f"{name} peer {peer}", f"{name} module"))
        if name == "deep":
            _probed(builds, asked)
        outcome.add(run(builds, asked, setting))
    return outcome


def _by_hand(name: str, net: Net) -> tuple[Builds, list[Asked]]:
    """Recorded in every way against the bare module, and for the deep network against the bare hand-written step."""
    module, hand = f"{name} module", f"{name} by hand"
    builds: Builds = {module: partial(bare.module_step, net), hand: partial(subjects.hand_step, net)}
    asked = [Asked(f"step.{name}.bare", "plain", hand, module)]
    for record in subjects.RECORDINGS:
        watched = f"{name} by hand, {record}"
        builds[watched] = partial(subjects.hand_step, net, record=record)
        if record == "plain_histograms":
            asked.append(Asked(f"step.{name}.full.histograms", "plain", watched, module))
            continue
        asked.append(Asked(f"step.{name}.full", record, watched, module))
        if name == "deep":
            asked.append(Asked("step.deep.cost", record, watched, hand))
    if name == "deep":
        now_and_then = f"{name} by hand, every {EVERY}th step"
        builds[now_and_then] = lambda: subjects.fastest(
            lambda fast: subjects.hand_step(net, record="accelerated" if fast else "plain_histograms", every=EVERY)
        )
        asked.append(Asked("step.deep.full", "every10", now_and_then, module))
        asked.append(Asked("step.deep.cost", "every10", now_and_then, hand))
    return builds, asked


def _probed(builds: Builds, asked: list[Asked]) -> None:
    for variant, build in (
        ("accelerated", lambda: subjects.probe_step(DEEP, True)),
        ("plain", lambda: subjects.probe_step(DEEP, False)),
        ("every10", lambda: subjects.fastest(lambda fast: subjects.probe_step(DEEP, fast, EVERY))),
    ):
        name = f"deep module probed, {variant}"
        builds[name] = build
        asked.append(Asked("step.module.full", variant, name, "deep module"))
