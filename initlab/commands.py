"""Commands on run folders: a first word without `=`. What reads runs imports neither torch nor Hydra."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from initlab.errors import UsageError, choose, nearest, printable

DIFFERENT = 3  # exit code
SHOWN = 10  # pages that are named
PACKAGE = Path(__file__).resolve().parent
# In a checkout the studies stand beside the package; the wheel carries them inside.
EXPERIMENTS = (PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else PACKAGE) / "experiments"


class Command(NamedTuple):
    """What it is for, what it does with its options (the exit code), and these: name -> how argparse reads it."""

    about: str
    run: Callable[[argparse.Namespace], int]
    options: Mapping[str, Mapping[str, Any]]
    end: str = ""  # of its page of help


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog.removeprefix('initlab ')}: {message}")


def is_command(words: Sequence[str]) -> bool:
    """Whether the first word is one of ours and not an option of a run."""
    return bool(words) and "=" not in words[0] and not words[0].startswith(("-", "+", "~"))


def run(words: Sequence[str]) -> int:
    """A command and its words; UsageError for a mistake in them."""
    name = words[0]
    if name not in COMMANDS:
        names = ", ".join(sorted(COMMANDS))
        raise UsageError(f"{name}: is neither key=value nor a command ({names}){nearest(name, COMMANDS)}")
    command = COMMANDS[name]
    parser = _Parser(f"initlab {name}", description=command.about, epilog=command.end)
    for option, how in command.options.items():
        parser.add_argument(option, **how)
    return command.run(parser.parse_args(words[1:]))


def run_collect(given: argparse.Namespace) -> int:
    from initlab.runs import collect
    from initlab.runs.read import notes
    from initlab.runs.schema import STATS, TABLES

    choose(TABLES, given.table, "table")
    if given.to is not None:
        collect.refuse(given.to)
    runs, frame = collect.collect(given.paths, given.table)
    if frame is None or given.to is not None:
        _print_notes(notes(runs, given.table))
    if frame is None:
        raise UsageError(f"no run with a table `{given.table}` at or below {', '.join(given.paths)}")
    if given.to is not None:
        collect.save(frame, given.to)
        count = sum(run.has_table for run in runs)
        print(f"{given.to}: {len(frame):,} rows of `{given.table}` from {count:,} runs, {frame.shape[1]} columns")
        return 0
    print("\n".join(collect.describe(runs, frame, given.table)))
    if given.table == STATS:
        print(collect.short_table(runs, frame))
    return 0


def _print_notes(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"initlab: {line}", file=sys.stderr)


def run_compare(given: argparse.Namespace) -> int:
    from initlab.runs.compare import compare

    found = compare([given.A], [given.B])
    _print_notes(found.notes)
    print(f"A: {given.A}\nB: {given.B}\n{found}")
    return 0 if found.equal else DIFFERENT


def run_gallery(given: argparse.Namespace) -> int:
    from initlab.studies.gallery import write

    for path in given.outputs or ():
        if not os.path.isdir(path):  # noqa: PTH112 (a Path raises where a name is too long)
            raise UsageError(f"{path}: no such folder")
    if given.experiments is None and EXPERIMENTS.parent == PACKAGE:
        raise UsageError("gallery: the shipped studies keep their README; name the folder of yours with --experiments")
    done, *mistakes = write(given.experiments or EXPERIMENTS, [Path(path) for path in given.outputs or ["outputs"]])
    print(printable(done))
    _print_notes(mistakes)
    return 0


def run_report(given: argparse.Namespace) -> int:
    from initlab.report.page_files import write_pages

    written, notes = write_pages(given.paths)
    _print_notes(notes)
    for path in written[:SHOWN]:
        print(f"report: {printable(str(path))}")
    if len(written) > SHOWN:
        print(f"and {len(written) - SHOWN:,} more, one for each run")
    return 0


SIDE = {"help": "a run folder, the folder of a sweep, or a glob of them in quotes"}
COMMANDS: dict[str, Command] = {
    "collect": Command(
        "Many run folders as one table, or a short account of them.",
        run_collect,
        {
            "paths": {"nargs": "+", "metavar": "PATH", "help": "run folders, sweep folders or globs: 'outputs/**'"},
            "--to": {"type": Path, "metavar": "FILE", "help": "write the table to FILE: .parquet, .csv or .feather"},
            "--table": {"default": "stats", "metavar": "NAME", "help": "which table; default: stats"},
        },
    ),
    "compare": Command(
        "What differs between two runs or sweeps, beyond what seeds do.",
        run_compare,
        {"A": SIDE, "B": SIDE},
        "Exit code 0: equal within 4 seed-to-seed spreads, 3: not, 2: a mistake.",
    ),
    "report": Command(
        "The page report.html of runs and sweeps, made anew from their tables.",
        run_report,
        {"paths": {"nargs": "+", "metavar": "PATH", "help": "run folders, sweep folders or globs: 'outputs/**'"}},
    ),
    "gallery": Command(
        "Every study with its newest figure and answer, in their README.",
        run_gallery,
        {
            "outputs": {"nargs": "*", "metavar": "PATH", "help": "where the studies were run"},
            "--experiments": {"type": Path, "metavar": "FOLDER", "help": "the folder of the studies"},
        },
    ),
}
