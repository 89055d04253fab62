"""The order of the rows of a table, whatever ran together, and whenever rows were handed over.

Rows stand by stage, implementation and step, as far as their table is ordered by these; in a stack by layer, in the
order of travel; then by tensor, in the order in which a step measures them; then by network.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from initlab.stats.keys import KEY_COLUMNS

if TYPE_CHECKING:
    import pandas as pd

NETWORK = "network"  # column of what is emitted: the number of a row's network in its ensemble
ORDER = (*KEY_COLUMNS[:2], "step")  # of the table `stats`
_FAR = 2**40  # beyond every layer


def place_columns(frame: "pd.DataFrame", order: Sequence[str]) -> list[np.ndarray]:
    """For each name in `order` that is a column, a number by which rows are sorted; words by the alphabet."""
    import pandas as pd

    found = []
    for name in order:
        if name not in frame:
            continue
        column = frame[name]
        if name == "step" and {"stage", "layer", "direction"} <= set(frame):
            layer = frame["layer"].to_numpy()
            travel = np.where(frame["direction"] == "forward", layer, _FAR - layer)
            found.append(np.where(frame["stage"] == "stack", travel, column))
        elif not pd.api.types.is_numeric_dtype(column.dtype):
            column = column.astype("category")
            rank = np.argsort(np.argsort(column.cat.categories.to_numpy(str), kind="stable"))
            found.append(rank[column.cat.codes.to_numpy()])
        else:
            found.append(column.to_numpy())
    return found


def row_order(frame: "pd.DataFrame", networks: np.ndarray, order: Sequence[str] = ORDER) -> np.ndarray:
    """Which row comes first, second, ...: of rows of whole steps, in the order in which each network was measured."""
    import pandas as pd

    places = place_columns(frame, order)
    tensors = [name for name in KEY_COLUMNS if name in frame and name not in ("seed", "step")]
    kind = frame.groupby(tensors, sort=False, observed=True).ngroup().to_numpy() if tensors else np.zeros(len(frame))
    return np.lexsort((networks, pd.factorize(kind)[0], *reversed(places)))


def sort_rows(frame: "pd.DataFrame") -> "pd.DataFrame":
    """A measured table in its order, less the column `network`."""
    order = ("stage", "layer", "attempt") if "attempt" in frame else ORDER if "stage" in frame else ("step",)
    rows = row_order(frame, frame[NETWORK].to_numpy(), order)
    return frame.drop(columns=NETWORK).iloc[rows].reset_index(drop=True)
