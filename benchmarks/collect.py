"""Thousands of run folders as one frame: initlab.read against what reads many Parquet files elsewhere.

All have the same files before them, in the cache of the operating system. initlab also looks for the folders, reads
each run.json and adds the folder as a column; the others are handed the list of files.
"""

import tempfile
from functools import partial
from pathlib import Path

from benchmarks import peers, subjects
from benchmarks.folders import run_folders
from benchmarks.race import Asked, Builds, Outcome, Setting, row, run

FOLDERS, QUICK_FOLDERS = 3000, 300
ROUNDS = 3  # of some ten seconds each
RIVAL = "dataset"


def group(setting: Setting) -> Outcome:
    """All read the same folders in turn; the seconds are those of initlab's own calls."""
    count = QUICK_FOLDERS if setting.quick else FOLDERS
    own: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        files = run_folders(Path(folder), count)
        reader = subjects.collected(Path(folder))

        def clocked() -> None:
            begun = setting.clock()
            reader.call()
            own.append((setting.clock() - begun) * FOLDERS / count)

        builds: Builds = {name: partial(build, files) for name, build in peers.FILES.items()}
        builds["initlab.read"] = lambda: reader._replace(call=clocked)
        asked = [Asked("collect", "plain", "initlab.read", RIVAL)]
        asked += [Asked(f"collect.peer.{name}", "plain", name, RIVAL) for name in peers.FILES if name != RIVAL]
        outcome = run(builds, asked, setting._replace(rounds=min(setting.rounds, ROUNDS)))
    if setting.threads == 1:  # the clock is the processor's
        outcome.rows.append(row("collect.seconds", "plain", own[1:], setting, "s"))
    return outcome
