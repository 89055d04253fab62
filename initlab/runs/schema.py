"""Every table of a run folder in one place: what it is, its columns, and what is compared, labelled and summarized.

Beside its own columns a table has those of the configuration, so that a file explains itself.
"""

from collections.abc import Collection
from dataclasses import dataclass

from initlab.errors import UsageError
from initlab.stats.keys import KEY_COLUMNS, LOSS_COLUMNS, PARITY_COLUMNS, TEXT_COLUMNS
from initlab.stats.row_order import ORDER
from initlab.stats.statistics import NONFINITE, STATISTICS, TORCH_COLUMN, TRUE_COLUMNS

COMMAND = "INITLAB_COMMAND"  # variable of the environment: the command line of run.json, as it was typed
SCHEMA_VERSION = 2
SEALED = 2  # from here on every table of a run is sealed, see parquet.py

STATS, THEORY, LOSSES, PARITY = "stats", "theory", "losses", "parity"
HISTOGRAMS, LSUV, TIMINGS = "histograms", "lsuv", "timings"
JACOBIAN, SINGULAR_VALUES = "jacobian", "singular_values"
GAINS, PHASE, FORMATS, ENDS = "gains", "phase", "formats", "ends"
AUDIT, FINDINGS = "audit", "findings"
NODES, EDGES, STEPS, RULES, EXAMPLES = "nodes", "edges", "steps", "rules", "examples"

_TENSOR = tuple(name for name in KEY_COLUMNS if name != "seed")


@dataclass(frozen=True)
class Table:
    """A table of a run folder.

    `keys` name a row beside its setting and its seed: two runs are compared row by row, and a table without keys is
    not compared. Of the other columns only `compared` are, where that is given. `own` are all columns of its own (in
    `stats` the statistics too), where they are known before anything is measured: a misspelt column of a study is then
    found before its sweep begins. `needed`: columns without which no file is such a table, beside `keys`.
    `order`: the columns that its rows are sorted by, before tensor and network; empty for the order in which they came.
    `labelled`: its rows get the label of their run when figures are drawn.
    """

    about: str
    keys: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()
    own: tuple[str, ...] | None = None
    needed: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    labelled: bool = False


TABLES: dict[str, Table] = {
    STATS: Table(
        "a row per stage, implementation, seed, step, layer, tensor and direction",
        keys=_TENSOR,
        own=(*KEY_COLUMNS, *TRUE_COLUMNS, TORCH_COLUMN),
        needed=("seed", "mean", "std", *("n_nan", "n_inf", "frac_zero")),
        order=ORDER,
        labelled=True,
    ),
    LOSSES: Table(
        "loss and accuracy per implementation, seed and step",
        keys=tuple(name for name in LOSS_COLUMNS if name != "seed"),
        own=(*LOSS_COLUMNS, "loss", "accuracy"),
        needed=("seed", "loss"),
        order=("step",),
        labelled=True,
    ),
    PARITY: Table(
        "relative error of the hand-written tensors against the module's",
        keys=tuple(name for name in PARITY_COLUMNS if name != "seed"),
        own=(*PARITY_COLUMNS, "relative_error", NONFINITE),
        needed=("seed", "relative_error", NONFINITE),
        order=("step",),
        labelled=True,
    ),
    THEORY: Table(
        "measured and predicted statistics side by side; seed -1 for the mean over the networks",
        keys=(*_TENSOR, "statistic"),
        compared=("predicted", "band_low", "band_high", "limit"),  # the others repeat what STATS holds
        own=(
            *(*_TENSOR, "seed", "statistic"),
            *("measured", "predicted", "band_low", "band_high", "z", "limit", "rho", "method"),
        ),
        needed=("seed", "measured", "predicted", "band_low", "band_high"),
        labelled=True,
    ),
    HISTOGRAMS: Table(
        "entries by sign and octave, for the rows of `stats`; lists of counts from octave `first` on",
        order=ORDER,
        labelled=True,
    ),
    LSUV: Table(
        "a row per stage, seed, layer and attempt to scale its weights to unit variance",
        keys=("stage", "layer", "attempt"),
        order=("stage", "layer", "attempt"),
    ),
    JACOBIAN: Table(
        "a row per seed and layer: moments of the squared singular values, measured and predicted",
        keys=("layer",),
        needed=("seed",),
        labelled=True,
    ),
    SINGULAR_VALUES: Table(
        "a row per seed, layer and rank, at some layers",
        keys=("layer", "rank"),
        needed=("seed",),
        labelled=True,
    ),
    GAINS: Table(
        "a row per activation and gain: what it leads to, and how far it is from what it stands for",
        keys=("activation", "gain"),
    ),
    PHASE: Table(
        "a row per seed and point of a plane of networks, or per layer of it: measured and predicted",
        keys=("gain", "sigma_b", "layer"),
    ),
    FORMATS: Table(
        "a row per number format and event: the layer, predicted and measured",
        keys=("format", "event"),
    ),
    ENDS: Table(
        "a row per number format, event and seed: the first layer of it, nan for none",
        keys=("format", "event"),
    ),
    TIMINGS: Table("a row per version and shape of a ladder"),  # measured times never repeat
    AUDIT: Table("a row per parameter of a model: law, gain, what it needs"),
    FINDINGS: Table("a row per thing that is wrong: rule, layer, cause, remedy"),
    NODES: Table("a row per node of autograd's graph"),
    EDGES: Table("a row per edge of autograd's graph"),
    STEPS: Table("a row per `.g` that one backward pass sets, in order"),
    RULES: Table("the local rule of each layer and its derivative"),
    EXAMPLES: Table("a row per expression of the course's 3x3 examples, with shape, strides and numbers"),
}


def own_columns(name: str) -> set[str] | None:
    """The columns that a table has of its own, None where they are not known before it is measured."""
    own = TABLES[name].own
    return None if own is None else {*own, *(STATISTICS if name == STATS else ())}


def column_kinds(name: str) -> dict[str, str]:
    """The columns that others read of a table, and whether they hold `numbers`, `text`, or either, `values`."""
    text = {*TEXT_COLUMNS, "statistic", "activation", "format", "event"}
    own = {one: "text" if one in text else "numbers" for one in (*TABLES[name].keys, *TABLES[name].needed)}
    return dict.fromkeys((*OPTION_OF, *NOT_OPTIONS), "values") | own


def refuse_other_table(name: str, columns: Collection[str]) -> None:
    """A frame that is not such a table, whatever its file is called."""
    missing = [one for one in (*TABLES[name].keys, *TABLES[name].needed) if one not in columns]
    if missing:
        raise UsageError(f"the table {name} has no column {', '.join(missing)}")


# Column of every table -> option; a name of the trained network that the stack has too gets the prefix `train_`.
OPTION_OF = {
    "task": "task",
    "init": "init.name",
    "gain_kind": "init.gain_kind",
    "mode": "init.mode",
    "distribution": "init.distribution",
    "bias": "init.bias",
    "sigma_b": "init.sigma_b",
    "attempts": "init.attempts",
    "tolerance": "init.tolerance",
    "base_width": "init.base_width",
    "activation": "activation.name",
    "depth": "depth",
    "width": "width",
    "inputs": "inputs",
    "batch": "batch",
    "dtype": "dtype",
    "generator": "generator",
    "matmul": "matmul",
    "data": "data.name",
    "train_depth": "train.depth",
    "train_width": "train.width",
    "train_batch": "train.batch",
    "steps": "train.steps",
    "lr": "train.lr",
    "optimizer": "train.optimizer",
    "train_loss": "train.loss",
    "modules": "train.modules",
    "every": "every",
}
NOT_OPTIONS = ("gain", "device", "run")  # in every table too

# Configuration columns that may be part of a label, in the order in which they are named.
LABELS = (
    "init", "activation", "gain", "mode", "distribution", "bias", "sigma_b", "attempts", "tolerance", "base_width",
    "depth", "width", "widths", "inputs", "batch", "dtype", "device", "data", "train_depth", "train_width",
    "train_batch", "steps", "lr", "optimizer", "train_loss", "every", "task",
)  # fmt: skip
IN_EVERY_LABEL = ("init", "activation")
# They follow from others, and are named only where those do not tell the runs apart.
DERIVED = ("gain", "mode", "distribution", "bias", "sigma_b", "attempts", "tolerance", "base_width", "inputs")
TASKS_WITH_STATS = ("lab", "stack", "train", "seeded")
