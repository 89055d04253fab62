"""Pages made anew from what folders hold: of every run, and of every sweep above them."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from initlab.errors import UsageError, show
from initlab.figures.pictures import draw_pictures
from initlab.report.page import write_page
from initlab.runs.folders import Paths, list_paths
from initlab.runs.labels import label_run_tables
from initlab.runs.read import Run, find_runs, read_runs
from initlab.runs.schema import TABLES, refuse_other_table

ABOVE = 3  # folders from a job up to its sweep: a job may lie in one of a thousand


def write_pages(paths: Paths) -> tuple[list[Path], list[str]]:
    """Write `report.html` for each run at or below the paths, and for each sweep; the pages, sweeps first, and notes.

    A sweep is a folder with `multirun.yaml`, or one that is named here and holds several runs without one. Figures are
    drawn anew, into the pages alone. A note is a line about what cannot be read. Errors: no run, a page that cannot be
    written.
    """
    runs = find_runs(paths)
    if not runs:
        raise UsageError(f"no run at or below {', '.join(list_paths(paths)) or show(paths)}")
    from initlab.figures import plots  # seaborn takes a second to import

    sweeps: dict[Path, list[Run]] = {}
    for run in runs:
        above = list(Path(run.folder.path).parents)[:ABOVE]
        sweep = next((folder for folder in above if (folder / "multirun.yaml").exists()), None)
        if sweep is None:
            named = [Path(path) for path in list_paths(paths) if Path(path).is_dir()]
            sweep = next((folder for folder in named if folder in Path(run.folder.path).parents), None)
        if sweep is not None:
            sweeps.setdefault(sweep, []).append(run)
    several = {folder: members for folder, members in sweeps.items() if len(members) > 1}
    single = {Path(run.folder.path): [run] for run in runs}
    written, notes = [], list[str]()
    for folder, members in {**several, **single}.items():
        tables, broken = read_labelled(members)
        labels = {str(one) for frame in tables.values() if "label" in frame for one in frame["label"].unique()}
        figures = plots.make_figures(tables, compare=len(labels) > 1 or len(members) > 1)
        written.append(write_page(folder, tables, draw_pictures(figures, None, inline=True)))
        notes += broken
    return written, list(dict.fromkeys(notes))


def read_labelled(runs: Sequence[Run]) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """The labelled tables of some runs, and a line for each file that cannot be read or is another table."""
    tables, notes = {}, []
    for name in TABLES:
        found, frame = read_runs(runs, name)
        notes += [line for run in found for line in run.unreadable]
        if frame is None:
            continue
        try:
            refuse_other_table(name, frame.columns)
        except UsageError as error:
            notes.append(f"{runs[0].name}: {error}")
            continue
        tables[name] = frame
    return label_run_tables(tables), notes
