"""Where number formats end a stack: the layer of each event, predicted for all formats and measured where it can be.

A CPU and a GPU multiply in float16, bfloat16, float32 and float64; the two float8 are formats to store in, so that of
them there is only a prediction. A CPU's bfloat16 flushes subnormals to 0: its `subnormal` never happens there.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch

from initlab.nn.custom_activation import Given
from initlab.nn.init import Rule, rule
from initlab.stats.dtypes import DTYPES
from initlab.stats.keys import Seeds, resolve_seeds
from initlab.tasks.ensemble.networks import Frames
from initlab.tasks.stack import stack
from initlab.terminal import Bar
from initlab.theory.format_limits import limits

# Event -> whether it has happened in rows of preactivations.
HAPPENED: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "overflow": lambda z: z["n_inf"] + z["n_nan"] > 0,
    "subnormal": lambda z: z["n_subnormal"] > 0,
    "zero": lambda z: z["frac_zero"] > 0,
    "all_zero": lambda z: z["frac_zero"] == 1,
}
WORDS = {
    "overflow": "first inf", "subnormal": "first subnormal number", "zero": "first zero", "all_zero": "all zero",
}  # fmt: skip
PREDICTED = {"layer": "predicted", "layer_02": "band_low", "layer_98": "band_high", "share": "predicted_share"}


def formats(
    init: str | Rule = "kaiming",
    activation: Given = "relu",
    depth: int = 50,
    width: int = 100,
    inputs: int | None = None,
    batch: int = 200,
    seeds: Seeds = 8,
    device: str | torch.device = "cpu",
    generator: str = "philox",
    progress: bool = False,
    **rule_fields: Any,
) -> Frames:
    """Where number formats end a stack: two tables, `formats` and `ends`.

    init, activation, depth, width, inputs, batch, seeds, device, generator, progress, rule_fields: as in `stack`; one
    rule for all networks.

    `formats` has a row per format and event, with the layer by which the event has happened: `predicted` in half of all
    networks, `band_low` and `band_high` in 2.3 and 97.7 %, `predicted_share` in how many at all; `measured` in half of
    these networks, `measured_low` and `measured_high` in the first and the last, `measured_share`. A layer is nan where
    fewer networks get so far. `ends` has a row per format, event and network, nan where it never happens.
    Errors: those of `stack` and `initlab.limits`.
    """
    scaling, numbers = rule(init, **rule_fields), resolve_seeds(seeds)
    shape: dict[str, Any] = {"depth": depth, "width": width, "inputs": inputs, "batch": batch}
    predicted = limits(scaling, activation, **shape).rename(columns=PREDICTED)
    ends = []
    for dtype in Bar(DTYPES, desc="formats", unit="format", disable=None if progress else True):
        where: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
        stats = stack(scaling, activation, seeds=numbers, backward=False, **shape, **where)
        z = stats[(stats["tensor"] == "preactivation") & (stats["direction"] == "forward")]
        for event, happened in HAPPENED.items():
            first = z[happened(z)].groupby("seed")["layer"].min().reindex(list(numbers)).astype(float)
            ends.append(first.rename_axis("seed").reset_index().assign(event=event, format=dtype))
    found = pd.concat(ends, ignore_index=True)
    table = predicted[["format", "event", *PREDICTED.values()]].merge(
        summarize_ends(found), "left", ["format", "event"]
    )
    return {"formats": table, "ends": found}


def summarize_ends(ends: pd.DataFrame) -> pd.DataFrame:
    """The measured columns of `formats`; a network in which an event never happens ranks last."""
    rows = []
    for (name, event), layers in ends.groupby(["format", "event"], sort=False)["layer"]:
        ranked = np.sort(np.where(layers.isna(), np.inf, layers))
        low, half, high = ranked[[0, (len(ranked) - 1) // 2, -1]]
        found = [layer if np.isfinite(layer) else np.nan for layer in (half, low, high)]
        rows.append((name, event, *found, float(np.isfinite(ranked).mean())))
    columns = ["format", "event", "measured", "measured_low", "measured_high", "measured_share"]
    return pd.DataFrame(rows, columns=columns)


def formats_as_text(frames: Frames) -> str:
    """A line for every event that happens in a format, and which formats hold the whole stack."""
    frame = frames["formats"]
    happens = (frame["predicted_share"] >= 0.5) | (frame["measured_share"] > 0)
    rows = frame[happens]
    table = pd.DataFrame(
        {
            "format": rows["format"],
            "event": rows["event"].map(WORDS),
            "layer predicted": [span_as_text(*row) for row in rows[["predicted", "band_low", "band_high"]].to_numpy()],
            "measured": [span_as_text(*row) for row in rows[["measured", "measured_low", "measured_high"]].to_numpy()],
            "of networks": ["" if np.isnan(share) else f"{100 * share:.0f} %" for share in rows["measured_share"]],
        }
    )
    held = [name for name in dict.fromkeys(frame["format"]) if name not in set(rows["format"])]
    lines = [table.to_string(index=False)] if len(table) else []
    lines += [f"no end of the format: {', '.join(held)}"] if held else []
    subnormal = frame[(frame["format"] == "bfloat16") & (frame["event"] == "subnormal")].iloc[0]
    if subnormal["predicted_share"] >= 0.5 and subnormal["measured_share"] == 0:
        lines.append(
            "bfloat16: this device flushes subnormal numbers to 0, so that its zeros come as early as those would"
        )
    return "\n".join(
        [*lines, "predicted: of half the networks (95 % of them); measured: of half of these (all of them)"]
    )


def span_as_text(centre: float, low: float, high: float) -> str:
    """A layer and its range in words; a layer of nan is never reached, a high end of inf not by all networks."""
    if np.isnan(low):
        return "-"
    ends = f"{low:.0f} to {high:.0f}" if np.isfinite(high) else f"from {low:.0f}, some never"
    return f"{'never' if np.isnan(centre) else f'{centre:.0f}'}{'' if low == high == centre else f' ({ends})'}"
