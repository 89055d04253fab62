"""Figures of the tables that a run does not draw by itself: laws, differences, attempts, one pass step by step."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from initlab.figures.axes import log_scale, name_rows, new_figure
from initlab.figures.lines import assign_styles, plot_lines, plot_theory, set_layer_ticks, set_log_ticks
from initlab.figures.model_rows import shorten_path
from initlab.tasks.coordinate_check import CHANGE, ERRORS, GROWS, MODULE, OUTPUT, VANISHES, list_rows, name_module

SHOWN = ("rms", "std")  # of the statistics of a law, the first that is there is drawn
BARS = 60  # rows of a figure with a name each


def draw_theory(frame: pd.DataFrame) -> Figure | None:
    """What is predicted for every layer, with the band of 95 % of networks, and crosses where something was measured.

    frame: the table `theory`, or what `predict` gives; one of its statistics is drawn, a panel for each direction.
    """
    statistic = next((name for name in SHOWN if (frame["statistic"] == name).any()), str(frame["statistic"].iloc[0]))
    rows = frame[frame["statistic"] == statistic].astype(dict.fromkeys(("tensor", "direction"), str))
    tensor = next(name for name in ("activation", "preactivation", *rows["tensor"]) if (rows["tensor"] == name).any())
    for name in ("step", "implementation"):
        if name in rows:
            rows = rows[rows[name] == rows[name].iloc[0]]
    rows = rows[rows["tensor"] == tensor].rename(columns={"band_low": "low", "band_high": "high"})
    rows = rows.assign(label=rows["label"].astype(str) if "label" in rows else "law")
    directions, order = list(dict.fromkeys(rows["direction"])), list(dict.fromkeys(rows["label"]))
    styles = assign_styles(order)
    figure, axes = new_figure(describe_laws(rows, tensor, statistic, directions), 1, len(directions))
    for ax, direction in zip(axes, directions, strict=True):
        mine = rows[rows["direction"] == direction]
        measured = mine[mine["seed"] >= 0] if "seed" in mine else mine[:0]
        for label, crosses in measured.groupby("label"):
            ax.plot(
                crosses["layer"], crosses["measured"], "x", color=styles[str(label)].colour, markersize=4, label=label
            )
        lines = mine.drop_duplicates(["label", "layer"]).sort_values("layer")
        if len(order) > 1:
            for label, line in lines.groupby("label"):
                ax.plot(line["layer"], line["predicted"], "--", color=styles[str(label)].colour, linewidth=1)
        log_scale(ax, np.concatenate([lines["predicted"], measured["measured"] if len(measured) else []]), least=3)
        ax.relim()
        ax.set_ylim(*find_limits(lines, measured))
        plot_theory(ax, lines, styles)
        set_log_ticks(ax)
        ax.set_title(f"{direction}: {statistic} of the {tensor}s", fontsize=10, loc="left")
        set_layer_ticks(ax, mine["layer"])
    return figure


def find_limits(lines: pd.DataFrame, measured: pd.DataFrame) -> tuple[float, float]:
    """The smallest and largest number of what is predicted and measured, with a margin."""
    values = np.concatenate([lines["predicted"], measured["measured"] if len(measured) else []]).astype(float)
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = values.min(), values.max()
    return (
        (low / 1.5, high * 1.5) if low > 0 else (low - 0.1 * (high - low) - 1e-300, high + 0.1 * (high - low) + 1e-300)
    )


def describe_laws(rows: pd.DataFrame, tensor: str, statistic: str, directions: list[str]) -> str:
    texts = []
    several = rows["label"].nunique() > 1
    for label in dict.fromkeys(rows["label"]):
        for direction in directions:
            mine = rows[(rows["label"] == label) & (rows["direction"] == direction)]
            layer = mine["layer"].max() if direction == "forward" else mine["layer"][mine["layer"] > 0].min()
            end = mine[mine["layer"] == layer]
            if len(end):
                low, centre, high = end[["low", "predicted", "high"]].iloc[0]
                span = f"{centre:.3g} ({low:.3g} to {high:.3g}) at layer {layer}"
                texts.append(f"{f'{label}, ' if several else ''}{direction}: {span}")
    return f"What theory predicts, {statistic} of the {tensor}s. " + "; ".join(texts[:4])


def draw_lines(
    rows: pd.DataFrame, x: str, y: str, title: str, labels: pd.Series, axis: str, log: bool = True
) -> Figure | None:
    """A line for each label, the largest of the networks at each x; None where there is no number to draw."""
    known = rows.assign(label=labels.astype(str), y=pd.to_numeric(rows[y]))
    known = known[np.isfinite(known["y"])]
    if not len(known):
        return None
    order = list(dict.fromkeys(known["label"]))
    top = known.groupby(["label", x], sort=False)["y"].max().reset_index().sort_values(x)
    if log and (top["y"] > 0).any():
        top = top[top["y"] > 0]  # a line would come from below the axis
    figure, (ax,) = new_figure(title, height=3.2)
    band = top.assign(low=top["y"], median=top["y"], high=top["y"])
    plot_lines(ax, band, x, assign_styles(order), log=log and bool((top["y"] > 0).all()), names=True)
    ax.set_ylabel(axis)
    set_layer_ticks(ax, top[x], x)
    return figure


def draw_parity(frame: pd.DataFrame) -> Figure | None:
    """How far the hand-written tensors are from the module's, the worst layer and network of each kind of tensor."""
    worst = frame.loc[frame["relative_error"].fillna(-1).idxmax()] if len(frame) else None
    if worst is None:
        return None
    title = (
        f"By hand against nn.Module: relative error at most {worst['relative_error']:.2g} "
        f"({worst['tensor']}, {worst['direction']}, layer {worst['layer']}, step {worst['step']})"
    )
    labels = frame["tensor"].astype(str) + ", " + frame["direction"].astype(str)
    return draw_lines(frame, "step", "relative_error", title, labels, "relative error, largest of layers and networks")


def draw_attempts(frame: pd.DataFrame) -> Figure | None:
    """The std of every layer's preactivations before each attempt of LSUV."""
    title = f"LSUV: {frame['outcome'].eq('fits').sum()} fits in {int(frame['attempt'].max())} attempts at most"
    return draw_lines(
        frame, "attempt", "std", title, "layer " + frame["layer"].astype(str), "std of the preactivations, largest"
    )


def draw_curves(frame: pd.DataFrame) -> Figure | None:
    """log2 of the activations' std in arithmetic without a range, a line for each rule."""
    rows = frame[(frame["tensor"] == "activation") & (frame["direction"] == "forward")]
    labels = rows["label"] if "label" in rows else rows["init"] if "init" in rows else rows["stage"]
    last = rows[rows["layer"] == rows["layer"].max()].groupby(labels, observed=True)["log2_std_true"].median()
    ends = "; ".join(f"{label}: 2^{value:.1f}" for label, value in last.items())
    return draw_lines(
        rows, "layer", "log2_std_true", f"Std at layer {rows['layer'].max()}. {ends}", labels,
        "log2 of the activations' std", log=False,
    )  # fmt: skip


def draw_agreement(frame: pd.DataFrame) -> Figure:
    """The relative error of every tensor of two results beside the limit of its number format; 0 has no bar."""
    different = frame[~(frame["relative_error"] <= frame["limit"])]
    title = f"{len(different)} of {len(frame)} tensors differ beyond rounding" if len(different) else (
        f"All {len(frame)} tensors agree up to rounding"
    )  # fmt: skip

    def draw(ax: Axes, rows: pd.DataFrame, y: np.ndarray) -> None:
        ax.plot(rows["limit"], y, "|", color="0.3", markersize=12, markeredgewidth=2, label="limit")
        ax.plot(
            rows["relative_error"].clip(lower=1e-17), y, "o", color="C1", label="relative error (0 at the left end)"
        )
        ax.set_xscale("log")

    return _draw_bars(frame, [shorten_path(str(name)) for name in frame["name"]], title, "||a - b|| / ||b||", draw)


def draw_steps(frame: pd.DataFrame) -> Figure:
    """The rms of everything that one pass sets, forward and backward, in order."""
    names = [f"{k} {name}.{what}" for k, name, what in frame[["step", "name", "sets"]].itertuples(index=False)]

    def draw(ax: Axes, rows: pd.DataFrame, y: np.ndarray) -> None:
        for direction, style in (("forward", "C0o"), ("backward", "C1s")):
            chosen = (rows["direction"] == direction).to_numpy()
            ax.plot(rows["rms"][chosen], y[chosen], style, label=direction, zorder=3)
        if (rows["rms"] > 0).any():
            ax.set_xscale("log")

    largest = frame.loc[frame["rms"].fillna(-1).idxmax()]
    title = f"One pass sets {len(frame)} tensors; the largest rms is {largest['rms']:.3g}, of {largest['tensor']}"
    return _draw_bars(frame, names, title, "rms", draw)


def _draw_bars(
    frame: pd.DataFrame, names: list[str], title: str, axis: str, draw: Callable[[Axes, pd.DataFrame, np.ndarray], None]
) -> Figure:
    """A named row for each row of the table, from top to bottom, as far as they can be read."""
    cut = f" (the first {BARS} are drawn)" if len(frame) > BARS else ""
    figure, (ax,) = new_figure(title + cut)
    figure.set_size_inches(8.5, 0.26 * min(len(frame), BARS) + 2)
    draw(ax, frame[:BARS], np.arange(min(len(frame), BARS)))
    name_rows(ax, names[:BARS])
    ax.set_xlabel(axis)
    ax.legend(fontsize=9)
    return figure


def draw_audit(frame: pd.DataFrame) -> Figure | None:
    """The gain of every weight beside the one that what follows it needs; parameters without a gain are left out."""
    rows = frame[frame["gain"] > 0].reset_index(drop=True)
    if not len(rows):
        return None
    off = (np.log2(rows["gain"] / rows["needed"])).abs().fillna(0)
    worst = rows.loc[off.idxmax()]
    title = f"Gains of {len(rows)} weights"
    if off.max() > 0.1:
        title += (
            f"; farthest off is {worst['name']}: {worst['gain']:.3g}, {worst['follower']} needs {worst['needed']:.3g}"
        )

    def draw(ax: Axes, shown: pd.DataFrame, y: np.ndarray) -> None:
        for one, other, row in zip(shown["gain"], shown["needed"], y, strict=True):
            ax.plot([one, other], [row, row], color="0.75", linewidth=2, zorder=1)
        error = 2 * shown["gain_error"].fillna(0)
        ax.errorbar(shown["gain"], y, xerr=error, fmt="o", color="C0", capsize=3, label="gain found, 2 standard errors")
        ax.plot(shown["needed"], y, "|", color="C1", markersize=14, markeredgewidth=3, label="needed by what follows")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")

    names = [f"{shorten_path(str(name))} ({law})" for name, law in zip(rows["name"], rows["law"], strict=True)]
    return _draw_bars(rows, names, title, "gain = std × sqrt(fan_in)", draw)


def draw_exponents(frame: pd.DataFrame) -> Figure:
    """Exponents in the width of what modules compute and of its change, at the last step, with 3 standard errors."""
    last = frame[frame["step"] == frame["step"].max()]
    rows = last.drop_duplicates(MODULE)[MODULE].reset_index(drop=True)
    places = {tuple(row): k for k, row in enumerate(rows.itertuples(index=False))}
    names = [name_module(row) for row in list_rows(rows)]
    bad = last[~last["verdict"].isin(["level", "zero", "undecided"])]
    count = len(bad[MODULE].drop_duplicates())
    title = f"{count} of {len(rows)} modules go with the width after {frame['step'].max()} steps"

    def draw(ax: Axes, shown: pd.DataFrame, _: np.ndarray) -> None:
        ax.axvspan(VANISHES, GROWS, color="0.9", zorder=0, label="level")
        for k, tensor in enumerate((OUTPUT, CHANGE)):
            mine = last[last["tensor"] == tensor]
            y = np.array([places[tuple(row)] for row in mine[MODULE].itertuples(index=False)]) + 0.24 * (k - 0.5)
            error = ERRORS * mine["error"].where(np.isfinite(mine["error"]), 0)
            ax.errorbar(mine["exponent"], y, xerr=error, fmt="o", color=f"C{k}", capsize=3, markersize=5, label=tensor)

    return _draw_bars(rows, names, title, "exponent in the width: rms goes as width^exponent", draw)
