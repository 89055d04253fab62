"""What an attack is, and what becomes of its cases.

A topic is a module beside this one with two things: `LARGE`, how many cases a full run tries, and
`cases(count, seed, folder)`, which yields one `Case` after another. Every case must hold alone: it gets a folder of its
own, and the same seed makes the same cases.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

TOPICS = ("kills", "disk", "files", "hostile", "options", "calls", "determinism", "long")


@dataclass(frozen=True)
class Case:
    """One case: what was done, in a line that lets one do it again, and what went wrong; "" where it held."""

    what: str
    wrong: str = ""


@dataclass
class Outcome:
    """How many cases of a topic were tried, and those that were lost."""

    topic: str
    tried: int = 0
    lost: list[Case] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.topic:<12} tried {self.tried:>6}   held {self.tried - len(self.lost):>6}   lost {len(self.lost):>4}"
        )


class Topic(Protocol):
    """What a module of this folder offers."""

    LARGE: int

    def cases(self, count: int, seed: int, folder: Path) -> Iterator[Case]: ...


def topic(name: str) -> Topic:
    return importlib.import_module(f"tests.reliability.{name}")  # type: ignore[return-value]


def attack(name: str, count: int, seed: int, folder: Path) -> Outcome:
    """Try so many cases of a topic."""
    outcome = Outcome(name)
    for case in topic(name).cases(count, seed, folder):
        outcome.tried += 1
        if case.wrong:
            outcome.lost.append(case)
    return outcome
