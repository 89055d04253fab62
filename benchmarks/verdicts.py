"""What each tool says is wrong with networks of `faults.py`: `python -m benchmarks.verdicts [FILE]` prints a table.

An answer is judged by the gravest findings that a tool gives, its errors or, without one, its warnings:

right       they name the kind of the fault, and first of all the layer that it was planted in, if it is in one; or name
            an effect of the fault at that layer
kind only   they name the kind and another layer first or none, or an effect of the fault (`EFFECTS`), no layer
layer only  they name the layer, with another kind
wrong       they name other kinds
nothing     there is no error and no warning
crash       the tool raises an error that is no answer of its own

The layer is what the first finding of a kind names, among three at most; of a longer list the first counts. It is a
module, what is inside of it, its parameters, the activation just behind it, or the function of torch at fault. Behind
an answer stands how many kinds are named that are neither the fault nor an effect. Of a healthy network errors and
warnings are counted.
"""

import importlib.metadata
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from datetime import date
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from benchmarks.child import python
from benchmarks.faults import FAULTS, HEALTHY, LIBRARIES, Case
from benchmarks.sees import as_markdown
from benchmarks.verdict_peers import TOOLS, Said
from initlab.errors import describe_error

SIZES = ((20, 64), (10, 200))
RIGHT, KIND, LAYER, WRONG, NOTHING, CRASH = "right", "kind only", "layer only", "wrong", "nothing", "crash"
WORDS = (RIGHT, KIND, LAYER, NOTHING, WRONG, CRASH)

# What follows from a fault and is true of it, by its name or its rule.
EFFECTS: dict[str, tuple[str, ...]] = {
    "tanh 3": ("exploding",),  # of gradients, in the chaotic phase
    "sigmoid N(0, 1)": ("exploding", "vanishing"),  # of gradients, by width
    "input x1e4": ("exploding",),
    "input x1e-4": ("vanishing",),
    "input-equal": ("correlation-collapse",),
    "exploding": ("non-finite",),
    "vanishing": ("dead",),
    "dead": ("vanishing",),
    "saturated": ("vanishing",),
    "lost-variance": ("vanishing",),
    "post-norm": ("vanishing", "exploding"),
}


class Fault(NamedTuple):
    """What a tool should say: kinds that are the fault itself, its effects, and where it is."""

    kinds: tuple[str, ...]
    effects: tuple[str, ...]
    name: str
    op: str = ""

    def is_at(self, said: str) -> bool:
        """Whether a place that a tool names is that of the fault."""
        home, place = (one.removesuffix(".weight").removesuffix(".bias") for one in (self.name, said))
        around, _, last = home.rpartition(".")
        behind = f"{around}.{int(last) + 1}".lstrip(".") if last.isdigit() else home
        return (bool(self.op) and place == self.op) or place in (home, behind) or place.startswith(f"{home}.")

    def is_named(self, said: Sequence[Said]) -> bool:
        """Whether the first of the findings names the place, among three at most; of a longer list the first counts."""
        first = said[0].places if said else ()
        return any(map(self.is_at, first[: 3 if len(first) <= 3 else 1]))


def fault_of(name: str, case: Case) -> Fault:
    """What is planted in a case."""
    kind = case.rules[0]
    single = ("outlier",) if case.name.endswith(".weight") and kind != "non-finite" else ()
    return Fault((kind, *single), EFFECTS.get(name, EFFECTS.get(kind, ())), case.name, case.op)


def judge(fault: Fault, said: Sequence[Said]) -> str:
    """A word of `WORDS`, and how many other kinds are named."""
    gravest = [one for one in said if one.error] or list(said)
    if not gravest:
        return NOTHING
    own = [one for one in gravest if one.kind in fault.kinds]
    effects = [one for one in gravest if one.kind in fault.effects]
    others = list(dict.fromkeys(one.kind for one in gravest if one not in own and one not in effects))
    if (fault.is_named(own) or fault.is_named(effects)) if fault.name else own:
        word = RIGHT
    elif own or effects:
        word = KIND
    elif fault.name and fault.is_named(gravest):
        word = LAYER
    else:
        return f"{WRONG}: {', '.join(others)}"
    return f"{word} (+{len(others)})" if others else word


def count(said: Sequence[Said]) -> str:
    """Of a healthy network: the errors and the warnings."""
    errors = sum(one.error for one in said)
    parts = [f"{n} {word}{'s' * (n != 1)}" for n, word in ((errors, "error"), (len(said) - errors, "warning")) if n]
    return ", ".join(parts) or NOTHING


def list_cases() -> Iterator[tuple[str, int, int]]:
    """The cases at each size, those of a library that is not there left out."""
    for depth, width in SIZES:
        for name in [*HEALTHY, *FAULTS]:
            if name not in LIBRARIES or find_spec(LIBRARIES[name]) is not None:
                yield name, depth, width


def ask(tool: str) -> list[str]:
    """A tool's answers, judged; what it prints and warns is left out."""
    if tool not in ("hooks", "anomaly mode"):
        try:
            importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            return ["not installed"] * len(list(list_cases()))
    logging.disable(logging.CRITICAL)
    answers = []
    for name, depth, width in list_cases():
        torch.manual_seed(0)
        case = (HEALTHY.get(name) or FAULTS[name])(depth, width)
        try:
            y = torch.randn_like(case.model(case.x))
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings(action="ignore"):
                said = TOOLS[tool](case.model, case.x, y)
            answers.append(judge(fault_of(name, case), said) if case.rules else count(said))
        except Exception as error:  # another's program may raise anything, and that is an answer
            answers.append(f"{CRASH}: {describe_error(error)[:60]}")
    return answers


def child(tool: str) -> None:
    """What a process of its own runs."""
    print(json.dumps(ask(tool)))


def table() -> pd.DataFrame:
    """A row per case and size, a column per tool."""
    names = [f"{name}, {depth} x {width}" for name, depth, width in list_cases()]
    columns: dict[str, list[str]] = {"network": names}
    for tool in TOOLS:
        _, said = python(["-c", f"from benchmarks import verdicts; verdicts.child({tool!r})"], threads=1)
        columns[tool] = json.loads(said.splitlines()[-1])
    return pd.DataFrame(columns)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per tool: how often each word fell, and how many healthy networks it blames."""
    is_healthy = [name in HEALTHY for name, *_ in list_cases()]
    healthy = frame[is_healthy]
    planted = frame.drop(healthy.index)
    rows = []
    for tool in TOOLS:
        row: dict[str, object] = {"tool": tool}
        for word in WORDS:
            row[f"{word} of {len(planted)}" if word == RIGHT else word] = planted[tool].str.startswith(word).sum()
        row[f"healthy: nothing of {len(healthy)}"] = (healthy[tool] == NOTHING).sum()
        row["warnings"] = healthy[tool].str.match(r"\d+ warning").sum()  # alone
        row["errors"] = healthy[tool].str.match(r"\d+ error").sum()
        row["crashes"] = healthy[tool].str.startswith(CRASH).sum()
        rows.append(row)
    return pd.DataFrame(rows)


def versions() -> str:
    found = []
    for package in ["torch", *TOOLS]:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def main(words: list[str]) -> None:
    frame = table()
    parts = [as_markdown(summary(frame)), as_markdown(frame), f"{versions()}; {date.today()}"]
    text = "\n\n".join(parts) + "\n"
    print(text, end="")
    if words:
        Path(words[0]).write_text(f"# What each tool says is wrong with a network\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
