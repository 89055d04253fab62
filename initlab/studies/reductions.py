"""Rows of many networks as one number, with its standard error by drawing the networks again (the bootstrap).

A reduction is written once, over weighted networks: with all weights 1 it is the measurement, with the counts of a draw
with replacement it is one repetition of the bootstrap. Networks are drawn, not rows: the layers of one network are not
independent. nan is a value here and is not skipped. Legend: R rows, E networks, B draws.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from initlab.runs.select import NothingFound

Numbers = np.ndarray
DRAWS = 200  # the error is then known to 1/sqrt(2 * 200) = 5 % of itself
_BLOCK = 256  # rows in a block of the median


class Measured(NamedTuple):
    """A number, its standard error over networks (nan where there is one network only), and what it is about."""

    number: float
    error: float
    of: str = ""

    def __str__(self) -> str:
        """The number in three digits, or in as many as its error leaves meaningful, and one more; the error in one."""
        number, error = self.number, self.error
        if math.isfinite(number) and math.isfinite(error) and error > 0:
            number = round(number, 1 - math.floor(math.log10(error)))
        text = "never" if number == math.inf else f"{float(f'{number:.3g}'):g}"  # 10, not 1e+01
        spread = f" +- {float(f'{error:.1g}'):g}" if math.isfinite(error) else ""
        return f"{self.of}{': ' if self.of else ''}{text}{spread}"


def _sums(values: Numbers, owner: Numbers) -> Numbers:
    return np.bincount(owner, values)


def _variance(values: Numbers, owner: Numbers, weights: Numbers) -> Numbers:
    """Unbiased, over the rows: divided by their number less one."""
    apart = values - values.mean()
    count, first, second = (weights @ _sums(v, owner) for v in (np.ones(len(values)), apart, apart**2))
    return np.asarray((second - first**2 / count) / (count - 1))


def _median(values: Numbers, owner: Numbers, weights: Numbers) -> Numbers:
    """The middle of the rows, each counted as often as its network was drawn; nan as soon as one of them is.

    The rows in their order are cut into blocks, so that no draw needs to walk over all of them.
    """
    blocks = math.ceil(len(values) / _BLOCK)
    order, padding = np.argsort(values), blocks * _BLOCK - len(values)
    ranked, whose = np.pad(values[order], (0, padding)), np.pad(owner[order], (0, padding), constant_values=-1)
    drawn = np.pad(weights, ((0, 0), (0, 1)))  # the last one: of the padding, never drawn
    cells = np.repeat(np.arange(blocks), _BLOCK) * drawn.shape[1] + whose % drawn.shape[1]
    held = np.bincount(cells, minlength=blocks * drawn.shape[1]).reshape(blocks, -1)
    until = np.cumsum(drawn @ held.T, axis=1)

    def value_at(rank: Numbers) -> Numbers:
        block = (until <= rank[:, None]).sum(axis=1)
        before = np.take_along_axis(np.pad(until, ((0, 0), (1, 0))), block[:, None], axis=1)
        inside = before + np.cumsum(np.take_along_axis(drawn, whose.reshape(blocks, -1)[block], axis=1), axis=1)
        return np.asarray(ranked[block * _BLOCK + (inside <= rank[:, None]).sum(axis=1)])

    middle = 0.5 * value_at((until[:, -1] - 1) // 2) + 0.5 * value_at(until[:, -1] // 2)
    return np.where(_nans(values, owner, weights) > 0, np.nan, middle)


def _max(values: Numbers, owner: Numbers, weights: Numbers) -> Numbers:
    largest = np.full(weights.shape[1], -np.inf)
    np.maximum.at(largest, owner, values)
    return np.asarray(np.where(weights > 0, largest, -np.inf).max(axis=1))


def _nans(values: Numbers, owner: Numbers, weights: Numbers) -> Numbers:
    return np.asarray(weights @ _sums(np.isnan(values), owner))


REDUCTIONS: dict[str, Callable[[Numbers, Numbers, Numbers], Numbers]] = {
    "mean": lambda values, owner, weights: (weights @ _sums(values, owner)) / (weights @ np.bincount(owner)),
    "median": _median,
    "variance": _variance,
    "min": lambda values, owner, weights: -_max(-values, owner, weights),
    "max": _max,
    "nans": _nans,  # how many there are
}


def first(met: Numbers, over: Numbers, owner: Numbers) -> Numbers:
    """Per network the smallest `over` at which the condition is met; inf for one that never meets it, (E,)."""
    found = np.full(owner.max() + 1, np.inf)
    np.minimum.at(found, owner[met], over[met])
    return found


def slopes(values: Numbers, over: Numbers, owner: Numbers) -> Numbers:
    """Per network the least-squares slope of the values against `over`, (E,); nan where a value is not finite."""
    count = np.bincount(owner)
    x = over - (_sums(over, owner) / count)[owner]
    spread = _sums(x * x, owner)
    if not (spread > 0).all():
        raise NothingFound("there is no slope where `over` has one value only")
    return np.asarray(_sums(x * (values - (_sums(values, owner) / count)[owner]), owner) / spread)


def find_lowest(values: Numbers, over: Numbers, owner: Numbers) -> Numbers:
    """Per network the `over` at which the mean of the values is smallest, (E,); nan where none is finite."""
    (owners, places), group = np.unique(np.stack([owner, over]), axis=1, return_inverse=True)
    mean = _sums(values, group) / np.bincount(group)
    mean = np.where(np.isfinite(mean), mean, np.inf)
    order = np.lexsort((mean, owners))
    first = order[np.unique(owners[order], return_index=True)[1]]
    return np.where(np.isfinite(mean[first]), places[first], np.nan)


def varies_inside(over: Numbers, owner: Numbers) -> bool:
    """Does `over` take several values in some network?"""
    return bool((over != over[np.unique(owner, return_index=True)[1]][owner]).any())


@lru_cache(maxsize=32)
def draws(networks: int) -> Numbers:
    """How often each network is drawn, (B, E); the same draws whenever there are as many networks."""
    return np.random.default_rng(0).multinomial(networks, np.full(networks, 1 / networks), size=DRAWS).astype(float)


def reduce_rows(name: str, values: Numbers, owner: Numbers, of: str = "") -> Measured:
    """One number and its bootstrap error.

    name: a reduction of the table. values (R,): the statistic of each row. owner (R,): which network each row is
    about, 0 to E - 1. of: what the number is about, for the reader.
    """
    reduction, networks = REDUCTIONS[name], int(owner.max()) + 1
    with np.errstate(all="ignore"):
        number = float(reduction(values, owner, np.ones((1, networks)))[0])
        if networks < 2:
            return Measured(number, np.nan, of)
        again = reduction(values, owner, draws(networks))
        return Measured(number, float(again.std(ddof=1)), of)
