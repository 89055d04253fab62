"""The figures of a run and of a sweep: from the tables, by name.

Medians, bands and findings come from `runs.summary`. Layers stand in network order; a signal that died is marked where
it died, since nan, inf and 0 cannot be drawn.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from initlab.figures.axes import cell_edges, draw_heat_map, name_rows, new_figure
from initlab.figures.broadcast_figure import draw_broadcast
from initlab.figures.format_figure import draw_formats
from initlab.figures.gain_figure import draw_gains
from initlab.figures.graph_figure import draw_graph
from initlab.figures.histogram_figure import draw_octaves
from initlab.figures.jacobian_figure import draw_jacobian
from initlab.figures.lines import (
    FLAT,
    PANELS,
    assign_styles,
    mark_formats,
    plot_lines,
    plot_theory,
    set_layer_ticks,
    set_log_ticks,
    share_panels,
)
from initlab.figures.phase_figure import draw_phase
from initlab.figures.training_figures import compared_loss, gradient_norm, loss, training_activations
from initlab.runs import schema, summary, theory_rows
from initlab.runs.labels import shorten_labels
from initlab.runs.schema import STATS, THEORY, TIMINGS
from initlab.terminal import Bar

Tables = Mapping[str, pd.DataFrame]


SIGNALS = {"forward": "Activations", "backward": "Gradients"}


def draw_stack(tables: Tables, directions: Sequence[str] = tuple(SIGNALS)) -> Figure | None:
    """Std of every layer's activations, or of the gradient with respect to them, pulled back from the last layer.

    Panels beside each other for the directions that there are, and below each other where there are many lines; as
    a heat map where there would be too many panels.
    """
    if STATS not in tables:
        return None
    merged = summary.merge_trainings(tables[STATS])
    short, common = shorten_labels(list(dict.fromkeys(merged.values())))
    names = {label: short[name] for label, name in merged.items()}
    keys = ["label", "seed", "layer", "tensor", "direction", "statistic"]

    def take_stack(frame: pd.DataFrame) -> pd.DataFrame:
        """The stack's rows under the labels of the figure, each network once."""
        rows = frame[frame["stage"] == "stack"]
        label = pd.Categorical(rows["label"].astype(str).map(names), list(short.values()))
        return rows.assign(label=label).drop_duplicates([name for name in keys if name in rows])

    stats = take_stack(tables[STATS])
    known = take_stack(tables.get(THEORY, pd.DataFrame(columns=theory_rows.NEEDED)))
    signals = {one: summary.stack_signal(stats, one) for one in directions}
    signals = {one: rows[(rows["layer"] > 0) | (one == "forward")] for one, rows in signals.items()}
    if not any(map(len, signals.values())):
        return None
    texts = []
    for direction in signals:
        found = summary.end_of_signal(stats, direction)
        kept = theory_rows.find_agreement(known, direction) if len(known) else {}
        agreement = f"; {next(iter(kept.values()))}" if len(kept) == len(found) == 1 else ""
        texts.append(f"{SIGNALS[direction]}{f' ({common})' if common else ''}: {summary.findings(found)}{agreement}")
    labels = list(short.values())
    groups = share_panels(labels)
    if len(groups) > PANELS:
        return draw_heat_maps(signals, labels, ". ".join(texts))
    figure, axes = new_figure(". ".join(texts), len(groups), len(signals), sharex=True)
    for row, group in enumerate(groups):
        for column, (direction, signal) in enumerate(signals.items()):
            ax = axes[row * len(signals) + column]
            lines = theory_rows.lines(known, direction) if len(known) else known
            _plot_signal(ax, signal, direction, stats, lines, group, len(labels) > 1)
            if len(signals) > 1 and not row:
                ax.set_title(SIGNALS[direction].lower(), fontsize=10, loc="left")
            if row < len(groups) - 1:
                ax.set_xlabel("")
    return figure


def _plot_signal(
    ax: Axes,
    signal: pd.DataFrame,
    direction: str,
    stats: pd.DataFrame,
    lines: pd.DataFrame,
    group: list[str],
    names: bool,
) -> None:
    """The lines of one direction, with theory, the ends of the number formats and marks where a signal died."""
    died = summary.first_dead_layer(stats, direction)
    signal, died, lines = (rows[rows["label"].astype(str).isin(group)] for rows in (signal, died, lines))
    # Beyond the format's end the finite entries that are left still have a std: the line ends where the signal does.
    whole = signal["std"].where(signal["n_nan"] + signal["n_inf"] == 0)
    band = summary.band(signal.assign(std=whole), ["layer"], "std")
    ax.set_ylabel("std (median, 16-84 % of networks)")
    set_layer_ticks(ax, stats["layer"])
    if not len(band):
        ax.text(0.5, 0.5, "no gradient: the values are dead", transform=ax.transAxes, ha="center")
        return
    styles = assign_styles(group)
    lines = lines[lines["label"].isin(band["label"])]
    plot_lines(ax, band, "layer", styles, died, direction == "backward", flat=FLAT, names=names)
    plot_theory(ax, lines, styles)
    mark_formats(ax, sorted(signal["dtype"].astype(str).unique()) if "dtype" in signal else [])


def draw_heat_maps(signals: Mapping[str, pd.DataFrame], labels: list[str], title: str) -> Figure:
    """A row for each label, a column for each layer, the std as colour; grey where nothing is left of the signal."""
    figure, axes = new_figure(title, 1, len(signals), height=0.9 + min(0.17 * len(labels), 9.0), sharey=True)
    for ax, (direction, signal) in zip(axes, signals.items(), strict=True):
        whole = signal["std"].where(signal["n_nan"] + signal["n_inf"] == 0)
        band = summary.band(signal.assign(std=whole), ["layer"], "std")
        table = band.pivot(index="label", columns="layer", values="median").reindex(labels)
        values = np.log10(table.where(table > 0).to_numpy())
        layers, rows = cell_edges(table.columns.to_numpy(float)), np.arange(len(labels) + 1) - 0.5
        draw_heat_map(figure, ax, layers, rows, values, "log10 of the std; grey: dead", share=0.9, least=0.5)
        step = -(-len(labels) // 48)
        ax.set_yticks(range(0, len(labels), step), labels[::step], fontsize=7)
        ax.set_ylim(len(labels) - 0.5, -0.5)
        set_layer_ticks(ax, table.columns.to_series())
        ax.set_title(SIGNALS[direction].lower(), fontsize=10)
    return figure


activation_std = partial(draw_stack, directions=("forward",))
gradient_std = partial(draw_stack, directions=("backward",))


def timings(tables: Tables) -> Figure | None:
    """Seconds a call of every version of a ladder over the sizes that it ran at."""
    frame = tables.get(TIMINGS)
    if frame is None or not (frame["median"] > 0).any():
        return None
    ran = frame.dropna(subset=["median"]).rename(columns={"version": "label", "q25": "low", "q75": "high"})
    reference = "".join(ran[(ran["relative_error"] == 0) & (ran["ratio"] == 1)]["label"].iloc[-1:])
    figure, (ax,) = new_figure(f"{ran['label'].nunique()} versions: {summary.crossing(frame)}", height=3.4)
    shapes = list(dict.fromkeys(ran.sort_values("rows")["shape"].astype(str)))
    order = list(ran.groupby("label")["ratio"].median().sort_values().index)
    for k, (shape, colour) in enumerate(zip(shapes, sns.color_palette("colorblind", len(shapes)), strict=True)):
        rows = ran[ran["shape"].astype(str) == shape]
        y = np.array([order.index(name) for name in rows["label"]]) + 0.6 * ((k + 0.5) / len(shapes) - 0.5)
        ax.plot(rows["ratio"], y, "o", color=colour, markersize=5, label=shape)
    ax.set_xscale("log")
    set_log_ticks(ax, "x")
    name_rows(ax, [str(name) for name in order])
    ax.axvline(1, color="0.45", linestyle="--", linewidth=1, zorder=1)
    ax.set_xlabel(f"seconds a call / those of {reference}" if reference else "seconds a call, ratio")
    ax.legend(title="shape", fontsize=8)
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
    "broadcast": _from_tables(draw_broadcast, schema.EXAMPLES),
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


def make_figures(tables: Tables, compare: bool = False) -> Iterator[tuple[str, Figure]]:
    """Every figure that the tables allow, by name, or those that compare several runs; needs `label`."""
    makers = (COMPARING if compare else FIGURES).items()
    for name, make in Bar(makers, desc="figures", unit="figure", disable=None, ticks=True):
        if (figure := make(tables)) is not None:
            yield name, figure
