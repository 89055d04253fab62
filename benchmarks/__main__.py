"""The command line of the benchmarks: which groups, with how many threads, and what becomes of the results.

Without groups it measures a dozen questions of a user, and how cost grows, in some minutes.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import guard, machine, questions, report, rows
from benchmarks.groups import GROUPS
from benchmarks.race import Outcome, Setting
from initlab.errors import UsageError, choose
from initlab.tasks.ensemble.device import find_device

RESULTS = Path(__file__).with_name("results")
WORSE, MISTAKE = 1, 2
QUICK_ROUNDS, QUICK_SECONDS = 5, 0.15
DOZEN = ["stack", "chapter", "step", "train", "ensemble", "phase", "verdict", "growth"]
DOZEN_ROUNDS, DOZEN_SECONDS = 9, 0.6


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description="What watching costs, as ratios in one run.")
    parser.add_argument("groups", nargs="*", help=f"all of {' | '.join(GROUPS)}; none is a dozen rows of them")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], metavar="N", help="1: CPU time; more: wall time")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the group gpu")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: for a look")
    parser.add_argument(
        "--json", type=Path, nargs="?", const=Path(), metavar="FILE",
        help="add the results to FILE, by default to the machine's class in benchmarks/results",
    )  # fmt: skip
    parser.add_argument("--compare", type=Path, metavar="FILE", help="exit with 1 if a ratio became worse than in FILE")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the results; with --from those of a file")
    parser.add_argument("--from", type=Path, dest="source", metavar="FILE", help="measure nothing, take FILE's results")
    return parser.parse_args(words)


def measure(options: argparse.Namespace) -> Outcome:
    """Run the groups at each number of threads; what a group has measured is in the file before the next begins."""
    outcome = Outcome()
    default = ["gpu"] if options.device == "cuda" else DOZEN
    for threads in options.threads:
        torch.set_num_threads(threads)
        setting = Setting(threads, options.device)
        if not options.groups and options.device != "cuda":
            setting = setting._replace(rounds=DOZEN_ROUNDS, seconds=DOZEN_SECONDS, quick=True, wanted=questions.wanted)
        if options.quick:
            setting = setting._replace(rounds=QUICK_ROUNDS, seconds=QUICK_SECONDS, quick=True)
        for name in dict.fromkeys(options.groups or default):
            begun = time.monotonic()
            found = GROUPS[name](setting)
            outcome.add(found)
            if options.json is not None:
                rows.write(options.json, found.rows)
            print(f"{name}, {threads} threads: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    return outcome


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be before anything is measured."""
    for name in options.groups:
        choose(GROUPS, name, "group")
    find_device(options.device)
    for threads in options.threads:
        if threads < 1:
            raise UsageError(f"--threads {threads}: must be at least 1")
    if options.compare:
        rows.read(options.compare)


def main(words: Sequence[str]) -> int:
    options = arguments(words)
    check(options)
    if options.json is not None and not options.json.name:
        options.json = RESULTS / f"{machine.machine_class(options.device)}.json"
    if options.source:
        outcome = Outcome(rows.read(options.source))
    else:
        print("\n".join(machine.describe(options.threads, options.device)), flush=True)
        outcome = measure(options)
    print("\n".join(["", *questions.lines(outcome.rows), "", *report.growth(outcome.rows), ""]))
    long = bool(options.groups or options.source)
    rest = [*report.lines(outcome), "", *report.glossary(row.id for row in outcome.rows)]
    print("\n".join(rest if long else report.missing(outcome)))
    if options.json is not None and not options.source:
        print(f"\nResults added to {options.json}.")
    if options.plot:
        from benchmarks.draw import save

        save(outcome.rows, options.plot, title(options.source))
        print(f"\nFigure written to {options.plot}.")
    return judge(outcome, options.compare) if options.compare else 0


def title(source: Path | None) -> str:
    where = source.stem if source else machine.machine_class()
    return f"What watching a network costs: CPU time on {where}, one thread"


def judge(outcome: Outcome, path: Path) -> int:
    """Say what became worse since the file was written; the exit code is 1 if anything did."""
    then = rows.read(path)
    known = {row.key for row in then}
    shared = [row for row in guard.comparable(outcome.rows) if row.key in known]
    if not shared:
        raise UsageError(f"{path}: none of its ratios was measured in this run; the same groups, threads and device?")
    found = guard.worse(outcome.rows, then)
    for name in guard.no_longer_measured(outcome.rows, then):
        print(f"not measured now: {name}")
    for each in found:
        print(f"WORSE {each}")
    print(f"{len(shared)} ratios compared with {path}, {len(found)} worse by more than {guard.ROOM - 1:.0%}.")
    return WORSE if found else 0


def entry() -> int:
    try:
        return main(sys.argv[1:])
    except UsageError as mistake:
        print(mistake, file=sys.stderr)
        return MISTAKE


if __name__ == "__main__":
    sys.exit(entry())
