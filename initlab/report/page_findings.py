"""The findings of a page, in words: what the rules of a verdict found in its runs, and what theory and losses say."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from initlab import files
from initlab.errors import UsageError
from initlab.report.page_sections import DIRECTIONS, Facts, Tables, take_median
from initlab.report.page_tables import BAD, FAIR, GOOD, Cell, PageTable, as_text, judge_p, text_row
from initlab.report.page_words import explain_rule
from initlab.runs import folders, summary
from initlab.runs.read import Run
from initlab.runs.schema import LOSSES, STATS
from initlab.studies.study import ANSWERS

ANYTHING = (str, int, float, dict, list, type(None))
_FINDING: files.Form = {
    **dict.fromkeys(("rule", "severity", "name", "cause", "remedy"), str), "layer": int, ...: ANYTHING
}  # fmt: skip
VERDICT: files.Form = {"ok": bool, "layers": int, "findings": [_FINDING], ...: ANYTHING}
STUDY: files.Form = {
    "question": str, "source": str, "holds": int, "of": int, "study": str,
    "verdicts": [{"say": str, "holds": bool, "said": str, ...: ANYTHING}], ...: ANYTHING,
}  # fmt: skip
OF_SIGNAL, OF_GRADIENT = ("exploding", "vanishing"), ("gradient-exploding", "gradient-vanishing")
OF_TRAINING = ("diverged", "dead", "not-learning")
MOST_LINES = 8  # settings that have a sentence of their own


class Found(NamedTuple):
    """Findings of one rule: in which runs, also as `where`, and the first of them in words. about: what the rule is."""

    rule: str
    kind: str
    runs: Sequence[str]
    where: str
    place: str
    cause: str
    remedy: str
    about: str


def read_verdict(folder: str | Path) -> Mapping[str, Any] | None:
    """What `verdict.json` of a run says; None where there is none. Errors: one line where it cannot be read."""
    path = Path(folder) / "verdict.json"
    found: Mapping[str, Any] | None = files.read_json(path, VERDICT) if path.exists() else None
    return found


def read_verdicts(runs: Sequence[Run]) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """The verdicts by the names of the runs that have one, and a line for each that cannot be read."""
    found, mistakes = {}, []
    for run in runs:
        try:
            verdict = read_verdict(run.folder.path)
        except UsageError as error:
            mistakes.append(str(error))
            continue
        if verdict is not None:
            found[run.name] = verdict
    return found, mistakes


def read_answers(folder: Path) -> Mapping[str, Any]:
    """What `expect.json` of a study says; nothing where there is none, or none that can be read."""
    try:
        found: Mapping[str, Any] = files.read_json(folder / ANSWERS, STUDY) if (folder / ANSWERS).exists() else {}
    except UsageError:
        return {}
    return found


def join_findings(verdicts: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Sequence[str]]) -> list[Found]:
    """The findings of all runs by their rule, errors first. settings: the labels of each run."""
    rules: dict[tuple[str, str], list[tuple[str, Mapping[str, Any]]]] = {}
    for run, verdict in verdicts.items():
        for one in verdict.get("findings", []):
            rules.setdefault((one.get("rule", "?"), one.get("severity", "")), []).append((run, one))
    found = []
    for (rule, severity), members in rules.items():
        first = members[0][1]
        layer, name = first.get("layer", -1), first.get("name", "")
        where = f"layer {layer}" if layer > 0 else "the input" if layer == 0 else ""
        place = " ".join(filter(None, [where, f"({name})" if name else ""]))
        cause, remedy = (str(first.get(key, "")) for key in ("cause", "remedy"))
        runs = list(dict.fromkeys(run for run, _ in members))
        kind = BAD if severity == "error" else FAIR
        named = list(dict.fromkeys(label for run in runs for label in settings.get(run, [run])))
        listed = len(runs) < MOST_LINES and len(named) < MOST_LINES
        spread = "; ".join(named) if listed else f"{len(runs)} of {len(verdicts)} runs"
        found.append(Found(rule, kind, runs, spread, place, cause, remedy, explain_rule(rule)))
    return sorted(found, key=lambda one: one.kind != BAD)


def describe_findings(facts: Facts) -> list[str]:
    """Sentences about signal, gradient, theory and training; how many met which fate where there are many settings."""
    lines = [
        f"{what.capitalize()}: {summary.findings(facts.ends[one])}."
        for one, what in DIRECTIONS.items()
        if facts.ends[one]
    ]
    for direction, what in DIRECTIONS.items():
        tests = facts.tests[direction]
        if len(tests) == 1:
            lines.append(f"{what.capitalize()}: {next(iter(tests.values()))}.")
        elif tests:
            agree = sum(judge_p(one).kind == GOOD for one in tests.values())
            lines.append(f"{what.capitalize()}: theory agrees with {agree} of {len(tests)} settings.")
    if 0 < len(facts.losses) <= MOST_LINES:
        said = [
            f"{f'{label}: ' if len(facts.losses) > 1 else ''}{as_text(float(row['loss by hand']))} by hand and "
            f"{as_text(float(row['loss nn.Module']))} by nn.Module"
            for label, row in facts.losses.iterrows()
        ]
        lines.append(f"Loss at the end: {'; '.join(said)}.")
    if parted := summary.describe_parting(facts.losses):
        lines.append(f"{parted}.")
    return lines


def make_grid(
    runs: Sequence[Run], facts: Facts, verdicts: Mapping[str, Mapping[str, Any]], top: Path
) -> PageTable | None:
    """A row for each run, and for each setting of a run that has several: its options, and what was found in words."""
    keys = folders.differing_keys([run.settings for run in runs])
    keys = [key for key in keys if not key.startswith("hydra.")]
    tables = facts.tables
    stats, losses = (tables.get(name, pd.DataFrame()) for name in (STATS, LOSSES))
    fates = {one: find_fates(stats, one) for one in DIRECTIONS} if len(stats) else {}
    trained = find_last_losses(losses)
    settings = list_settings(tables)
    several = any(len(own) > 1 for own in settings.values())
    values = stats.drop_duplicates("label").set_index("label").to_dict("index") if len(stats) else {}
    rows = []
    for run in runs:
        own = settings.get(run.name) or [""]
        for label in own:
            key = (run.name, label)
            rules = [
                one.get("rule", "")
                for one in verdicts.get(run.name, {}).get("findings", [])
                if len(own) == 1 or is_of(one.get("name", ""), values.get(label, {}))
            ]
            options = [as_text(run.settings.get(name, "default")) for name in keys]
            cells = [
                judge_signal(fates.get("forward", {}).get(key), [one for one in rules if one in OF_SIGNAL]),
                judge_signal(fates.get("backward", {}).get(key), [one for one in rules if one in OF_GRADIENT]),
                judge_training(trained.get(key), [one for one in rules if one in OF_TRAINING]),
                Cell(as_text(trained.get(key))),
                judge_p(facts.tests["forward"].get(label)),
            ]
            name = Path(run.folder.path)
            inner = str(name.relative_to(top)) if name.is_relative_to(top) else run.name
            status = [] if run.status == "done" else [Cell(run.status, BAD)]
            link = f"{inner}/report.html" if name.is_relative_to(top) and inner != "." else ""
            job = [Cell(inner, "", link)] * (len(runs) > 1)
            rows.append([*job, *text_row(*options), *[Cell(label)] * several, *cells, *status])
    if len(rows) < 2:
        return None
    width = max(map(len, rows))
    columns = [*["job"] * (len(runs) > 1), *keys, *["setting"] * several]
    columns += ["signal", "gradient", "training", "last loss", "theory"]
    columns += ["status"] * (width > len(columns))
    padded = [[*row, *[Cell("done", GOOD)] * (width - len(row))] for row in rows]
    return PageTable(f"What was found in each {'job' if len(runs) > 1 else 'setting'}", columns, padded)


def list_settings(tables: Tables) -> dict[str, list[str]]:
    """The labels of each run folder."""
    found: dict[str, list[str]] = {}
    for frame in tables.values():
        if {"run", "label"} <= set(frame):
            for run, label in frame[["run", "label"]].drop_duplicates().itertuples(index=False):
                found.setdefault(str(run), []).append(str(label))
    return {run: list(dict.fromkeys(labels)) for run, labels in found.items()}


def is_of(name: str, row: Mapping[str, Any]) -> bool:
    """Whether a finding that names its setting as `init=naive, gain=1.0` is about the setting of a row of a table."""
    pairs = [pair.partition("=") for pair in name.split(", ") if "=" in pair]
    return all(value in (str(row.get(key, value)), as_text(row.get(key, value))) for key, _, value in pairs)


def find_fates(stats: pd.DataFrame, direction: str) -> dict[tuple[str, str], summary.Fate]:
    """The fate of the signal of each run and label."""
    signal = summary.stack_signal(stats, direction)
    if not len(signal):
        return {}
    pairs = signal["run"].astype(str) + "\0" + signal["label"].astype(str)
    died = summary.first_dead_layer(signal.assign(label=pairs), direction)
    fates = summary.find_fates(died, "min" if direction == "forward" else "max")
    return {(run, label): fate for pair, fate in fates.items() for run, _, label in [pair.partition("\0")]}


def find_last_losses(losses: pd.DataFrame) -> dict[tuple[str, str], float]:
    """The median of the last loss by hand of each run and label."""
    if not len(losses):
        return {}
    hand = losses[losses["implementation"] == "scratch"]
    found = {}
    for (run, label), rows in hand.groupby(["run", "label"], observed=True):
        found[str(run), str(label)] = take_median(rows[rows["step"] == rows["step"].max()]["loss"])
    return found


def judge_signal(fate: summary.Fate | None, rules: Sequence[str]) -> Cell:
    if fate is None:
        return Cell("")
    if fate.kind or rules:
        return Cell("; ".join(filter(None, [rules[0] if rules else "", str(fate) if fate.kind else ""])), BAD)
    return Cell("alive", GOOD)


def judge_training(loss: float | None, rules: Sequence[str]) -> Cell:
    if loss is None:
        return Cell("")
    if rules:
        return Cell(rules[0], FAIR if rules[0] == "not-learning" else BAD)
    return Cell("learns", GOOD)
