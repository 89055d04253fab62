"""What the figure of a model shows: the rows of a probe as places from input to output, each with its powers of two."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from initlab.probes.parameters import AS_FOUND

# Series of the figure: which rows are outputs on their way, and which are about parameters.
OUTPUTS = {"forward": "values", "backward": "gradients"}
PARAMETERS = ("weight", "parameter", "update")
LEFT_OUT = ("bias", "drift", "loss")
PASSED_ON = ("Identity", "Dropout", "Flatten")  # classes that are left out where they change no number
PLACE = ["name", "part", "call", "tensor", "layer"]
LONGEST = 34  # letters of a name beside an axis


def place_rows(frame: pd.DataFrame, octaves: pd.DataFrame | None = None) -> pd.DataFrame:
    """A row per output or parameter, direction and step: where it stands, and log2 of its magnitudes.

    frame: the table `stats` of a probe, or of a network without names. octaves: its table `histograms`, where it was
    recorded; it knows the smallest magnitude. Only the first and the last step are taken, and of several backward
    passes the first. Columns: `place` (0 is the first of the network), `text`, `series` (values, gradients, update),
    `is_output`, `step`, `low`, `middle`, `high` (log2 of the smallest magnitude, of the rms and of the largest; nan
    where there is none), `state` ("", zero, inf, nan). Of several networks the median rms and the widest ends.
    """
    rows = complete_rows(frame)
    rows = rows[rows["step"].isin([rows["step"].min(), rows["step"].max()]) & (rows["count"] > 0)]
    if octaves is not None:
        keys = [name for name in octaves if name in rows and name not in ("first", "positive", "negative")]
        known = octaves[octaves["positive"].map(len) > 0]
        rows = rows.merge(known[[*keys, "first"]].astype({k: rows[k].dtype for k in keys}), "left", keys)
    largest = np.maximum(-rows["min"], rows["max"])
    one_sign = np.maximum(np.maximum(rows["min"], -rows["max"]), 0)
    with np.errstate(divide="ignore"):
        rows["middle"], rows["high"] = np.log2(rows["rms"]), np.log2(largest)
        rows["low"] = np.log2(one_sign) if octaves is None else rows["first"]
    rows["low"] = rows["low"].where(np.isfinite(rows["low"]))
    rows["state"] = np.select(
        [rows["n_nan"] > 0, rows["n_inf"] > 0, rows["frac_zero"] == 1], ["nan", "inf", "zero"], ""
    )
    return join_networks(add_places(rows[~is_passed_on(rows)]))


def add_places(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of outputs and parameters with `is_output`, `place`, `text` and `series`, see `place_rows`."""
    rows = rows.assign(
        is_output=~rows["tensor"].isin(PARAMETERS),
        series=rows["direction"].map(OUTPUTS).where(rows["tensor"] != "update", "update"),
    )
    places = find_places(rows)
    rows["place"] = [places[key] for key in zip(*(rows[name] for name in PLACE), rows["is_output"], strict=True)]
    return rows.assign(text=rows["place"].map(write_places(rows)))


def complete_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of outputs and parameters, with the columns that a network without modules has not.

    Of several implementations, and of several backward passes, the first.
    """
    missing: dict[str, Any] = {"step": 0, "part": "", "call": 0, "pass": 0, "seed": 0}
    rows = frame.assign(**{name: value for name, value in missing.items() if name not in frame})
    if "name" not in rows:
        rows["name"] = "layer " + rows["layer"].astype(str)
        rows["op"] = rows["tensor"].astype(str)
    for name in ("stage", "implementation"):
        if name in rows:
            rows = rows[rows[name] == rows[name].iloc[0]]
    rows = rows[(rows["pass"] == rows["pass"].min()) & ~rows["tensor"].isin(LEFT_OUT) & (rows["op"] != AS_FOUND)]
    return rows.astype(dict.fromkeys(("tensor", "direction", "name", "part", "op"), str)).reset_index(drop=True)


def is_passed_on(rows: pd.DataFrame) -> pd.Series:
    """Outputs of modules that hand on what they get: the same numbers stand at the row before them."""
    quiet = rows["op"].str.startswith(PASSED_ON) & (rows["tensor"] == "other")
    forward = rows[rows["direction"] == "forward"]
    keys = ["step", "seed", "rms", "max", "n_nan", "n_inf"]
    same = forward[forward[keys].duplicated(keep="first") & quiet[forward.index]]
    gone = set(zip(same["name"], same["part"], same["call"], strict=True))
    return quiet & pd.Series([one in gone for one in zip(*(rows[k] for k in PLACE[:3]), strict=True)], rows.index)


def find_places(rows: pd.DataFrame) -> dict[tuple[Any, ...], float]:
    """Outputs in the order in which they were computed; a parameter stands where its module's output does.

    One whose module has no output of its own stands behind the outputs of the module around it.
    """
    outputs = rows[rows["is_output"]].sort_values("direction", ascending=False, kind="stable")
    order = list(dict.fromkeys(zip(*(outputs[name] for name in PLACE), strict=True)))
    if not (outputs["direction"] == "forward").any():
        order.reverse()
    places: dict[tuple[Any, ...], float] = {(*key, True): place for place, key in enumerate(order)}
    by_modules = set(outputs["name"][~is_by_function(outputs)])
    own: dict[tuple[str, str], float] = {}
    around: dict[str, float] = {"": -1}
    for place, (name, *_) in enumerate(order):
        if name in by_modules and name:
            own.setdefault((name, ""), place)
        for prefix in list_prefixes(name):
            around[prefix] = place
    rest = rows[~rows["is_output"]].sort_values("layer", kind="stable")
    homes = {
        key: (key[0], "" if (key[0], "") in own else key[1]) for key in zip(rest["name"], rest["part"], strict=True)
    }
    homeless = list(dict.fromkeys(home for home in homes.values() if home not in own))
    for k, home in enumerate(homeless, start=1):
        above = next(prefix for prefix in [*list_prefixes(home[0]), ""] if prefix in around)
        own[home] = around[above] + k / (len(homeless) + 1)
    keys = list(zip(*(rest[name] for name in PLACE), strict=True))
    places |= {(*key, False): own[homes[key[:2]]] for key in keys}
    used = {place: k for k, place in enumerate(sorted(set(places.values())))}
    return {key: used[place] for key, place in places.items()}


def is_by_function(rows: pd.DataFrame) -> pd.Series:
    """Whether a function of torch computed an output: its part is relu, or relu.1."""
    found = [bool(op) and part.startswith(op) for op, part in zip(rows["op"], rows["part"], strict=True)]
    return pd.Series(found, rows.index, dtype=bool)


def list_prefixes(name: str) -> list[str]:
    """The dotted names around a name, itself first."""
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(len(parts), 0, -1)]


def write_places(rows: pd.DataFrame) -> dict[int, str]:
    """A text for each place: the module's name without what all names begin with, and what it computes where the name
    does not say it.
    """
    first = rows.sort_values("is_output", ascending=False, kind="stable").drop_duplicates("place")
    start = find_prefix([name for name in first["name"] if name])
    texts = {}
    columns = [first[k] for k in ("place", "name", "part", "op", "call", "is_output")]
    for place, name, part, op, call, is_output in zip(*columns, strict=True):
        path = shorten_path(name[len(start) :])
        if not is_output:
            what = "" if part == "weight" and path else part
        elif not path or (op and part.startswith(op)):
            what = part or op
        else:
            what = op if path.rpartition(".")[2].isdigit() else ""
        texts[place] = " ".join(one for one in (path, what, f"#{call + 1}" if call else "") if one)
    return texts


def find_prefix(names: Iterable[str]) -> str:
    """What all dotted names begin with, in whole parts; never all of a name."""
    parts = [name.split(".")[:-1] for name in names]
    kept = []
    for several in zip(*parts, strict=False):
        if len(set(several)) > 1 or several[0].isdigit():
            break
        kept.append(several[0])
    return ".".join(kept) + "." if kept and len(parts) > 1 else ""


def shorten_path(path: str) -> str:
    """A dotted name that fits beside an axis: its last parts, and dots for what is left out.

    >>> shorten_path("encoder.blocks.11.attention.self.query.projection")
    '….attention.self.query.projection'
    """
    parts = path.split(".")
    while len(".".join(parts)) > LONGEST and len(parts) > 1:
        parts = ["…", *parts[2:]] if parts[0] == "…" else ["…", *parts[1:]]
    return ".".join(parts)


def join_networks(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for all networks, and for parameters of one module; the largest parameter's rms stands for them."""
    rank = {"": 0, "zero": 1, "inf": 2, "nan": 3}
    rows = rows.assign(rank=rows["state"].map(rank))
    keys = ["is_output", "series", "step", "place", "text"]
    weights = rows["count"].groupby([rows[k] for k in keys]).transform("max")
    largest = rows[rows["count"] == weights].groupby(keys, sort=False)
    joined = largest.agg(
        layer=("layer", "first"), middle=("middle", "median"), low=("low", "min"), high=("high", "max"),
        rank=("rank", "max"), **{name: (name, "first") for name in ("tensor", "direction", "name", "part", "call")},
    ).reset_index()  # fmt: skip
    state = {number: name for name, number in rank.items()}
    joined["state"] = joined.pop("rank").map(state)
    return joined.sort_values(["step", "is_output", "series", "place"], kind="stable").reset_index(drop=True)
