"""Which tensor of which network a row of a table is about, and the columns that say so.

Legend: E networks of an ensemble, K keys.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from initlab.errors import UsageError, check, check_value, plain, show

if TYPE_CHECKING:
    import pandas as pd

# The columns that stand first in the table `stats`; a step and a seed belong to each row.
KEY_COLUMNS = ("stage", "implementation", "seed", "step", "layer", "tensor", "direction")
MODULE_COLUMNS = ("name", "part", "op", "call", "pass")  # and behind them in the rows of a probe
TENSOR_COLUMNS = ("layer", "tensor", "direction")
PARITY_COLUMNS = ("seed", "step", *TENSOR_COLUMNS)
LOSS_COLUMNS = ("implementation", "seed", "step")
TEXT_COLUMNS = ("stage", "implementation", "tensor", "direction", "name", "part", "op")  # each repeats a few texts


LayerTensor = tuple[int, str, str]  # the TENSOR_COLUMNS of one tensor


class TensorKey(NamedTuple):
    """A tensor of a network, at whatever step; the texts are explained in the README's glossary."""

    stage: str
    implementation: str
    layer: int
    tensor: str
    direction: str
    name: str = ""  # dotted name of the module
    part: str = ""  # name of the parameter, or the path in a module's nested output
    call: int = 0  # how often the module had been called before in this step
    op: str = ""  # what computed it: the class of the module, or the function of torch
    pass_: int = 0  # how many backward passes had been through this call before; the column `pass`


def key_columns(
    keys: Sequence[TensorKey],
    code: np.ndarray,
    steps: np.ndarray,
    seeds: Sequence[int],
    names: Sequence[str] = KEY_COLUMNS,
) -> "dict[str, np.ndarray | pd.Categorical]":
    """The key columns of a table of K x E rows, through which the seeds run fastest.

    `code` (K,) says which of `keys` a tensor has, `steps` (K,) its step. Categories stand in the order of the rows.
    """
    import pandas as pd

    used, first, code = np.unique(code, return_index=True, return_inverse=True)
    order = np.argsort(first)  # keys in the order in which they occur
    keys, code = [keys[k] for k in used[order].tolist()], np.argsort(order)[code]
    repeated = np.repeat(code, len(seeds))
    columns: dict[str, np.ndarray | pd.Categorical] = {}
    for name in names:
        if name == "seed":
            columns[name] = np.tile(np.asarray(seeds, dtype=np.int64), len(code))
        elif name == "step":
            columns[name] = np.repeat(steps, len(seeds))
        elif name in TEXT_COLUMNS:
            place: dict[str, int] = {}
            codes = np.array([place.setdefault(getattr(key, name), len(place)) for key in keys], dtype=np.int64)
            columns[name] = pd.Categorical.from_codes(codes[repeated], dtype=_make_categories(tuple(place)))
        else:
            field = "pass_" if name == "pass" else name
            columns[name] = np.array([getattr(key, field) for key in keys], dtype=np.int64)[repeated]
    return columns


@lru_cache(1000)
def _make_categories(texts: tuple[str, ...]) -> "pd.CategoricalDtype":
    """pandas takes long to make one."""
    import pandas as pd

    return pd.CategoricalDtype(list(texts))


def update_ratio(codes: Mapping[TensorKey, int], code: np.ndarray, steps: np.ndarray, rms: np.ndarray) -> np.ndarray:
    """rms(update) / rms(weight) of the same step, on the rows of updates, nan on all others: (K, E) like `rms`.

    `codes` numbers the keys, `code` (K,) and `steps` (K,) say which tensor of which step a row is about.
    """
    ratio = np.full(rms.shape, np.nan)
    for key, update in codes.items():
        weight = codes.get(key._replace(tensor="weight"), -1)
        if key.tensor == "update" and weight >= 0:
            row_of = dict(zip(steps[code == weight].tolist(), np.flatnonzero(code == weight), strict=True))
            rows = [row for row in np.flatnonzero(code == update) if steps[row] in row_of]
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio[rows] = rms[rows] / rms[[row_of[step] for step in steps[rows].tolist()]]
    return ratio


Seeds = int | Sequence[int]  # how many networks, or the seed of each


def resolve_seeds(seeds: Seeds) -> Sequence[int]:
    """The seeds of networks: 0, 1, ... for a number of them, or those of a sequence.

    >>> list(resolve_seeds(3)), resolve_seeds([5, 9])
    ([0, 1, 2], [5, 9])
    """
    given: Any = plain(seeds)
    if isinstance(given, Real) and not isinstance(given, bool):
        return range(check_value("seeds", given))
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise UsageError(f"seeds={show(given)}: must be how many networks there are, or a sequence of their seeds")
    check(seeds=len(given))
    try:
        if isinstance(given, range):
            check(seed=given[0]), check(seed=given[-1])
            return given
        return [check_value("seed", seed) for seed in given]
    except UsageError as error:
        raise UsageError(f"seeds: {error}") from None
