"""One door for every figure: what a frame is, is seen from its columns, and the figure of such a table is drawn."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from initlab.errors import UsageError, library_call, nearest, report_disk, show
from initlab.figures import plots, training_figures
from initlab.figures.format_figure import draw_formats
from initlab.figures.gain_figure import draw_gains
from initlab.figures.graph_figure import draw_graph
from initlab.figures.histogram_figure import draw_module_octaves, draw_octaves
from initlab.figures.jacobian_figure import draw_jacobian
from initlab.figures.model_figure import draw_model
from initlab.figures.phase_figure import draw_phase
from initlab.figures.share_figure import draw_format_shares
from initlab.figures.table_figures import (
    draw_agreement,
    draw_attempts,
    draw_audit,
    draw_curves,
    draw_exponents,
    draw_lines,
    draw_parity,
    draw_steps,
    draw_theory,
)
from initlab.runs import schema
from initlab.runs.labels import add_labels
from initlab.runs.schema import LABELS, TABLES
from initlab.tasks.formats import PREDICTED, summarize_ends

Tables = dict[str, pd.DataFrame]
MODEL = "model"  # the table `stats` of a network of modules


class TableKind(NamedTuple):
    """A kind of table: the columns that tell it, what it is in words, and what draws it, knowing the others given."""

    columns: frozenset[str]
    about: str
    draw: Callable[[pd.DataFrame, Tables], Figure | None]


def draw_stats(frame: pd.DataFrame, tables: Tables) -> Figure | None:
    """The stack where there is one, else the training, else the rows one by one, as of a probed network."""
    if (frame["stage"].astype(str) == "stack").any():
        return plots.draw_stack(tables)
    settings = list(dict.fromkeys(frame["label"].astype(str)))
    if len(settings) > 1:
        frame = frame[frame["label"].astype(str) == settings[0]]
        tables = {schema.STATS: frame}
    figure = training_figures.training_activations(tables) or draw_model(frame)
    if len(settings) > 1:
        figure.suptitle(f"The first of {len(settings)} settings. {figure.get_suptitle()}", fontsize=10.5)
    return figure


def draw_probed(frame: pd.DataFrame, tables: Tables) -> Figure:
    return draw_model(frame, tables.get(schema.HISTOGRAMS), tables.get(schema.THEORY))


def draw_losses(frame: pd.DataFrame, tables: Tables) -> Figure | None:
    pair = {"scratch", "module"} <= set(frame["implementation"].astype(str))
    return (
        training_figures.loss(tables)
        if pair and frame["label"].nunique() == 1
        else training_figures.compared_loss(tables)
    )


def draw_histograms(frame: pd.DataFrame, _: Tables) -> Figure | None:
    trained = "name" not in frame and (frame["stage"].astype(str) == "train").any()
    return (draw_octaves(frame) if trained else None) or draw_module_octaves(frame)


def draw_moments(frame: pd.DataFrame, tables: Tables) -> Figure | None:
    if schema.SINGULAR_VALUES in tables:
        return draw_jacobian(frame, tables[schema.SINGULAR_VALUES])
    title = "Mean squared singular value of the Jacobian, layer by layer"
    return draw_lines(frame, "layer", "log2_mean_s2", title, frame["label"], "log2 of the mean of s²", log=False)


def draw_spectra(frame: pd.DataFrame, tables: Tables) -> Figure | None:
    """With the moments that follow from the values, where they were not given."""
    if schema.JACOBIAN in tables:
        return draw_jacobian(tables[schema.JACOBIAN], frame)
    squares = frame.assign(square=frame["singular_value"] ** 2).groupby(["label", "seed", "layer"], observed=True)
    moments = squares["square"].agg(mean_s2="mean", var_s2=lambda s: s.var(ddof=0)).reset_index()
    return draw_jacobian(moments.assign(predicted_var_s2=float("nan"), predicted_mean_s4=float("nan")), frame)


def draw_nodes(frame: pd.DataFrame, tables: Tables) -> Figure:
    """With the edges that were given, or those that the nodes name."""
    edges = tables.get(schema.EDGES)
    if edges is None:
        nexts = zip(frame["id"], frame["next"].astype(str), strict=True)
        pairs = [(at, int(to.split(":")[0])) for at, text in nexts for to in text.split(", ") if ":" in to]
        known = set(frame["id"])
        edges = pd.DataFrame([pair for pair in pairs if pair[1] in known], columns=["source", "target"], dtype=int)
    return draw_graph(frame, edges)


def draw_edges(frame: pd.DataFrame, tables: Tables) -> Figure:
    if schema.NODES in tables:
        return draw_graph(tables[schema.NODES], frame)
    raise UsageError("plot: edges alone have no nodes; give both tables, as plot({'nodes': nodes, 'edges': edges})")


_MEASURED = ("measured", "measured_low", "measured_high", "measured_share")


def draw_limits(frame: pd.DataFrame) -> Figure:
    return draw_formats(frame.rename(columns=PREDICTED).assign(**dict.fromkeys(_MEASURED, float("nan"))))


def draw_ends(frame: pd.DataFrame) -> Figure:
    return draw_formats(summarize_ends(frame).assign(**dict.fromkeys(PREDICTED.values(), float("nan"))))


def draw_alone(draw: Callable[[pd.DataFrame], Figure | None]) -> Callable[[pd.DataFrame, Tables], Figure | None]:
    """A figure of one table, whatever else is given."""
    return lambda frame, _: draw(frame)


def table_kind(columns: str, about: str, draw: Callable[[pd.DataFrame, Tables], Figure | None]) -> TableKind:
    return TableKind(frozenset(columns.split()), about, draw)


# The first whose columns a frame has is what the frame is.
KINDS: dict[str, TableKind] = {
    MODEL: table_kind("name tensor direction layer rms n_nan", "rows of `probe` and `measure`", draw_probed),
    schema.STATS: table_kind(
        "stage tensor direction layer std n_nan", "statistics of a stack or a training", draw_stats
    ),
    "format_shares": table_kind(
        "tensor direction layer format overflow_most underflow subnormal",
        "formats of a probe",
        draw_alone(draw_format_shares),
    ),
    schema.HISTOGRAMS: table_kind("tensor direction layer first positive negative", "histograms", draw_histograms),
    schema.THEORY: table_kind(
        "statistic tensor direction layer predicted band_low", "predictions", draw_alone(draw_theory)
    ),
    schema.PARITY: table_kind("tensor direction layer step relative_error", "parity", draw_alone(draw_parity)),
    "curves": table_kind("tensor direction layer log2_std_true", "curves of gains", draw_alone(draw_curves)),
    schema.LOSSES: table_kind("implementation seed step loss", "losses", draw_losses),
    schema.LSUV: table_kind("layer attempt std outcome", "attempts of LSUV", draw_alone(draw_attempts)),
    schema.TIMINGS: table_kind(
        "version shape rows median q25 q75 ratio", "timings", lambda _, tables: plots.timings(tables)
    ),
    schema.JACOBIAN: table_kind("seed layer log2_mean_s2 mean_s2 var_s2", "moments of singular values", draw_moments),
    schema.SINGULAR_VALUES: table_kind("seed layer rank log2_singular_value", "singular values", draw_spectra),
    schema.GAINS: table_kind("activation kind gain chi_1 stability", "gains", draw_alone(draw_gains)),
    schema.PHASE: table_kind(
        "gain sigma_b layer chi_1 limit_chi_1 predicted_cosine",
        "planes",
        draw_alone(lambda frame: draw_phase(frame) if frame["gain"].notna().any() else None),
    ),
    schema.FORMATS: table_kind("format event predicted measured", "ends of formats", draw_alone(draw_formats)),
    "limits": table_kind("format event layer_02 layer_98", "predicted ends of formats", draw_alone(draw_limits)),
    schema.ENDS: table_kind("format event seed layer", "measured ends of formats", draw_alone(draw_ends)),
    schema.NODES: table_kind("id node leaf shape next hand rule", "nodes of a graph", draw_nodes),
    schema.EDGES: table_kind("source target position", "edges of a graph", draw_edges),
    schema.STEPS: table_kind("step direction name sets rms", "steps of a pass", draw_alone(draw_steps)),
    "coordinate_check": table_kind(
        "name op tensor step exponent error verdict", "exponents", draw_alone(draw_exponents)
    ),
    "audit": table_kind("name kind gain gain_error law follower needed", "gains of parameters", draw_alone(draw_audit)),
    "agreement": table_kind("name relative_error limit cause", "gradients compared", draw_alone(draw_agreement)),
}


@library_call
def plot(frame: Any, path: str | Path | None = None) -> Figure:
    """Draw any table that initlab returns; what it is, is seen from its columns.

    frame: a table of `stack`, `measure`, `probe`, `predict`, `limits`, `read` and all tasks; a dictionary of tables, as
    `train` returns it; or an object with such a `frame`: a verdict is drawn with the band of the networks that it was
    compared with. Of several tables the first that can be drawn is, with the
    others where its figure shows them too: the `histograms` of a probe and the `theory` of its layers beside its rows.
    path: also write the figure to this file; its ending says how, such as .png, .svg or .pdf.

    The figure shows itself in a notebook; elsewhere `plot(...).savefig("x.png")`. pyplot and its settings are left
    alone. Of a model the layers go downwards and powers of two across, with the limits of number formats; of several
    steps the first and the last are drawn. Raises UsageError for what has no figure, or nothing in it to be drawn.

    >>> import initlab
    >>> initlab.plot(initlab.stack("kaiming", depth=3, width=8, seeds=2)).get_suptitle()[:11]
    'Activations'
    """
    tables = name_tables(frame)
    name = next(one for one in tables if one in KINDS)
    if not len(tables[name]):
        raise UsageError(f"plot: the table has no rows, there is nothing to draw ({KINDS[name].about})")
    with matplotlib.rc_context():
        labelled = label_tables(tables)
        figure = KINDS[name].draw(labelled[name], labelled)
        if figure is None:
            raise UsageError(f"plot: no number in the table can be drawn ({KINDS[name].about})")
        if path is not None:
            save_figure(figure, Path(path))
    return figure


def name_tables(given: Any) -> Tables:
    """The tables by the names of their kinds, in their order; a table that is of no kind is left out, or refused."""
    inside = getattr(given, "frame", None) if not isinstance(given, pd.DataFrame | Mapping) else None
    if inside is not None:
        bands = getattr(given, "bands", ())
        given = inside() if callable(inside) else inside
        given = {MODEL: given, schema.THEORY: bands} if len(bands) else given
    if isinstance(given, Iterator):
        given = pd.concat(list(given), ignore_index=True)
    frames = list(given.values()) if isinstance(given, Mapping) else [given]
    frames = [one for one in frames if isinstance(one, pd.DataFrame)]
    if not frames:
        raise UsageError(f"plot: frame={show(given)}: must be a table that initlab returns, or a dictionary of some")
    found: Tables = {}
    for one in frames:
        name = next((name for name, kind in KINDS.items() if kind.columns <= set(one.columns)), None)
        if name is not None:
            found.setdefault(name, one)
    if not found:
        columns = ", ".join(map(str, frames[0].columns[:4]))
        raise UsageError(f"plot: a table of {columns}, ... has no figure; these have one: {', '.join(KINDS)}")
    return found


def label_tables(tables: Tables) -> Tables:
    """Tables of runs get the label of their run; those that say nothing of it, their stage's name."""
    found = dict(tables)
    labelled = {name: one for name, one in tables.items() if name in TABLES and TABLES[name].labelled}
    with_setting = {name: one for name, one in labelled.items() if any(column in one for column in LABELS)}
    found |= add_labels({name: one for name, one in with_setting.items() if "seed" in one})
    for name, one in labelled.items():
        if "label" not in found[name]:
            stage = one["stage"].astype(str).iloc[0] if "stage" in one and len(one) else "this run"
            found[name] = one.assign(label=stage)
    return found


def save_figure(figure: Figure, path: Path) -> None:
    endings = sorted(figure.canvas.get_supported_filetypes())
    ending = path.suffix.removeprefix(".").lower()
    if ending not in endings:
        raise UsageError(f"plot: path={path}: must end in .{', .'.join(endings)}{nearest(ending, endings)}")
    with report_disk(path):
        figure.savefig(path)
