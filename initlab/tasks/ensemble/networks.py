"""The networks of one batched program: what is built, which rules and seeds they have, and what is drawn for them.

Networks may differ in seed, rule, gain and learning rate; what is drawn for one depends on its own seed and rule only.
Legend: E ensemble, N batch, I fan_in, O fan_out, L layers.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from initlab.engine.mlp import Parameters
from initlab.errors import UsageError, check, check_value, keep_checked, plain, show
from initlab.nn import lsuv
from initlab.nn.activations import Activation
from initlab.nn.custom_activation import Given, as_activation
from initlab.nn.init import GENERATORS, RULES, Rule, draw, rule, rule_name
from initlab.nn.mup import last_layer
from initlab.nn.network import Network, dense, resolve_units
from initlab.nn.philox import Layers
from initlab.stats.keys import Seeds, resolve_seeds
from initlab.tasks.ensemble.device import Where

Init = str | Rule | Sequence[str | Rule]
Columns = Mapping[str, np.ndarray | pd.Categorical]
Frames = dict[str, pd.DataFrame]  # tables by name
AHEAD = 2**18  # weights that are drawn together, of neighbouring layers: 1 MB
Emit = Callable[[Frames], object]


@dataclass(frozen=True)
class Net:
    """A stack to be built: `depth` layers of `width` units, fed with `batch` inputs of `inputs` units.

    widths: where they differ the units of every layer; `width` is then the largest of them.
    Errors: a number that is not whole or below 1.
    """

    activation: Activation
    depth: int = 50
    width: int = 100
    inputs: int = 100
    batch: int = 200
    residual: bool = False
    widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        keep_checked(self, ("depth", "width", "inputs", "batch", "residual"))

    @classmethod
    def resolve(
        cls,
        activation: Given,
        depth: int,
        width: int,
        inputs: int | None,
        batch: int,
        residual: bool = False,
        widths: Sequence[int] | None = None,
    ) -> "Net":
        """From what a user says: an activation by name, row or function, and `inputs` None for the first width."""
        units = resolve_units(depth, width, widths, inputs)
        own = () if widths is None else tuple(units[1:])
        return cls(as_activation(activation), len(units) - 1, max(units[1:]), units[0], batch, residual, own)

    @cached_property
    def sizes(self) -> list[int]:
        """Units of the input and of every layer."""
        return [self.inputs, *(self.widths or [self.width] * self.depth)]

    @cached_property
    def network(self) -> Network:
        """The architecture as data."""
        return dense(self.sizes, self.activation, self.residual)

    def shape(self, layer: int) -> tuple[int, int]:
        """(I, O) of a layer's weights."""
        return self.sizes[layer - 1], self.sizes[layer]

    def __str__(self) -> str:
        layers = f"widths={show(list(self.widths))}" if self.widths else f"depth={self.depth} width={self.width}"
        return f"{layers} inputs={self.inputs} batch={self.batch}"


@dataclass(frozen=True)
class Ensemble:
    """A rule and a seed for each network, perhaps a learning rate, and the columns that tell the networks apart.

    `columns` have a value for each network and are added to every table. The networks lie on `points` of a grid, each
    an ensemble of as many seeds, the seed running fastest.
    """

    rules: Sequence[Rule]
    seeds: Sequence[int]
    rates: Sequence[float] = ()
    columns: Columns = field(default_factory=dict)
    points: int = 1

    @classmethod
    def resolve(
        cls,
        init: Init,
        seeds: Seeds,
        activation: Activation,
        fields: Mapping[str, Any] | None = None,
        lr: float | Sequence[float] = 0.0,
    ) -> "Ensemble":
        """From what a user says: one rule and one learning rate for all, or one for each seed, which then is a column.

        init: a rule's name, a `Rule`, or a sequence of them. seeds: how many networks, or their seeds. fields: fields
        of a rule that replace its own. lr: learning rate, or a sequence of them. Errors: an unknown rule or field; not
        as many rules or rates as networks; networks that are the same.
        """
        numbers, inits, rates = resolve_seeds(seeds), plain(init), plain(lr)
        columns: dict[str, np.ndarray | pd.Categorical] = {}
        if isinstance(inits, str | Rule):
            rules = [rule(inits, **(fields or {}))] * len(numbers)
        elif isinstance(inits, Sequence):
            rules = [rule(one, **(fields or {})) for one in inits]
            columns["init"] = pd.Categorical([rule_name(one) for one in inits])
            columns["gain"] = np.array([one.gain_for(activation) for one in rules])
        else:
            raise UsageError(f"init={show(init)}: must be a rule's name, a Rule, or a sequence with one for each seed")
        if isinstance(rates, Sequence) and not isinstance(rates, str | bytes):
            rates = [check_value("train.lr", rate) for rate in rates]
            columns["lr"] = np.array(rates)
        else:
            rates = check(train_lr=rates) * len(numbers)
        for what, given in (("init", rules), ("train.lr", rates)):
            if len(given) != len(numbers):
                raise UsageError(f"{what}: {len(given)} for {len(numbers)} networks; give one, or one for each seed")
        networks = list(zip(rules, numbers, rates, strict=True))
        if not isinstance(numbers, range) and len(set(networks)) < len(networks):
            _, twice, _ = Counter(networks).most_common(1)[0][0]
            raise UsageError(f"seeds={show(list(numbers))}: {twice} stands there more than once")
        return cls(rules, numbers, rates, columns)

    def __len__(self) -> int:
        return len(self.seeds)

    def part(self, chunk: slice) -> "Ensemble":
        """Some of the networks."""
        columns = {name: values[chunk] for name, values in self.columns.items()}
        return Ensemble(self.rules[chunk], self.seeds[chunk], self.rates[chunk], columns)

    def add_columns(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The frame, whose rows run through the networks fastest, with the columns that tell them apart."""
        if not self.columns:
            return frame
        network = np.arange(len(frame)) % len(self)
        return frame.assign(**{name: values.take(network) for name, values in self.columns.items()})


def share_rule(rules: Sequence[Rule]) -> bool:
    """Whether all networks have the same rule."""
    return all(one is rules[0] or one == rules[0] for one in rules)


def draw_networks(
    rules: Sequence[Rule],
    activation: Activation,
    shape: tuple[int, int],
    seeds: Sequence[int],
    layer: Layers,
    where: Where,
) -> tuple[Tensor, Tensor]:
    """Weights (E, I, O) and biases (E, O) of a layer, each network by its own rule and seed.

    Where all rules are the same they may be those of several layers, (L E, I, O) and (L E, O). Networks of one seed
    share their Gaussian numbers: these are drawn once and scaled by each network's own std.
    """
    how = (layer, where.dtype, where.device, where.generator)
    if share_rule(rules):
        return draw(rules[0], activation, shape, seeds, *how)
    if all(one.distribution == "normal" and not one.has_biases for one in rules):
        unique = list(dict.fromkeys(seeds))
        unit, _ = draw(RULES["naive"], activation, shape, unique, layer, torch.float32, where.device, where.generator)
        stds = torch.tensor([one.std_for(activation, shape) for one in rules], device=where.device)
        w = (unit[[unique.index(seed) for seed in seeds]] * stds[:, None, None]).to(where.dtype)
        return w, w.new_zeros(len(seeds), shape[1])
    each = [draw(one, activation, shape, [seed], *how) for one, seed in zip(rules, seeds, strict=True)]
    return torch.cat([w for w, _ in each]), torch.cat([b for _, b in each])


class Networks:
    """A chunk of stacks: draws what it needs, on its device; what the data rescale is fitted at once."""

    def __init__(self, net: Net, ensemble: Ensemble, where: Where, keep_weights: bool = False) -> None:
        """`keep_weights` holds on to weights that have been drawn; else each is drawn again whenever it is asked for.

        A rule that is fitted to data is fitted to the input that the stack will see, and `fit` says how it went.
        """
        self.net, self.ensemble, self.where = net, ensemble, where
        self._keep, self._kept = keep_weights, dict[int, tuple[Tensor, Tensor | None]]()
        entries = len(ensemble) * max(net.sizes) ** 2
        self._at_once = max(1, min(16, AHEAD // entries)) if share_rule(ensemble.rules) else 1
        self._ahead = dict[int, tuple[Tensor, Tensor]]()
        self._has_biases = any(one.has_biases for one in ensemble.rules)
        self.fit = None
        if any(one.attempts for one in ensemble.rules):
            x = self.gaussian(net.inputs, "input")
            self.fit = lsuv.fit(ensemble.rules, ensemble.seeds, net.network, self._draw, x)

    def __len__(self) -> int:
        return len(self.ensemble)

    def weights(self, layer: int, who: Sequence[int] | None = None) -> tuple[Tensor, Tensor | None]:
        """w (E, I, O) and b (E, O) of a layer, None where no network has biases; of all networks, or of some."""
        if layer in self._kept:
            w, b = self._kept[layer]
            return (w, b) if who is None else (w[list(who)], None if b is None else b[list(who)])
        w, b = self._draw(layer, who)
        if self.fit is not None:
            w = self.fit.scale(layer, w, who)
        if self._keep and who is None:
            self._kept[layer] = w, b
        return w, b

    def _draw(self, layer: int, who: Sequence[int] | None = None) -> tuple[Tensor, Tensor | None]:
        rules, seeds, net = self.ensemble.rules, self.ensemble.seeds, self.net
        if who is not None and layer in self._ahead:
            w, b = (one[list(who)] for one in self._ahead[layer])
            return w, b if self._has_biases else None
        if who is not None:
            rules, seeds = [rules[k] for k in who], [seeds[k] for k in who]
        elif self._at_once > 1:
            if layer not in self._ahead:
                self._ahead.clear()
                first = (layer - 1) // self._at_once * self._at_once + 1
                near = range(first, min(first + self._at_once, net.depth + 1))
                layers = [k for k in near if net.shape(k) == net.shape(layer)]
                drawn = draw_networks(rules, net.activation, net.shape(layer), seeds, layers, self.where)
                each = (one.view(len(layers), len(seeds), *one.shape[1:]).unbind() for one in drawn)
                self._ahead = dict(zip(layers, zip(*each, strict=True), strict=True))
            w, b = self._ahead[layer]
            return w, b if self._has_biases else None
        w, b = draw_networks(rules, net.activation, net.shape(layer), seeds, layer, self.where)
        return w, b if self._has_biases else None

    def gaussian(self, units: int, what: str) -> Tensor:
        """Unit Gaussian numbers (E, N, units); networks of one seed have the same."""
        source, where = GENERATORS[self.where.generator], self.where
        drawn = source.gaussian((self.net.batch, units), self.ensemble.seeds, what, 0, where.device)
        return drawn.to(where.device, where.dtype)


class Start(NamedTuple):
    """Where a training starts: [(w (E, I, O), b (E, O)), ...], and how the data rescaled it, if they did."""

    parameters: Parameters
    fit: lsuv.Fit | None


def draw_trained(
    rules: Sequence[Rule],
    activation: Given,
    sizes: Sequence[int],
    seeds: Sequence[int],
    x: Tensor,
    generator: str = "philox",
) -> Start:
    """The weights of networks to be trained, layers of `sizes` units, with the dtype and the device of x (E, N, I).

    rules, seeds: one of each for every network. x: what a rule that looks at data is fitted to; no other rule looks at
    it. The last layer of a network with hidden layers is drawn as its rule says of outputs.
    """
    where, shapes, row = Where(x.dtype, x.device, generator), list(pairwise(sizes)), as_activation(activation)
    found = []
    for layer, shape in enumerate(shapes, start=1):
        last = 1 < layer == len(shapes)
        by_layer = [last_layer(one, row, shape[0]) for one in rules] if last else rules
        found.append(draw_networks(by_layer, row, shape, seeds, layer, where))
    fit = lsuv.fit(rules, seeds, dense(sizes, row), lambda layer: found[layer - 1], x)
    if fit is not None:
        found = [(fit.scale(layer, w), b) for layer, (w, b) in enumerate(found, start=1)]
    return Start(found, fit)
