"""A study: a question, with the figure and the expectations that answer it; checked before anything is measured.

The answers stay in the folder as expect.json.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from initlab.errors import UsageError
from initlab.figures.figure_spec import FigureSpec, parse_figure
from initlab.runs.recorder import write_text
from initlab.runs.schema import NOT_OPTIONS, OPTION_OF, TABLES, own_columns
from initlab.studies.expect import Answer, judge
from initlab.studies.expectation import MACHINES, Expectation, parse_expectation

ANSWERS = "expect.json"


@dataclass(frozen=True)
class Study:
    """What a configuration asks; without a question and expectations it is an ordinary run."""

    name: str
    question: str
    source: str
    cost: Mapping[str, float | None]
    expect: tuple[Expectation, ...]
    figure: FigureSpec | None = None
    overrides: tuple[str, ...] = ()
    answer: str = ""

    def __bool__(self) -> bool:
        return bool(self.question or self.expect)

    def tables(self) -> set[str]:
        """The tables that the answers are in, and the figure."""
        return {one.table for one in self.expect} | (self.figure.tables() if self.figure else set())


def known_columns(options: Iterable[str]) -> dict[str, set[str] | None]:
    """The columns that each table can have, None where they are not known before it is measured.

    options: the names that may become columns of a table.
    """
    configuration = {*OPTION_OF, *NOT_OPTIONS, *options}
    own = {table: own_columns(table) for table in TABLES}
    return {table: None if columns is None else columns | configuration for table, columns in own.items()}


def prepare(
    name: str, about: Mapping[str, Any], expect: Sequence[Any], options: Iterable[str], overrides: Iterable[str] = ()
) -> Study:
    """Refuse every mistake of form, and every column that no table can have.

    `about` is the node `study` of the file (question, source, cost, figure) and `expect` its list of expectations;
    `options` are the names that may become columns of a table, `overrides` what the command line changed.
    """
    for option, amount in about["cost"].items():
        if amount is not None and not amount >= 0:
            raise UsageError(f"study.cost.{option}={amount}: must be at least 0")
    known = known_columns(options)
    parsed = [parse_expectation(one, known) for one in expect]
    wanted = tuple(one for one in parsed if not one.machine or MACHINES[one.machine]())
    figure = parse_figure(about["figure"], known)
    return Study(
        name,
        about["question"],
        about["source"],
        about["cost"],
        wanted,
        figure,
        tuple(overrides),
        about.get("answer", ""),
    )


def answer(study: Study, tables: Mapping[str, pd.DataFrame], folder: Path) -> tuple[list[Answer], list[UsageError]]:
    """Judge every expectation and keep the answers in the folder; returns them, and what could not be judged."""

    def as_json(value: float) -> float | str:  # which has no nan and no inf
        return value if math.isfinite(value) else str(value)

    answers, verdicts, mistakes = [], [], []
    for one in study.expect:
        try:
            found = judge(one, tables)
        except UsageError as error:
            mistakes.append(error)
            continue
        answers.append(found)
        measured = [{"of": m.of, "number": as_json(m.number), "error": as_json(m.error)} for m in found.measured]
        kept = {"say": found.say, "holds": found.holds, "fails": found.fails, "kind": found.kind}
        verdicts.append({**kept, "measured": measured, "said": str(found)})
    record = {
        "study": study.name,
        "question": study.question,
        "answer": study.answer,
        "source": study.source,
        "cost": dict(study.cost),
        "overrides": list(study.overrides),
        "holds": sum(answer.holds for answer in answers),
        "of": len(study.expect),
        "verdicts": verdicts,
    }
    write_text(folder / ANSWERS, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return answers, mistakes


def draw(study: Study, tables: Mapping[str, pd.DataFrame], folder: Path, answers: Sequence[Answer]) -> Path | None:
    """Its own figure, titled with its answer where all is as it says, else with the question; None for none."""
    if study.figure is None:
        return None
    from initlab.figures.study_figure import draw_study  # seaborn takes a second to import

    path = folder / f"{study.name}.png"
    subtitle = count(answers, len(study.expect)) if answers else ""
    holds = len(answers) == len(study.expect) and all(one.as_said for one in answers)
    title = study.answer if study.answer and holds else study.question or study.name
    try:
        draw_study(study.figure, tables, title, subtitle).savefig(path)
    except UsageError as error:
        raise type(error)(f"study.figure: {error}") from error
    return path


def count(answers: Sequence[Answer], of: int) -> str:
    """`6 of 7 expectations hold, 1 does not reproduce`; of all there are, also those that the tables do not answer."""
    one = "expectation holds" if of == 1 else "expectations hold"
    silent = f", {of - len(answers)} cannot be judged" if of > len(answers) else ""
    known = sum(bool(answer.fails) and answer.as_said for answer in answers)
    fails = f", {known} {'does' if known == 1 else 'do'} not reproduce" if known else ""
    return f"{sum(answer.holds for answer in answers)} of {of} {one}{fails}{silent}"
