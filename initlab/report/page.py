"""One page for a run or a sweep: everything that its folder holds, in one file that asks for nothing from outside.

What comes from outside is escaped by jinja2; the numbers behind the walk through the layers stand in it as JSON.
"""

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from initlab import files
from initlab.errors import UsageError, report_disk
from initlab.figures.pictures import Picture, make_png
from initlab.report import page_sections
from initlab.report.page_findings import (
    OF_GRADIENT,
    OF_TRAINING,
    Found,
    describe_findings,
    join_findings,
    list_settings,
    make_grid,
    read_answers,
    read_verdicts,
)
from initlab.report.page_numbers import SHOWN, collect_views
from initlab.report.page_tables import PageSection, as_text
from initlab.report.page_words import Reader
from initlab.runs import folders
from initlab.runs.read import Run, find_runs
from initlab.runs.recorder import write_text
from initlab.runs.schema import HISTOGRAMS, LABELS, OPTION_OF, STATS, TABLES
from initlab.verdict.table_rules import SETTING

PAGE = "report.html"
HERE = Path(__file__).parent
NUMBERS, NUMBERS_OF_A_SWEEP = 40_000, 150_000  # of the walk: some 250 KB, and 900
LARGEST_PICTURE = 2**20  # bytes of a PNG that is taken into a page
# Where a picture stands that is not the one above all others.
PLACES = {
    "activation_std": "stack",
    "gradient_std": "stack",
    "loss": "training",
    "training_activations": "training",
    "training_histograms": "training",
    "gradient_norm": "training",
}


@cache
def load_template() -> Any:
    room = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return room.get_template("page.html.jinja")


def write_page(folder: Path, tables: Mapping[str, pd.DataFrame], pictures: Sequence[Picture]) -> Path:
    """Write `report.html` into the folder of a run or of a sweep, from its labelled tables.

    pictures: of the figures that they allow. Errors: one line where the file cannot be written.
    """
    runs = find_runs(folder)
    path = folder / PAGE
    with report_disk(path):
        write_text(path, make_page(folder, runs, tables, list(pictures)))
    return path


def make_page(folder: Path, runs: Sequence[Run], tables: page_sections.Tables, pictures: list[Picture]) -> str:
    """The page as HTML."""
    tables = drop_settings(tables)
    facts = page_sections.find_facts(tables)
    single = len(runs) == 1 and Path(runs[0].folder.path) == folder
    verdicts, mistakes = read_verdicts(runs)
    study, found = read_answers(folder), join_findings(verdicts, list_settings(tables))
    pictures = [*read_study_picture(folder, study), *pictures]
    first = choose_picture(pictures, found)
    views = collect_views(tables, NUMBERS if single else NUMBERS_OF_A_SWEEP)
    sections = list_sections(facts, [one for one in pictures if one is not first], single)
    grid = make_grid(runs, facts, verdicts, folder)
    three = page_sections.list_three_layers(views)
    lines = describe_findings(facts) or [f"{one.title}." for one in pictures if one.title]
    lines += [note for run in runs[:1] for note in run.json.get("notes", [])] if single else []
    reader = Reader()
    opening = reader.explain([*lines, *(f"{one.cause} {one.remedy} {one.about}" for one in found)])
    for section in sections:
        section.words = reader.explain(section.whole_text())
    closing = reader.explain([text for table in [*three, *([grid] if grid else [])] for text in table.columns])
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page: str = load_template().render(
        title=name_page(folder, runs, study, single),
        study=study, single=single, place=describe_place(folder, runs, single), made=describe_making(runs),
        healthy=bool(verdicts) and not found, judged=len(verdicts), found=found, lines=lines, mistakes=mistakes,
        opening=opening, first=first, settings=list_options(runs), columns=list_columns(runs), sections=sections,
        grid=grid, three=three, left=max(0, len(views) - len(three)), closing=closing, views=bool(views),
        numbers=escape_json({"views": views, "titles": SHOWN}),
        histograms=HISTOGRAMS in tables, commands=list_commands(runs, folder, single), script=Markup(script),
        script_hash=digest, style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
    )  # fmt: skip
    return page


def drop_settings(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The tables that have rows; those of the most rows without the constant columns of the configuration.

    Of a training by hand and by modules the first is kept.
    """
    kept = {}
    for name, frame in tables.items():
        if not len(frame):
            continue
        if name in (STATS, HISTOGRAMS):
            by_hand = frame["implementation"].astype(str) == "scratch"
            frame = frame[by_hand | ~frame["stage"].isin(frame.loc[by_hand, "stage"].unique())]
        if TABLES[name].labelled:
            frame = frame.drop(columns=[one for one in {*LABELS, *OPTION_OF} - {*SETTING} if one in frame])
        kept[name] = frame
    return kept


def escape_json(value: Any) -> Markup:
    """JSON that may stand inside an element of a page: no `<` is left in it, and so no end of the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def describe_place(folder: Path, runs: Sequence[Run], single: bool) -> str:
    """The folder, and of a single run how it ended, when it began and what it cost."""
    if not single:
        return folders.path_text(folder)
    about = runs[0].json
    started, seconds = about.get("started"), about.get("cpu_seconds")
    said = [f"{folders.path_text(folder)}: {about.get('status')}"]
    said += [f"started {started[:16].replace('T', ' ')} UTC"] if isinstance(started, str) else []
    said += [f"{seconds:.3g} s of CPU time"] if isinstance(seconds, int | float) else []
    return ", ".join(said)


def describe_making(runs: Sequence[Run]) -> str:
    """The versions, the revision and the machine of the first run."""
    about: Mapping[str, Any] = runs[0].json if runs else {}
    versions = about.get("versions")
    said = [", ".join(f"{name} {version}" for name, version in versions.items())] if isinstance(versions, dict) else []
    said += [f"revision {about['git_revision']}"] if about.get("git_revision") else []
    said += [str(about[name]) for name in ("platform", "device") if about.get(name)]
    return f"Made with {'; '.join(said)}." if said else ""


def name_page(folder: Path, runs: Sequence[Run], study: Mapping[str, Any], single: bool) -> str:
    if study.get("question"):
        return str(study["question"])
    if not single:
        swept = [key for key in folders.differing_keys([run.settings for run in runs]) if not key.startswith("hydra.")]
        return f"{len(runs)} runs over {', '.join(swept)}" if swept else f"{len(runs)} runs"
    columns = runs[0].columns
    names = [str(columns[name]) for name in ("task", "init", "activation") if columns.get(name)]
    return ", ".join(names) or folder.name


def read_study_picture(folder: Path, study: Mapping[str, Any]) -> list[Picture]:
    """The figure of a study, which lies in its folder."""
    name = str(study.get("study", ""))
    path = folder / f"{name}.png"
    if not name or Path(name).name != name or not path.exists():
        return []
    try:
        png = files.read_bytes(path, LARGEST_PICTURE)
    except UsageError:
        return []
    title = str(study.get("question") or name)
    return [Picture("study", title, title, make_png(png, title))] if png.startswith(b"\x89PNG") else []


def choose_picture(pictures: Sequence[Picture], found: Sequence[Found]) -> Picture | None:
    """The one that shows the gravest finding."""
    wanted = ["study"]
    for one in found[:1]:
        wanted += ["gradient_std"] * (one.rule in OF_GRADIENT) + ["loss"] * (one.rule in OF_TRAINING)
    by_name = {one.name: one for one in pictures if one.image}
    return next((by_name[name] for name in wanted if name in by_name), next(iter(by_name.values()), None))


def list_sections(facts: page_sections.Facts, pictures: Sequence[Picture], single: bool) -> list[PageSection]:
    """The parts that numbers fill, each with its pictures; the comparing ones of a sweep stand together at the end."""
    made = [
        page_sections.describe_stack(facts),
        page_sections.describe_training(facts),
        page_sections.describe_parity(facts),
        page_sections.describe_formats(facts),
        page_sections.describe_theory(facts),
        page_sections.list_other_tables(facts),
    ]
    sections = [one for one in made if one is not None]
    left = [one for one in pictures if one.image]
    if single:
        for section in sections:
            section.pictures = [one for one in left if PLACES.get(one.name) == section.name]
        named = {one.name for section in sections for one in section.pictures}
        left = [one for one in left if one.name not in named]
    return [*sections, *([PageSection("pictures", "Pictures", pictures=left)] if left else [])]


def list_options(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What was set for these runs, all their values."""
    values: dict[str, dict[str, None]] = {}
    for run in runs:
        for key, value in run.settings.items():
            values.setdefault(key, {})[as_text(value)] = None
    return [(key, ", ".join(found)) for key, found in values.items()]


def list_columns(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The configuration in force, where it is the same in all runs; what differs is among the options."""
    every = [run.columns for run in runs if run.columns]
    if not every:
        return []
    same = set(every[0]) - set(folders.differing_keys(every))
    return [(str(name), as_text(value)) for name, value in every[0].items() if name in same]


def list_commands(runs: Sequence[Run], folder: Path, single: bool) -> list[tuple[str, str]]:
    """What it is for, and the command: to run it again, to make this page anew, to read the tables."""
    found = []
    command = next((run.json["command"] for run in runs if isinstance(run.json.get("command"), list)), None)
    if command:
        program, *words = map(str, command)
        start = ["python", "-m", "initlab"] if program == "__main__.py" else [program]
        swept = any(word in ("-m", "--multirun") for word in words)
        found.append(("Run it again", shlex.join([*start, *words])))
        if single and swept:
            found[0] = ("Run the sweep again", found[0][1])
            flags = [word for k, word in enumerate(words) if word.startswith("-") or words[k - 1] in ("-cn", "-cd")]
            flags = [word for word in flags if word not in ("-m", "--multirun")]
            own = runs[0].json.get("overrides") or []
            found.insert(0, ("Run this job alone", shlex.join([*start, *flags, *own])))
    where = folders.path_text(folder)
    found.append(("Make this page again", shlex.join(["python", "-m", "initlab", "report", where])))
    found.append(("Read its numbers", f"import initlab; frame = initlab.read({where!r})"))
    return found
