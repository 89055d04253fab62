"""experiments/README.md, written anew: every study with its question, source, cost, and what its newest sweep said.

    initlab gallery [--experiments FOLDER] [PATH ...]

Only sweeps at a study's own size count: those of the launch line alone, without further options. Their figures are
copied beside the studies. What stands outside of the two marks in the README is left as it is.
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
    """Rewrite the README between its marks; a word about what was found."""
    readme = experiments / "README.md"
    if not readme.is_file():
        raise UsageError(f"{readme}: no such file; --experiments names the folder of the studies")
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UsageError(f"{readme}: the gallery goes between the lines {BEGIN} and {END}")
    found = newest(outputs)
    said = studies(experiments)
    for name in said:
        if name in found and (figure := found[name].parent / f"{name}.png").is_file():
            copy_small(figure, experiments / f"{name}.png")
    verdicts = {name: verdict(text, name, found.get(name)) for name in said}
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    sections = [section(name, about, verdicts[name], experiments) for name, about in said.items()]
    page = "\n".join([table(said, verdicts), *sections])
    write_text(readme, f"{before}{BEGIN}\n\n{page}\n{after}")
    return f"{readme}: {len(said)} studies, {len(set(found) & set(said))} of them with a new sweep"


def studies(experiments: Path) -> dict[str, Mapping[str, Any]]:
    """Name -> the node `study`, for every study of the folder."""
    files = sorted(experiments.glob("*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")).get("study", {}) for file in files}


def newest(outputs: Iterable[Path]) -> dict[str, Path]:
    """Name -> the answers of its newest whole sweep at the study's own size; the folders' names are their times."""
    found: dict[str, Path] = {}
    for path in sorted(path for folder in outputs for path in folder.rglob(ANSWERS)):
        said = json.loads(path.read_text(encoding="utf-8"))
        runs = [json.loads(run.read_text(encoding="utf-8"))["status"] for run in path.parent.glob("*/run.json")]
        whole = bool(runs) and set(runs) == {"done"} and not said["overrides"]
        older = found.get(said["study"])
        if whole and (older is None or older.parent.name <= path.parent.name):
            found[said["study"]] = path
    return found


def copy_small(figure: Path, to: Path) -> None:
    """The figure with a palette of its own, in a third of the bytes.

    The palette covers the colours that there are, however few pixels have them: two lines never become one colour.
    """
    from PIL import Image

    partial = to.with_suffix(".part")
    with Image.open(figure) as image:
        small = image.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        small.save(partial, "PNG", optimize=True)
    partial.replace(to)


def verdict(text: str, name: str, answers: Path | None) -> list[str]:
    """How many expectations hold, then each of them: of the new sweep, or as the README has them; [] if never run."""
    if answers is None:
        old = re.search(rf"^### `{re.escape(name)}`$(.*?)(?=^### |\Z|^<!--)", text, re.M | re.S)
        return re.findall(r"^(?:\*\*\d+ of .*|- (?:holds|FAILS): .*)$", old[1], re.M) if old else []
    said = json.loads(answers.read_text(encoding="utf-8"))
    return [f"**{said['holds']} of {said['of']} hold**", *(f"- {one['said']}" for one in said["verdicts"])]


def table(said: Mapping[str, Mapping[str, Any]], verdicts: Mapping[str, Sequence[str]]) -> str:
    """The index: a line for every study."""
    rows = ["| study | question | runs | CPU s | GPU s | expectations |", "|---|---|---|---|---|---|"]
    for name, about in said.items():
        cost = about.get("cost") or {}
        costs = [f"{cost[of]:g}" if cost.get(of) is not None else "" for of in ("runs", "cpu_seconds", "gpu_seconds")]
        hold = (verdicts[name] or ["not run yet"])[0].strip("*")
        rows.append("| " + " | ".join([f"[`{name}`](#{name})", about.get("question", ""), *costs, hold]) + " |")
    return "\n".join(rows) + "\n"


def section(name: str, about: Mapping[str, Any], verdicts: Sequence[str], experiments: Path) -> str:
    """A study's place in the gallery: question, source, verdict, figure."""
    source = " ".join(str(about.get("source", "")).split())
    lines = [f"### `{name}`", "", about.get("question", ""), "", f"Source: {source}.", ""]
    lines += [*verdicts[:1], "", *verdicts[1:], ""] if verdicts else []
    if (experiments / f"{name}.png").is_file():
        lines += [f"![{about.get('question', name)}]({name}.png)", ""]
    return "\n".join(lines)
