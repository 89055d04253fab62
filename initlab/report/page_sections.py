"""The parts of a page that numbers fill: stack, training, parity, number formats, theory, and what else there is.

Takes labelled tables; a part without rows is None.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from initlab.report.page_numbers import SHOWN, value_at
from initlab.report.page_tables import (
    BAD,
    FAIR,
    GOOD,
    Cell,
    PageSection,
    PageTable,
    as_text,
    judge_p,
    show_frame,
    text_row,
)
from initlab.runs import summary, theory_rows
from initlab.runs.schema import HISTOGRAMS, LOSSES, LSUV, PARITY, STATS, TABLES, THEORY
from initlab.runs.theory_rows import ProfileTest
from initlab.stats.dtypes import FORMATS

Tables = Mapping[str, pd.DataFrame]
DIRECTIONS = {"forward": "activations", "backward": "gradients"}
OWN_PARTS = (STATS, LOSSES, PARITY, THEORY, HISTOGRAMS)  # tables that have a part of their own
MOST_VIEWS = 6  # that are listed with three layers each
SHOWN_FORMATS = ("float64", "float32", "bfloat16", "float16")
RULERS = ("std", "cosine")  # statistics that are listed beside what is predicted


@dataclass(frozen=True)
class Facts:
    """What a page says, found once: for each direction the ends of the signals and the tests against theory by label.

    losses: a row per label: first and last loss and accuracy, how many networks diverged; `summary.describe_parting`
    reads it too.
    """

    tables: Tables
    ends: Mapping[str, Mapping[str, str]]
    tests: Mapping[str, Mapping[str, ProfileTest]]
    losses: pd.DataFrame


def find_facts(tables: Tables) -> Facts:
    """tables: labelled, and narrow."""
    stats, theory = (tables.get(name, pd.DataFrame()) for name in (STATS, THEORY))
    has_stack = len(stats) and (stats["stage"] == "stack").any()
    ends = {one: summary.end_of_signal(stats, one) if has_stack else {} for one in DIRECTIONS}
    tests = {one: theory_rows.find_agreement(theory, one) if len(theory) else {} for one in DIRECTIONS}
    return Facts(tables, ends, tests, summarize_losses(tables))


def summarize_losses(tables: Tables) -> pd.DataFrame:
    """A row per label, see `Facts`; medians of the networks."""
    losses, parity = (tables.get(name, pd.DataFrame()) for name in (LOSSES, PARITY))
    rows = {}
    for label, mine in losses.groupby("label", observed=True) if len(losses) else ():
        steps = mine["step"].to_numpy()
        row: dict[str, Any] = {"last step": int(steps.max())}
        for name, implementation, step in (
            ("first loss", "scratch", steps.min()),
            ("loss by hand", "scratch", steps.max()),
            ("loss nn.Module", "module", steps.max()),
        ):
            at = mine[(steps == step) & (mine["implementation"] == implementation)]
            row[name] = take_median(at["loss"])
            if name == "loss by hand":
                row["accuracy"] = take_median(at["accuracy"]) if "accuracy" in at else math.nan
                row["diverged"], row["networks"] = int((~np.isfinite(at["loss"])).sum()), len(at)
        rows[str(label)] = row
    table = pd.DataFrame.from_dict(rows, orient="index")
    if rows and len(parity):
        gradients = parity[parity["direction"] == "backward"].groupby("label", observed=True)
        table["gradient difference"] = gradients["relative_error"].max().rename(str)
    return table


def take_median(values: pd.Series) -> float:
    return float(summary.rank_quantiles(values.to_numpy(dtype=float), (0.5,))[0]) if len(values) else math.nan


def describe_stack(facts: Facts) -> PageSection | None:
    """What has become of the signal and of the gradient, a row per setting."""
    if not facts.ends["forward"]:
        return None
    stack = facts.tables[STATS][facts.tables[STATS]["stage"] == "stack"]
    rows = [
        [Cell(label), *(judge_end(facts.ends[one].get(label, "not measured")) for one in DIRECTIONS)]
        for label in facts.ends["forward"]
    ]
    note = "Medians; in brackets the 16-84 % of networks. Gradients travel from the last layer to layer 1."
    table = PageTable("At the end of the way", ["setting", "activations", "gradients"], rows, note)
    networks, layers = stack["seed"].nunique(), int(stack["layer"].max())
    line = f"{networks} {'networks' if networks > 1 else 'network'}, {layers} {'layers' if layers > 1 else 'layer'}."
    return PageSection("stack", "The stack", [line], [table])


def judge_end(text: str) -> Cell:
    """The words of `summary.end_of_signal`: a signal that lives begins with its std."""
    return Cell(text, "" if text.startswith("std") or text == "not measured" else BAD)


def describe_training(facts: Facts) -> PageSection | None:
    """First and last loss and accuracy, a row per setting."""
    if not len(facts.losses):
        return None
    rows = []
    for label, row in facts.losses.iterrows():
        accuracy = "" if math.isnan(row["accuracy"]) else f"{row['accuracy']:.1%}"
        lost = Cell(f"{row['diverged']:.0f} of {row['networks']:.0f}", BAD if row["diverged"] else GOOD)
        numbers = (float(row[name]) for name in ("first loss", "loss by hand", "loss nn.Module"))
        rows.append(text_row(str(label), int(row["last step"]), *numbers, accuracy, lost))
    columns = ["setting", "last step", "first loss", "last loss by hand", "last loss nn.Module", "accuracy", "diverged"]
    note = "Medians of the networks on the last batch. Loss: mean over the batch."
    return PageSection("training", "The training", tables=[PageTable("Loss", columns, rows, note)])


def describe_parity(facts: Facts) -> PageSection | None:
    """How far both backward passes and both trainings are apart, tensor by tensor."""
    parity = facts.tables.get(PARITY, pd.DataFrame())
    if not len(parity):
        return None
    several = parity["label"].nunique() > 1
    keys = [*(["label"] if several else []), "direction", "tensor"]
    rows = []
    for key, mine in parity.groupby(keys, observed=True):
        *label, direction, tensor = key if isinstance(key, tuple) else (key,)
        if several and direction == "forward":
            continue
        limit = summary.PARITY_LIMIT.get(str(mine["dtype"].iloc[0]), math.nan) if "dtype" in mine else math.nan
        finite = mine["relative_error"].dropna()
        worst = mine.loc[finite.idxmax()] if len(finite) else None
        error = float(finite.max()) if len(finite) else math.nan
        lost = float((mine["n_nonfinite"] > 0).mean())
        kind = (GOOD if error <= limit else FAIR) if direction == "backward" and not math.isnan(limit) else ""
        where = f"layer {worst['layer']}, step {worst['step']}" if worst is not None else "nowhere finite"
        what = "one backward pass" if direction == "backward" else "both trainings"
        rows.append(text_row(*map(str, label), what, str(tensor), Cell(as_text(error), kind), where, f"{lost:.0%}"))
    columns = [*(["setting"] if several else []), "compared", "tensor", "largest relative error", "at", "not finite"]
    note = (
        f"By hand against nn.Module. One pass from equal weights should agree to {as_text(limit)}; two trainings go on "
        "apart and may part by chaos."
    )
    return PageSection("parity", "Parity", tables=[PageTable("Gradients by hand and by autograd", columns, rows, note)])


def describe_formats(facts: Facts) -> PageSection | None:
    """The layer at which a number format would end the signal of the middle network."""
    stats = facts.tables.get(STATS, pd.DataFrame())
    if "log2_rms_true" not in stats:
        return None
    rows = []
    several = stats["label"].nunique() > 1
    for direction, what in DIRECTIONS.items():
        signal = summary.stack_signal(stats, direction)
        signal = signal[signal["layer"] > 0]
        sizes = signal.groupby(["label", "layer"], observed=True)["log2_rms_true"].median().unstack("layer")
        sizes = sizes.sort_index(axis=1, ascending=direction == "forward")
        for label, mine in zip(sizes.index.astype(str), sizes.to_numpy(), strict=True):
            cells = [find_format_end(mine, sizes.columns, name) for name in SHOWN_FORMATS]
            rows.append([*([Cell(label)] if several else []), Cell(what), *cells])
    if not rows:
        return None
    columns = [*(["setting"] if several else []), "signal", *SHOWN_FORMATS]
    note = "From the rms of the median network in arithmetic without a range: single entries leave a format earlier."
    return PageSection("formats", "Number formats", tables=[PageTable("Where a format would end", columns, rows, note)])


def find_format_end(sizes: np.ndarray, layers: Sequence[int], name: str) -> Cell:
    """Of sizes (log2) of layers in the order of travel: where they leave a format, in words."""
    held = FORMATS[name]
    for word, kind, met in (
        ("overflow", BAD, sizes > math.log2(held.max)),
        ("all zero", BAD, sizes < math.log2(held.least)),
        ("subnormal", FAIR, sizes < math.log2(held.tiny)),
    ):
        if met.any():
            return Cell(f"{word} from layer {layers[int(met.argmax())]}", kind)
    return Cell("holds", GOOD)


def describe_theory(facts: Facts) -> PageSection | None:
    """The test of each profile, and of one setting some layers beside what is predicted."""
    rows, theory = [], facts.tables.get(THEORY, pd.DataFrame())
    for label in dict.fromkeys([*facts.tests["forward"], *facts.tests["backward"]]):
        found = [facts.tests[one].get(label) for one in DIRECTIONS]
        far = [as_text(one.z) if one is not None and one.layers else "" for one in found]
        rows.append(text_row(label, judge_p(found[0]), far[0], judge_p(found[1]), far[1]))
    note = "p: share of correct ensembles that are as far from the prediction, over all layers. z: the farthest layer."
    columns = ["setting", "activations", "z", "gradients", "z"]
    made = [PageTable("Does the std of all layers agree?", columns, rows, note)] if rows else []
    if len(theory) and theory["label"].nunique() == 1 and (beside := compare_layers(theory)):
        made.append(beside)
    return PageSection("theory", "Theory", tables=made) if made else None


def compare_layers(theory: pd.DataFrame) -> PageTable | None:
    """The mean over the networks beside its prediction at the first, the middle and the last layer."""
    mean = theory[(theory["seed"] == -1) & theory["statistic"].isin(RULERS) & (theory["layer"] > 0)]
    stages = [one for one in ("stack", "train") if (mean["stage"] == one).any()]
    if not stages:
        return None
    mean = mean[(mean["stage"] == stages[0]) & (mean["implementation"] == "scratch")]
    mean = mean[mean["tensor"] == ("activation" if stages[0] == "stack" else "preactivation")]
    mean = mean[(mean["direction"] == "forward") | (mean["statistic"] == RULERS[0])]
    layers = take_three(sorted(mean["layer"].unique().tolist()))
    shown = mean[mean["layer"].isin(layers)].astype({"direction": str, "statistic": str})
    shown = shown.sort_values(["direction", "statistic", "layer"], ascending=[False, False, True])
    rows = [
        text_row(
            DIRECTIONS[str(row.direction)], str(row.statistic), int(row.layer), row.measured, row.predicted,
            f"{as_text(row.band_low)} to {as_text(row.band_high)}", row.z,
        )
        for row in shown.itertuples()
    ]  # fmt: skip
    columns = ["tensor", "statistic", "layer", "measured", "predicted", "95 % band", "z"]
    return PageTable("Mean over the networks", columns, rows) if rows else None


def take_three(values: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys([values[0], values[len(values) // 2], values[-1]])) if values else []


def list_three_layers(views: Sequence[Mapping[str, Any]]) -> list[PageTable]:
    """The first, the middle and the last layer of each view at its last step: what the walk shows, for paper."""
    made = []
    for view in views[:MOST_VIEWS]:
        steps, layers, rows = view["steps"], view["layers"], []
        values = [one["values"] for one in view["tensors"]]
        names = [name for name in SHOWN if any(any(one.get(name, ())) for one in values)]  # others are 0 everywhere
        for layer in take_three([layer for layer in layers if layer > 0] or layers):
            place = (len(steps) - 1) * len(layers) + layers.index(layer)
            for one in view["tensors"]:
                if layer in one["layers"]:
                    numbers = [value_at(one, name, place) for name in names]
                    rows.append(text_row(int(layer), one["name"], *numbers))
        step = f", step {steps[-1]}" if len(steps) > 1 else ""
        caption = f"{view['label']}: {view['title']}{step}"
        made.append(PageTable(caption, ["layer", "tensor", *(SHOWN[name] for name in names)], rows))
    return made


def list_other_tables(facts: Facts) -> PageSection | None:
    """Tables that have no part of their own: of other tasks, as they are."""
    tables = facts.tables
    others = [name for name in tables if name not in OWN_PARTS and (name != LSUV or STATS not in tables)]
    if not others:
        return None
    made = [show_frame(tables[name], f"{name}: {TABLES[name].about}") for name in others]
    return PageSection("tables", "What was measured", tables=made)
