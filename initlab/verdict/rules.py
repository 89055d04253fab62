"""The table of rules: what each looks at, from what number on it speaks and whose number that is, cause and remedy.

The functions of the rules take their numbers from here, and a finding names its row: `Finding.rule` is the row's `id`.
`docs/rules.md` is this table. Sentences with the layer, the number found and the number to set are each finding's own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

ERROR, WARNING = "error", "warning"


class Threshold(float):
    """A number that a rule compares with: of what it is, in which unit, and where it comes from."""

    def __new__(cls, value: float, of: str, unit: str = "", source: str = "") -> "Threshold":
        """value: the number. of: what is compared with it. unit: empty for a share or a ratio. source: empty where it
        was set between the healthy and the faulty networks of benchmarks/faults.py.
        """
        self = super().__new__(cls, value)
        self.of, self.unit = of, unit
        self.source = source or "set between the healthy and the faulty networks of benchmarks/faults.py"
        return self

    of: str
    unit: str
    source: str

    def __str__(self) -> str:
        return f"{float(self):.3g} {self.unit}".strip()


EXACT = "exact"  # the source of a number that follows from what is asked
# How sizes change with depth.
RATE = Threshold(0.15, "change of size a layer beyond the reference networks'", "octaves a layer")
NOISE = Threshold(3, "change of size a layer over its own error", "standard errors", "a chance of 0.3 %")
SPREAD = Threshold(4, "change a layer beyond the reference networks', over their spread", "standard deviations")
TOTAL = Threshold(math.log2(10), "change of size over all layers", "octaves", "a factor 10, which any optimizer bears")
DEEP = Threshold(
    9, "layers from which a change of size stops training", "layers", "shallower nets by torch's default train"
)
MUCH = Threshold(3.7, "change of size over all layers of a deep network", "octaves")
FAR = Threshold(10, "change of size over the layers of any network", "octaves", "a factor 1000")
NETWORKS = Threshold(16, "networks drawn by the right rule", "networks", "their spread is known to 18 %")
# Weights.
APART = Threshold(2.3, "one layer's gain and std beside the middle of all, without norms and branches", "octaves")
OUTLIER = Threshold(3, "one layer's gain and std beside the middle of all layers", "octaves")
HEAD = Threshold(4, "the same of the last layer, whose size is often chosen", "octaves")
FEW_WEIGHTS = Threshold(16, "weights below which a size is chance", "weights", "std's error is 18 % at 16")
LOUD = Threshold(8, "rms of the outputs of a table that is the head too")
MEAN = Threshold(0.3, "mean of a weight's entries over their std")
MEAN_SUM = Threshold(
    4, "mean of a weight's entries times fan_in", "", "what a constant input of 1 becomes in each unit"
)
STRAY = Threshold(1e3, "largest entry of a weight over that which 99 % do not exceed", "", "normal numbers: below 3")
SAME = Threshold(0.1, "units with the same weights, of all units of a layer")
KEPT = Threshold(0.97, "std that a cut normal keeps of the one asked for", "", "trunc_normal_ at 2 std keeps 0.880")
SHORT = Threshold(0.5, "lost variance over all layers", "octaves", "a factor 1.4 of the signal")
SHORT_LAYERS = Threshold(0.3, "layers of a cut normal, of all layers")
AGREES = Threshold(5, "std of a weight beside that of a rule", "standard errors", "a chance of 6e-7")
LOST = Threshold(0.4, "gain of a computed weight beside the one needed", "octaves")
RECURRENT = Threshold(4, "gain of recurrent weights", "", "orthogonal is 1: Saxe et al. 2014")
GATES = Threshold(8, "rms of the biases of gates", "", "sigmoid(8) is 1 - 3e-4; Jozefowicz et al. 2015 use 1")
TABLE = Threshold(16, "rms of the vectors of an embedding", "", "as of any input")
NORMED = Threshold(8, "rms of what a norm gives, and its inverse", "", "1 by definition of a norm")
# Units and attention.
UNITS = Threshold(
    32, "units below which it may be chance that most are dead", "units", "5 standard errors of 1/2 are 0.44 at 32"
)
SATURATED = Threshold(0.2, "saturated share beyond that of a unit normal input")
LEAST_SATURATED = Threshold(0.25, "saturated share in any case")
DEAD = Threshold(0.9, "dead units of a layer's activation")
SHUTS = Threshold(0.5, "rms of biases that can shut units that are given a size of 1")
OUTWEIGHS = Threshold(10, "rms of biases over what the weights give, and over 1")
LOGITS = Threshold(10, "std over keys of attention's logits", "", "softmax of N(0, 10^2): one key has most")
SHARP = Threshold(64, "the same where no weight is too large: a mask of -100, or sharp by design")
# Inputs and outputs.
INPUT = Threshold(16, "rms of the input, and its inverse", "", "weights are made for 1: LeCun et al. 1998")
INPUT_MEAN = Threshold(3, "mean of the input over its std", "", "LeCun et al. 1998, section 4.3: it should be 0")
LOSS = Threshold(2, "first cross-entropy over that of a guess, log of the classes")
LARGE_LOSS = Threshold(1e4, "a first loss that is no cross-entropy", "", "targets 100 times too large")
TINY_GRADIENT = Threshold(1e-9, "rms of the largest gradient of a weight", "", "a tenth of Adam's eps, 1e-8")
POST_NORM = Threshold(36, "residual branches with a norm behind each", "branches", "Xiong et al. 2020, section 3")
SOME_POST_NORM = Threshold(12, "the same, for a warning", "branches", "Xiong et al. 2020, section 3")
DIFFERENT = Threshold(0.9, "mean cosine of inputs, below which they differ")
COLLAPSED = Threshold(0.99, "mean cosine of different inputs at the end", "", "Schoenholz et al. 2017, section 3")
WIDTH = Threshold(math.log(2), "std of ln(rms) over networks of this rule", "", "a factor 2; Hanin & Nica 2020")
# Training.
USUAL = Threshold(
    1e-3, "rms of an update over that of its weight, as it should be", "", "Karpathy 2022, makemore part 3"
)
LARGE = Threshold(0.1, "rms of an update over that of its weight")
SMALL = Threshold(1e-4, "rms of an update over that of its weight", "", "10,000 steps to change a weight")
TINY = Threshold(1e-5, "the same, for an error", "", "100,000 steps to change a weight")
GONE = Threshold(10, "last loss over the first")
LEARNED = Threshold(0.99, "last loss of a run over its first")
CONSTANT = Threshold(0.95, "last loss of a run over that of an answer which does not look at the inputs")
STEPS = Threshold(50, "steps of a run from which something should be learned", "steps")
UNDERFLOW = Threshold(0.01, "share of a gradient that a format takes for 0")
OVERFLOW = Threshold(0, "share of a tensor that a format takes for inf", "", EXACT)


@dataclass(frozen=True)
class VerdictRule:
    """A row: its name, the gravest finding that it gives, what it looks at, its numbers; a usual cause and remedy."""

    id: str
    severity: str
    looks_at: str
    thresholds: tuple[Threshold, ...]
    cause: str
    remedy: str


TREND = (RATE, NOISE, SPREAD, NETWORKS, TOTAL, DEEP, MUCH, FAR)
ONE_LAYER = (APART, OUTLIER, HEAD, FEW_WEIGHTS, LOUD)
FORWARD = "sizes of preactivations, or of residual sums, from layer to layer; each weight's gain beside the others'"
BACKWARD = "sizes of the loss gradient, from the last layer to the first"

# In the order in which they are looked for: parameters, input, weights, units, depth, output, training, runs, audits.
TABLE_OF_RULES = (
    VerdictRule(
        "non-finite", ERROR, "entries of parameters, buffers and inputs; the first operation that makes nan or inf",
        (), "memory that was never set, a training that diverged, or a function outside of where it has a value",
        "draw the parameter anew, clean the input, or keep the function's argument away from the edge",
    ),
    VerdictRule(
        "frozen", ERROR, "whether any parameter has requires_grad", (), "nothing is trained",
        "model.requires_grad_() for what is to be trained",
    ),
    VerdictRule(
        "no-gradient", ERROR, "whether what the model gives carries a gradient", (),
        "the output was cut off from the parameters, by argmax or detach", "give numbers that depend on the parameters",
    ),
    VerdictRule(
        "input-scale", ERROR, "rms of each input", (INPUT,), "the input is not standardized",
        "subtract the mean of the input and divide by its std",
    ),
    VerdictRule(
        "input-equal", ERROR, "differences between the examples of the batch", (), "all examples are the same",
        "look at how batches are made",
    ),
    VerdictRule(
        "input-mean", WARNING, "mean and std of each input", (INPUT_MEAN,), "the input is not centred",
        "subtract the mean of the input",
    ),
    VerdictRule(
        "symmetric", ERROR, "rows and columns of each weight", (SAME,),
        "units with the same weights stay alike for ever", "draw the weight at random",
    ),
    VerdictRule(
        "stray-entries", ERROR, "largest entries of each weight", (STRAY,),
        "a few entries outweigh all others: memory that was never set, or a faulty file", "draw the weight anew",
    ),
    VerdictRule(
        "weights-with-a-mean", ERROR, "mean and std of each weight", (MEAN, MEAN_SUM),
        "weights of one sign, as by nn.init.uniform_ between 0 and 1: all units give the same",
        "draw the weight with mean 0 and the std that it needs",
    ),
    VerdictRule(
        "lost-variance", ERROR, "laws of the weights", (KEPT, SHORT, SHORT_LAYERS),
        "normal numbers were cut off and not widened again",
        "divide the std that trunc_normal_ is given by what it keeps",
    ),
    VerdictRule(
        "fans-swapped", ERROR, "std of matrices that are kept as (inputs, outputs)", (AGREES,),
        "torch.nn.init takes shape[1] for the number of inputs", "multiply the weight by sqrt(fan_out / fan_in)",
    ),
    VerdictRule(
        "init-lost", ERROR, "gain of weights that a hook or a parametrization computes", (LOST,),
        "the direction was set and the magnitude was not", "set the magnitude too, or use initlab.init_",
    ),
    VerdictRule(
        "bias-too-large", ERROR, "biases beside what the weights give, of layers and of norms", (OUTWEIGHS, NORMED),
        "the bias outweighs the input: all examples become alike", "set the bias to 0",
    ),
    VerdictRule(
        "dead", ERROR, "units that are 0 for the whole batch", (DEAD, UNITS, SHUTS, OUTWEIGHS),
        "biases, or a mean of inputs or weights, below what the activation lets pass",
        "set the biases to 0, or draw the weights with mean 0",
    ),
    VerdictRule(
        "saturated", ERROR, "saturated share of units; logits of attention; weights and biases of gates",
        (SATURATED, LEAST_SATURATED, UNITS, AGREES, SHUTS, OUTWEIGHS, LOGITS, SHARP, RECURRENT, GATES),
        "weights or inputs too large for the activation, for softmax or for the gates",
        "multiply the weights by the gain needed over the gain found",
    ),
    VerdictRule(
        "exploding", ERROR, f"{FORWARD}; tables of embeddings; norms", (*TREND, *ONE_LAYER, TABLE, NORMED),
        "weights of a gain above the one that what follows needs, in all layers or in one; branches added unscaled",
        "multiply them by the gain needed over the gain found; branches by 1/sqrt(their number)",
    ),
    VerdictRule(
        "vanishing", ERROR, f"{FORWARD}; tables of embeddings; norms", (*TREND, *ONE_LAYER, NORMED),
        "weights of a gain below the one that what follows needs, in all layers or in one; all of a weight is 0",
        "multiply them by the gain needed over the gain found; draw what is 0",
    ),
    VerdictRule(
        "gradient-exploding", ERROR, BACKWARD, TREND, "weights of a gain above the one that what follows needs",
        "multiply them by the gain needed over the gain found",
    ),
    VerdictRule(
        "gradient-vanishing", ERROR, BACKWARD, TREND, "weights of a gain below the one that what follows needs",
        "multiply them by the gain needed over the gain found",
    ),
    VerdictRule(
        "post-norm", ERROR, "norms behind the sums of residual branches", (POST_NORM, SOME_POST_NORM),
        "gradients of the last layers do not shrink with depth", "put the norms in front of the branches, or warm up",
    ),
    VerdictRule(
        "output-scale", WARNING, "first cross-entropy", (LOSS,), "the outputs of the last layer are too large",
        "draw its weights 10 times smaller, or as 0",
    ),
    VerdictRule(
        "loss-scale", WARNING, "first loss, and the largest gradient of a weight", (LARGE_LOSS, TINY_GRADIENT),
        "targets that are not of size 1, or a loss scaled down", "standardize the targets, or scale the loss",
    ),
    VerdictRule(
        "correlation-collapse", WARNING, "mean cosine of the batch's vectors", (DIFFERENT, COLLAPSED),
        "the network is deeper than the scale over which its inputs become alike",
        "fewer layers, residual branches, or an activation and gain that keep angles",
    ),
    VerdictRule(
        "finite-width", WARNING, "widths and depth", (WIDTH,), "the network is deeper than its widths allow",
        "wider layers, fewer of them, or orthogonal weights",
    ),
    VerdictRule(
        "norm-never-updated", WARNING, "norms in eval mode", (), "no batch has moved their running statistics",
        "call model.train() before a network that was not trained is judged",
    ),
    VerdictRule(
        "update-too-large", ERROR, "updates beside weights, and the loss, in a few steps", (USUAL, LARGE, GONE),
        "the learning rate is too large", "multiply the learning rate by the factor named",
    ),
    VerdictRule(
        "update-too-small", ERROR, "updates beside weights in a few steps", (USUAL, SMALL, TINY),
        "the learning rate is too small", "multiply the learning rate by the factor named",
    ),
    VerdictRule(
        "number-format", WARNING, "the log2 histogram of each tensor", (OVERFLOW, UNDERFLOW),
        "numbers beyond the reach of a format", "keep the tensor in float32, or scale the loss by the power named",
    ),
    VerdictRule(
        "unmeasured", WARNING, "modules and tensors that have no row", (),
        "a module that was not called, or not measurable", "look at it, or leave it",
    ),
    VerdictRule(
        "diverged", ERROR, "losses of a run", (GONE,), "the learning rate is too large", "a smaller train.lr",
    ),
    VerdictRule(
        "not-learning", WARNING, "losses of a run", (LEARNED, CONSTANT, STEPS),
        "the learning rate is too small, or the rule is wrong", "another train.lr, or init=kaiming",
    ),
    VerdictRule(
        "never-set", ERROR, "audit: largest entry of a parameter", (), "all entries are subnormal: empty memory",
        "set it",
    ),
    VerdictRule(
        "zero", WARNING, "audit: weights that are 0", (), "nothing passes",
        "draw it, unless it ends a residual branch",
    ),
    VerdictRule(
        "xavier-stacked", WARNING, "audit: std of stacked projections", (AGREES,),
        "Xavier's rule took several matrices for one", "draw each part for itself",
    ),
    VerdictRule(
        "shared", WARNING, "audit: names of one parameter", (), "several modules hold it",
        "nothing, if it is meant: one rule sets them all, and the last one wins",
    ),
    VerdictRule(
        "different", WARNING, "audit of two models: shapes, laws and gains", (AGREES,),
        "they were initialized differently",
        "nothing, if that is meant",
    ),
)  # fmt: skip
RULES = {rule.id: rule for rule in TABLE_OF_RULES}


def list_rules() -> pd.DataFrame:
    """The table of rules, a row for each number: `looks_at`, `threshold` with `unit`, what it is `of`, its `source`."""
    return pd.DataFrame(list(_list_rows()))


def _list_rows() -> Iterator[dict[str, object]]:
    for rule in TABLE_OF_RULES:
        about = {"id": rule.id, "severity": rule.severity, "looks_at": rule.looks_at}
        for one in rule.thresholds or (None,):
            number = {"threshold": math.nan, "unit": "", "of": "", "source": EXACT}
            if one is not None:
                number = {"threshold": float(one), "unit": one.unit, "of": one.of, "source": one.source}
            yield {**about, **number, "cause": rule.cause, "remedy": rule.remedy}


def describe_rules() -> str:
    """The table of rules as a page of Markdown, a row for each rule; `docs/rules.md` is what this gives."""
    lines = [
        "# The rules of a verdict",
        "",
        "What `initlab.diagnose`, `initlab.audit` and every run look for, in this order. `Finding.rule` is the first",
        "column, and `Verdict.rules` is this table as a frame. Cause and remedy are the usual ones; those of a finding",
        "name the layer and the numbers.",
        "",
        "| rule | gravest | looks at | speaks from | usual cause | remedy |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for rule in TABLE_OF_RULES:
        numbers = "<br>".join(f"**{one}** {one.of} ({one.source})" for one in rule.thresholds)
        cells = (f"`{rule.id}`", rule.severity, rule.looks_at, numbers or EXACT, rule.cause, rule.remedy)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
