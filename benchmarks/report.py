"""Rows -> the tables of all results and of exponents; that of the questions is in `questions.py`."""

from collections.abc import Iterable, Iterator

from benchmarks.race import Outcome
from benchmarks.rows import IDS, Row


def lines(outcome: Outcome) -> Iterator[str]:
    """Results first, then what was not measured and why, then the seconds behind the ratios."""
    if outcome.rows:
        yield f"{'id':34} {'variant':12} {'median':>9} {'q25':>9} {'q75':>9} {'unit':6} {'thr':>3} {'bar':>8}"
        yield from map(line, outcome.rows)
    yield from missing(outcome)
    if outcome.seconds:
        yield ""
        yield "time of one step, pass or network"
        for name, seconds in outcome.seconds.items():
            yield f"  {name:42} {1e3 * seconds:10.4g} ms"


def missing(outcome: Outcome) -> Iterator[str]:
    """What was asked for and not measured, with its reason."""
    for one in outcome.missing:
        yield f"{one.id:34} {one.variant:12} not available: {one.reason}"


def growth(rows: Iterable[Row]) -> Iterator[str]:
    """The table of exponents: initlab's, and those of the products or of a bare module's steps."""
    powers = {row.id: row for row in rows if row.unit == "power"}
    if powers:
        yield f"{'CPU time grows with the power of':32} {'initlab':>9} {'bare':>9}"
    for name, row in powers.items():
        if alone := powers.get(f"{name}.products"):
            yield f"  {name.removeprefix('growth.'):30} {row.ratio:9.2f} {alone.ratio:9.2f}"


def line(row: Row) -> str:
    held = "" if row.bar is None else f"{row.bar:8.4g} {'holds' if row.clears_its_bar else 'MISSED'}"
    numbers = " ".join(f"{value:9.4g}" for value in (row.ratio, row.q25, row.q75))
    return f"{row.id:34} {row.variant:12} {numbers} {row.unit:6} {row.threads:3} {held}".rstrip()


def glossary(ids: Iterable[str]) -> Iterator[str]:
    """What is divided by what, for the ids that are among the named ones."""
    for name in dict.fromkeys(ids):
        if name in IDS:
            yield f"  {name:18} {IDS[name]}"
