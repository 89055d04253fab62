"""What is printed and drawn when a run or a sweep has ended: its short table, its notes, where its files are."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from initlab.runs import gather, recorder, summary, theory_rows
from initlab.runs.gather import Run


def tables(folder: Path, names: Iterable[str] = tuple(recorder.TABLES)) -> dict[str, pd.DataFrame]:
    """What a run folder, or the folder of a sweep, has."""
    return _tables(gather.found(folder), names)


def _tables(runs: Sequence[Run], names: Iterable[str]) -> dict[str, pd.DataFrame]:
    every = {name: gather.of(runs, name) for name in names}
    return {name: gather.frame(some) for name, some in every.items() if any(run.shards for run in some)}


def report(folder: Path, said: Sequence[str] = (), plots: bool = True, compare: bool = False, about: str = "") -> str:
    """Draw the figures of a run folder, or those that compare the runs of a sweep; what is to be printed.

    That is what the stages said, the short table, a line `about` the run, and where the rest is.
    """
    runs = gather.found(folder)
    found = _tables(runs, recorder.TABLES)
    paths = _draw(found, folder, compare) if plots else []
    lines = [text for text in said if text]
    if "stats" in found:
        table = summary.summarize(*(found.get(name) for name in ("stats", "losses", "parity", "theory")))
        lines.append(summary.as_text(table))
        if "theory" in table:
            lines.append(theory_rows.said(list(table["theory"].dropna())))
    lines += [*([about] if about else []), *notes(runs)]
    below = Path() if (folder / "run.json").is_file() else Path("*")  # the folders of a sweep's jobs
    if below.name and not any(folder.glob("*/run.json")):
        below = Path("*/*")
    lines.append(f"tables: {shown(folder / below / '*.parquet')}")
    for run in runs:
        if run.said["status"] not in ("done", "running"):
            lines.append(f"not done: {shown(Path(run.folder.path))} is {run.said['status']}")
    if paths:
        lines.append(f"plots:  {shown(folder / '*.png')}")
    return "\n".join(lines)


def notes(runs: Sequence[Run]) -> list[str]:
    """What runs have to say beside their numbers: each sentence once, and how many say it."""
    said = Counter(note for run in runs for note in run.said.get("notes", []))
    return [text if n == len(runs) else f"{text}: {n} of {len(runs)} runs" for text, n in said.items()]


def _draw(found: Mapping[str, pd.DataFrame], folder: Path, compare: bool) -> list[Path]:
    from initlab.figures import plots  # seaborn takes a second to import

    return plots.draw(found, folder, compare)


def shown(path: Path) -> str:
    """Relative where the path lies below the working folder."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
