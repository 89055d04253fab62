"""Networks drawn from the exact law of a stack, without drawing all of their weights where that is cheaper.

Some networks share the random matrix of a layer, each behind signs of its own: W_e = S_e W, S_e diagonal with random
signs, has the law of W, and lengths under two such matrices are correlated by 1/I alone. So one product serves them
all, and few numbers are drawn.

Few inputs of a wide layer are cheaper without it. Given the layer's inputs x (b x I), z = x W with Gaussian W depends
on W only through an orthonormal basis of the rows of x: with x^T = Q R, z = R^T (Q^T W), and Q^T W is Gaussian. Only
the inner products of the inputs, x x^T = R^T R, are needed. On the way back d W^T = d (Q^T W)^T Q^T + what W does
outside the basis, independent of everything so far. So b inputs cost b^2 I per layer, not b I^2, with no approximation
but one: weights of another distribution are taken as normal there, where all layers have many inputs. The networks are
not those that a run with the same seed draws.

Legend: E networks, b inputs, M matrices of a layer, F statistics.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from initlab.nn.activations import Activation
from initlab.stats.backend import SATURATED
from initlab.stats.keys import LayerTensor
from initlab.stats.measure import backend_for
from initlab.theory.forward_law import DenseLayer
from initlab.theory.sample import GROUPS, Sample, find_rows, find_rows_of_product, find_samples, find_saturated

ENTRIES = 2**17  # of a layer's tensor, held at once: near the processor
WIDE_LAYER = 64  # units for each input that is carried, from which on a layer's weights are not drawn
SHARE, MOST_SHARE = 4, 32  # networks with one matrix: one for so many units, and at most
EDGE = 0.87962566103423978  # standard deviation of a normal variable cut off at two
INSIDE = 0.9544997361036416  # probability that it is not
_SMALL = {torch.float32: 1e-6, torch.float64: 1e-13}  # of a Gram matrix: rounding, as its smallest relative eigenvalue


class _Known(NamedTuple):
    """What the way back needs of a layer's weights: the shared matrices and the signs, or W in the basis of the inputs
    and that basis; and the factor of a fit."""

    drawn: Tensor
    signs: Tensor | None
    basis: Tensor
    factor: Tensor | None = None


class _Chain:
    """The random numbers of a group of E networks, M matrices a layer."""

    def __init__(
        self,
        matrices: int,
        share: int,
        inputs: int,
        batch: int,
        generator: torch.Generator,
        distribution: str,
        dtype: torch.dtype,
    ) -> None:
        self.networks, self.matrices, self.inputs, self.batch = matrices * share, matrices, inputs, batch
        self.generator, self.distribution, self.dtype = generator, distribution, dtype

    def normal(self, *shape: int) -> Tensor:
        found: Tensor = torch.randn(self.networks, *shape, generator=self.generator, dtype=self.dtype)
        return found

    def uniform(self, *shape: int) -> Tensor:
        """On (-1, 1)."""
        return torch.rand(self.networks, *shape, generator=self.generator, dtype=self.dtype).mul_(2).sub_(1)

    def weights(self, layer: DenseLayer) -> Tensor:
        """(M, I, O) of variance `layer.weight`, one for every `share` networks; drawn in float32 where that does."""
        i, o = layer.fan_in, layer.fan_out
        if layer.orthogonal:
            free = torch.randn(self.matrices, max(i, o), min(i, o), generator=self.generator, dtype=self.dtype)
            frame, triangle = torch.linalg.qr(free)
            size = triangle.diagonal(dim1=-2, dim2=-1).sign() * (layer.weight * max(i, o)) ** 0.5  # all frames alike
            scaled: Tensor = frame * size[:, None]
            return scaled if i >= o else scaled.mT
        if self.distribution == "normal":
            normal: Tensor = torch.randn(self.matrices, i, o, generator=self.generator)
            return normal.mul_(layer.weight**0.5).to(self.dtype)
        even = torch.rand(self.matrices, i, o, generator=self.generator).mul_(2).sub_(1)
        if self.distribution == "uniform":
            return even.mul_((3 * layer.weight) ** 0.5).to(self.dtype)
        flat: Tensor = torch.special.ndtri(0.5 + 0.5 * even * INSIDE)
        return flat.mul_(layer.weight**0.5 / EDGE).to(self.dtype)

    def multiply(self, x: Tensor, weights: Tensor) -> Tensor:
        """Vectors (E, b, I) by the matrices (M, I, O) that networks share, (E, b, O)."""
        found: Tensor = x.reshape(len(weights), -1, x.shape[-1]) @ weights
        return found.view(*x.shape[:2], -1)

    def biases(self, layer: DenseLayer) -> Tensor | None:
        """(E, 1, O), or None without."""
        found = self.normal(1, layer.fan_out) * layer.bias**0.5 if layer.bias else None
        if layer.uniform_bias:
            own = self.uniform(1, layer.fan_out) * (3 * layer.uniform_bias) ** 0.5
            found = own if found is None else found + own
        return found

    def is_projected(self, layer: DenseLayer) -> bool:
        """Whether the projection of the weights on the inputs is cheaper than the weights."""
        return min(layer.fan_in, layer.fan_out) >= WIDE_LAYER * self.inputs

    def forward(self, layer: DenseLayer, x: Tensor) -> tuple[Tensor, _Known]:
        """z = f x W + b, and what is known of W; f is 1 unless LSUV scales the weights."""
        if self.is_projected(layer):
            long = max(layer.fan_in, layer.fan_out) if layer.orthogonal else layer.fan_out
            apart = _find_differences(x)
            root = _take_root(apart @ apart.mT)
            drawn = self.normal(self.inputs, long)
            drawn = (_draw_frame(drawn) * long**0.5 if layer.orthogonal else drawn) * layer.weight**0.5
            z = root @ drawn[..., : layer.fan_out]
            z[:, 1:] += z[:, :1].clone()
            safe = root + torch.diag_embed(
                (root.diagonal(dim1=-2, dim2=-1) == 0).to(root.dtype)
            )  # of an input of zeros
            known = _Known(drawn, None, torch.linalg.solve_triangular(safe, apart, upper=False))
        else:
            signs = torch.empty(self.networks, 1, layer.fan_in, dtype=self.dtype)
            signs.bernoulli_(0.5, generator=self.generator).mul_(2).sub_(1)
            known = _Known(self.weights(layer), signs, signs)
            z = self.multiply(x * signs, known.drawn)
        biases = self.biases(layer)
        if layer.fitted is None:
            return z if biases is None else z.add_(biases), known
        biases = z.new_zeros(()) if biases is None else biases
        factor = torch.ones(self.networks, 1, 1, dtype=torch.float64)
        for _ in range(layer.fitted.attempts):
            scaled = z * factor.to(z.dtype) + biases
            variance = scaled.var((1, 2), correction=0, keepdim=True).double()
            due = (variance - 1).abs() >= layer.fitted.tolerance
            factor = torch.where(due & (variance > 0) & variance.isfinite(), factor / variance.sqrt(), factor)
        factor = factor.to(z.dtype)
        return z * factor + biases, known._replace(factor=factor)

    def back(self, layer: DenseLayer, d: Tensor, known: _Known) -> Tensor:
        """d W^T, the part of W that no input has seen drawn now."""
        drawn, signs, basis, factor = known
        d = d if factor is None else d * factor
        if signs is not None:
            return self.multiply(d, drawn.mT).mul_(signs)
        i, o = layer.fan_in, layer.fan_out
        seen = d @ drawn[..., :o].mT
        if layer.orthogonal:
            scale = (layer.weight * max(i, o)) ** 0.5
            unit, rest = drawn / scale, torch.nn.functional.pad(d, (0, max(0, i - o)))
            rest = rest - (rest @ unit.mT) @ unit  # goes where no input has been
            free = self.normal(self.inputs, i)
            free = torch.cat([free - (free @ basis.mT) @ basis, self.normal(self.inputs, max(0, o - i))], -1)
            turned: Tensor = seen @ basis + _take_root(rest @ rest.mT) @ _draw_frame(free)[..., :i] * scale
            return turned
        if self.inputs < o:
            apart = _find_differences(d)
            free = _take_root(apart @ apart.mT) @ self.normal(self.inputs, i)
            free[:, 1:] += free[:, :1].clone()
        else:
            free = d @ self.normal(o, i)
        free = free * layer.weight**0.5
        found: Tensor = free + (seen - free @ basis.mT) @ basis
        return found


def _find_differences(x: Tensor) -> Tensor:
    """The first of b vectors (E, b, n) and its differences from the others: what is apart where all have nearly become
    one."""
    found = x.clone()
    found[:, 1:] -= x[:, :1]
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
    wanted: Mapping[tuple[str, str], Collection[str]] | None = None,
    input_gradient: bool = False,
) -> dict[LayerTensor, Sample]:
    """Draw networks and take the statistics of their tensors.

    row: the activation. batch, q0, c0: number, second moment and mean cosine of the inputs. distribution: of the
    weights. dtype: what the networks are computed in; float32 is twice as fast where no signal leaves its range.
    inputs: how many of them stand for the batch, a multiple of `sample.GROUPS`; None takes all. wanted: statistics by
    name and direction of their tensor; None takes all. input_gradient: the gradient at the input too, of numbers of its
    own.
    """
    inputs = min(batch, inputs or batch)
    widths = [layers[0].fan_in, *(layer.fan_out for layer in layers)]
    near = max(1, ENTRIES // (max(widths) * inputs))
    share = max(1, min(min(widths) // SHARE, MOST_SHARE, networks, near))
    step = share * max(1, min(-(-networks // share), near // share))
    found: dict[LayerTensor, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)
    at_input = torch.Generator().manual_seed(seed + 1) if input_gradient else None
    for start in range(0, networks, step):
        matrices = -(-min(step, networks - start) // share)
        chain = _Chain(matrices, share, inputs, batch, generator, distribution, dtype)
        _pass(chain, row, layers, q0, c0, found, wanted, at_input)
    alike: dict[tuple[int, int], list[LayerTensor]] = {}  # tensors of as many rows and units
    for layer, tensor, direction in found:
        rows = 1 if tensor in ("weight", "bias") else batch
        units = widths[layer] * (widths[layer - 1] if tensor == "weight" else 1)
        alike.setdefault((rows, units), []).append((layer, tensor, direction))
    samples: dict[LayerTensor, Sample] = {}
    for (rows, units), keys in alike.items():
        measured = torch.stack([torch.cat(found[key], 1)[:, :networks] for key in keys], 1)
        samples |= zip(keys, find_samples(measured, min(inputs, rows), rows, units), strict=True)
    return samples


def _pass(
    chain: _Chain,
    row: Activation,
    layers: Sequence[DenseLayer],
    q0: float,
    c0: float,
    found: dict[LayerTensor, list[Tensor]],
    wanted: Mapping[tuple[str, str], Collection[str]] | None,
    at_input: torch.Generator | None,
) -> None:
    """at_input: draws what a gradient at the input needs; None: that is not wanted."""
    whole, backend = chain.inputs == chain.batch, backend_for()
    groups = 1 if whole else GROUPS

    def note(key: LayerTensor, values: Tensor) -> None:
        if wanted is None or wanted.get(key[1:]):
            found.setdefault(key, []).append(find_rows(values, backend, groups))

    down = wanted is None or any(direction == "backward" for _, direction in wanted)
    of_weights = whole and (wanted is None or ("weight", "backward") in wanted)
    layers = [layer._replace(weight=layer.fitted.drawn) if layer.fitted else layer for layer in layers]
    n, b = layers[0].fan_in, chain.inputs
    x = q0**0.5 * (c0**0.5 * chain.normal(1, n) + (1 - c0) ** 0.5 * chain.normal(b, n))
    note((0, "activation", "forward"), x)
    entered: list[Tensor] = []  # where gradients of weights are wanted
    kept: list[tuple[Tensor, _Known]] = []  # phi' or z, and what is known of the weights
    for k, layer in enumerate(layers, 1):
        z, known = chain.forward(layer, x)
        entered += [x] * of_weights
        note((k, "preactivation", "forward"), z)
        if wanted is None or "frac_saturated" in wanted.get(("preactivation", "forward"), ()):
            found[k, "preactivation", "forward"][-1][SATURATED] = find_saturated(z, row, groups)
        x = row.phi(z)
        note((k, "activation", "forward"), x)
        if down:
            kept.append((row.slope(z) if row.backward is None else z, known))
    g = chain.normal(b, layers[-1].fan_out)
    for k in range(len(kept), 0, -1):
        passed, known = kept.pop()
        note((k, "activation", "backward"), g)
        d = g * passed if row.backward is None else row.backward(g, passed)
        note((k, "preactivation", "backward"), d)
        if of_weights:  # a step follows the sum over all inputs
            found.setdefault((k, "weight", "backward"), []).append(find_rows_of_product(entered.pop(), d))
        if whole:
            note((k, "bias", "backward"), d.sum(1, keepdim=True))
        g = chain.back(layers[k - 1], d, known) if k > 1 else g
    if down and at_input is not None:
        chain.generator = at_input
        note((0, "activation", "backward"), chain.back(layers[0], d, known))
