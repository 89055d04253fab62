"""Many networks that differ in (sigma_w, sigma_b) as one batched program: what each layer's preactivations are like.

    z_l = sigma_w phi(z_{l-1}) G_l / sqrt(n) + sigma_b g_l,  G_l of a standard law, g_l normal; phi(z_0) is the input

All points share G_l and g_l, so that their inputs are rows of one matrix product; or each point has its own. Points go
through in chunks that stay in a processor's cache, and what is kept of a chunk is a few numbers a layer.
Legend: P points, N batch, O units, R layers that are measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from initlab.nn.activations import Activation
from initlab.nn.init import DISTRIBUTIONS, GENERATORS, Draw, Generator, WeightNumbers
from initlab.nn.network import dense, forward
from initlab.stats.statistics import SATURATED
from initlab.tasks.ensemble.device import Where

CHUNK = {"cpu": 2**20, "cuda": 2**28}  # bytes of a chunk's signal: on a CPU its passes stay in the cache
KEPT = 2**28  # bytes of weights that are kept for all points; what is more is drawn again for every block of them
BLOCK = 2**28  # bytes of the signals of such a block
SAFE = (1e-12, 1e12)  # between these no square leaves the range of float32
EXPONENTS = {torch.float32: 126, torch.float64: 1022}  # powers of two on either side of 1, subnormal ones left out

Advance = Callable[[int], object]  # gets how many layers of how many points are done, as their product
PointWeights = tuple[Tensor, Tensor]  # (I, O) or (P, I, O), and (O,) or (P, 1, O)


@dataclass(frozen=True)
class Points:
    """(sigma_w, sigma_b) of each network, and what they share; `correlation` is that of every two inputs.

    `fresh`: each point draws its own weights.
    """

    sigma_w: Sequence[float]
    sigma_b: Sequence[float]
    row: Activation
    depth: int
    width: int
    batch: int
    correlation: float = 0.0
    distribution: str = "normal"
    fresh: bool = False


class Schedule(NamedTuple):
    """How the points go through, and the most bytes that signals and weights take at once."""

    chunk: int  # points in a chunk
    block: int  # points that see a group of layers before the next is drawn
    group: int  # layers whose weights are kept together
    held: int


class PointStatistics(NamedTuple):
    """Of every point, float64 (P, R): `q` and `apart` at all layers that are measured, the others where slopes are too.

    `q` second moment, `apart` = 1 - mean pairwise cosine of the batch; `mean`, `slope` = mean phi'(z)^2, `saturated`
    share, `nan` and `inf` counts. Vectors of length 0 have no cosine; where fewer than two have one, `apart` is 0.
    Where an entry is not finite q is inf and the others are nan, but for the counts. `died_at` (P,) is the first layer
    whose entries are not all finite, or all 0; 0 of a signal that lives.
    """

    q: np.ndarray
    apart: np.ndarray
    mean: np.ndarray
    slope: np.ndarray
    saturated: np.ndarray
    nan: np.ndarray
    inf: np.ndarray
    died_at: np.ndarray


def schedule(points: Points, where: Where) -> Schedule:
    """Bounded memory, whatever the number of points: see CHUNK, KEPT and BLOCK."""
    size, count = where.dtype.itemsize, len(points.sigma_w)
    signal, weights = points.batch * points.width * size, points.width * (points.width + 1) * size
    each = signal + (weights if points.fresh else 0)
    chunk = min(count, max(1, CHUNK[where.device.type] // each))
    group = 1 if points.fresh else max(1, min(points.depth, KEPT // weights))
    whole = points.fresh or group == points.depth
    block = count if whole else min(count, max(chunk, BLOCK // signal))
    working = 6 * chunk * signal + (chunk if points.fresh else group) * weights
    return Schedule(chunk, block, group, working + (0 if whole else block * signal))


def measure_points(
    points: Points,
    seed: int,
    layers: Sequence[int],
    slopes: Sequence[int],
    where: Where,
    advance: Advance = lambda done: None,
) -> PointStatistics:
    """The networks of one seed, measured at `layers`, and with their slopes at those in `slopes`.

    Numbers depend on (seed, layer), and with fresh weights on (sigma_w, sigma_b), only: not on the other points, nor
    on how many go together. With correlation 0 the point (sigma_w, 0) is the network of `task=stack` with that gain.
    """
    planned = schedule(points, where)
    with torch.inference_mode():
        run = _Run(points, seed, where, frozenset(layers), frozenset(slopes), planned, advance)
        found = [run.block(block) for block in _pieces(range(len(points.sigma_w)), planned.block)]
        return PointStatistics(*(torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True)))


def _pieces(whole: range, size: int) -> list[range]:
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def _with_suffix(draw: Draw, at: str) -> Draw:
    """The same source of numbers under other keys: `at` is added to what they are for."""
    return lambda shape, seeds, what, layer, device: draw(shape, seeds, what + at, layer, device)


class _Chunk:
    """Some points on their way: the arithmetic of their pass, their signal, and what has been measured of them."""

    def __init__(self, run: "_Run", who: range) -> None:
        self.run = run
        number = {"dtype": run.where.dtype, "device": run.where.device}
        self.sigma_w, self.sigma_b = (
            torch.tensor([values[k] for k in who], **number)[:, None, None]  # type: ignore[arg-type]
            for values in (run.points.sigma_w, run.points.sigma_b)
        )
        self.x = run.x.expand(len(who), *run.x.shape).contiguous()
        self.biased = any(run.points.sigma_b[k] for k in who)
        self.sizes: list[Tensor] = []
        self.measured: list[list[Tensor]] = [[] for _ in PointStatistics._fields[:-1]]

    def linear(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """sigma_w x w + sigma_b b."""
        assert b is not None
        z = x @ w if w.dim() == 3 else (x.flatten(0, 1) @ w).view_as(x)
        return torch.addcmul(self.sigma_b * b, z, self.sigma_w, out=z) if self.biased else z.mul_(self.sigma_w)

    def activate(self, z: Tensor, row: Activation) -> Tensor:
        return row.phi(z)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def measure(self, layer: int, z: Tensor, a: Tensor) -> None:
        """Note what is wanted of a layer's preactivations."""
        size = torch.maximum(z.amax((1, 2)), -z.amin((1, 2)))  # nan where one is; no tensor of |z| is made
        self.sizes.append(size)
        if layer in self.run.layers:
            for into, value in zip(self.measured[:2], lengths(z, size), strict=True):
                into.append(value)
        if layer in self.run.slopes:
            for into, value in zip(self.measured[2:], details(z, size, self.run.points.row), strict=True):
                into.append(value)

    def result(self) -> list[Tensor]:
        """The fields of `PointStatistics` for these points."""
        sizes = torch.stack(self.sizes, -1)
        dead = ~((sizes > 0) & (sizes < torch.inf))
        died_at = torch.where(dead.any(-1), dead.int().argmax(-1) + 1, 0)
        return [*(torch.stack(each, -1) for each in self.measured), died_at]


@dataclass
class _Run:
    """The networks of one seed."""

    points: Points
    seed: int
    where: Where
    layers: frozenset[int]
    slopes: frozenset[int]
    planned: Schedule
    advance: Advance

    def __post_init__(self) -> None:
        """Draw the inputs (N, I): sqrt(c) times what all have in common and sqrt(1 - c) times what is their own."""
        p, device = self.points, self.where.device
        self.source = GENERATORS[self.where.generator]
        each = self.source.gaussian((p.batch, p.width), [self.seed], "input", 0, device)[0]
        common = self.source.gaussian((1, p.width), [self.seed], "common input", 0, device)[0]
        mixed = each * sqrt(1 - p.correlation) + common * sqrt(p.correlation) if p.correlation else each
        self.x = mixed.to(device, self.where.dtype)
        self.network = dense([p.width] * (p.depth + 1), p.row)
        self.kept: list[PointWeights] | None = None

    def block(self, who: range) -> list[Tensor]:
        """All layers of some points: group by group of layers, and in each chunk by chunk of points."""
        p, chunks, done = self.points, dict[range, _Chunk](), []
        for group in _pieces(range(1, p.depth + 1), p.depth if p.fresh else self.planned.group):
            shared = [] if p.fresh else self.kept or [self._draw(self.source, layer) for layer in group]
            self.kept = shared if len(shared) == p.depth else None
            for part in _pieces(who, self.planned.chunk):
                chunk = chunks.pop(part, None) or _Chunk(self, part)

                weights = partial(self._weights, shared, group[0], part)
                chunk.x = forward(self.network, weights, chunk.x, chunk.measure, chunk, group)
                self.advance(len(part) * len(group))
                if group[-1] == p.depth:
                    done.append(chunk.result())
                else:
                    chunks[part] = chunk
        return [torch.cat(each) for each in zip(*done, strict=True)]

    def _weights(self, shared: Sequence[PointWeights], first: int, who: range, layer: int) -> PointWeights:
        """Those of the group that begins at layer `first`; or each point's own, keyed by its coordinates: the same in
        every plane that holds it."""
        if shared:
            return shared[layer - first]
        drawn = []
        for k in who:
            at = f" at {self.points.sigma_w[k]!r}, {self.points.sigma_b[k]!r}"
            drawn.append(self._draw(Generator(*(_with_suffix(draw, at) for draw in self.source)), layer))
        w, b = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        return w, b.unsqueeze(1)

    def _draw(self, source: Generator, layer: int) -> PointWeights:
        p, where = self.points, self.where
        numbers = WeightNumbers(source, [self.seed], layer, where.device)
        w = DISTRIBUTIONS[p.distribution]((p.width, p.width), 1 / sqrt(p.width), numbers)
        b = source.gaussian((p.width,), [self.seed], "bias", layer, where.device)
        w = w if where.dtype == torch.float64 else w.float()
        return w[0].to(where.device, where.dtype), b[0].to(where.device, where.dtype)


def lengths(z: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Second moment and 1 - mean pairwise cosine of z (P, N, O), each (P,) in float64; `size` is the largest |z|.

    Where a square could leave the number format it is divided by a power of two near its largest entry first; a GPU
    does so always, since to ask it takes longer. The cosine is taken from the spread of the directions about their
    mean, which keeps the digits of 1 - cosine near 1.
    """
    _, batch, units = z.shape
    finite, u = size < torch.inf, z.float() if z.dtype.itemsize < 4 else z
    scale = torch.ones_like(size, dtype=torch.float64)
    if z.device.type != "cpu" or not bool(((size > SAFE[0]) & (size < SAFE[1])).all()):
        exponent = torch.frexp(torch.where(finite & (size > 0), size, 1.0).double()).exponent
        exponent = exponent.clamp(-EXPONENTS[u.dtype], EXPONENTS[u.dtype])
        u, scale = u * torch.exp2(-exponent.to(u.dtype))[:, None, None], torch.exp2(exponent.double())
    squares = u.square().sum(-1)
    q = squares.double().sum(-1) / (batch * units) * scale.square()
    u = u / torch.where(squares > 0, squares, 1.0).sqrt_()[..., None]
    alive = (squares > 0).sum(-1)
    middle = u.sum(1, keepdim=True) / alive.clamp(min=1)[:, None, None]
    left_out = (batch - alive) * middle.square().sum((1, 2)).double()
    spread = (u.sub_(middle).square_().sum((1, 2)).double() - left_out).clamp(min=0)
    apart = torch.where(alive > 1, spread / (alive - 1).clamp(min=1), 0.0)
    return torch.where(finite, q, torch.inf), torch.where(finite, apart, torch.nan)


def details(z: Tensor, size: Tensor, row: Activation) -> tuple[Tensor, ...]:
    """Mean, mean phi'(z)^2, share of |phi'| below 5 % of its largest, counts of nan and of inf; (P,) in float64."""
    lost = torch.where(size < torch.inf, 0.0, torch.nan)
    wide, slope = (t.float() if t.dtype.itemsize < 4 else t for t in (z, row.slope(z)))
    entries = z.shape[1] * z.shape[2]
    saturated = (slope.abs() < SATURATED * row.largest_slope).sum((1, 2)).double() / entries
    found = (wide.mean((1, 2)).double() + lost, slope.square().mean((1, 2)).double() + lost, saturated + lost)
    if z.device.type == "cpu" and bool((size < torch.inf).all()):
        return *found, torch.zeros_like(saturated), torch.zeros_like(saturated)
    return *found, z.isnan().sum((1, 2)).double(), z.isinf().sum((1, 2)).double()
