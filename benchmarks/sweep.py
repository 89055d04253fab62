"""What a sweep of many jobs takes of the processor: the batched launcher against Hydra's own, in fresh processes.

Rounds of three programs in turn: the sweep by each launcher, and one trivial run, whose cost is that of starting and
is taken from both. The jobs are the default stack without plots.
"""

import tempfile
from pathlib import Path

from benchmarks.child import python
from benchmarks.race import NotAvailable, Outcome, Setting, row
from benchmarks.rows import Missing

JOBS = 32
START = ["-m", "initlab", "task=stack", "depth=2", "width=8", "batch=8", "seeds=1", "plots=false", "device=cpu"]
SWEEP = ["-m", "initlab", "-m", "task=stack", "plots=false", "device=cpu"]
# id -> what the jobs differ in
SWEEPS = {
    "sweep.seeds": [f"seed=range(0,{8 * JOBS},8)"],  # ensembles of 8
    "sweep.single": [f"seed=range(0,{JOBS})", "seeds=1"],
    "sweep.gains": [f"init.gain=range(1,{1 + JOBS // 16},{1 / 16})"],  # ensembles of 8, each with a theory of its own
}


def group(setting: Setting) -> Outcome:
    """Ratios batched / basic."""
    outcome = Outcome()
    for name, words in SWEEPS.items():
        programs = {"start": START, "basic": [*SWEEP, *words], "batched": [*SWEEP, "hydra/launcher=batched", *words]}
        order = list(programs)
        ratios = []
        try:
            for k in range(min(setting.rounds, 3)):
                turn = order[k % 3 :] + order[: k % 3]
                with tempfile.TemporaryDirectory() as folder:
                    spent = {each: python(programs[each], setting.threads, Path(folder))[0] for each in turn}
                ratios.append((spent["batched"] - spent["start"]) / (spent["basic"] - spent["start"]))
        except NotAvailable as reason:
            outcome.missing.append(Missing(name, "plain", str(reason)))
            continue
        outcome.rows.append(row(name, "plain", ratios, setting))
    return outcome
