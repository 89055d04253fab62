"""A label for each run of a table: the values of the options in which the runs differ, as short as they allow."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from initlab.runs.schema import DERIVED, IN_EVERY_LABEL, LABELS, TABLES


def label_columns(frame: pd.DataFrame) -> list[str]:
    """`init` and `activation`, and whatever else differs between the runs; the gain only where those do not tell it.

    Runs that differ in their seeds alone are one ensemble; runs that repeat a network are told apart by their folder.
    """
    found = [c for c in LABELS if c in frame and (c in IN_EVERY_LABEL or not is_constant(frame[c]))]
    if "run" in frame:
        networks = _distinct_rows(frame[frame["seed"] >= 0], [*found, "run", "seed"])  # -1 is a mean over them
        if networks.duplicated([*found, "seed"]).any():  # runs that differ in nothing that is named here
            found.append("run")
    for derived in DERIVED:
        if derived in found:
            others = [name for name in found if name != derived]
            if (frame.groupby(others, observed=True)[derived].nunique(dropna=False) <= 1).all():
                found.remove(derived)
    return found


def labels(frame: pd.DataFrame) -> pd.Categorical:
    """A short name for each row's run: 'kaiming, relu'."""
    names = label_columns(frame)
    codes = frame.groupby(names, observed=True, sort=False, dropna=False).ngroup().to_numpy()
    settings = frame[names].drop_duplicates()
    texts = [format_values("" if name in IN_EVERY_LABEL else name, settings[name].tolist()) for name in names]
    return pd.Categorical.from_codes(codes, [", ".join(row) for row in zip(*texts, strict=True)])


def add_labels(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The tables with a column `label`, one label for a run, or for a point of its grid, in all of them.

    Which columns tell runs apart is asked of all tables at once: a table that only some runs have says less.
    """
    if not tables or any("run" not in frame for frame in tables.values()):
        return {name: frame.assign(label=labels(frame)) for name, frame in tables.items()}
    kept = [_distinct_rows(frame, [c for c in (*LABELS, "run", "seed") if c in frame]) for frame in tables.values()]
    every = pd.concat([frame.astype({"run": str}) for frame in kept], ignore_index=True).drop_duplicates()
    every = every.assign(label=labels(every))
    several = every.groupby("run", sort=False)[[name for name in LABELS if name in every]].nunique(dropna=False)
    axes = [name for name in several if (several[name] > 1).any()]  # inside one run
    every = every.drop_duplicates(["run", *axes])
    order = list(dict.fromkeys(every["label"].astype(str)))
    known = every[["run", *axes, "label"]].astype(str)

    def label(frame: pd.DataFrame) -> pd.Series:
        if not axes:
            return frame["run"].astype("category").map(dict(zip(known["run"], known["label"], strict=True)))
        return frame[["run", *axes]].astype(str).merge(known, "left", ["run", *axes])["label"]

    return {name: frame.assign(label=pd.Categorical(label(frame), order)) for name, frame in tables.items()}


def label_run_tables(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """All tables of some runs, those with a column `label` that figures and pages tell apart by it."""
    return {**tables, **add_labels({name: frame for name, frame in tables.items() if TABLES[name].labelled})}


def is_constant(column: pd.Series) -> bool:
    """Whether every row has the same value, or none has one."""
    values = column.cat.codes.to_numpy() if isinstance(column.dtype, pd.CategoricalDtype) else column.to_numpy()
    return len(values) == 0 or bool((values == values[0]).all()) or bool(pd.isna(column).all())


def _distinct_rows(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The different rows of these columns; most are constant, and pandas would hash them all."""
    varying = [name for name in names if not is_constant(frame[name])]
    chosen = ~frame[varying].duplicated().to_numpy() if varying else np.arange(len(frame)) == 0
    return frame.loc[chosen, list(names)]


def format_values(name: str, values: Sequence[Any]) -> list[str]:
    """A text for each value of an option, with the option's name where it is no text itself; "" for no name.

    `run` stands for folders: they are told by their last name, or by as many as it takes.
    """
    if name == "run":
        return format_folders([str(value) for value in values])
    numbers = format_numbers(value for value in values if isinstance(value, float))
    texts = [numbers.get(value, str(value)) if isinstance(value, float) else str(value) for value in values]
    return [
        text if not name or isinstance(value, str) else f"{name} {text}"
        for value, text in zip(values, texts, strict=True)
    ]


def format_numbers(numbers: Iterable[float]) -> dict[float, str]:
    """Each number but nan in four digits, or in as many more as tell all of them apart."""
    different = [number for number in dict.fromkeys(numbers) if not math.isnan(number)]
    for digits in range(4, 18):  # 17 digits tell any two numbers of float64 apart
        texts = {number: f"{number:.{digits}g}" for number in different}
        if len(set(texts.values())) == len(texts):
            break
    return texts


def shorten_labels(names: Sequence[str]) -> tuple[dict[str, str], str]:
    """Each label without the parts that all have in common, and these parts: what a title says once."""
    parts = [name.split(", ") for name in names]
    if len(names) < 2 or len({len(one) for one in parts}) > 1:
        return {name: name for name in names}, ""
    varying = [len(set(column)) > 1 for column in zip(*parts, strict=True)]
    kept = [", ".join(part for part, varies in zip(one, varying, strict=True) if varies) for one in parts]
    common = ", ".join(part for part, varies in zip(parts[0], varying, strict=True) if not varies)
    return dict(zip(names, kept, strict=True)), common


def format_folders(paths: Sequence[str]) -> list[str]:
    """Each folder by its last name, or by as many of its last names as tell all of them apart."""
    parts = {path: Path(path).parts for path in paths}
    names = dict(zip(paths, paths, strict=True))
    for depth in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {path: "/".join(found[-depth:]) for path, found in parts.items()}
        if len(set(names.values())) == len(names):
            break
    return [names[path] for path in paths]
