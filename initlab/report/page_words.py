"""What a page explains: the words of the tables where they are first used, and the rules that findings refer to."""

import re
from collections.abc import Iterable

from initlab.stats.statistics import STATISTICS
from initlab.verdict.rules import RULES

WORDS = {
    "layer": "1 is the first linear layer and what follows it, 0 the input",
    "network": "one draw of the random weights; a run has several, told apart by their seed",
    "median": "half of the networks lie below it",
    "16-84 %": "the range of the middle two thirds of the networks",
    "preactivation": "z = x W + b, what a linear layer gives",
    "activation": "what follows from a preactivation by the activation function",
    "gradient": "of the loss with respect to a tensor; in the stack pulled back from the last layer",
    "gain": "dimensionless factor of the weights: their standard deviation is gain / sqrt(fan_in)",
    "std": "standard deviation, pooled over the inputs of the batch and the units of the layer",
    "rms": "square root of the mean square",
    "norm": STATISTICS["norm"].description,
    "octave": "a factor of 2: the octave of x is floor(log2 |x|)",
    "dead": "a unit that is 0 for the whole batch; a signal that is 0 or not finite everywhere",
    "saturated": STATISTICS["frac_saturated"].description,
    "cosine": STATISTICS["cosine"].description,
    "z": "distance from what is predicted, in standard deviations",
    "p": "share of correct ensembles that are at least as far from the prediction; small values are rare by chance",
    "band": "the range in which theory expects 95 % of the networks",
    "by hand": "trained with a backward pass that is written out, without autograd",
    "nn.Module": "trained from the same weights on the same batches by torch's modules and autograd",
    "parity": "whether both backward passes give the same gradients",
    "relative error": "length of the difference over the length of the module's tensor",
    "update": "what one step of training adds to a parameter",
    "step": "k means after k updates",
    "subnormal": "below the smallest normal number of a format: digits are lost",
    "overflow": "beyond the largest number of a format: it becomes inf",
    "chi": "mean squared factor by which a layer multiplies a gradient",
    "verdict": "what rules find wrong in the tables of a run",
}
_PATTERNS = {word: re.compile(rf"(?<![\w.]){re.escape(word)}(?:s|es)?(?![\w.]*\w)") for word in WORDS}


class Reader:
    """Who reads a page from top to bottom: which words were explained already."""

    def __init__(self) -> None:
        self.known: set[str] = set()

    def explain(self, texts: Iterable[str]) -> list[tuple[str, str]]:
        """The words that these texts use first, with what they mean."""
        text = " | ".join(texts)
        met = [word for word, pattern in _PATTERNS.items() if word not in self.known and pattern.search(text)]
        self.known |= set(met)
        return [(word, WORDS[word]) for word in met]


def explain_rule(name: str) -> str:
    """What a rule of verdicts looks at, from what number on it speaks, the usual cause and remedy; "" if unknown."""
    rule = RULES.get(name)
    if rule is None:
        return ""
    numbers = "; ".join(f"{one} ({one.of})" for one in rule.thresholds[:3])
    speaks = f", and speaks from {numbers}" if numbers else ""
    return f"The rule looks at {rule.looks_at}{speaks}. Usual cause: {rule.cause}. Usual remedy: {rule.remedy}."
