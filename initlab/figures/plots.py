"""The figures of a run and of a sweep: from the tables, by name, to PNG files.

Medians, bands and findings come from `runs.summary`. Layers stand in network order; a signal that died is marked where
it died, since nan, inf and 0 cannot be drawn.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from initlab.figures.axes import (
    cell_edges,
    layer_axis,
    log_scale,
    mark_dead_layers,
    mark_format_limits,
    marker_if_sparse,
    new_figure,
    plot_bands,
    plot_start,
    plot_theory,
)
from initlab.figures.format_figure import draw_formats
from initlab.figures.gain_figure import draw_gains
from initlab.figures.graph_figure import draw_graph
from initlab.figures.histogram_figure import draw_octaves
from initlab.figures.jacobian_figure import draw_jacobian
from initlab.figures.phase_figure import draw_phase
from initlab.runs import schema, summary, theory_rows
from initlab.runs.labels import add_labels
from initlab.runs.schema import LOSSES, STATS, TABLES, THEORY, TIMINGS

Tables = Mapping[str, pd.DataFrame]

BY_HAND = {"scratch": "by hand", "module": "nn.Module"}
MANY_LAYERS = 8  # from here on a colour bar serves better than a legend


SIGNALS = {"forward": "Activations", "backward": "Gradients"}


def draw_stack(tables: Tables, directions: Sequence[str] = tuple(SIGNALS)) -> Figure | None:
    """Std of every layer's activations, or of the gradient with respect to them, pulled back from the last layer.

    Panels beside each other for the directions that there are.
    """
    if STATS not in tables:
        return None
    signals = {one: summary.stack_signal(tables[STATS], one) for one in directions}
    signals = {one: rows[(rows["layer"] > 0) | (one == "forward")] for one, rows in signals.items()}
    signals = {one: rows for one, rows in signals.items() if len(rows)}
    if not signals:
        return None
    known = tables.get(THEORY, pd.DataFrame(columns=theory_rows.NEEDED))
    texts = []
    for direction in signals:
        found = summary.end_of_signal(tables[STATS], direction)
        kept = theory_rows.find_agreement(known, direction)
        agreement = f"; {next(iter(kept.values()))}" if len(kept) == len(found) == 1 else ""
        texts.append(f"{SIGNALS[direction]} through the stack. {summary.findings(found)}{agreement}")
    figure, axes = new_figure(". ".join(texts), 1, len(signals))
    for ax, (direction, signal) in zip(axes, signals.items(), strict=True):
        _plot_signal(ax, signal, direction, tables[STATS], theory_rows.lines(known, direction))
    if len(axes) > 1:
        for ax, direction in zip(axes, signals, strict=True):
            ax.set_title(SIGNALS[direction].lower(), fontsize=11)
    return figure


def _plot_signal(ax: Axes, signal: pd.DataFrame, direction: str, stats: pd.DataFrame, lines: pd.DataFrame) -> None:
    """The lines of one direction, with theory, the ends of the number formats and marks where a signal died."""
    # Beyond the format's end the finite entries that are left still have a std: the line ends where the signal does.
    whole = signal["std"].where(signal["n_nan"] + signal["n_inf"] == 0)
    band = summary.band(signal.assign(std=whole), ["layer"], "std")
    plot_bands(ax, band, "layer")
    log_scale(ax, band["median"])
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.1), max(high, 10))  # a curve that stays near 1 shall look like it
    if len(lines):
        plot_theory(ax, lines, list(band["label"].astype(str).unique()))
    ax.set_ylabel("std (median and 16-84 % of networks)")
    layer_axis(ax)
    mark_format_limits(ax, sorted(signal["dtype"].astype(str).unique()) if "dtype" in signal else [])
    ax.set_xlim(band["layer"].min() - 0.5, band["layer"].max() + 0.5)
    mark_dead_layers(ax, band, summary.first_dead_layer(stats, direction), direction)


activation_std = partial(draw_stack, directions=("forward",))
gradient_std = partial(draw_stack, directions=("backward",))


def _training_rows(tables: Tables, tensor: str, direction: str) -> pd.DataFrame:
    if STATS not in tables:
        return pd.DataFrame()
    stats = tables[STATS]
    chosen = (stats["stage"] == "train") & (stats["implementation"] == "scratch")
    return stats[chosen & (stats["tensor"] == tensor) & (stats["direction"] == direction)]


def training_activations(tables: Tables) -> Figure | None:
    """Mean and std of the preactivations over the training steps, a line per layer."""
    rows = _training_rows(tables, "preactivation", "forward")
    if not len(rows):
        return None
    label, layers = str(rows["label"].iloc[0]), sorted(rows["layer"].unique())
    many, by_layer = len(layers) > MANY_LAYERS, rows.assign(label=rows["layer"])
    colours = dict(zip(layers, sns.color_palette("viridis", len(layers)), strict=True))
    figure, axes = new_figure("", 1, 2)
    for ax, statistic in zip(axes, ("mean", "std"), strict=True):
        band = summary.band(by_layer, ["step"], statistic)
        sns.lineplot(
            data=band, x="step", y="median", hue="label", palette=colours, errorbar=None, ax=ax,
            legend=not many, marker=marker_if_sparse(band["step"]) or None,
        )  # fmt: skip
        for layer, line in band.groupby("label") if not many else ():
            ax.fill_between(line["step"], line["low"], line["high"], color=colours[layer], alpha=0.2, linewidth=0)
        ax.set_ylabel(f"{statistic} of the preactivations")
        ax.set_xlabel("training step")
        known = theory_rows.start(tables.get(THEORY, pd.DataFrame(columns=theory_rows.NEEDED)), statistic)
        plot_start(ax, known, colours, int(rows["step"].max()))
        if ax is axes[0] and (legend := ax.get_legend()):
            legend.remove()  # one is enough, where there is room for it
        elif ax.get_legend_handles_labels()[1]:
            ax.legend(title=None if many else "layer", loc="best")
    if many:
        log_scale(axes[1], band["median"])
        figure.colorbar(ScalarMappable(Normalize(1, len(layers)), "viridis"), ax=axes, label="layer")
    figure.suptitle("\n".join(textwrap.wrap(_training_title(label, band, layers), 130)), fontsize=12)
    return figure


def _training_title(label: str, band: pd.DataFrame, layers: list[int]) -> str:
    texts = []
    for layer in (layers[0], layers[-1]) if len(layers) > 1 else layers:
        line = band[band["label"] == layer]["median"].to_numpy()
        alive = np.isfinite(line)
        gone = "" if alive.all() else f", not finite from step {int(np.argmin(alive))} on"
        span = f"from {line[0]:.3g} to {line[alive][-1]:.3g}{gone}" if alive.any() else "never finite"
        texts.append(f"layer {layer} {span}")
    return f"{label}: std of the preactivations in training, " + ", ".join(texts)


def gradient_norm(tables: Tables) -> Figure | None:
    """Norm of every layer's weight gradient at every recorded step, as a heat map."""
    rows = _training_rows(tables, "weight", "backward")
    if not len(rows):
        return None
    band = summary.band(rows, ["layer", "step"], "norm")
    table = band.pivot(index="layer", columns="step", values="median")
    label = str(rows["label"].iloc[0])
    values = table.to_numpy()
    finite = values[np.isfinite(values) & (values > 0)]
    span = f"from {finite.min():.3g} to {finite.max():.3g}" if len(finite) else "0 or not finite everywhere"
    figure, (ax,) = new_figure(f"{label}: norm of the weight gradients, {span}, median over networks")
    ax.set_facecolor("0.75")
    drawn = np.where(values > 0, values, np.nan)
    norm = LogNorm(finite.min(), max(finite.max(), 10 * finite.min())) if len(finite) else None  # at least a decade
    steps, layers = table.columns.to_numpy(), table.index.to_numpy()
    mesh = ax.pcolormesh(
        cell_edges(steps), cell_edges(layers), np.ma.masked_invalid(drawn), norm=norm, cmap="viridis", rasterized=True
    )
    if len(finite):
        figure.colorbar(mesh, ax=ax, label="norm of dL/dW")
    if len(finite) < values.size:
        ax.plot([], [], marker="s", linestyle="", color="0.75", label="0 or not finite")
        ax.legend(loc="upper right")
    ax.grid(visible=False)
    ax.set_xlabel("training step")
    ax.set_ylabel("layer")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.invert_yaxis()
    return figure


def loss(tables: Tables) -> Figure | None:
    """Loss by hand and by `nn.Module`, and beneath it their relative difference."""
    losses = tables.get(LOSSES, pd.DataFrame())
    if not len(losses):
        return None
    label = str(losses["label"].iloc[0])
    band = summary.band(losses.assign(label=losses["implementation"]), ["step"], "loss")
    difference = summary.loss_difference(losses)
    last = band[band["step"] == band["step"].max()].set_index("label")["median"]
    worst = difference["largest"].max()
    title = (
        f"{label}: loss {last['scratch']:.3g} by hand and {last['module']:.3g} by nn.Module "
        f"after {band['step'].max()} updates, relative difference at most {worst:.1g}"
        f"{': the two trainings have parted' if worst > 0.01 else ''}"
    )
    figure, (top, bottom) = new_figure(title, 2, 1, sharex=True, height_ratios=[2, 1])
    plot_bands(top, band.replace({"label": BY_HAND}), "step")
    top.set_ylabel("loss")
    if (band["low"].dropna() > 0).all():
        log_scale(top, band["median"], least=3)
    sns.lineplot(
        data=difference, x="step", y="largest", errorbar=None, color="0.25", ax=bottom, label="largest of the networks"
    )
    sns.scatterplot(data=difference, x="step", y="median", color="0.25", s=9, linewidth=0, ax=bottom, label="median")
    bottom.legend(fontsize=8)
    log_scale(bottom, difference["largest"])
    bottom.set_ylabel("|difference| / loss")
    bottom.set_xlabel("training step")
    _mark_divergence(top, losses)
    return figure


def _mark_divergence(ax: Axes, losses: pd.DataFrame) -> None:
    """Where the first network's loss is no number any more, and how many follow."""
    gone = losses[~np.isfinite(losses["loss"])]
    ax.set_xlim(losses["step"].min() - 0.5, losses["step"].max() + 0.5)
    if len(gone):
        step, last = gone["step"].min(), gone[gone["step"] == losses["step"].max()]
        ax.axvline(step, color="0.3", linestyle=":")
        share = f"{last['seed'].nunique()} of {losses['seed'].nunique()} networks at the end"
        text = f"not finite from step {step} on, {share}"
        left = step > losses["step"].max() / 2
        ax.annotate(
            text, (step, 0.5), xycoords=ax.get_xaxis_transform(), xytext=(-6 if left else 6, 0),
            textcoords="offset points", ha="right" if left else "left", fontsize=9,
        )  # fmt: skip


def compared_loss(tables: Tables) -> Figure | None:
    """Loss by hand of several runs."""
    losses = tables.get(LOSSES)
    if losses is None or not len(losses):
        return None
    rows = losses[losses["implementation"] == "scratch"]
    band = summary.band(rows, ["step"], "loss")
    last = band[band["step"] == band["step"].max()]
    best = last.sort_values("median").iloc[0]
    lowest = f"{best['label']} {best['median']:.3g}" if np.isfinite(best["median"]) else "none is finite"
    figure, (ax,) = new_figure(f"Lowest loss after {best['step']} updates: {lowest}")
    plot_bands(ax, band, "step")
    if (band["low"].dropna() > 0).all():
        log_scale(ax, band["median"])
    ax.set_ylabel("loss (median and 16-84 % of networks)")
    ax.set_xlabel("training step")
    return figure


def timings(tables: Tables) -> Figure | None:
    """Seconds a call of every version of a ladder over the sizes that it ran at."""
    frame = tables.get(TIMINGS)
    if frame is None or not (frame["median"] > 0).any():
        return None
    ran = frame.dropna(subset=["median"]).rename(columns={"version": "label", "q25": "low", "q75": "high"})
    figure, (left, right) = new_figure(f"{ran['label'].nunique()} versions: {summary.crossing(frame)}", 1, 2)
    plot_bands(left, ran, "rows", marker="o")
    left.legend().remove()
    plot_bands(right, ran.assign(median=ran["ratio"], low=ran["ratio"], high=ran["ratio"]), "rows", marker="o")
    right.axhline(1, color="0.45", linestyle="--", linewidth=1, zorder=1)
    reference = ran[(ran["relative_error"] == 0) & (ran["ratio"] == 1)]["label"].iloc[-1:]
    for ax, label in ((left, "seconds a call (median, 25-75 %)"), (right, f"ratio to {''.join(reference)}")):
        ax.set_xscale("log")
        log_scale(ax, ran["median"])
        ax.set_xlabel("rows")
        ax.set_ylabel(label)
    return figure


def _from_tables(make: Callable[..., Figure | None], *names: str) -> Callable[[Tables], Figure | None]:
    """A figure that another file makes of these tables, where they are all there."""
    return lambda tables: make(*(tables[name] for name in names)) if set(names) <= set(tables) else None


draw_spectra = _from_tables(draw_jacobian, schema.JACOBIAN, schema.SINGULAR_VALUES)
FIGURES: dict[str, Callable[[Tables], Figure | None]] = {
    "activation_std": activation_std,
    "gradient_std": gradient_std,
    "training_activations": training_activations,
    "training_histograms": _from_tables(draw_octaves, schema.HISTOGRAMS),
    "gradient_norm": gradient_norm,
    "loss": loss,
    "timings": timings,
    "graph": _from_tables(draw_graph, schema.NODES, schema.EDGES),
    "gains": _from_tables(draw_gains, schema.GAINS),
    "formats": _from_tables(draw_formats, schema.FORMATS),
    "jacobian": draw_spectra,
    "phase": _from_tables(draw_phase, schema.PHASE),
}
COMPARING: dict[str, Callable[[Tables], Figure | None]] = {
    "activation_std": activation_std,
    "gradient_std": gradient_std,
    "loss": compared_loss,
    "jacobian": draw_spectra,
}


def draw(tables: Tables, folder: Path, compare: bool = False) -> list[Path]:
    """Write every figure that the tables allow as PNG, or those that compare several runs; their paths."""
    labelled = {**tables, **add_labels({name: frame for name, frame in tables.items() if TABLES[name].labelled})}
    paths = []
    for name, make in (COMPARING if compare else FIGURES).items():
        figure = make(labelled)
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=110)
    return paths
