"""One backward pass over the book's 50,000 rows: time and memory, by hand and by nn.Module."""

from functools import partial

import torch

from benchmarks import bare, subjects
from benchmarks.nets import LARGE, batch, parameters
from benchmarks.race import Asked, Builds, Contestant, NotAvailable, Outcome, Setting, row, run
from benchmarks.rows import Missing
from initlab.tasks.course.engine_versions import BACKWARDS
from initlab.tasks.course.rotated_timing import seconds_each
from initlab.tasks.ensemble.memory import free_memory, peak_bytes, readable

MIB = 2**20
# How the book's reader computes the gradients before autograd: name -> row of the ladder.
PEERS = {"functions": "matmul"}
OUTER = "outer"  # many seconds a pass: its time is taken once


def group(setting: Setting) -> Outcome:
    builds: Builds = {"50000 module": partial(bare.module_backward, LARGE), "50000 by hand": hand}
    asked = [Asked("backward.50000", "plain", "50000 by hand", "50000 module")]
    for peer, version in PEERS.items():
        builds[f"50000 peer {peer}"] = partial(_ladder, version)
        asked.append(Asked(f"backward.50000.peer.{peer}", "plain", f"50000 peer {peer}", "50000 module"))
    outcome = run(builds, asked, setting)
    _outer(outcome, setting)
    cpu = torch.device("cpu")
    for name, build in (("memory", first), ("peer.module.memory", partial(bare.module_backward, LARGE))):
        peak = peak_bytes(build().call, cpu) / MIB
        outcome.rows.append(row(f"backward.50000.{name}", "plain", [peak], setting, "MiB"))
    return outcome


def hand() -> Contestant:
    return subjects.backward_pass(LARGE)


def first() -> Contestant:
    return subjects.first_backward_pass(LARGE)


def _outer(outcome: Outcome, setting: Setting) -> None:
    """One pass of outer products over the module's median; left out of a quick look."""
    asked, name = ("backward.50000.peer.outer", "plain"), "50000 peer outer"
    try:
        if setting.quick:
            raise NotAvailable("takes many seconds, left out of a quick look")
        call = _ladder(OUTER).call
        outcome.seconds[name] = seconds_each(call, 1, torch.device(setting.device), setting.clock)
    except NotAvailable as reason:
        outcome.missing.append(Missing(*asked, str(reason)))
        return
    outcome.rows.append(row(*asked, [outcome.seconds[name] / outcome.seconds["50000 module"]], setting))


def _ladder(version: str) -> Contestant:
    """A row of initlab's ladder; refused where it would take half of the free memory."""
    needed, free = BACKWARDS[version].memory(LARGE.sizes, LARGE.batch), free_memory(torch.device("cpu"))
    if needed > free / 2:
        raise NotAvailable(f"needs {readable(needed)}, half of the free memory is {readable(free / 2)}")
    step = BACKWARDS[version].bind([(w[0], b[0]) for w, b in parameters(LARGE)], "relu", "mse")
    xb, yb = batch(LARGE)
    return Contestant(lambda: step(xb[0], yb[0]))
