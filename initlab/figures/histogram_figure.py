"""The figure of histograms over the training: which powers of two a tensor's entries have, step by step."""

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from initlab.figures.axes import WIDTH, new_figure
from initlab.figures.model_rows import OUTPUTS, add_places, complete_rows

SHOWN = (("preactivation", "forward", "preactivations"), ("weight", "backward", "weight gradients"))


def shares(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, octaves, and the share (octaves, steps) of a step's entries in each octave, all networks together."""
    steps = np.sort(rows["step"].unique())
    position = {step: k for k, step in enumerate(steps)}
    length = rows["positive"].map(len)
    filled = rows[length > 0]
    if not len(filled):
        return steps, np.arange(0), np.zeros((0, len(steps)))
    low, high = int(filled["first"].min()), int((filled["first"] + length[length > 0]).max())
    counts = np.zeros((high - low, len(steps)))
    columns = filled[["step", "first", "positive", "negative"]]
    for step, first, positive, negative in columns.itertuples(index=False):
        counts[first - low : first - low + len(positive), position[step]] += np.add(positive, negative)
    total = counts.sum(0)
    return steps, np.arange(low, high), np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)


def draw_octaves(histograms: pd.DataFrame) -> Figure | None:
    """Preactivations and weight gradients of the first, the middle and the last layer; zeros are in no octave."""
    rows = histograms[(histograms["stage"] == "train") & (histograms["implementation"] == "scratch")]
    if not len(rows):
        return None
    last = int(rows["layer"].max())
    layers = sorted({1, (1 + last) // 2, last})
    figure, axes = new_figure(_title(rows, last), len(SHOWN), len(layers), sharex=True, sharey="row")
    mesh = None
    for ax, (tensor, direction, name), layer in zip(
        axes, [one for one in SHOWN for _ in layers], layers * len(SHOWN), strict=True
    ):
        chosen = (rows["tensor"] == tensor) & (rows["direction"] == direction) & (rows["layer"] == layer)
        steps, octaves, share = shares(rows[chosen])
        ax.grid(False)
        ax.set_facecolor("0.92")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        if len(octaves):
            shown = np.ma.masked_less_equal(share, 0)
            mesh = ax.pcolormesh(steps, octaves, shown, norm=LogNorm(1e-4, 1), cmap="viridis", shading="nearest")
        ax.set_title(f"{name}, layer {layer}", fontsize=10)
    for ax in axes[-len(layers) :]:
        ax.set_xlabel("training step")
    for ax in axes[:: len(layers)]:
        ax.set_ylabel("octave: floor(log2 |x|)")
    if mesh is not None:
        figure.colorbar(mesh, ax=axes, label="share of the entries", shrink=0.8)
    return figure


def _title(rows: pd.DataFrame, last: int) -> str:
    gradients = rows[(rows["tensor"] == "weight") & (rows["direction"] == "backward")]
    texts = []
    for layer in sorted({1, last}):
        _, octaves, share = shares(gradients[gradients["layer"] == layer])
        if not len(octaves):
            texts.append(f"layer {layer}: no entry but 0, nan and inf")
            continue
        typical = [int(octaves[np.argmax(share[:, step])]) for step in (0, -1)]
        texts.append(f"layer {layer}: most often 2^{typical[0]} at first, 2^{typical[1]} at last")
    return f"Weight gradients by octave. {'; '.join(texts)}"


def draw_module_octaves(histograms: pd.DataFrame) -> Figure | None:
    """Of every module's output the octaves of its entries, from the first module down to the last, at the last step.

    Left the values, right the gradients; the entries that are 0, nan or inf are in no octave.
    """
    rows = complete_rows(histograms)
    rows = add_places(rows[rows["step"] == rows["step"].max()])
    rows = rows[rows["is_output"]] if rows["is_output"].any() else rows
    filled = rows[rows["positive"].map(len) > 0]
    if not len(filled):
        return None
    sides = [name for name in OUTPUTS.values() if (filled["series"] == name).any()]
    names = filled.drop_duplicates("place").set_index("place")["text"].sort_index()
    low, high = int(filled["first"].min()), int((filled["first"] + filled["positive"].map(len)).max())
    figure, axes = new_figure(describe_octaves(filled, sides), 1, len(sides), sharey=True)
    figure.set_size_inches(WIDTH, min(0.2 * len(names), 14) + 2.5)
    for ax, side in zip(axes, sides, strict=True):
        counts = np.zeros((len(names), high - low))
        columns = filled.loc[filled["series"] == side, ["place", "first", "positive", "negative"]]
        for place, first, positive, negative in columns.itertuples(index=False):
            counts[names.index.get_loc(place), first - low : first - low + len(positive)] += np.add(positive, negative)
        total = counts.sum(1, keepdims=True)
        share = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
        mesh = ax.pcolormesh(
            np.arange(low, high), range(len(names)), np.ma.masked_less_equal(share, 0), norm=LogNorm(1e-4, 1),
            cmap="viridis", shading="nearest",
        )  # fmt: skip
        ax.grid(False)
        ax.set_facecolor("0.92")
        ax.set_title(side, fontsize=11)
        ax.set_xlabel("octave: floor(log2 |x|)")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    every = -(-len(names) // 80)
    axes[0].set_yticks(range(0, len(names), every), names.iloc[::every], fontsize=8)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.colorbar(mesh, ax=axes, label="share of the entries", shrink=0.8)
    return figure


def describe_octaves(filled: pd.DataFrame, sides: list[str]) -> str:
    texts = []
    for side in sides:
        mine = filled[filled["series"] == side]
        ends = mine["first"] + mine["positive"].map(len) - 1
        texts.append(f"{side} from 2^{mine['first'].min()} to 2^{ends.max()}")
    return f"Entries by octave, step {filled['step'].iloc[0]}: {'; '.join(texts)}"
