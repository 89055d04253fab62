"""What is printed and drawn when a run or a sweep has ended: its short table, its notes, where its files are."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from initlab.errors import UsageError
from initlab.runs import summary, theory_rows
from initlab.runs.collect import LONGEST
from initlab.runs.read import Run, find_runs, read_runs
from initlab.runs.recorder import Recorder
from initlab.runs.schema import LOSSES, PARITY, STATS, TABLES, THEORY
from initlab.terminal import as_json, find_width, is_aside


def read_tables(runs: Sequence[Run], names: Iterable[str]) -> dict[str, pd.DataFrame]:
    """The named tables that some runs have."""
    frames = {name: read_runs(runs, name)[1] for name in names}
    return {name: frame for name, frame in frames.items() if frame is not None}


def report_run(
    recorder: Recorder,
    tables: Mapping[str, pd.DataFrame],
    texts: Sequence[str],
    plots: bool,
    compare: bool,
    gain: str,
) -> str:
    """Draw the figures of a run that has ended, from memory; what is to be printed.

    tables: what it has recorded. texts: what its stages have to say. compare: its networks differ, and the figures of a
    sweep are drawn. gain: which gain the rule took, in words.
    """
    drawn = plots and bool(_draw(tables, recorder.folder, compare))
    lines = [text for text in texts if text] + _summarize(tables)
    lines += [*([gain] if gain else []), *_notes([recorder.about])]
    return "\n".join([*lines, *_files(recorder.folder, Path(), drawn)])


def run_as_json(
    recorder: Recorder,
    tables: Mapping[str, pd.DataFrame],
    findings: Sequence[Mapping[str, Any]],
    plots: bool,
    compare: bool,
    objective: float | None,
) -> str:
    """Draw as `report_run` does; a run for another program: its findings, and the short table or else its only one.

    objective: its value, if the run has one.
    """
    if plots:
        _draw(tables, recorder.folder, compare)
    notes = recorder.about.get("notes", [])
    found = {"folder": path_text(recorder.folder), "findings": list(findings), "notes": list(dict.fromkeys(notes))}
    return as_json(found | ({} if objective is None else {"objective": objective}) | {"table": read_rows(tables)})


def read_rows(tables: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """The rows of the short table, of a task without one those of its first table."""
    if STATS in tables:
        table = summary.summarize(*(tables.get(name) for name in (STATS, LOSSES, PARITY, THEORY)))
        if "theory" in table:
            table = table.assign(theory=[getattr(test, "short", None) for test in table["theory"]])
    else:
        table = next(iter(tables.values()), pd.DataFrame())
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def report_sweep(folder: Path, plots: bool) -> str:
    """Draw the figures that compare the runs of a sweep; what is to be printed."""
    runs = find_runs(folder)
    tables = read_tables(runs, TABLES)
    drawn = plots and bool(_draw(tables, folder, compare=True))
    below = Path("*") if any(folder.glob("*/run.json")) else Path("*/*")
    lines = _summarize(tables) + _notes([run.json for run in runs])
    files = _files(folder, below, drawn)
    counts = Counter(str(run.json["verdict"]).split(":")[0].split(" at ")[0] for run in runs if "verdict" in run.json)
    said = ", ".join(f"{n} {rule}" for rule, n in counts.most_common())
    unfinished = [run for run in runs if run.json["status"] not in ("done", "running")]
    lines += [
        files[0],
        *(f"not done: {path_text(Path(run.name))} is {run.json['status']}" for run in unfinished),
    ]
    if is_aside():
        states = {path_text(Path(run.name)): run.json["status"] for run in runs}
        return as_json({"folder": path_text(folder), "runs": states, "verdicts": counts, "table": read_rows(tables)})
    verdicts = [f"verdicts of {counts.total()} runs: {said}"] if counts else []
    return "\n".join([*lines, *files[1:], *verdicts])


def _summarize(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """The short table, and how many layers keep to the prediction."""
    if STATS not in tables:
        return []
    try:
        table = summary.summarize(*(tables.get(name) for name in (STATS, LOSSES, PARITY, THEORY)))
    except UsageError as error:  # files of another table, or rows that stand there twice
        return [f"no short table: {error}"]
    lines = [summary.as_text(table.head(LONGEST), find_width())]
    if len(table) > LONGEST:
        lines.append(f"... and {len(table) - LONGEST:,} more: initlab collect FOLDER --to FILE keeps them")
    if "theory" in table:
        lines.append(theory_rows.describe(list(table["theory"].dropna())))
    parted = summary.describe_parting(table)
    return [*lines, parted] if parted else lines


def _notes(run_jsons: Sequence[Mapping[str, Any]]) -> list[str]:
    """What runs have to say beside their numbers: each sentence once, and how many say it."""
    counts = Counter(note for run_json in run_jsons for note in dict.fromkeys(run_json.get("notes", [])))
    return [text if n == len(run_jsons) else f"{text}: {n} of {len(run_jsons)} runs" for text, n in counts.items()]


def _files(folder: Path, below: Path, drawn: bool) -> list[str]:
    plots = [f"plots:  {path_text(folder / '*.png')}"] if drawn else []
    return [f"tables: {path_text(folder / below / '*.parquet')}", *plots]


def _draw(tables: Mapping[str, pd.DataFrame], folder: Path, compare: bool) -> list[Path]:
    from initlab.figures import plots  # seaborn takes a second to import

    return plots.draw(tables, folder, compare)


def path_text(path: Path) -> str:
    """Relative where the path lies below the working folder."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
