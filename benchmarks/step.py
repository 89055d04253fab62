"""A training step, watched and bare: the deep network, the book's, and nn.Module under the probe."""

from functools import partial

from benchmarks import bare, peers, subjects
from benchmarks.nets import BOOK, DEEP, Net
from benchmarks.race import Asked, Builds, Outcome, Setting, run

EVERY = 10
# How a step by hand is recorded: name of the recording -> what it is asked against the bare nn.Module, and the variant.
FULL = {
    "accelerated": ("full", "accelerated"),
    "nohist": ("full", "nohist"),
    "plain": ("full", "plain"),
    "plain_histograms": ("full.histograms", "plain"),
}
COST = ("accelerated", "nohist")


def group(setting: Setting) -> Outcome:
    outcome = Outcome()
    for name, net in (("deep", DEEP), ("book", BOOK)):
        builds, asked = _by_hand(name, net)
        for peer, build in peers.STEP.items():
            builds[f"{name} peer {peer}"] = partial(build, net)
            asked.append(Asked(f"step.{name}.peer.{peer}", "plain", f"{name} peer {peer}", f"{name} module"))
        if name == "deep":
            _now_and_then(builds, asked)
            _tabled(builds, asked)
            _probed(builds, asked)
        outcome.add(run(builds, asked, setting))
    return outcome


def _by_hand(name: str, net: Net) -> tuple[Builds, list[Asked]]:
    """Recorded in every way against the bare module, and for the deep network against the bare hand-written step."""
    module, hand = f"{name} module", f"{name} by hand"
    builds: Builds = {module: partial(bare.module_step, net), hand: partial(subjects.bare_step, net)}
    asked = [Asked(f"step.{name}.bare", "plain", hand, module)]
    for record, (what, variant) in FULL.items():
        watched = f"{name} by hand, {record}"
        builds[watched] = partial(subjects.recorded_step, net, record)
        asked.append(Asked(f"step.{name}.{what}", variant, watched, module))
        if name == "deep" and record in COST:
            asked.append(Asked("step.deep.cost", variant, watched, hand))
    return builds, asked


def _now_and_then(builds: Builds, asked: list[Asked]) -> None:
    name = f"deep by hand, every {EVERY}th step"
    builds[name] = lambda: subjects.recorded_step(DEEP, subjects.fastest(), every=EVERY)
    asked.append(Asked("step.deep.cost", "every10", name, "deep by hand"))


def _tabled(builds: Builds, asked: list[Asked]) -> None:
    """The same with the making of the tables, which a training does once in a while, charged to the steps."""
    for record in ("accelerated", "nohist"):
        name = f"deep by hand, {record}, tables made"
        builds[name] = partial(subjects.tabled_step, DEEP, record)
        asked.append(Asked("step.deep.full.tables", record, name, "deep module"))


def _probed(builds: Builds, asked: list[Asked]) -> None:
    for record in ("accelerated", "nohist", "plain"):
        name = f"deep module probed, {record}"
        builds[name] = partial(subjects.probed_step, DEEP, record)
        asked.append(Asked("step.module.full", record, name, "deep module"))
    sometimes, tabled = f"deep module probed, every {EVERY}th step", "deep module probed, tables made"
    builds[sometimes] = lambda: subjects.probed_step(DEEP, subjects.fastest(), EVERY)
    asked.append(Asked("step.module.full", "every10", sometimes, "deep module"))
    builds[tabled] = partial(subjects.probed_step, DEEP, "accelerated", tables=True)
    asked.append(Asked("step.module.full.tables", "accelerated", tabled, "deep module"))
