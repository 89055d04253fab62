"""Networks of several owners in one program: each owner gets the rows of its own networks, as if they had run alone.

An owner is whoever asked for some of the networks: a job of a sweep, or a job whose networks lie on a grid. Knows
nothing of what the program measures, only that its rows carry the column `network`, a network's place in the whole
ensemble.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from initlab.nn.init import Rule

Frames = Mapping[str, pd.DataFrame]


class Share(NamedTuple):
    """The networks of one owner, a rule and a seed for each, and where their rows go.

    `take` gets frames in which the column `network` counts from this owner's first network.
    """

    rules: Sequence[Rule]
    seeds: Sequence[int]
    take: Callable[[Frames], None]


def run_shared(program: Callable[..., Any], shares: Sequence[Share]) -> None:
    """Run `stack` or `train` once for the networks of all owners.

    Rows keep their order: an owner whose networks ran in one chunk sees the table that it would have seen alone.
    """
    sizes = [len(share.seeds) for share in shares]
    owner, first = np.repeat(np.arange(len(shares)), sizes), np.concatenate([[0], np.cumsum(sizes)])

    def split(frames: Frames) -> None:
        parts: dict[int, dict[str, pd.DataFrame]] = {}
        for name, frame in frames.items():
            for k, rows in _by_owner(frame, owner):
                parts.setdefault(k, {})[name] = rows.assign(network=rows["network"].to_numpy() - first[k])
        for k in sorted(parts):
            shares[k].take(parts[k])

    rules, seeds = [one for share in shares for one in share.rules], [one for share in shares for one in share.seeds]
    program(init=rules, seeds=seeds, emit=split, tagged=True)


def _by_owner(frame: pd.DataFrame, owner: np.ndarray) -> list[tuple[int, pd.DataFrame]]:
    """The rows of each owner that has some, in their order."""
    whose = owner[frame["network"].to_numpy()]
    order = np.argsort(whose, kind="stable")
    found, starts = np.unique(whose[order], return_index=True)
    if len(found) == 1:
        return [(int(found[0]), frame)]
    ends = [*starts[1:], len(order)]
    return [
        (int(k), frame.iloc[order[start:end]].reset_index(drop=True))
        for k, start, end in zip(found, starts, ends, strict=True)
    ]
