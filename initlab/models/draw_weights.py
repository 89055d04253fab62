"""Values for each weight of a model by a rule: each gate, each projection and each group of a convolution for itself.

Random numbers depend on the seed and the name of the parameter alone, so that a layer more changes no other. They are
drawn in float32 on the CPU whatever the device, and torch's own generators stay where they are.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init as torch_init

from initlab.errors import UsageError, describe_error, nearest, show
from initlab.models.fans import ModelTensor, Slice
from initlab.nn import init, philox
from initlab.nn.activations import ACTIVATIONS, Activation
from initlab.nn.init import DISTRIBUTIONS, FIELDS, MODES, RULES, Generator, Rule, WeightNumbers

Fill = Callable[[Tensor], Any]

# Those of torch that scale by fans are rules: fans are counted as the layer uses its weight, gains as it needs them.
AS_RULES = {
    "xavier_normal_": Rule(mode="fan_avg"),
    "xavier_uniform_": Rule(mode="fan_avg", distribution="uniform"),
    "kaiming_normal_": Rule(),
    "kaiming_uniform_": Rule(distribution="uniform"),
    "orthogonal_": RULES["orthogonal"],
}
PLAIN = ("normal_", "uniform_", "trunc_normal_", "constant_", "zeros_", "ones_", "eye_", "dirac_", "sparse_")


def read_rule(rule: object, options: Mapping[str, object]) -> tuple[str, Rule | Fill]:
    """A rule as it may be given, with its name: a name of initlab's or torch's, a Rule, or a function of a tensor.

    Options are fields of a rule, or arguments of torch's function.
    """
    name = rule if isinstance(rule, str) else getattr(rule, "__name__", type(rule).__name__)
    if callable(rule) and not (name in (*AS_RULES, *PLAIN) and rule is getattr(torch_init, name)):
        if options:
            raise UsageError(f"{next(iter(options))}: a function takes no options here; use functools.partial")
        return name, rule
    if isinstance(rule, Rule):
        return init.rule_name(rule), init.rule(rule, **options)
    if not isinstance(rule, str) and not callable(rule):
        raise UsageError(f"rule={show(rule)}: must be the name of a rule, a Rule, or a function that fills a tensor")
    if name not in RULES:
        name = next((one for one in (name, f"{name}_") if one in AS_RULES or one in PLAIN), name)
    if name in PLAIN:
        function = getattr(torch_init, name)
        try:
            inspect.signature(function).bind(torch.empty(0), **options)
        except TypeError as error:
            raise UsageError(f"rule={name}: {error}") from None
        return name, partial(function, **options)
    if name not in RULES and name not in AS_RULES:
        known = [*RULES, *AS_RULES, *PLAIN]
        raise UsageError(f"rule={name}: must be one of {', '.join(known)}{nearest(name, known)}")
    if name in RULES:
        return name, init.rule(name, **options)
    unknown = [option for option in options if option not in FIELDS]
    if unknown:
        raise UsageError(f"{unknown[0]}: no such parameter; there are {', '.join(FIELDS)}{nearest(unknown[0], FIELDS)}")
    return name, init.rule(AS_RULES[name], **options)


def make_numbers(name: str, seed: int) -> WeightNumbers:
    """The random numbers of a parameter."""

    def draw(one: Any, shape: Sequence[int], seeds: Sequence[int], what: str, layer: int, device: Any) -> Tensor:
        return torch.stack([one(shape, each, f"{what} {name}", layer) for each in seeds])

    return WeightNumbers(Generator(partial(draw, init.gaussian), partial(draw, init.uniform)), [seed], 0, "cpu")


def split_groups(tensor: ModelTensor, part: Slice, values: Tensor) -> Iterator[Tensor]:
    """Views of the values of a slice, outputs first, each of them fed by inputs of its own."""
    groups = getattr(tensor.module, "groups", 1) if tensor.kind.endswith("convolution") else 1
    if values.ndim == 3 and tensor.kind == "linear" and not isinstance(tensor.module, nn.Bilinear):
        yield from (one.transpose(0, max(tensor.axis - 1, 0)) for one in values)  # a stack of matrices
    elif groups > 1:
        yield from (one.transpose(0, tensor.axis) for one in values.chunk(groups, 0))
    else:
        yield values.narrow(tensor.axis, part.start, part.stop - part.start).transpose(0, tensor.axis)


def draw_weight(
    tensor: ModelTensor, name: str, rule: Rule | Fill, activation: Activation | None, seed: int
) -> tuple[Tensor, float]:
    """Values for a weight, float32 on the CPU, and their gain; nan where a function or a constant decides.

    tensor: of the model. name: of the rule. activation: what follows; None where a gain of 1 is right.
    """
    values, gain = torch.empty(tensor.values.shape), math.nan
    if isinstance(rule, Rule):
        gain = rule.gain_for(activation or ACTIVATIONS["linear"])
        if rule == RULES["torch_default"] and tensor.kind == "recurrent":  # torch scales by the number of units
            rule = replace(rule, mode="fan_out")
    for part in tensor.slices:
        for number, piece in enumerate(split_groups(tensor, part, values)):
            key = f"{tensor.name} {part.label} {number}"
            if isinstance(rule, Rule):
                fan_in, fan_out = (1.0 if math.isnan(fan) else fan for fan in (part.fan_in, part.fan_out))
                std = gain / math.sqrt(MODES[rule.mode](fan_in, fan_out))
                matrix = (piece[0].numel(), len(piece))
                drawn = DISTRIBUTIONS[rule.distribution](matrix, std, make_numbers(key, seed))[0].mT
            else:
                drawn = fill(rule, piece, tensor, name, philox.key(seed, key, 0))
            piece.copy_(drawn.reshape(piece.shape))
    return values, math.nan if isinstance(rule, Rule) and rule.mode == "constant" else gain


def fill(function: Fill, piece: Tensor, tensor: ModelTensor, name: str, seed: int) -> Tensor:
    """What a function makes of a piece of a weight; a line on what went wrong where it cannot."""
    given = torch.empty(piece.shape)
    if name in ("eye_", "dirac_"):
        function = torch_init.eye_ if given.ndim == 2 else torch_init.dirac_
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed >> 1)
            made = function(given)
    except Exception as error:
        text = f"rule={name}: cannot fill {tensor.name} of shape {tuple(piece.shape)}: {describe_error(error)}"
        raise UsageError(text) from error
    made = made.detach() if isinstance(made, Tensor) else given
    if made.shape != given.shape:
        raise UsageError(f"rule={name}: gives {tuple(made.shape)} for {tensor.name} of shape {tuple(given.shape)}")
    return made
