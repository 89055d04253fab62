"""Writes experiments/README.md: every study with its question, source, cost, and what its newest sweep showed.

    initlab gallery [--experiments FOLDER] [PATH ...]

Only sweeps at a study's own size count: those of the launch line alone, without further options. Their figures are
copied beside the studies. Only the text between the two marks of the README is replaced.
"""

import html
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from initlab import files
from initlab.errors import UsageError, printable
from initlab.runs.folders import read_run_json
from initlab.runs.recorder import write_text
from initlab.studies.study import ANSWERS

BEGIN = "<!-- gallery: written by initlab gallery -->"
END = "<!-- end of the gallery -->"
COLOURS = 256  # of a copied figure; the file is a third as large
LARGEST = 2**24  # pixels of a figure
# What is read of a study, and of the answers that a sweep has left.
STUDY: files.Form = {
    "study": {
        "question": str,
        "source": str,
        "cost": {...: lambda value: value is None or (isinstance(value, int | float) and abs(value) < 1e300)},
    }
}
KEPT: dict[str, files.Form] = {"study": str, "overrides": list, "holds": int, "of": int, "verdicts": [{"said": str}]}


def write(experiments: Path, outputs: Iterable[Path]) -> list[str]:
    """Rewrite the README of the studies between its marks, from the sweeps below `outputs`.

    Returns a line about it, then one for each file that cannot be read: such a sweep counts as none.
    """
    readme = experiments / "README.md"
    if not readme.is_file():
        raise UsageError(f"{readme}: no such file; --experiments names the folder of the studies")
    try:
        text = files.read_bytes(readme).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{readme}: is not a text") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UsageError(f"{readme}: the gallery goes between the lines {BEGIN} and {END}")
    mistakes: list[str] = []
    newest = find_newest(outputs, mistakes)
    studies = {}  # name -> the node `study`
    for file in sorted(experiments.glob("*.yaml")):
        studies[file.stem] = files.read_yaml(file, STUDY).get("study", {})
    for name in studies:
        if name in newest and (figure := newest[name][0].parent / f"{name}.png").is_file():
            try:
                copy_small(figure, experiments / f"{name}.png")
            except UsageError as error:
                mistakes.append(str(error))
    answers = {name: answer_lines(text, name, newest[name][1] if name in newest else None) for name in studies}
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    sections = [section(name, about, answers[name], experiments) for name, about in studies.items()]
    page = "\n".join([table(studies, answers), *sections])
    write_text(readme, f"{before}{BEGIN}\n\n{page}\n{after}")
    return [f"{readme}: {len(studies)} studies, {len(set(newest) & set(studies))} of them with a new sweep", *mistakes]


def find_newest(outputs: Iterable[Path], mistakes: list[str]) -> dict[str, tuple[Path, Mapping[str, Any]]]:
    """Name -> file and answers of its newest whole sweep at the study's own size; the folders' names are their times.

    A file that cannot be read becomes a line of `mistakes`.
    """
    found: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    for path in sorted(path for folder in outputs for path in folder.rglob(ANSWERS)):
        try:
            answers = files.read_json(path, KEPT)
        except UsageError as error:
            mistakes.append(str(error))
            continue
        missing = [name for name in KEPT if name not in answers]
        if missing or not all("said" in one for one in answers["verdicts"]):
            mistakes.append(
                str(UsageError(f"{path}: is not what a study leaves, {', '.join(missing) or 'said'} is missing"))
            )
            continue
        runs = [read_run_json(run.parent)["status"] for run in path.parent.glob("*/run.json")]
        whole = bool(runs) and set(runs) == {"done"} and not answers["overrides"]
        older = found.get(answers["study"])
        if whole and (older is None or older[0].parent.name <= path.parent.name):
            found[answers["study"]] = (path, answers)
    return found


def escape_markdown(text: object) -> str:
    """A text of anybody's as a README shows it: no tag, link or picture comes of it, and it stays on its line."""
    escaped = html.escape(printable(" ".join(str(text).split())), quote=False)
    return escaped.replace("](", "]\\(").replace("][", "]\\[")


def copy_small(figure: Path, to: Path) -> None:
    """Copy a figure with a palette, in a third of the bytes.

    The palette covers the colours that there are, however few pixels have them: two lines never become one colour.
    """
    from PIL import Image

    partial = to.with_suffix(".part")
    try:
        with warnings.catch_warnings(action="error"), Image.open(figure, formats=["PNG"]) as image:
            if image.width * image.height > LARGEST:
                raise UsageError(f"{figure}: has {image.width:,} x {image.height:,} pixels; no figure is as large")
            small = image.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        small.save(partial, "PNG", optimize=True)
    except UsageError:
        raise
    except Exception as error:  # whatever the reader of pictures raises is about the file
        raise UsageError(f"{figure}: cannot be read ({error or type(error).__name__})") from error
    partial.replace(to)


def answer_lines(text: str, name: str, answers: Mapping[str, Any] | None) -> list[str]:
    """How many expectations hold, then each of them: of the new sweep, or as the README has them; [] if never run."""
    if answers is None:
        old = re.search(rf"^### `{re.escape(name)}`$(.*?)(?=^### |\Z|^<!--)", text, re.M | re.S)
        lines = re.findall(r"^(?:\*\*\d+ of .*|- (?:holds|FAILS|does not reproduce): .*)$", old[1], re.M) if old else []
        return [escape_markdown(html.unescape(line)) for line in lines]  # somebody may have written there
    said = [f"- {escape_markdown(one['said'])}" for one in answers["verdicts"]]
    known = sum(bool(one.get("fails")) and not one["holds"] for one in answers["verdicts"])
    fails = f", {known} {'does' if known == 1 else 'do'} not reproduce" if known else ""
    return [f"**{answers['holds']} of {answers['of']} hold{fails}**", *said]


def table(studies: Mapping[str, Mapping[str, Any]], answers: Mapping[str, Sequence[str]]) -> str:
    """The index: a line for every study."""
    rows = ["| study | question | runs | CPU s | GPU s | expectations |", "|---|---|---|---|---|---|"]
    for name, about in studies.items():
        cost = about.get("cost") or {}
        costs = [f"{cost[of]:g}" if cost.get(of) is not None else "" for of in ("runs", "cpu_seconds", "gpu_seconds")]
        hold = (answers[name] or ["not run yet"])[0].strip("*")
        rows.append(
            "| " + " | ".join([f"[`{name}`](#{name})", escape_markdown(about.get("question", "")), *costs, hold]) + " |"
        )
    return "\n".join(rows) + "\n"


def section(name: str, about: Mapping[str, Any], answers: Sequence[str], experiments: Path) -> str:
    """A study's section of the gallery: question, source, answers, figure."""
    question = escape_markdown(about.get("question", ""))
    lines = [f"### `{name}`", "", question, "", f"Source: {escape_markdown(about.get('source', ''))}.", ""]
    lines += [*answers[:1], "", *answers[1:], ""] if answers else []
    if (experiments / f"{name}.png").is_file():
        lines += [f"![{question or name}]({name}.png)", ""]
    return "\n".join(lines)
