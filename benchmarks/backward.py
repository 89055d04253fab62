"""One backward pass over the book's 50,000 rows: time and memory, by hand and by nn.Module."""

from functools import partial

import torch

from benchmarks import bare, subjects
from benchmarks.nets import LARGE, batch, parameters
from benchmarks.race import Asked, Builds, Contestant, NotAvailable, Outcome, Setting, row, run
from initlab.scratch.backward import VERSIONS
from initlab.tasks.memory import free_memory, peak_bytes, readable

MIB = 2**20
# How the book's reader computes the gradients before autograd: name -> row of the ladder.
PEERS = {"outer": "outer", "functions": "matmul"}


def group(setting: Setting) -> Outcome:
    builds: Builds = {"50000 module": partial(bare.module_backward, LARGE), "50000 by hand": hand}
    asked = [Asked("backward.50000", "plain", "50000 by hand", "50000 module")]
    for peer, version in PEERS.items():
        builds[f"50000 peer {peer}"] = partial(_ladder, version, setting.quick)
        asked.append(Asked(f"backward.50000.peer.{peer}", "plain", f"50000 peer {peer}", "50000 module"))
    outcome = run(builds, asked, setting)
    cpu = torch.device("cpu")
    for name, build in (("memory", hand), ("peer.module.memory", partial(bare.module_backward, LARGE))):
        peak = peak_bytes(build().call, cpu) / MIB
        outcome.rows.append(row(f"backward.50000.{name}", "plain", [peak], setting, "MiB"))
    return outcome


def hand() -> Contestant:
    return subjects.backward_pass(LARGE)


def _ladder(version: str, quick: bool) -> Contestant:
    """A row of initlab's ladder; refused where it would take half of the free memory or the time of a quick look."""
    if quick and VERSIONS[version].outer:
        raise NotAvailable("takes many seconds a call, left out of a quick look")
    needed, free = VERSIONS[version].memory(LARGE.sizes, LARGE.batch), free_memory(torch.device("cpu"))
    if needed > free / 2:
        raise NotAvailable(f"needs {readable(needed)}, half of the free memory is {readable(free / 2)}")
    step = VERSIONS[version].bind([(w[0], b[0]) for w, b in parameters(LARGE)], "relu", "mse")
    xb, yb = batch(LARGE)
    return Contestant(lambda: step(xb[0], yb[0]))
