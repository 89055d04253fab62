"""How far apart are two sets of networks? Rows joined on their keys, differences in units of the seed-to-seed spread.

At a key (setting, stage, step, layer, ...) let s be the standard deviation of a statistic over the networks, pooled
over both sides: s^2 = sum of squared deviations from each side's mean / nu, nu = n_A + n_B - 2. Of what is a scale
(IN_LN) the natural logarithm is taken first. Networks that both sides have are compared one by one, x = |a - b| / s;
where no seed is shared the means over the networks are, x = |mean a - mean b| / s. A spread of few networks is hardly
known, so x becomes the z that has the same chance under a normal law, by Wallace's approximation of Student's law,

    z = (8 nu + 1) / (8 nu + 3) * sqrt(nu * ln(1 + x^2 / nu)),

about x for many networks; for two against two z = 4 stands at x = 208. Where the spread is smaller than rounding, and
where there is one network alone, rounding is the unit: z = 4 |a - b| / (sqrt(eps) max(|a|, |b|)), so that 4 stands for
half of the digits of the number format. nan equals nan and inf equals inf; either against a number is inf away.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from initlab.stats.statistics import IN_LN

BEYOND = 4.0  # spreads; farther than this is a difference

Floats = np.ndarray


class Side(NamedTuple):
    """Of one side: the key of each row as a number, its seed, its values (rows, statistics)."""

    group: np.ndarray
    seed: np.ndarray
    values: Floats


class Joined(NamedTuple):
    """Rows that both sides have, and where no seed was shared at a key the means there.

    a, b, z (rows, statistics): what is compared, how far apart; `rounding`: where that and no spread is the unit of z;
    `at`: a row of A with the same key; `paired`: one network on either side, and no mean over seeds.
    """

    at: np.ndarray
    a: Floats
    b: Floats
    z: Floats
    rounding: np.ndarray
    paired: np.ndarray


def codes(a: pd.DataFrame, b: pd.DataFrame, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """One number for each row, the same in A and B where all the named columns agree."""
    found = np.zeros(len(a) + len(b), np.int64)
    for name in names:
        both = pd.concat([_plain(a[name]), _plain(b[name])], ignore_index=True)
        code, values = pd.factorize(both, use_na_sentinel=False)
        found = pd.factorize(found * len(values) + code)[0]
    return found[: len(a)], found[len(a) :]


def _plain(column: pd.Series) -> pd.Series:
    return column.astype(object) if isinstance(column.dtype, pd.CategoricalDtype) else column


def first_of_each(side: Side) -> tuple[Side, np.ndarray]:
    """Without the rows that repeat a key and seed, in the order of keys and seeds; where the rows stood."""
    order = np.lexsort((side.seed, side.group))
    same = (np.diff(side.group[order]) == 0) & (np.diff(side.seed[order]) == 0)
    rows = order[np.concatenate([[True], ~same])] if len(order) else order
    return Side(side.group[rows], side.seed[rows], side.values[rows]), rows


def join(a: Side, b: Side, statistics: Sequence[str], epsilon: float) -> Joined:
    """Both sides without repetitions and in order, see `first_of_each`."""
    groups = int(max(a.group.max(initial=-1), b.group.max(initial=-1))) + 1
    logarithms = np.array([name in IN_LN for name in statistics])
    with np.errstate(all="ignore"):
        la, lb = (np.where(logarithms, np.log(side.values), side.values) for side in (a, b))
        (na, mean_a, m2a), (nb, mean_b, m2b) = (_moments(s.group, v, groups) for s, v in ((a, la), (b, lb)))
        nu = np.maximum(na - 1, 0) + np.maximum(nb - 1, 0)
        spread = np.where(nu > 0, np.sqrt((m2a + m2b) / np.maximum(nu, 1)), 0.0)
        names = np.concatenate([np.stack([side.group, side.seed], 1) for side in (a, b)])
        network = np.unique(names, axis=0, return_inverse=True)[1].ravel()
        _, ia, ib = np.intersect1d(network[: len(a.seed)], network[len(a.seed) :], return_indices=True)
        shared = np.zeros(groups, bool)
        shared[a.group[ia]] = True
        pairs = _distance(a.values[ia], b.values[ib], la[ia], lb[ib], spread[a.group[ia]], nu[a.group[ia]], epsilon)
        lone = np.intersect1d(a.group, b.group)
        lone = lone[~shared[lone]]
        back_a, back_b = (np.where(logarithms, np.exp(mean), mean)[lone] for mean in (mean_a, mean_b))
        means = _distance(back_a, back_b, mean_a[lone], mean_b[lone], spread[lone], nu[lone], epsilon)
    first = np.searchsorted(a.group, lone)
    return Joined(
        np.concatenate([ia, first]),
        np.concatenate([a.values[ia], back_a]),
        np.concatenate([b.values[ib], back_b]),
        np.concatenate([pairs[0], means[0]]),
        np.concatenate([pairs[1], means[1]]),
        np.concatenate([np.ones(len(ia), bool), np.zeros(len(lone), bool)]),
    )


def _moments(group: np.ndarray, values: Floats, groups: int) -> tuple[Floats, Floats, Floats]:
    """Per group and statistic, of what is finite: how many, their mean, their squared deviations.

    Where nothing is finite the mean is what there is, inf or nan.
    """
    found = np.full((3, groups, values.shape[1]), np.nan)
    for k, column in enumerate(values.T):
        finite = np.isfinite(column)
        n = np.bincount(group[finite], minlength=groups)
        mean = np.bincount(group[finite], column[finite], groups) / n
        away = (column - mean[group])[finite]
        mean = np.where(n > 0, mean, np.bincount(group, column, groups))
        found[:, :, k] = n, mean, np.bincount(group[finite], away * away, groups)
    return found[0], found[1], found[2]


def _distance(
    a: Floats, b: Floats, la: Floats, lb: Floats, spread: Floats, nu: Floats, epsilon: float
) -> tuple[Floats, np.ndarray]:
    """z of the formula above and whether rounding is its unit; a, b as they are, la, lb where they are compared."""
    x = np.abs(la - lb) / spread
    nu = np.maximum(nu, 1)
    student = (8 * nu + 1) / (8 * nu + 3) * np.sqrt(nu * np.log1p(x * x / nu))
    rounding = BEYOND * np.abs(a - b) / (np.sqrt(epsilon) * np.maximum(np.abs(a), np.abs(b)))
    z = np.fmin(student, rounding)  # fmin: 0/0 where there is no spread
    equal = (a == b) | (np.isnan(a) & np.isnan(b))
    number = np.isfinite(a) & np.isfinite(b)
    return np.where(equal, 0.0, np.where(number, z, np.inf)), ~(student < rounding)
