"""Every gain of every activation with what it leads to: its fixed point, whether that is stable, what gradients do.

A kind of gain keeps one promise (`activations.GAIN_KINDS`); this table says which others it breaks. All widths are
infinite.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from initlab.meanfield.fixed_points import phase
from initlab.nn.activations import ACTIVATIONS, GAIN_KINDS, TORCH_HAS, Activation, find_torch_gain, gain
from initlab.nn.custom_activation import Given, as_activation, name_of
from initlab.nn.init import Rule

EDGE = 1e-6


class Published(NamedTuple):
    """Gains that other libraries use: their source, the kind of gain they stand for, why they differ from it."""

    source: str
    meant: str
    why: str
    gains: Mapping[str, float]


# torch's own stand in WHY_TORCH. Slopes and values at 0 are the limit of small signals, which a deep net leaves.
PUBLISHED: dict[str, Published] = {
    "nfnets": Published(
        "Brock et al. 2021, nfnets/base.py",
        "std",
        "a sample's 1/std instead of the integral: all are a little too large",
        {
            "linear": 1.0,
            "relu": 1.7139588594436646,
            "leaky_relu": 1.70590341091156,
            "tanh": 1.5939117670059204,
            "sigmoid": 4.803835391998291,
            "gelu": 1.7015043497085571,
            "silu": 1.7881293296813965,
            "selu": 1.0008515119552612,
        },
    ),
    "slope_at_0": Published(
        "Glorot & Bengio 2010 as taught: 1, and 4 for sigmoid",
        "chi",
        "1/phi'(0): right as long as the signal is small, too small for a signal of 1",
        {"linear": 1.0, "tanh": 1.0, "sigmoid": 4.0},
    ),
    "kumar": Published(
        "Kumar 2017: 1/(phi'(0) sqrt(1 + phi(0)^2))",
        "rms",
        "the activation as its tangent at 0, and that mixed up with its mean",
        {"linear": 1.0, "tanh": 1.0, "sigmoid": 4 / 1.25**0.5},
    ),
    "klambauer": Published("Klambauer et al. 2017", "rms", "what selu's two constants were solved for", {"selu": 1.0}),
}

# Where torch's number is not the one that keeps gradients, and why.
WHY_TORCH = {
    "linear": "the same in every sense",
    "relu": "keeps second moments both ways; unit variance would take 1.71286, since the mean is not 0",
    "leaky_relu": "keeps second moments both ways",
    "tanh": "5/3 is older than the theory and answers to no promise: gradients grow by chi_1 a layer",
    "sigmoid": "1, as if sigmoid were linear: its slope is at most 1/4, so gradients vanish",
    "selu": "3/4 was set by experiment, for self-normalization 1 is right; near the chi gain in effect",
    "gelu": "torch has none; the fixed point of rms repels: take the biases of fixed_points.half_stable too",
    "silu": "torch has none; the fixed point of rms repels: take the biases of fixed_points.half_stable too",
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
        by_torch = find_torch_gain(row)
        for kind in GAIN_KINDS:
            if kind == "torch" and by_torch is None:
                continue
            value = gain(row, kind)
            named = {"activation": name, "kind": kind, **consequences(row, value)}
            why = WHY_TORCH.get(name, "torch has none" if name in ACTIVATIONS else "a function of one's own")
            theirs = float("nan") if by_torch is None else by_torch
            rows.append({**named, "torch": theirs, "ratio": value / theirs, "why": why})
    return pd.DataFrame(rows)


def published_table() -> pd.DataFrame:
    """A row per gain that other libraries use, torch's first.

    Columns: `kind` who uses it, `source`, `meant` the kind of gain it stands for, `right` that gain, `deviation` from
    it as a share, `why` the reason, and the consequences as in `gain_table`. torch's numbers stand for `chi`: they are
    called gains of Kaiming's rule, which keeps gradients.
    """
    in_use = {
        "torch": Published(
            "torch.nn.init.calculate_gain", "chi", "", {name: gain(name, "torch") for name in TORCH_HAS}
        ),
        **PUBLISHED,
    }
    rows = []
    for kind, numbers in in_use.items():
        for name, value in numbers.gains.items():
            right = gain(name, numbers.meant)
            why = numbers.why or WHY_TORCH[name]
            named = {"activation": name, "kind": kind, **consequences(ACTIVATIONS[name], value)}
            about = {"source": numbers.source, "meant": numbers.meant, "right": right, "deviation": value / right - 1}
            rows.append({**named, **about, "why": why})
    return pd.DataFrame(rows)


PROMISE = {
    "chi": "gradients keep their mean square where that of the preactivations is 1",
    "rms": "preactivations keep a mean square of 1",
    "std": "activations have unit variance where preactivations have a mean square of 1",
    "torch": "torch.nn.init.calculate_gain's number",
}


def gain_words(scaling: Rule, row: Activation) -> str:
    """Say which gain a rule takes for an activation, of which kind, and what torch has; "" where the rule sets its own.

    >>> gain_words(Rule(), ACTIVATIONS["gelu"])
    'gain: 1.481 (chi: gradients keep their mean square where that of the preactivations is 1; torch has none)'
    """
    if scaling.gain is not None:
        return ""
    kind, value = scaling.gain_kind, scaling.gain_for(row)
    by_torch = find_torch_gain(row)
    if kind == "torch":
        other = f"the one that keeps gradients is {gain(row, 'chi'):.4g}, init.gain_kind=chi"
    elif by_torch is None:
        other = "torch has none"
    elif abs(by_torch / value - 1) < EDGE:
        other = "torch has the same"
    else:
        other = f"torch has {by_torch:.4g}, init.gain_kind=torch"
    return f"gain: {value:.4g} ({kind}: {PROMISE[kind]}; {other})"


def consequences(row: Activation, value: float) -> dict[str, object]:
    """What a gain leads to: the columns `gain`, `q`, `slope`, `chi_1`, `stability`, `gradient`."""
    at = phase(row, value)
    stability = _compare_with_one(at.slope, "stable", "marginal", "unstable")
    if at.q in (0, float("inf")):
        stability = "gone"
    gradient = _compare_with_one(at.chi_1, "vanishes", "kept", "grows")
    return {
        "gain": value, "q": at.q, "slope": at.slope, "chi_1": at.chi_1, "stability": stability, "gradient": gradient,
    }  # fmt: skip


def _compare_with_one(x: float, below: str, equal: str, above: str) -> str:
    return equal if abs(x - 1) <= EDGE else below if x < 1 else above
