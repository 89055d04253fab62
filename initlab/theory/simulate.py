"""Networks drawn from the exact law of a stack, without drawing all of their weights where that is cheaper.

Given a layer's input X (B x I), z = X W with Gaussian W depends on W only through an orthonormal basis of X's rows:
with X^T = Q R, z = R^T (Q^T W), and Q^T W is Gaussian. On the way back d W^T = d (Q^T W)^T Q^T + what W does outside
the basis, independent of everything so far. So B < I inputs cost B^2 I per layer, not B I^2, with no approximation.
The networks are not those that a run with the same seed draws.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from initlab.nn.activations import Activation
from initlab.stats.keys import LayerTensor
from initlab.stats.measure import measure
from initlab.stats.statistics import STATISTICS
from initlab.stats.summarize import saturated_share
from initlab.theory.forward_law import DenseLayer

ENTRIES = 2**20  # of a layer, held at once
EDGE = 0.87962566103423978  # standard deviation of a normal variable cut off at two
INSIDE = 0.9544997361036416  # probability that it is not


class _Chain:
    """The random numbers of a group of E networks on B inputs."""

    def __init__(self, networks: int, generator: torch.Generator, distribution: str, dtype: torch.dtype) -> None:
        self.networks, self.generator, self.distribution = networks, generator, distribution
        self.dtype = dtype

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
            q, r = torch.linalg.qr(self.normal(max(i, o), min(i, o)))
            q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
            found: Tensor = (q if i >= o else q.mT) * (layer.weight * max(i, o)) ** 0.5
            return found
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

    def short(self, layer: DenseLayer, batch: int) -> bool:
        """Whether the projection of the weights on the inputs is enough."""
        return batch < layer.fan_in and self.distribution == "normal" and not layer.orthogonal


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
) -> dict[LayerTensor, Tensor]:
    """Draw networks and take the statistics of every tensor: (S, E) float64 in the order of STATISTICS.

    row: the activation. batch, q0, c0: number, second moment and mean cosine of the inputs. distribution: of the
    weights. dtype: what the networks are computed in; float32 is twice as fast where no signal leaves its range.
    """
    widest = max(max(layer.fan_in, layer.fan_out) for layer in layers)
    step = max(1, min(networks, ENTRIES // (widest * max(batch, widest))))
    found: dict[LayerTensor, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, networks, step):
        chain = _Chain(min(step, networks - start), generator, distribution, dtype)
        _pass(chain, row, layers, batch, q0, c0, found)
    return {key: torch.cat(parts, -1) for key, parts in found.items()}


def _pass(
    chain: _Chain,
    row: Activation,
    layers: Sequence[DenseLayer],
    batch: int,
    q0: float,
    c0: float,
    found: dict[LayerTensor, list[Tensor]],
) -> None:
    def note(layer: int, tensor: str, direction: str, values: Tensor) -> Tensor:
        block = measure(values)
        found.setdefault((layer, tensor, direction), []).append(block)
        return block

    layers = [layer._replace(weight=layer.fitted.drawn) if layer.fitted else layer for layer in layers]
    n = layers[0].fan_in
    x = q0**0.5 * (c0**0.5 * chain.normal(1, n) + (1 - c0) ** 0.5 * chain.normal(batch, n))
    note(0, "activation", "forward", x)
    kept: list[tuple[Tensor, Tensor, _Known, Tensor | float]] = []
    for k, layer in enumerate(layers, 1):
        z, passed, factor = _pass_layer(chain, layer, x)
        x = row.phi(z)
        block = note(k, "preactivation", "forward", z)
        slope = row.slope(z)
        block[_SATURATED] = saturated_share(slope, row.largest_slope)
        note(k, "activation", "forward", x)
        kept.append((z, slope, passed, factor))
    g = chain.normal(batch, layers[-1].fan_out)
    for k in range(len(layers), 0, -1):
        z, slope, passed, factor = kept.pop()
        note(k, "activation", "backward", g)
        d = g * slope if row.backward is None else row.backward(g, z)
        note(k, "preactivation", "backward", d)
        g = _back(chain, layers[k - 1], d, passed) * factor if k > 1 else g


_SATURATED = list(STATISTICS).index("frac_saturated")


_Known: TypeAlias = tuple[Tensor, Tensor] | Tensor


def _pass_layer(chain: _Chain, layer: DenseLayer, x: Tensor) -> tuple[Tensor, _Known, Tensor | float]:
    """z = f x W + b; then W, or the basis Q (E, I, B) of the inputs and Q^T W (E, B, O); then f.

    The factor f is 1 unless LSUV scales the weights.
    """
    known: _Known
    if chain.short(layer, x.shape[-2]):
        basis, triangle = torch.linalg.qr(x.mT)
        projected = chain.normal(x.shape[-2], layer.fan_out) * layer.weight**0.5
        z, known = triangle.mT @ projected, (basis, projected)
    else:
        known = chain.weights(layer)
        z = x @ known
    biases = chain.biases(layer)
    if layer.fitted is None:
        return z + biases, known, 1.0
    factor = torch.ones(chain.networks, 1, 1, dtype=torch.float64)
    for _ in range(layer.fitted.attempts):
        variance = (z * factor.to(z.dtype) + biases).double().var((-2, -1), correction=0, keepdim=True)
        due = (variance - 1).abs() >= layer.fitted.tolerance
        factor = torch.where(due & (variance > 0) & variance.isfinite(), factor / variance.sqrt(), factor)
    return z * factor.to(z.dtype) + biases, known, factor.to(z.dtype)


def _back(chain: _Chain, layer: DenseLayer, d: Tensor, passed: tuple[Tensor, Tensor] | Tensor) -> Tensor:
    """d W^T, the part of W that no input has seen drawn now."""
    if isinstance(passed, Tensor):
        through: Tensor = d @ passed.mT
        return through
    basis, seen = passed
    if d.shape[-2] < layer.fan_out:
        mixing = torch.linalg.qr(d.mT).R.mT  # d = mixing times an orthonormal frame, which the fresh W does not notice
        fresh = mixing @ chain.normal(mixing.shape[-1], layer.fan_in) * layer.weight**0.5
    else:
        fresh = d @ (chain.normal(layer.fan_out, layer.fan_in) * layer.weight**0.5)
    both: Tensor = fresh + (d @ seen.mT - fresh @ basis) @ basis.mT
    return both
