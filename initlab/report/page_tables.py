"""The tables of a page and their cells: numbers of three digits, and words with a colour that is never alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd

from initlab.figures.pictures import Picture
from initlab.runs.schema import LABELS, NOT_OPTIONS, OPTION_OF
from initlab.runs.theory_rows import DOUBTFUL, REJECTED, ProfileTest

GOOD, FAIR, BAD = "good", "fair", "bad"
NOT_FINITE = "not finite"
SHORT = 32  # letters of a cell that is not wrapped
MOST_ROWS, MOST_COLUMNS = 40, 14  # of a table that is shown as it is


class Cell(NamedTuple):
    """A text, what it is for the reader (`good`, `fair`, `bad`, or nothing), and where it leads to."""

    text: str
    kind: str = ""
    link: str = ""


@dataclass(frozen=True)
class PageTable:
    """A table of a page. note: a sentence beneath it."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    @cached_property
    def classes(self) -> list[str]:
        """Of each column: `number` where it holds numbers alone, which stand to the right; `short` where none wraps."""
        found = []
        for k in range(len(self.columns)):
            texts = {row[k].text for row in self.rows}
            found.append("number" if all(map(is_number, texts)) else "short" if max(map(len, texts)) <= SHORT else "")
        return found


@dataclass
class PageSection:
    """A part of a page: sentences, tables and pictures under a heading. words: those that are explained here."""

    name: str
    title: str
    lines: Sequence[str] = ()
    tables: Sequence[PageTable] = ()
    pictures: Sequence[Picture] = ()
    words: list[tuple[str, str]] = field(default_factory=list)

    def whole_text(self) -> list[str]:
        """All that is read in it, piece by piece."""
        cells = [cell.text for table in self.tables for row in table.rows for cell in row]
        heads = [text for table in self.tables for text in (table.caption, table.note, *table.columns)]
        return [self.title, *self.lines, *heads, *cells, *(one.about for one in self.pictures)]


def is_number(text: str) -> bool:
    if text == NOT_FINITE:
        return True
    try:
        float(text.replace(",", "").removesuffix("%") or "nan")
    except ValueError:
        return False
    return True


def as_text(value: Any) -> str:
    """Three digits of a number, whole numbers as they are; nothing for None."""
    if value is None or value is pd.NA:
        return ""
    if isinstance(value, float) and math.isnan(value):
        return NOT_FINITE
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) < 1e5 and value == int(value) else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1e5 else str(value)


def text_row(*values: Any) -> list[Cell]:
    """A row of plain cells."""
    return [value if isinstance(value, Cell) else Cell(as_text(value)) for value in values]


def judge_p(test: ProfileTest | None) -> Cell:
    """The test of a profile against its prediction."""
    if test is None:
        return Cell("")
    if math.isnan(test.p) or test.outside:
        return Cell(test.short, FAIR if test.outside else "")
    return Cell(test.short, BAD if test.p < REJECTED else FAIR if test.p < DOUBTFUL else GOOD)


def show_frame(frame: pd.DataFrame, caption: str) -> PageTable:
    """The own columns of any table, and those of the configuration that differ; its first rows."""
    configuration = {*OPTION_OF, *NOT_OPTIONS, *LABELS, "run", "label"}
    names = [name for name in frame if name not in configuration or frame[name].nunique(dropna=False) > 1]
    names = [name for name in names if name != "label"][:MOST_COLUMNS]
    rows = [text_row(*row) for row in frame[names].head(MOST_ROWS).astype(object).itertuples(index=False)]
    left = [f"the first {MOST_ROWS} of {len(frame):,} rows"] if len(frame) > MOST_ROWS else []
    return PageTable(caption, [str(name) for name in names], rows, "; ".join(left))
