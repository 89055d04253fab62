"""What is printed and drawn when a run or a sweep has ended: its short table, its notes, where its files are."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from initlab.errors import UsageError
from initlab.runs import summary, theory_rows
from initlab.runs.collect import LONGEST
from initlab.runs.folders import path_text
from initlab.runs.labels import label_run_tables
from initlab.runs.read import Run, find_runs, read_runs
from initlab.runs.recorder import Recorder
from initlab.runs.schema import LOSSES, PARITY, STATS, TABLES, THEORY
from initlab.terminal import as_json, find_width, is_aside

if TYPE_CHECKING:
    from initlab.figures.pictures import Picture


def read_tables(runs: Sequence[Run], names: Iterable[str]) -> dict[str, pd.DataFrame]:
    """The named tables that some runs have."""
    frames = {name: read_runs(runs, name)[1] for name in names}
    return {name: frame for name, frame in frames.items() if frame is not None}


@dataclass
class Ended:
    """A run or a sweep that has ended: its folder, its tables, its figures as a page shows them."""

    folder: Path
    tables: Mapping[str, pd.DataFrame]
    pictures: "list[Picture]" = field(default_factory=list)

    @cached_property
    def labelled_tables(self) -> Mapping[str, pd.DataFrame]:
        """The tables, for what tells settings apart."""
        return label_run_tables(self.tables)

    def draw(self, compare: bool, inline: bool) -> None:
        """Write the figures, those that compare several runs if asked for; for a page too where there will be one."""
        from initlab.figures import plots  # seaborn takes a second to import
        from initlab.figures.pictures import draw_pictures

        self.pictures = draw_pictures(plots.make_figures(self.labelled_tables, compare), self.folder, inline)

    def write_page(self) -> None:
        """`report.html`; errors: one line where it cannot be written."""
        from initlab.report import page

        page.write_page(self.folder, self.labelled_tables, self.pictures)


def describe_run(ended: Ended, recorder: Recorder, texts: Sequence[str], gain: str, report: bool) -> str:
    """What is to be printed of a run whose figures are drawn.

    texts: what its stages have to say. gain: which gain the rule took, in words. report: there will be a page.
    """
    lines = [text for text in texts if text] + _summarize(ended.tables)
    lines += [*([gain] if gain else []), *_notes([recorder.about])]
    return "\n".join([*lines, *_files(ended, Path(), report)])


def run_as_json(
    ended: Ended, recorder: Recorder, findings: Sequence[Mapping[str, Any]], objective: float | None
) -> str:
    """A run for another program: its findings, and the short table or else its only one.

    objective: its value, if the run has one.
    """
    notes = recorder.about.get("notes", [])
    found: dict[str, Any] = {
        "folder": path_text(recorder.folder),
        "findings": list(findings),
        "notes": list(dict.fromkeys(notes)),
    }
    found |= {} if objective is None else {"objective": objective}
    return as_json(found | {"table": read_rows(ended.tables)})


def read_rows(tables: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """The rows of the short table, of a task without one those of its first table."""
    if STATS in tables:
        table = summary.summarize(*(tables.get(name) for name in (STATS, LOSSES, PARITY, THEORY)))
        if "theory" in table:
            table = table.assign(theory=[getattr(test, "short", None) for test in table["theory"]])
    else:
        table = next(iter(tables.values()), pd.DataFrame())
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def report_sweep(folder: Path, plots: bool, report: bool) -> tuple[str, Ended]:
    """Draw the figures that compare the runs of a sweep; what is to be printed, and what a page is made of."""
    runs = find_runs(folder)
    ended = Ended(folder, read_tables(runs, TABLES))
    if plots:
        ended.draw(True, report)
    below = Path("*") if any(folder.glob("*/run.json")) else Path("*/*")
    lines = _summarize(ended.tables) + _notes([run.json for run in runs])
    files = _files(ended, below, report)
    counts = Counter(str(run.json["verdict"]).split(":")[0].split(" at ")[0] for run in runs if "verdict" in run.json)
    said = ", ".join(f"{n} {rule}" for rule, n in counts.most_common())
    unfinished = [run for run in runs if run.json["status"] not in ("done", "running")]
    lines += [
        files[0],
        *(f"not done: {path_text(Path(run.name))} is {run.json['status']}" for run in unfinished),
    ]
    if is_aside():
        states = {path_text(Path(run.name)): run.json["status"] for run in runs}
        table = read_rows(ended.tables)
        return as_json({"folder": path_text(folder), "runs": states, "verdicts": counts, "table": table}), ended
    verdicts = [f"verdicts of {counts.total()} runs: {said}"] if counts else []
    return "\n".join([*lines, *files[1:], *verdicts]), ended


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


def _files(ended: Ended, below: Path, report: bool) -> list[str]:
    plots = [f"plots:  {path_text(ended.folder / '*.png')}"] if ended.pictures else []
    page = [f"report: {path_text(ended.folder / 'report.html')}"] if report else []
    return [f"tables: {path_text(ended.folder / below / '*.parquet')}", *plots, *page]
