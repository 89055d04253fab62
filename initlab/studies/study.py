"""A study: a question, the figure and the expectations that answer it. Prepared before anything is measured.

Plain values in, verdicts out; knows nothing of Hydra. What came out stays in the folder as expect.json.
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
from initlab.studies.expect import Expectation, Verdict, expected, judge

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

    def __bool__(self) -> bool:
        return bool(self.question or self.expect)

    def tables(self) -> set[str]:
        """The tables that the answers are in, and the figure."""
        return {one.table for one in self.expect} | (self.figure.tables() if self.figure else set())


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
    configuration = {*OPTION_OF, *NOT_OPTIONS, *options}
    own = {table: own_columns(table) for table in TABLES}
    known = {table: None if columns is None else columns | configuration for table, columns in own.items()}
    wanted = tuple(expected(one, known) for one in expect)
    figure = parse_figure(about["figure"], known)
    return Study(name, about["question"], about["source"], about["cost"], wanted, figure, tuple(overrides))


def answer(study: Study, tables: Mapping[str, pd.DataFrame], folder: Path) -> tuple[list[Verdict], list[UsageError]]:
    """Judge every expectation and keep the answers in the folder; beside them the expectations that ask for nothing."""
    verdicts, mistakes = [], []
    for one in study.expect:
        try:
            verdicts.append(judge(one, tables))
        except UsageError as error:
            mistakes.append(error)
    kept = {
        "study": study.name,
        "question": study.question,
        "source": study.source,
        "cost": dict(study.cost),
        "overrides": list(study.overrides),
        "holds": sum(verdict.holds for verdict in verdicts),
        "of": len(study.expect),
        "verdicts": [_kept(verdict) for verdict in verdicts],
    }
    write_text(folder / ANSWERS, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    return verdicts, mistakes


def draw(study: Study, tables: Mapping[str, pd.DataFrame], folder: Path, verdicts: Sequence[Verdict]) -> Path | None:
    """Its own figure, titled with the question; None where it has none."""
    if study.figure is None:
        return None
    from initlab.figures.study_figure import draw_study  # seaborn takes a second to import

    path = folder / f"{study.name}.png"
    said = count(verdicts, len(study.expect)) if verdicts else ""
    try:
        draw_study(study.figure, tables, study.question or study.name, said).savefig(path, dpi=110)
    except UsageError as error:
        raise type(error)(f"study.figure: {error}") from error
    return path


def _kept(verdict: Verdict) -> dict[str, Any]:
    """JSON has no nan and no inf: they are kept as words."""
    numbers = [{"of": one.of, "number": _number(one.number), "error": _number(one.error)} for one in verdict.measured]
    return {"say": verdict.say, "holds": verdict.holds, "measured": numbers, "said": str(verdict)}


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def count(verdicts: Sequence[Verdict], of: int) -> str:
    """`7 of 7 expectations hold`; of all there are, also those about which the tables say nothing."""
    one = "expectation holds" if of == 1 else "expectations hold"
    silent = f", {of - len(verdicts)} cannot be judged" if of > len(verdicts) else ""
    return f"{sum(verdict.holds for verdict in verdicts)} of {of} {one}{silent}"
