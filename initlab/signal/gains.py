"""Every gain of every activation with what it leads to: its fixed point, whether that is stable, what gradients do.

A gain belongs to a promise (`activations.GAIN_KINDS`); this table says which promises it breaks. Infinite width.
"""

from collections.abc import Sequence

import pandas as pd

from initlab.signal.activations import ACTIVATIONS, GAIN_KINDS, TORCH_HAS, gain
from initlab.signal.custom import Given, as_activation, name_of
from initlab.signal.phases import Phase, phase

EDGE = 1e-6

# Where torch's number is not the one that keeps gradients, and why.
WHY_TORCH = {
    "linear": "the same in every sense",
    "relu": "keeps second moments both ways; unit variance would take 1.71286, since the mean is not 0",
    "leaky_relu": "keeps second moments both ways",
    "tanh": "5/3 is older than the theory and answers to no promise: gradients grow by chi_1 a layer",
    "sigmoid": "1, as if sigmoid were linear: its slope is at most 1/4, so gradients vanish",
    "selu": "3/4 was set by experiment, for self-normalization 1 is right; near the chi gain in effect",
    "gelu": "torch has none; the fixed point of rms repels: take the biases of phases.half_stable too",
    "silu": "torch has none; the fixed point of rms repels: take the biases of phases.half_stable too",
}


def gain_table(activations: Sequence[Given] = tuple(ACTIVATIONS)) -> pd.DataFrame:
    """A row per activation and kind of gain, biases 0.

    `q` is the second moment that a signal of 1 runs into, `slope` V' and `chi_1` there; `stability` is stable where
    V' < 1, marginal at 1, unstable beyond, gone where q is 0 or unbounded. `gradient` is chi_1 in words. `torch` is
    `torch.nn.init.calculate_gain`'s number (nan where it has none), `ratio` the gain over it, `why` what it is.
    """
    rows = []
    for given in activations:
        name, row = name_of(given), as_activation(given)
        known = ACTIVATIONS.get(name) is row and name in TORCH_HAS
        by_torch = gain(name, "torch") if known else float("nan")
        for kind in GAIN_KINDS:
            if kind == "torch" and not known:
                continue
            value = gain(row, kind)
            at = phase(row, value**2)
            rows.append(
                {
                    "activation": name,
                    "kind": kind,
                    "gain": value,
                    "q": at.q,
                    "slope": at.slope,
                    "chi_1": at.chi_1,
                    "stability": _stability(at),
                    "gradient": _gradient(at.chi_1),
                    "torch": by_torch,
                    "ratio": value / by_torch,
                    "why": WHY_TORCH.get(name, "a function of one's own"),
                }
            )
    return pd.DataFrame(rows)


def _stability(at: Phase) -> str:
    if at.q == 0 or at.q == float("inf"):
        return "gone"
    if abs(at.slope - 1) <= EDGE:
        return "marginal"
    return "stable" if at.slope < 1 else "unstable"


def _gradient(chi_1: float) -> str:
    if abs(chi_1 - 1) <= EDGE:
        return "kept"
    return "grows" if chi_1 > 1 else "vanishes"
