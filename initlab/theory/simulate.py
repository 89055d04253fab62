"""Networks drawn from the exact law of a stack, without drawing all of their weights where that is cheaper.

Given a layer's inputs x (b x I), z = x W with Gaussian W depends on W only through an orthonormal basis of the rows of
x: with x^T = Q R, z = R^T (Q^T W), and Q^T W is Gaussian. Only the inner products of the inputs, x x^T = R^T R, are
needed. On the way back d W^T = d (Q^T W)^T Q^T + what W does outside the basis, independent of everything so far. So
b < I inputs cost b^2 I per layer, not b I^2, with no approximation but one: weights of another distribution are taken
as normal where a layer has many inputs. The networks are not those that a run with the same seed draws.

A large batch is represented by a few of its inputs. They are alike, so that the variance of an average over the batch
follows from that of one input and the covariance of two (of pairs: of one pair, of two that share an input, of two that
do not; Hoeffding 1948). Legend: E networks, b inputs, K tensors, F statistics.
"""

from collections.abc import Container, Sequence
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from initlab.nn.activations import Activation
from initlab.stats.keys import LayerTensor
from initlab.stats.statistics import SATURATED
from initlab.theory.forward_law import DenseLayer
from initlab.theory.sample import (
    Sample,
    Sums,
    estimate_squared_mean,
    find_sample,
    find_statistics,
    find_statistics_of_product,
)

ENTRIES = 2**18  # of a layer's tensor, held at once: near the processor
MANY_INPUTS = 64  # of a layer, from which on a uniform weight does as a normal one: by the central limit theorem
EDGE = 0.87962566103423978  # standard deviation of a normal variable cut off at two
INSIDE = 0.9544997361036416  # probability that it is not
_SMALL = {torch.float32: 1e-6, torch.float64: 1e-13}  # of a Gram matrix: rounding, as its smallest relative eigenvalue


class _Batch:
    """b vectors of E networks, `values` (E, b, n)."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @cached_property
    def differences(self) -> Tensor:
        """The first vector and its differences from the others: what is apart where all have nearly become one."""
        found = self.values.clone()
        found[:, 1:] -= self.values[:, :1]
        return found

    @cached_property
    def products(self) -> Tensor:
        """The inner products of `differences`, (E, b, b)."""
        return self.differences @ self.differences.mT


_Known: TypeAlias = tuple[Tensor | None, Tensor, Tensor | float]


class _Chain:
    """The random numbers of a group of E networks, and the b inputs that stand for a batch."""

    def __init__(self, networks: int, inputs: int, batch: int, generator: torch.Generator, distribution: str) -> None:
        self.networks, self.inputs, self.batch = networks, inputs, batch
        self.generator, self.distribution, self.dtype = generator, distribution, torch.float64

    def normal(self, *shape: int) -> Tensor:
        found: Tensor = torch.randn(self.networks, *shape, generator=self.generator, dtype=self.dtype)
        return found

    def uniform(self, *shape: int) -> Tensor:
        """On (-1, 1)."""
        return torch.rand(self.networks, *shape, generator=self.generator, dtype=self.dtype).mul_(2).sub_(1)

    def weights(self, layer: DenseLayer) -> Tensor:
        """(E, I, O) of variance `layer.weight`."""
        i, o = layer.fan_in, layer.fan_out
        if layer.orthogonal:
            frame: Tensor = _draw_frame(self.normal(min(i, o), max(i, o))) * (layer.weight * max(i, o)) ** 0.5
            return frame.mT if i >= o else frame
        if self.distribution == "uniform":
            return self.uniform(i, o).mul_((3 * layer.weight) ** 0.5)
        if self.distribution == "truncated_normal":
            flat: Tensor = torch.special.ndtri(0.5 + 0.5 * self.uniform(i, o) * INSIDE)
            return flat.mul_(layer.weight**0.5 / EDGE)
        return self.normal(i, o).mul_(layer.weight**0.5)

    def biases(self, layer: DenseLayer) -> Tensor | float:
        """(E, 1, O)."""
        found: Tensor | float = 0.0
        if layer.bias:
            found = found + self.normal(1, layer.fan_out) * layer.bias**0.5
        if layer.uniform_bias:
            found = found + self.uniform(1, layer.fan_out) * (3 * layer.uniform_bias) ** 0.5
        return found

    def is_projected(self, layer: DenseLayer) -> bool:
        """Whether the projection of the weights on the inputs is enough, and cheaper."""
        room = min(layer.fan_in, layer.fan_out) // 2 if layer.orthogonal else layer.fan_in - 1
        normal = layer.orthogonal or self.distribution == "normal" or layer.fan_in >= MANY_INPUTS
        return self.inputs <= room and normal

    def forward(self, layer: DenseLayer, x: _Batch) -> tuple[Tensor, _Known]:
        """z = f x W + b; then the basis of the inputs and W in it (or None and W), and the factor f.

        The factor is 1 unless LSUV scales the weights.
        """
        if self.is_projected(layer):
            long = max(layer.fan_in, layer.fan_out) if layer.orthogonal else layer.fan_out
            root = _take_root(x.products)
            drawn = self.normal(self.inputs, long)
            drawn = (_draw_frame(drawn) * long**0.5 if layer.orthogonal else drawn) * layer.weight**0.5
            z = root @ drawn[..., : layer.fan_out]
            z[:, 1:] += z[:, :1].clone()
            safe = root + torch.diag_embed(
                (root.diagonal(dim1=-2, dim2=-1) == 0).to(root.dtype)
            )  # of an input of zeros
            basis = torch.linalg.solve_triangular(safe, x.differences, upper=False)
        else:
            basis, drawn = None, self.weights(layer)
            z = x.values @ drawn
        biases = self.biases(layer)
        if layer.fitted is None:
            return z + biases, (basis, drawn, 1.0)
        factor = torch.ones(self.networks, 1, 1, dtype=torch.float64)
        for _ in range(layer.fitted.attempts):
            variance = self.pooled_variance((z * factor.to(z.dtype) + biases).double())
            due = (variance - 1).abs() >= layer.fitted.tolerance
            factor = torch.where(due & (variance > 0) & variance.isfinite(), factor / variance.sqrt(), factor)
        factor = factor.to(z.dtype)
        return z * factor + biases, (basis, drawn, factor)

    def pooled_variance(self, z: Tensor) -> Tensor:
        """Over units and the whole batch, (E, 1, 1), estimated from its representatives."""
        means = z.mean(-1)
        return ((z * z).mean((-2, -1)) - estimate_squared_mean(means, self.batch))[:, None, None]

    def back(self, layer: DenseLayer, d: _Batch, known: _Known) -> Tensor:
        """d W^T, the part of W that no input has seen drawn now."""
        basis, drawn, factor = known
        if basis is None:
            through: Tensor = d.values @ drawn.mT * factor
            return through
        i, o = layer.fan_in, layer.fan_out
        seen = d.values @ drawn[..., :o].mT
        if layer.orthogonal:
            scale = (layer.weight * max(i, o)) ** 0.5
            unit, rest = drawn / scale, torch.nn.functional.pad(d.values, (0, max(0, i - o)))
            rest = rest - (rest @ unit.mT) @ unit  # goes where no input has been
            free = self.normal(self.inputs, i)
            free = torch.cat([free - (free @ basis.mT) @ basis, self.normal(self.inputs, max(0, o - i))], -1)
            turned: Tensor = (seen @ basis + _take_root(rest @ rest.mT) @ _draw_frame(free)[..., :i] * scale) * factor
            return turned
        if self.inputs < o:
            free = _take_root(d.products) @ self.normal(self.inputs, i)
            free[:, 1:] += free[:, :1].clone()
        else:
            free = d.values @ self.normal(o, i)
        free = free * layer.weight**0.5
        found: Tensor = (free + (seen - free @ basis.mT) @ basis) * factor
        return found


def _take_root(gram: Tensor) -> Tensor:
    """Lower triangular square root of Gram matrices, (E, b, b); directions below rounding count as that large."""
    scale = gram.diagonal(dim1=-2, dim2=-1).double().sqrt()
    safe = scale.clamp_min(1e-150)
    unit = gram / (safe[:, :, None] * safe[:, None])
    unit.diagonal(dim1=-2, dim2=-1).add_(_SMALL[gram.dtype])
    found: Tensor = torch.linalg.cholesky_ex(unit).L * scale[:, :, None]
    return found.to(gram.dtype)


def _draw_frame(free: Tensor) -> Tensor:
    """Orthonormal rows of any direction alike, from normal numbers (E, b, n), b <= n."""
    found: Tensor = torch.linalg.solve_triangular(_take_root(free @ free.mT), free, upper=False)
    return found


def simulate(
    row: Activation,
    layers: Sequence[DenseLayer],
    batch: int,
    networks: int,
    q0: float = 1.0,
    c0: float = 0.0,
    distribution: str = "normal",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    inputs: int | None = None,
    tensors: Container[tuple[str, str]] | None = None,
    input_gradient: bool = False,
) -> dict[LayerTensor, Sample]:
    """Draw networks and take the statistics of every tensor.

    row: the activation. batch, q0, c0: number, second moment and mean cosine of the inputs. distribution: of the
    weights. dtype: what the networks are computed in; float32 is twice as fast where no signal leaves its range.
    inputs: how many of them stand for the batch, at least 5 or all; None takes all. tensors: names and directions of
    those that are wanted; None takes all. input_gradient: the gradient at the input too, of numbers of its own.
    """
    inputs = min(batch, inputs or batch)
    widest = max(max(layer.fan_in, layer.fan_out) for layer in layers)
    step = max(1, min(networks, ENTRIES // (widest * inputs)))
    found: dict[LayerTensor, list[Tensor | Sums]] = {}
    generator = torch.Generator().manual_seed(seed)
    at_input = torch.Generator().manual_seed(seed + 1) if input_gradient else None
    for start in range(0, networks, step):
        chain = _Chain(min(step, networks - start), inputs, batch, generator, distribution)
        chain.dtype = dtype
        _pass(chain, row, layers, q0, c0, found, tensors, at_input)
    return {key: find_sample(parts, batch) for key, parts in found.items()}


def _pass(
    chain: _Chain,
    row: Activation,
    layers: Sequence[DenseLayer],
    q0: float,
    c0: float,
    found: dict[LayerTensor, list[Tensor | Sums]],
    tensors: Container[tuple[str, str]] | None,
    at_input: torch.Generator | None,
) -> None:
    """at_input: draws what a gradient at the input needs; None: that is not wanted."""
    whole = chain.inputs == chain.batch

    def note(key: LayerTensor, x: _Batch, zero: Tensor | None = None, saturated: Tensor | None = None) -> None:
        """zero, saturated: which entries are, (E, b, n); without `zero` none is 0."""
        zero = torch.zeros(1, 1, 1).expand_as(x.values) if zero is None else zero
        if tensors is not None and key[1:] not in tensors:
            return
        if whole:
            numbers: Tensor | Sums = find_statistics(x.values, zero, saturated)
        else:
            n = x.values.shape[-1]
            zeros, flat = (None if one is None else one.to(x.values.dtype).mean(-1) for one in (zero, saturated))
            numbers = Sums(x.products / n, x.values.mean(-1), zeros, flat, n)
        found.setdefault(key, []).append(numbers)

    layers = [layer._replace(weight=layer.fitted.drawn) if layer.fitted else layer for layer in layers]
    n, b = layers[0].fan_in, chain.inputs
    x = _Batch(q0**0.5 * (c0**0.5 * chain.normal(1, n) + (1 - c0) ** 0.5 * chain.normal(b, n)))
    note((0, "activation", "forward"), x)
    entered = [x]
    kept: list[tuple[Tensor, _Known]] = []  # phi' or z, and what is known of the weights
    for k, layer in enumerate(layers, 1):
        z, known = chain.forward(layer, x)
        slope = row.slope(z)
        note((k, "preactivation", "forward"), _Batch(z), saturated=slope.abs() < SATURATED * row.largest_slope)
        x = _Batch(row.phi(z))
        note((k, "activation", "forward"), x, x.values == 0)
        entered.append(x)
        kept.append((slope if row.backward is None else z, known))
    del entered[-1]
    g = chain.normal(b, layers[-1].fan_out)
    for k in range(len(layers), 0, -1):
        passed, known = kept.pop()
        note((k, "activation", "backward"), _Batch(g))
        d = _Batch(g * passed if row.backward is None else row.backward(g, passed))
        note((k, "preactivation", "backward"), d, d.values == 0)
        below = entered.pop()
        if whole:  # a step follows the sum over all inputs
            found.setdefault((k, "weight", "backward"), []).append(find_statistics_of_product(below.values, d.values))
            bias = find_statistics(d.values.sum(1, keepdim=True), batched=False)
            found.setdefault((k, "bias", "backward"), []).append(bias)
        g = chain.back(layers[k - 1], d, known) if k > 1 else g
    if at_input is not None:
        chain.generator = at_input
        note((0, "activation", "backward"), _Batch(chain.back(layers[0], d, known)))
