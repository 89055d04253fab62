"""The initialization rules that have a name, and which of them the numbers of a weight agree with.

A rule is a line: its name, the law of its numbers, their standard deviation (of an orthogonal matrix or an identity the
scale, of a constant the value), and where it comes from.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from initlab.models.families import CUT, NORMAL, UNIFORM
from initlab.models.laws import CONSTANT, IDENTITY, ORTHOGONAL, SPARSE, WeightLaw
from initlab.nn import activations
from initlab.nn.activations import Activation
from initlab.nn.custom_activation import name_of
from initlab.nn.init import MODES

ERRORS = 5.0  # standard errors within which a number agrees
CLOSE = 1e-3  # of a scale or a constant, which have no standard error
AT_TWO = 0.87962566103423978  # what a cut at two standard deviations leaves of one


class Size(NamedTuple):
    """What the scale of a rule may follow from: the fans of a weight, and how many blocks a network has."""

    fan_in: float
    fan_out: float
    depth: float = math.nan


class NamedRule(NamedTuple):
    """A line of the table: `scale` of a size is nan where the rule does not apply; cut normal ones end at two
    standard deviations of the uncut density.
    """

    name: str
    law: str
    scale: Callable[[Size], float]
    source: str
    mean: float = 0.0


# torch.nn.init.calculate_gain
GAINS = {"linear": 1.0, "relu": math.sqrt(2), "leaky_relu": math.sqrt(2 / (1 + 0.01**2)), "tanh": 5 / 3, "selu": 0.75}


def scale_by_root(factor: float, mode: str) -> Callable[[Size], float]:
    """factor / sqrt(fan), by a name of MODES."""
    return lambda size: factor / math.sqrt(MODES[mode](size.fan_in, size.fan_out))


def keep_scale(value: float) -> Callable[[Size], float]:
    return lambda size: value


_HE, _GLOROT = "He et al. 2015, eq. 14", "Glorot & Bengio 2010, eq. 16"
_SAXE, _TORCH = "Saxe et al. 2013", "torch.nn.init"
NAMED_RULES: tuple[NamedRule, ...] = (
    NamedRule("torch's default", UNIFORM, scale_by_root(3**-0.5, "fan_in"), "nn.Linear, nn.Conv2d: 1/sqrt(fan_in)"),
    NamedRule("torch's default of RNNs", UNIFORM, scale_by_root(3**-0.5, "fan_out"), "nn.LSTM, nn.GRU: 1/sqrt(units)"),
    NamedRule("torch's default of embeddings, or naive", NORMAL, keep_scale(1), "nn.Embedding: N(0, 1)"),
    NamedRule("lecun_normal", NORMAL, scale_by_root(1, "fan_in"), "LeCun et al. 1998; Klambauer et al. 2017"),
    NamedRule("lecun_uniform", UNIFORM, scale_by_root(1, "fan_in"), "LeCun et al. 1998"),
    *(
        NamedRule(f"kaiming_{law}_({mode}, {name})", law, scale_by_root(gain, mode), _HE)
        for law in (NORMAL, UNIFORM) for mode in ("fan_in", "fan_out") for name, gain in GAINS.items()
    ),
    *(
        NamedRule(f"xavier_{law}_({name})", law, scale_by_root(gain, "fan_avg"), _GLOROT)
        for law in (NORMAL, UNIFORM) for name, gain in GAINS.items()
    ),
    *(
        NamedRule(f"{name}, cut at 2 and widened again", CUT, scale, "jax.nn.initializers, Keras, Flax")
        for name, scale in (
            ("lecun_normal", scale_by_root(1, "fan_in")), ("he_normal", scale_by_root(math.sqrt(2), "fan_in")),
            ("glorot_normal", scale_by_root(1, "fan_avg")),
        )
    ),
    *(
        NamedRule(f"{name}, cut at 2: std is 0.88 of it", CUT, scale_by_root(AT_TWO * gain, fan), _TORCH)
        for name, gain, fan in (
            ("lecun_normal", 1, "fan_in"), ("kaiming_normal_(fan_in, relu)", math.sqrt(2), "fan_in"),
            ("kaiming_normal_(fan_out, relu)", math.sqrt(2), "fan_out"),
            ("xavier_normal_(linear)", 1, "fan_avg"),
        )
    ),
    NamedRule("GPT-2's 0.02", NORMAL, keep_scale(0.02), "Radford et al. 2019; BERT in PyTorch, ViT, DCGAN"),
    NamedRule("GPT-2's 0.02/sqrt(2L)", NORMAL, lambda size: 0.02 / math.sqrt(2 * size.depth), "Radford et al. 2019"),
    NamedRule("BERT's 0.02, cut at 2", CUT, keep_scale(0.02 * AT_TWO), "Devlin et al. 2018, in TensorFlow"),
    NamedRule("trunc_normal_()", CUT, keep_scale(AT_TWO), "torch.nn.init: std 1, cut at 2"),
    NamedRule("small", NORMAL, keep_scale(0.01), "heads of VGG and of detectors, N(0, 0.01^2)"),
    NamedRule("small init", NORMAL, scale_by_root(math.sqrt(0.4), "fan_in"), "Nguyen & Salazar 2019"),
    NamedRule("Wang's 2/(L sqrt(d))", NORMAL, lambda size: 2 / (size.depth * math.sqrt(size.fan_in)), "GPT-J"),
    NamedRule("embedding of 1/sqrt(d)", NORMAL, scale_by_root(1, "fan_out"), "Vaswani et al. 2017, fairseq"),
    NamedRule("mup, base width 50, output, relu", NORMAL, lambda size: 10 / size.fan_in, "Yang et al. 2022"),
    NamedRule("mup, output", NORMAL, lambda size: 1 / size.fan_in, "Yang et al. 2022, table 3"),
    NamedRule("SIREN", UNIFORM, scale_by_root(math.sqrt(2) / 30, "fan_in"), "Sitzmann et al. 2020: omega 30"),
    NamedRule("SIREN, first layer", UNIFORM, lambda size: 3**-0.5 / size.fan_in, "Sitzmann et al. 2020"),
    NamedRule("uniform_()", UNIFORM, keep_scale(12**-0.5), _TORCH, mean=0.5),
    NamedRule("N(1, 0.02^2)", NORMAL, keep_scale(0.02), "norms of DCGAN", mean=1.0),
    *(NamedRule(f"orthogonal_({name})", ORTHOGONAL, keep_scale(gain), _SAXE) for name, gain in GAINS.items()),
    NamedRule("orthogonal_(0.01)", ORTHOGONAL, keep_scale(0.01), "output layers of policies, Andrychowicz et al. 2020"),
    NamedRule("zeros_", CONSTANT, keep_scale(0), _TORCH),
    NamedRule("ones_", CONSTANT, keep_scale(1), _TORCH),
    NamedRule("eye_ or dirac_", IDENTITY, keep_scale(1), _TORCH),
    NamedRule("sparse_", SPARSE, keep_scale(0.01), "Martens 2010"),
)  # fmt: skip


def matching_rules(
    law: WeightLaw, fan_in: float, fan_out: float, depth: int | None = None, activation: str | Activation | None = None
) -> list[NamedRule]:
    """The named rules that the numbers of a weight agree with in law, scale and mean, at 5 standard errors.

    law: of the weight, or of one of its slices. fan_in, fan_out: of that slice; nan where it has none. depth: how many
    blocks the network has, for rules that depend on it. activation: what follows, whose gain initlab's `kaiming` takes.

    >>> import torch
    >>> from initlab.models.laws import recognize_law
    >>> w = torch.nn.init.kaiming_normal_(torch.empty(256, 128), generator=torch.Generator().manual_seed(0))
    >>> [rule.name for rule in matching_rules(recognize_law(w), 128, 256)]
    ['kaiming_normal_(fan_in, relu)', 'kaiming_normal_(fan_in, leaky_relu)']
    """
    size = Size(fan_in or math.nan, fan_out or math.nan, math.nan if depth is None else depth)
    rules = NAMED_RULES
    if activation is not None:
        gain, name = activations.gain(activation), name_of(activation)
        scale = scale_by_root(gain, "fan_in")
        rules += tuple(NamedRule(f"kaiming for {name}", kind, scale, _HE) for kind in (NORMAL, UNIFORM))
        rules += (NamedRule(f"orthogonal for {name}", ORTHOGONAL, keep_scale(gain), _SAXE),)
    return [rule for rule in rules if rule.law == law.name and is_matching(law, rule.scale(size), rule)]


def is_matching(law: WeightLaw, scale: float, rule: NamedRule) -> bool:
    """Whether a law has the scale and the mean that a rule gives it."""
    if rule.law in (ORTHOGONAL, IDENTITY):
        return abs(law.scale - scale) <= CLOSE * scale
    if rule.law == CONSTANT:
        return abs(law.mean - scale) <= CLOSE * scale
    std, error = law.std, law.std_error
    if rule.law == SPARSE:
        std, error = law.nominal_std, law.nominal_std / math.sqrt(2 * law.size * (1 - law.zeros))
    ends = 2 * scale / AT_TWO
    if rule.law == CUT and not max(abs(law.high - ends), abs(law.low + ends)) < 0.05 * ends:
        return False
    return abs(std - scale) <= ERRORS * error and abs(law.mean - rule.mean) <= ERRORS * law.std / math.sqrt(law.size)
