"""Frame -> figure. Computes nothing: medians, bands and findings come from `summary`.

Layers stand in network order; a signal that died is marked where it died, since nan, inf and 0 cannot be drawn.
"""

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from initlab.figures.axes import at_the_start, banded, beside, few, layer_axis, limits, log_scale, mark_deaths, sheet
from initlab.figures.format_figure import draw_formats
from initlab.figures.gain_figure import draw_gains
from initlab.figures.graph_figure import draw_graph
from initlab.figures.histogram_figure import draw_octaves
from initlab.figures.jacobian_figure import draw_jacobian
from initlab.figures.phase_figure import draw_phase
from initlab.runs import summary, theory_rows
from initlab.runs.labels import add_labels
from initlab.runs.schema import TABLES

Tables = Mapping[str, pd.DataFrame]

BY_HAND = {"scratch": "by hand", "module": "nn.Module"}
MANY_LAYERS = 8  # from here on a colour bar serves better than a legend


def _stack(tables: Tables, direction: str, what: str) -> Figure | None:
    if "stats" not in tables:
        return None
    stats = tables["stats"]
    signal = summary.stack_signal(stats, direction)
    signal = signal[signal["layer"] > 0] if direction == "backward" else signal
    if not len(signal):
        return None
    found = summary.end_of_signal(stats, direction)
    known = tables.get("theory", pd.DataFrame(columns=theory_rows.NEEDED))
    kept = theory_rows.count_in_band(known, direction)
    told = f"; {theory_rows.sentence(next(iter(kept.values())))}" if len(kept) == len(found) == 1 else ""
    figure, (ax,) = sheet(f"{what} through the stack. {summary.findings(found)}{told}")
    # Beyond the format's end the finite entries that are left still have a std: the line ends where the signal does.
    whole = signal["std"].where(signal["n_nan"] + signal["n_inf"] == 0)
    band = summary.band(signal.assign(std=whole), ["layer"], "std")
    banded(ax, band, "layer")
    log_scale(ax, band["median"])
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.1), max(high, 10))  # a curve that stays near 1 shall look like it
    if len(lines := theory_rows.lines(known, direction)):
        beside(ax, lines, list(band["label"].astype(str).unique()))
    ax.set_ylabel("std (median and 16-84 % of networks)")
    layer_axis(ax)
    limits(ax, sorted(signal["dtype"].astype(str).unique()) if "dtype" in signal else [])
    ax.set_xlim(band["layer"].min() - 0.5, band["layer"].max() + 0.5)
    mark_deaths(ax, band, summary.first_dead_layer(stats, direction), direction)
    return figure


def activation_std(tables: Tables) -> Figure | None:
    """Std of every layer's activations in the stack."""
    return _stack(tables, "forward", "Activations")


def gradient_std(tables: Tables) -> Figure | None:
    """Std of the gradient with respect to every layer's activations, pulled back from the last layer to the first."""
    return _stack(tables, "backward", "Gradients")


def _trained(tables: Tables, tensor: str, direction: str) -> pd.DataFrame:
    if "stats" not in tables:
        return pd.DataFrame()
    stats = tables["stats"]
    chosen = (stats["stage"] == "train") & (stats["implementation"] == "scratch")
    return stats[chosen & (stats["tensor"] == tensor) & (stats["direction"] == direction)]


def training_activations(tables: Tables) -> Figure | None:
    """Mean and std of the preactivations over the training steps, a line per layer."""
    rows = _trained(tables, "preactivation", "forward")
    if not len(rows):
        return None
    label, layers = str(rows["label"].iloc[0]), sorted(rows["layer"].unique())
    by_layer = rows.assign(label=rows["layer"])
    figure, axes = sheet("", 1, 2)
    ends = []
    for ax, statistic in zip(axes, ("mean", "std"), strict=True):
        band = summary.band(by_layer, ["step"], statistic)
        colours = dict(zip(layers, sns.color_palette("viridis", len(layers)), strict=True))
        sns.lineplot(
            data=band,
            x="step",
            y="median",
            hue="label",
            palette=colours,
            errorbar=None,
            ax=ax,
            legend=len(layers) <= MANY_LAYERS,
            marker=few(band["step"]) or None,
        )
        for layer, line in band.groupby("label"):
            if len(layers) <= MANY_LAYERS:
                ax.fill_between(line["step"], line["low"], line["high"], color=colours[layer], alpha=0.2, linewidth=0)
        ax.set_ylabel(f"{statistic} of the preactivations")
        ax.set_xlabel("training step")
        known = theory_rows.start(tables.get("theory", pd.DataFrame(columns=theory_rows.NEEDED)), statistic)
        at_the_start(ax, known, colours, int(rows["step"].max()))
        if ax is axes[0] and (legend := ax.get_legend()):
            legend.remove()  # one is enough, where there is room for it
        elif ax.get_legend_handles_labels()[1]:
            ax.legend(title="layer" if len(layers) <= MANY_LAYERS else None, loc="best")
        ends.append(band)
    if len(layers) > MANY_LAYERS:
        log_scale(axes[1], ends[1]["median"])
        _layer_bar(figure, axes, len(layers))
    figure.suptitle("\n".join(textwrap.wrap(_training_title(label, ends[1], layers), 130)), fontsize=12)
    return figure


def _training_title(label: str, band: pd.DataFrame, layers: list[int]) -> str:
    said = []
    for layer in (layers[0], layers[-1]) if len(layers) > 1 else layers:
        line = band[band["label"] == layer]["median"].to_numpy()
        alive = np.isfinite(line)
        gone = "" if alive.all() else f", not finite from step {int(np.argmin(alive))} on"
        said.append(
            f"layer {layer} from {line[0]:.3g} to {line[alive][-1]:.3g}{gone}"
            if alive.any()
            else f"layer {layer} never finite"
        )
    return f"{label}: std of the preactivations in training, " + ", ".join(said)


def _layer_bar(figure: Figure, axes: list[Axes], layers: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure.colorbar(ScalarMappable(Normalize(1, layers), "viridis"), ax=axes, label="layer")


def gradient_norm(tables: Tables) -> Figure | None:
    """Norm of every layer's weight gradient at every recorded step, as a heat map."""
    rows = _trained(tables, "weight", "backward")
    if not len(rows):
        return None
    band = summary.band(rows, ["layer", "step"], "norm")
    table = band.pivot(index="layer", columns="step", values="median")
    label = str(rows["label"].iloc[0])
    values = table.to_numpy()
    seen = values[np.isfinite(values) & (values > 0)]
    figure, (ax,) = sheet(f"{label}: norm of the weight gradients, {_range(seen)}, median over networks")
    ax.set_facecolor("0.75")
    drawn = np.where(values > 0, values, np.nan)
    norm = LogNorm(seen.min(), max(seen.max(), 10 * seen.min())) if len(seen) else None  # at least a decade
    steps, layers = table.columns.to_numpy(), table.index.to_numpy()
    mesh = ax.pcolormesh(
        _edges(steps), _edges(layers), np.ma.masked_invalid(drawn), norm=norm, cmap="viridis", rasterized=True
    )
    if len(seen):
        figure.colorbar(mesh, ax=ax, label="norm of dL/dW")
    if len(seen) < values.size:
        ax.plot([], [], marker="s", linestyle="", color="0.75", label="0 or not finite")
        ax.legend(loc="upper right")
    ax.grid(visible=False)
    ax.set_xlabel("training step")
    ax.set_ylabel("layer")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.invert_yaxis()
    return figure


def _range(seen: np.ndarray) -> str:
    return f"from {seen.min():.3g} to {seen.max():.3g}" if len(seen) else "0 or not finite everywhere"


def _edges(centers: np.ndarray) -> np.ndarray:
    half = (centers[1] - centers[0]) / 2 if len(centers) > 1 else 0.5
    return np.append(centers - half, centers[-1] + half)


def loss(tables: Tables) -> Figure | None:
    """Loss by hand and by `nn.Module`, and beneath it their relative difference."""
    losses = tables.get("losses")
    if losses is None or not len(losses):
        return None
    label = str(losses["label"].iloc[0])
    band = summary.band(losses.assign(label=losses["implementation"]), ["step"], "loss")
    apart = summary.loss_difference(losses)
    last = band[band["step"] == band["step"].max()].set_index("label")["median"]
    worst = apart["largest"].max()
    title = (
        f"{label}: loss {last['scratch']:.3g} by hand and {last['module']:.3g} by nn.Module "
        f"after {band['step'].max()} updates, relative difference at most {worst:.1g}"
        f"{': the two trainings have parted' if worst > 0.01 else ''}"
    )
    figure, (top, bottom) = sheet(title, 2, 1, sharex=True, height_ratios=[2, 1])
    banded(top, band, "step", BY_HAND)
    top.set_ylabel("loss")
    if (band["low"].dropna() > 0).all():
        log_scale(top, band["median"], least=3)
    sns.lineplot(
        data=apart, x="step", y="largest", errorbar=None, color="0.25", ax=bottom, label="largest of the networks"
    )
    sns.scatterplot(data=apart, x="step", y="median", color="0.25", s=9, linewidth=0, ax=bottom, label="median")
    bottom.legend(fontsize=8)
    log_scale(bottom, apart["largest"])
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
        said = f"not finite from step {step} on, {share}"
        left = step > losses["step"].max() / 2
        ax.annotate(
            said, (step, 0.5), xycoords=ax.get_xaxis_transform(), xytext=(-6 if left else 6, 0),
            textcoords="offset points", ha="right" if left else "left", fontsize=9,
        )  # fmt: skip


def compared_loss(tables: Tables) -> Figure | None:
    """Loss by hand of several runs."""
    losses = tables.get("losses")
    if losses is None or not len(losses):
        return None
    rows = losses[losses["implementation"] == "scratch"]
    band = summary.band(rows, ["step"], "loss")
    last = band[band["step"] == band["step"].max()]
    best = last.sort_values("median").iloc[0]
    said = f"{best['label']} {best['median']:.3g}" if np.isfinite(best["median"]) else "none is finite"
    figure, (ax,) = sheet(f"Lowest loss after {best['step']} updates: {said}")
    banded(ax, band, "step")
    if (band["low"].dropna() > 0).all():
        log_scale(ax, band["median"])
    ax.set_ylabel("loss (median and 16-84 % of networks)")
    ax.set_xlabel("training step")
    return figure


def timings(tables: Tables) -> Figure | None:
    """Seconds a call of every version of a ladder over the sizes that it ran at."""
    frame = tables.get("timings")
    if frame is None or not frame["median"].notna().any():
        return None
    ran = frame.dropna(subset=["median"]).rename(columns={"version": "label", "q25": "low", "q75": "high"})
    figure, (left, right) = sheet(f"{ran['label'].nunique()} versions: {summary.crossing(frame)}", 1, 2)
    banded(left, ran, "rows", marker="o")
    left.legend().remove()
    banded(right, ran.assign(median=ran["ratio"], low=ran["ratio"], high=ran["ratio"]), "rows", marker="o")
    right.axhline(1, color="0.45", linestyle="--", linewidth=1, zorder=1)
    reference = ran[(ran["relative_error"] == 0) & (ran["ratio"] == 1)]["label"].iloc[-1:]
    for ax, said in ((left, "seconds a call (median, 25-75 %)"), (right, f"ratio to {''.join(reference)}")):
        ax.set_xscale("log")
        log_scale(ax, ran["median"])
        ax.set_xlabel("rows")
        ax.set_ylabel(said)
    return figure


def _of(make: Callable[..., Figure | None], *names: str) -> Callable[[Tables], Figure | None]:
    """A figure that another file makes of these tables, where they are all there."""
    return lambda tables: make(*(tables[name] for name in names)) if set(names) <= set(tables) else None


draw_spectra = _of(draw_jacobian, "jacobian", "singular_values")
FIGURES: dict[str, Callable[[Tables], Figure | None]] = {
    "activation_std": activation_std,
    "gradient_std": gradient_std,
    "training_activations": training_activations,
    "training_histograms": _of(draw_octaves, "histograms"),
    "gradient_norm": gradient_norm,
    "loss": loss,
    "timings": timings,
    "graph": _of(draw_graph, "nodes", "edges"),
    "gains": _of(draw_gains, "gains"),
    "formats": _of(draw_formats, "formats"),
    "jacobian": draw_spectra,
    "phase": _of(draw_phase, "phase"),
}
COMPARING: dict[str, Callable[[Tables], Figure | None]] = {
    "activation_std": activation_std,
    "gradient_std": gradient_std,
    "loss": compared_loss,
    "jacobian": draw_spectra,
}


def draw(tables: Tables, folder: Path, compare: bool = False) -> list[Path]:
    """Write every figure that the tables allow as PNG; their paths."""
    measured = {name: frame for name, frame in tables.items() if TABLES[name].labelled}
    labelled = {**tables, **add_labels(measured)}
    paths = []
    for name, make in (COMPARING if compare else FIGURES).items():
        figure = make(labelled)
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=110)
    return paths
