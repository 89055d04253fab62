"""The variance-scaling formula and its named rules, as `torch.nn.init` has them, with order-free random numbers.

Weights have shape (I, O), I = fan_in, O = fan_out, as in the book's `x @ w`; torch's `nn.Linear` stores the transpose.
Each tensor's random numbers depend on (seed, what it is, layer) only, are drawn in float32 and converted (isometries
are made of them in float64): a seed means the same network in every dtype, at every depth and in every ensemble. The
generator `philox` draws where the network lives, see `philox.py`; `torch` draws on the CPU, the same bits for every
device. Legend: E ensemble.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from initlab.errors import UsageError, choose, keep_checked, nearest, show
from initlab.nn import activations, philox


@dataclass(frozen=True)
class Rule:
    """Weights of standard deviation gain / sqrt(fan), as LeCun et al. 1998, Glorot & Bengio 2010 and He et al. 2015.

    gain: dimensionless; None takes the one that the activation needs, of kind `gain_kind`, a name of
    `activations.GAIN_KINDS`. mode: which fan, a name of MODES. distribution: a name of DISTRIBUTIONS. bias: half-width
    of a uniform bias in units of 1/sqrt(fan_in); 0 starts biases at 0. attempts: if above 0, the drawn weights are
    rescaled on the first batch, at most so many times, until variances are within `tolerance` of 1 (lsuv.py).
    base_width: if above 0, the last layer and the learning rates follow the width relative to it (mup.py). sigma_b:
    standard deviation of a normal bias, which is added to a uniform one if there is one.
    Errors: an unknown name; a number outside its range.

    >>> round(Rule(gain=2.0).std_for("relu", (100, 50)), 12)
    0.2
    """

    gain: float | None = None
    mode: str = "fan_in"
    distribution: str = "normal"
    bias: float = 0.0
    gain_kind: str = "chi"
    attempts: int = 0
    tolerance: float = 0.1
    base_width: int = 0
    sigma_b: float = 0.0

    def __post_init__(self) -> None:
        choose(MODES, self.mode, "mode")
        choose(DISTRIBUTIONS, self.distribution, "distribution")
        choose(activations.GAIN_KINDS, self.gain_kind, "gain_kind")
        keep_checked(self, ("gain", "bias", "sigma_b", "attempts", "tolerance", "base_width"))

    @property
    def has_biases(self) -> bool:
        """Whether biases are drawn."""
        return bool(self.bias or self.sigma_b)

    def gain_for(self, activation: str | activations.Activation) -> float:
        """The gain in force, dimensionless."""
        return activations.gain(activation, self.gain_kind) if self.gain is None else self.gain

    def std_for(self, activation: str | activations.Activation, shape: tuple[int, int]) -> float:
        """Standard deviation of weights (I, O): the gain in force / sqrt(fan)."""
        return self.gain_for(activation) / math.sqrt(MODES[self.mode](*shape))


FIELDS = tuple(field.name for field in fields(Rule))

# What the variance of a weight is divided by.
MODES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda fan_in, fan_out: 1.0,
    "fan_in": lambda fan_in, fan_out: float(fan_in),
    "fan_out": lambda fan_in, fan_out: float(fan_out),
    "fan_avg": lambda fan_in, fan_out: (fan_in + fan_out) / 2,
}


def _generator(seed: int, what: str, layer: int) -> torch.Generator:
    return torch.Generator().manual_seed(philox.key(seed, what, layer) >> 1)


def gaussian(shape: Sequence[int], seed: int, what: str, layer: int = 0) -> Tensor:
    """Standard normal numbers, float32 on the CPU, that depend on (seed, what, layer) only."""
    return torch.randn(*shape, generator=_generator(seed, what, layer))


def uniform(shape: Sequence[int], seed: int, what: str, layer: int = 0) -> Tensor:
    """Uniform numbers on (-1, 1), likewise."""
    return torch.rand(*shape, generator=_generator(seed, what, layer)).mul_(2).sub_(1)


def permutation(n: int, seed: int, what: str, layer: int = 0) -> Tensor:
    """A random order of 0..n-1, int64, likewise."""
    return torch.randperm(n, generator=_generator(seed, what, layer))


Draw = Callable[[Sequence[int], Sequence[int], str, philox.Layers, str | torch.device], Tensor]


class Generator(NamedTuple):
    """Random numbers of an ensemble: f(shape, seeds, what, layers, device) -> float32 (L E, *shape)."""

    gaussian: Draw
    uniform: Draw


def _on_the_cpu(one: Callable[[Sequence[int], int, str, int], Tensor]) -> Draw:
    """Whatever the device: what is drawn on the CPU, and scaled there, is the same network everywhere."""
    return lambda shape, seeds, what, layers, _: torch.stack(
        [one(shape, seed, what, k) for k in ([layers] if isinstance(layers, int) else layers) for seed in seeds]
    )


# Who draws the numbers; `philox` is the default. torch's generator tells seeds apart by 32 bits only.
GENERATORS: dict[str, Generator] = {
    "torch": Generator(_on_the_cpu(gaussian), _on_the_cpu(uniform)),
    "philox": Generator(philox.gaussian, philox.uniform),
}


@dataclass(frozen=True)
class WeightNumbers:
    """The random numbers behind the weights of one layer, or of some, float32 (L E, *shape), a network per seed."""

    generator: Generator
    seeds: Sequence[int]
    layer: philox.Layers
    device: str | torch.device

    def gaussian(self, shape: Sequence[int]) -> Tensor:
        return self.generator.gaussian(shape, self.seeds, "weight", self.layer, self.device)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        return self.generator.uniform(shape, self.seeds, "weight", self.layer, self.device)


def draw_normal(shape: tuple[int, int], std: float, numbers: WeightNumbers) -> Tensor:
    """N(0, std^2)."""
    return numbers.gaussian(shape).mul_(std)


def draw_uniform(shape: tuple[int, int], std: float, numbers: WeightNumbers) -> Tensor:
    """U(-sqrt(3) std, sqrt(3) std)."""
    return numbers.uniform(shape).mul_(std * math.sqrt(3))


def draw_truncated(shape: tuple[int, int], std: float, numbers: WeightNumbers) -> Tensor:
    """Normal cut off at two sigma of its parent, widened so that the standard deviation is the one asked for."""
    edge = math.erf(math.sqrt(2))  # P(|u| < 2)
    z: Tensor = torch.erfinv(numbers.uniform(shape).mul_(edge)).mul_(math.sqrt(2))
    return z.clamp_(-2, 2).mul_(std / 0.87962566103423978)  # sqrt(1 - 4 pdf(2) / P(|u| < 2))


def draw_orthogonal(shape: tuple[int, int], std: float, numbers: WeightNumbers) -> Tensor:
    """std sqrt(fan) times a matrix with orthonormal rows or columns, uniform (Mezzadri 2007: QR, signs of R)."""
    i, o = shape
    q, r = torch.linalg.qr(numbers.gaussian((max(i, o), min(i, o))).double())
    q *= r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    isometry: Tensor = q if i >= o else q.mT
    return isometry * (std * math.sqrt(i))


# name -> f((I, O), std, random numbers): float32, of an isometry float64, (E, I, O), where the random numbers are
DISTRIBUTIONS: dict[str, Callable[[tuple[int, int], float, WeightNumbers], Tensor]] = {
    "normal": draw_normal,
    "uniform": draw_uniform,
    "truncated_normal": draw_truncated,
    "orthogonal": draw_orthogonal,
}
LAWS = frozenset(DISTRIBUTIONS)  # what theory knows; functions of the user's own join the table (custom_init.py)


RULES: dict[str, Rule] = {
    "naive": Rule(gain=1.0, mode="constant"),  # N(0, 1)
    "small": Rule(gain=0.01, mode="constant"),  # N(0, 0.01^2)
    "lecun": Rule(gain=1.0),  # N(0, 1/fan_in), LeCun et al. 1998
    "xavier": Rule(mode="fan_avg"),  # N(0, 2 gain^2/(fan_in + fan_out)), Glorot & Bengio 2010, eq. 12
    "kaiming": Rule(),  # N(0, gain^2/fan_in), He et al. 2015, eq. 14
    "orthogonal": Rule(distribution="orthogonal"),  # gain times a random isometry, Saxe et al. 2013
    "torch_default": Rule(gain=3**-0.5, distribution="uniform", bias=1.0),  # U(-1/sqrt(fan_in), 1/sqrt(fan_in))
    "lsuv": Rule(gain=1.0, distribution="orthogonal", attempts=10),  # then unit variance, Mishkin & Matas 2015
    "mup": Rule(base_width=50),  # kaiming, and what keeps training alike at every width, Yang et al. 2022
}


# What functions take that take a rule's fields too: for the nearest match of a misspelt one.
PARAMETERS = (
    "init", "activation", "depth", "width", "widths", "inputs", "batch", "seeds", "dtype", "device", "generator",
    "steps", "lr", "optimizer", "loss", "every", "histograms", "backward", "input_gradient", "residual", "statistics",
    "q0", "c0", "method",
)  # fmt: skip


def rule(init: "str | Rule", **changes: object) -> Rule:
    """A rule by its name, or a `Rule` itself, with some of its fields replaced.

    init: a row of RULES, or a Rule. changes: `gain`, `gain_kind`, `mode`, `distribution`, `bias`, `sigma_b`,
    `attempts`, `tolerance`, `base_width`, as in `Rule`; None keeps the rule's own.
    Errors: an unknown rule or field; a field that is out of its range.

    >>> rule("kaiming", mode="fan_out").mode
    'fan_out'
    """
    if not isinstance(init, str | Rule):
        raise UsageError(f"init={show(init)}: must be a rule's name or a Rule")
    row = choose(RULES, init, "init") if isinstance(init, str) else init
    for name in changes:
        if name not in FIELDS:
            known = nearest(name, [*FIELDS, *PARAMETERS])
            raise UsageError(f"{name}: no such parameter; of a rule there are {', '.join(FIELDS)}{known}")
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return replace(row, **given) if given else row  # type: ignore[arg-type]
    except UsageError as error:
        raise UsageError(f"init.{error}") from None


def rule_name(init: "str | Rule") -> str:
    """A rule as tables name it: its name in RULES, or for a rule of the user's what it is made of."""
    if isinstance(init, str):
        return init
    return next((name for name, row in RULES.items() if row == init), f"{init.distribution}, {init.mode}")


def draw(
    rule: Rule,
    activation: str | activations.Activation,
    shape: tuple[int, int],
    seeds: Sequence[int],
    layer: philox.Layers,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    generator: str = "philox",
) -> tuple[Tensor, Tensor]:
    """Weights (E, I, O) and biases (E, O) of one layer for an ensemble, a network per seed.

    rule: how they are distributed. activation: what the layer is followed by, for a gain that depends on it. shape:
    (I, O). seeds: one for each network. layer: its number, which the random numbers depend on; or the numbers of L
    layers of this shape, which come one after the other, (L E, I, O) and (L E, O). dtype, device: of the result.
    generator: a name of GENERATORS. Errors: an unknown generator; a gain that the activation has not.

    >>> w, b = draw(RULES["kaiming"], "relu", (200, 100), seeds=[0, 1], layer=1)
    >>> tuple(w.shape), tuple(b.shape), round(float(w.std()), 2)
    ((2, 200, 100), (2, 100), 0.1)
    """
    fan_in, fan_out = shape
    std = rule.std_for(activation, shape)
    source = choose(GENERATORS, generator, "generator")
    weights = DISTRIBUTIONS[rule.distribution](shape, std, WeightNumbers(source, seeds, layer, device))
    biases = torch.zeros(len(weights), fan_out)
    if rule.bias:
        biases = source.uniform((fan_out,), seeds, "bias", layer, device) * (rule.bias / math.sqrt(fan_in))
    if rule.sigma_b:
        normal = source.gaussian((fan_out,), seeds, "normal bias", layer, device) * rule.sigma_b
        biases = biases + normal if rule.bias else normal
    if dtype != torch.float64:  # one rounding to float32 for all, whatever the narrower format
        weights = weights.float()
    return weights.to(device, dtype), biases.to(device, dtype)
