"""What became worse since a file of results was written. Ratios only: seconds and bytes belong to a machine."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from benchmarks.rows import Row

ROOM = 1.25  # what a busy machine may do to a median of ratios, with room to spare


class Worse(NamedTuple):
    """A row and its median then; `factor` above 1 is worse, by how much."""

    row: Row
    then: float
    factor: float

    def __str__(self) -> str:
        return (
            f"{self.row.id} ({self.row.variant}, {self.row.threads} threads): {self.row.ratio:.3g}, was {self.then:.3g}"
        )


def worse(now: Iterable[Row], then: Iterable[Row], room: float = ROOM) -> list[Worse]:
    """Rows of initlab whose median is worse by more than `room`; peers are others' business."""
    known = {row.key: row for row in then}
    found = []
    for row in comparable(now):
        if row.key in known:
            before = known[row.key].ratio
            factor = before / row.ratio if row.higher_is_better else row.ratio / before
            if not factor <= room:  # nan is worse than anything
                found.append(Worse(row, before, factor))
    return found


def comparable(rows: Iterable[Row]) -> Iterator[Row]:
    return (row for row in rows if row.unit == "ratio" and not row.is_peer)


def no_longer_measured(now: Iterable[Row], then: Iterable[Row]) -> list[str]:
    """Ids and variants of the runs' own threads and devices that the file has and this run has not."""
    current = list(now)
    keys, places = {row.key for row in current}, {(_group(row), row.threads, row.device) for row in current}
    return [
        f"{row.id} ({row.variant})"
        for row in comparable(then)
        if row.key not in keys and (_group(row), row.threads, row.device) in places
    ]


def _group(row: Row) -> str:
    return row.id.split(".")[0]
