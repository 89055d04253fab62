"""What a user can do wrong, said in one line: what was given, what is allowed, the nearest match.

Every room raises `UsageError` for a mistake in what it was asked; anything else that is raised is a fault of ours.
"""

import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from numbers import Real
from typing import TypeVar

Row = TypeVar("Row")

# Smallest value of every option that counts something; the lower limit itself is allowed.
LOWEST: dict[str, float] = {
    "depth": 1,
    "width": 1,
    "inputs": 1,
    "batch": 1,
    "seed": 0,
    "seeds": 1,
    "every": 1,
    "threads": 1,
    "train.depth": 0,
    "train.width": 1,
    "train.batch": 1,
    "train.steps": 1,
    "train.lr": 0.0,
}


# A seed is kept as an integer of 64 bits; more threads than this no library starts.
HIGHEST: dict[str, float] = {"seed": 2**62, "seeds": 10**6, "threads": 1024}


class UsageError(ValueError):
    """A mistake of the user; its text is one line."""


class Fault(Exception):
    """What went wrong in a job, in one line: it travels between processes where the error itself might not."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """' - did you mean X?', or nothing where nothing is near."""
    by_lower = {name.lower(): name for name in allowed}
    match = get_close_matches(given.lower(), list(by_lower), n=1, cutoff=0.6)
    return f" - did you mean {by_lower[match[0]]}?" if match else ""


def not_one_of(what: str, given: object, allowed: Iterable[str]) -> UsageError:
    names = sorted(allowed)
    return UsageError(f"{what}={given}: must be one of {', '.join(names)}{nearest(str(given), names)}")


def choose(table: Mapping[str, Row], name: str, what: str) -> Row:
    """The row of a table (or the column of a frame), or one line that lists its names."""
    if name not in table:
        raise not_one_of(what, name, table)
    return table[name]


WHOLE = frozenset(LOWEST) - {"train.lr"}  # whole numbers; the others are any


def check(**options: object) -> None:
    """Refuse what is no number, and numbers outside their limits; `train_depth` stands for the option `train.depth`."""
    for key, value in options.items():
        option = key.replace("train_", "train.", 1)
        if not isinstance(value, Real) or isinstance(value, bool):
            raise UsageError(f"{option}={value!r}: must be a {'whole ' if option in WHOLE else ''}number")
        number = float(value)
        if not math.isfinite(number):
            raise UsageError(f"{option}={value}: must be finite")
        if option in WHOLE and number != number // 1:
            raise UsageError(f"{option}={value}: must be a whole number")
        if number < LOWEST[option]:
            raise UsageError(f"{option}={number:g}: must be at least {LOWEST[option]:g}")
        if number > HIGHEST.get(option, math.inf):
            raise UsageError(f"{option}={number:g}: must be at most {HIGHEST[option]:g}")


def check_scale(**options: object) -> None:
    """Refuse a standard deviation, or another size, that is no finite number, at least 0."""
    for name, value in options.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise UsageError(f"{name}={value!r}: must be a number")
        if not 0 <= float(value) < math.inf:
            raise UsageError(f"{name}={float(value):g}: must be a finite number, at least 0")
