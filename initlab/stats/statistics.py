"""The table of statistics: what each column says about a tensor and how it follows from the tensor's row.

A row (reference.py) holds the sums that all statistics share; a formula sees its fields by name, and three more:
`finite`, how many entries are neither nan nor inf; `scale`, the power of two 2^e that the sums carry; and `root`, the
root of the second moment without that power. Moments are population moments over the finite entries, nan with none.
A statistic that these fields do not give can be passed as a function of the tensor. The table needs no torch.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING

from initlab.errors import UsageError, show
from initlab.stats.keys import KEY_COLUMNS, MODULE_COLUMNS

if TYPE_CHECKING:
    from torch import Tensor

SATURATED = 0.05  # |phi'| below this share of its largest value counts as saturated

Fields = Mapping[str, "Tensor"]
Function = Callable[["Tensor"], "Tensor"]  # a statistic of the user, (..., N, C) -> (...)


@dataclass(frozen=True)
class Statistic:
    """One statistic: `formula` makes it (...) from the fields (...) of rows."""

    description: str
    formula: Callable[[Fields], "Tensor"]
    is_count: bool = False
    in_ln: bool = False  # a size or a spread: never negative, and compared by its logarithm
    needs_batch: bool = False  # means nothing where the rows of a tensor are not inputs
    of_activations: bool = False  # has a meaning for activations alone
    is_share: bool = False


def _cosine(f: Fields) -> "Tensor":
    """Mean over pairs a != b of cos(x_a, x_b) = (resultant - k) / (k (k - 1)), k vectors of length > 0."""
    k = f["alive"]
    return ((f["resultant"] - k) / (k * (k - 1))).clamp(-1, 1).where(k > 1, nan)


STATISTICS: dict[str, Statistic] = {
    "count": Statistic("entries, finite or not", lambda f: f["count"], is_count=True),
    "n_nan": Statistic("entries that are nan", lambda f: f["n_nan"], is_count=True),
    "n_inf": Statistic("entries that are inf or -inf", lambda f: f["n_inf"], is_count=True),
    "n_subnormal": Statistic(
        "entries smaller than the dtype's smallest normal number, zero not counted",
        lambda f: f["n_subnormal"],
        is_count=True,
    ),
    "mean": Statistic("mean of the finite entries", lambda f: f["mean"] * f["scale"]),
    "std": Statistic(
        "their standard deviation, pooled over batch and units",
        lambda f: (f["m2"] / f["finite"]).sqrt() * f["scale"],
        in_ln=True,
    ),
    "rms": Statistic("square root of their second moment", lambda f: f["root"] * f["scale"], in_ln=True),
    "q": Statistic("their second moment", lambda f: (f["root"] * f["scale"]).square(), in_ln=True),
    "norm": Statistic(
        "square root of the sum of their squares",
        lambda f: f["root"] * f["finite"].sqrt() * f["scale"],
        in_ln=True,
    ),
    "min": Statistic("smallest finite entry", lambda f: f["min"]),
    "max": Statistic("largest finite entry", lambda f: f["max"]),
    "frac_zero": Statistic("share of entries that are exactly 0", lambda f: f["n_zero"] / f["count"], is_share=True),
    "frac_saturated": Statistic(
        "share of preactivations where |phi'| is below 5 % of its largest value",
        lambda f: f["saturated"],
        is_share=True,
    ),
    "frac_dead": Statistic(
        "share of units whose activation is 0 for the whole batch",
        lambda f: f["dead"],
        needs_batch=True,
        of_activations=True,
        is_share=True,
    ),
    "std_within": Statistic(
        "batch std inside a unit, root mean square over units",
        lambda f: f["within"].sqrt() * f["scale"],
        in_ln=True,
        needs_batch=True,
    ),
    "cosine": Statistic(
        "mean pairwise cosine of the batch's vectors, those of length 0 left out", _cosine, needs_batch=True
    ),
}
NONFINITE = "n_nonfinite"  # of the table `parity`: entries of either tensor that are nan or inf
COUNTS = (*(name for name, row in STATISTICS.items() if row.is_count), NONFINITE)
IN_LN = tuple(name for name, row in STATISTICS.items() if row.in_ln)

# What some rows of the table `stats` have beside these: log2 of rms and std in arithmetic without a range (stack),
# torch's own std (seeded), rms(update) / rms(weight), what a scaler multiplied the loss by, and what a cross-entropy is
# where all classes are equally probable (probe).
TRUE_COLUMNS, TORCH_COLUMN, UPDATE_RATIO = ("log2_rms_true", "log2_std_true"), "std_torch", "update_ratio"
LOSS_SCALE, CHANCE = "loss_scale", "chance_loss"
MORE_COLUMNS = (*TRUE_COLUMNS, TORCH_COLUMN, UPDATE_RATIO, LOSS_SCALE, CHANCE)
RESERVED = (*KEY_COLUMNS, *MODULE_COLUMNS, *STATISTICS, *MORE_COLUMNS, "network", "run", "init", "gain", "lr")


def checked_statistics(statistics: Mapping[str, Function] | None, reserved: Iterable[str] = ()) -> dict[str, Function]:
    """The functions by the names of their columns; a name that is taken, or no function, is refused in one line.

    `reserved` are names of further columns of the tables, such as those of the configuration.
    """
    if statistics is not None and not isinstance(statistics, Mapping):
        raise UsageError(f"statistics={show(statistics)}: must be a dictionary of functions by column names")
    given = dict(statistics or {})
    for name, function in given.items():
        if not isinstance(name, str) or not name.isidentifier():
            text = name if isinstance(name, str) else show(name)
            raise UsageError(f"statistics.{text}: the name of a column must be letters, digits and underscores")
        if name in RESERVED or name in reserved:
            raise UsageError(f"statistics.{name}: the tables have a column of this name; choose another one")
        if not callable(function):
            raise UsageError(f"statistics.{name}={show(function)}: must be a function (..., N, C) -> (...)")
    return given
