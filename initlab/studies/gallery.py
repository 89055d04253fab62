"""Writes experiments/README.md: every study with its question, source, cost, and what its newest sweep showed.

    initlab gallery [--experiments FOLDER] [PATH ...]

Only sweeps at a study's own size count: those of the launch line alone, without further options. Their figures are
copied beside the studies. Only the text between the two marks of the README is replaced.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from initlab.errors import UsageError
from initlab.runs.recorder import write_text
from initlab.studies.study import ANSWERS

BEGIN = "<!-- gallery: written by initlab gallery -->"
END = "<!-- end of the gallery -->"
COLOURS = 256  # of a copied figure; the file is a third as large


def write(experiments: Path, outputs: Iterable[Path]) -> str:
    """Rewrite the README of the studies between its marks, from the sweeps below `outputs`; returns a line about it."""
    readme = experiments / "README.md"
    if not readme.is_file():
        raise UsageError(f"{readme}: no such file; --experiments names the folder of the studies")
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UsageError(f"{readme}: the gallery goes between the lines {BEGIN} and {END}")
    newest = find_newest(outputs)
    files = sorted(experiments.glob("*.yaml"))  # name -> the node `study`
    studies = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")).get("study", {}) for file in files}
    for name in studies:
        if name in newest and (figure := newest[name].parent / f"{name}.png").is_file():
            copy_small(figure, experiments / f"{name}.png")
    answers = {name: answer_lines(text, name, newest.get(name)) for name in studies}
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    sections = [section(name, about, answers[name], experiments) for name, about in studies.items()]
    page = "\n".join([table(studies, answers), *sections])
    write_text(readme, f"{before}{BEGIN}\n\n{page}\n{after}")
    return f"{readme}: {len(studies)} studies, {len(set(newest) & set(studies))} of them with a new sweep"


def find_newest(outputs: Iterable[Path]) -> dict[str, Path]:
    """Name -> the answers of its newest whole sweep at the study's own size; the folders' names are their times."""
    found: dict[str, Path] = {}
    for path in sorted(path for folder in outputs for path in folder.rglob(ANSWERS)):
        answers = json.loads(path.read_text(encoding="utf-8"))
        runs = [json.loads(run.read_text(encoding="utf-8"))["status"] for run in path.parent.glob("*/run.json")]
        whole = bool(runs) and set(runs) == {"done"} and not answers["overrides"]
        older = found.get(answers["study"])
        if whole and (older is None or older.parent.name <= path.parent.name):
            found[answers["study"]] = path
    return found


def copy_small(figure: Path, to: Path) -> None:
    """Copy a figure with a palette, in a third of the bytes.

    The palette covers the colours that there are, however few pixels have them: two lines never become one colour.
    """
    from PIL import Image

    partial = to.with_suffix(".part")
    with Image.open(figure) as image:
        small = image.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        small.save(partial, "PNG", optimize=True)
    partial.replace(to)


def answer_lines(text: str, name: str, answers: Path | None) -> list[str]:
    """How many expectations hold, then each of them: of the new sweep, or as the README has them; [] if never run."""
    if answers is None:
        old = re.search(rf"^### `{re.escape(name)}`$(.*?)(?=^### |\Z|^<!--)", text, re.M | re.S)
        return re.findall(r"^(?:\*\*\d+ of .*|- (?:holds|FAILS): .*)$", old[1], re.M) if old else []
    kept = json.loads(answers.read_text(encoding="utf-8"))
    return [f"**{kept['holds']} of {kept['of']} hold**", *(f"- {one['said']}" for one in kept["verdicts"])]


def table(studies: Mapping[str, Mapping[str, Any]], answers: Mapping[str, Sequence[str]]) -> str:
    """The index: a line for every study."""
    rows = ["| study | question | runs | CPU s | GPU s | expectations |", "|---|---|---|---|---|---|"]
    for name, about in studies.items():
        cost = about.get("cost") or {}
        costs = [f"{cost[of]:g}" if cost.get(of) is not None else "" for of in ("runs", "cpu_seconds", "gpu_seconds")]
        hold = (answers[name] or ["not run yet"])[0].strip("*")
        rows.append("| " + " | ".join([f"[`{name}`](#{name})", about.get("question", ""), *costs, hold]) + " |")
    return "\n".join(rows) + "\n"


def section(name: str, about: Mapping[str, Any], answers: Sequence[str], experiments: Path) -> str:
    """A study's section of the gallery: question, source, answers, figure."""
    source = " ".join(str(about.get("source", "")).split())
    lines = [f"### `{name}`", "", about.get("question", ""), "", f"Source: {source}.", ""]
    lines += [*answers[:1], "", *answers[1:], ""] if answers else []
    if (experiments / f"{name}.png").is_file():
        lines += [f"![{about.get('question', name)}]({name}.png)", ""]
    return "\n".join(lines)
