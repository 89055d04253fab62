"""Values of an option as words of a label: short, and never the same for two values that differ."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def told(name: str, values: Sequence[Any]) -> list[str]:
    """One word for each value of an option; numbers and truth values with its name, if it is to be said ("" for none).

    `run` stands for folders: they are told by their last name, or by as many as it takes.
    """
    if name == "run":
        return folders([str(value) for value in values])
    numbers = spelled(value for value in values if isinstance(value, float))
    said = [numbers.get(value, str(value)) if isinstance(value, float) else str(value) for value in values]
    return [
        word if not name or isinstance(value, str) else f"{name} {word}"
        for value, word in zip(values, said, strict=True)
    ]


def spelled(numbers: Iterable[float]) -> dict[float, str]:
    """Each number but nan in four digits, or in as many more as tell all of them apart."""
    different = [number for number in dict.fromkeys(numbers) if not math.isnan(number)]
    for digits in range(4, 18):  # 17 digits tell any two numbers of float64 apart
        words = {number: f"{number:.{digits}g}" for number in different}
        if len(set(words.values())) == len(words):
            break
    return words


def folders(paths: Sequence[str]) -> list[str]:
    """Each folder by its last name, or by as many of its last names as tell all of them apart."""
    parts = {path: Path(path).parts for path in paths}
    words = dict(zip(paths, paths, strict=True))
    for depth in range(1, max(map(len, parts.values()), default=0) + 1):
        words = {path: "/".join(names[-depth:]) for path, names in parts.items()}
        if len(set(words.values())) == len(words):
            break
    return [words[path] for path in paths]
