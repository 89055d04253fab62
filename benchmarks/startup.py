"""What the command line takes before it does anything: CPU seconds of fresh processes, at any number of threads."""

import tempfile
from pathlib import Path

from benchmarks.child import python
from benchmarks.race import NotAvailable, Outcome, Setting, row
from benchmarks.rows import Missing

HELP = ["-m", "initlab", "--help"]
TINY = [
    *("-m", "initlab", "task=stack", "depth=2", "width=8", "batch=8", "seeds=1"),
    *("plots=false", "device=cpu"),
]
IMPORT = ["-c", "import torch, hydra"]


def group(setting: Setting) -> Outcome:
    """Rounds of all three in turn; the run minus the import is taken within a round."""
    outcome = Outcome()
    rounds = min(setting.rounds, 5)
    with tempfile.TemporaryDirectory() as folder:
        try:
            spent = [
                {name: python(words, setting.threads, Path(folder))[0] for name, words in _rotated(k)}
                for k in range(rounds + 1)
            ][1:]  # the first round fills the system's cache of files
        except NotAvailable as reason:
            outcome.missing = [Missing(name, "plain", str(reason)) for name in ("startup.help", "startup.run")]
            return outcome
    helped, ran = [each["help"] for each in spent], [each["run"] - each["import"] for each in spent]
    outcome.rows = [row("startup.help", "plain", helped, setting, "s"), row("startup.run", "plain", ran, setting, "s")]
    return outcome


def _rotated(k: int) -> list[tuple[str, list[str]]]:
    programs = [("help", HELP), ("run", TINY), ("import", IMPORT)]
    return programs[k % 3 :] + programs[: k % 3]
