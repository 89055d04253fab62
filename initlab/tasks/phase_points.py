"""Many networks that differ in (sigma_w, sigma_b) as one batched program: what each layer's preactivations are like.

    z_l = sigma_w phi(z_{l-1}) G_l / sqrt(n) + sigma_b g_l,  G_l of a standard law, g_l normal; phi(z_0) is the input

All points share G_l and g_l, so that their inputs are rows of one matrix product; or each point has its own. Points go
through in chunks that stay in a processor's cache, and what is kept of a chunk is a few numbers a layer. Knows nothing
of planes, theory or tables. Legend: P points, N batch, O units, R layers that are looked at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from initlab.errors import choose
from initlab.nn.activations import Activation
from initlab.nn.init import DISTRIBUTIONS, GENERATORS, Draw, Generator, Weights

CHUNK = {"cpu": 2**20, "cuda": 2**28}  # bytes of a chunk's signal: on a CPU its passes stay in the cache
KEPT = 2**28  # bytes of weights that are kept for all points; what is more is drawn again for every block of them
BLOCK = 2**28  # bytes of the signals of such a block
SAFE = (1e-12, 1e12)  # between these no square leaves the range of float32
SATURATED = 0.05  # of the largest slope
EXPONENTS = {torch.float32: 126, torch.float64: 1022}  # powers of two on either side of 1, subnormal ones left out

Advance = Callable[[int], object]  # told how many layers of how many points are done, as their product
Layer = tuple[Tensor, Tensor]  # (I, O) or (P, I, O), and (O,) or (P, 1, O)


@dataclass(frozen=True)
class Points:
    """(sigma_w, sigma_b) of each network, and what they share; `correlation` is that of every two inputs."""

    sw: Sequence[float]
    sb: Sequence[float]
    row: Activation
    depth: int
    width: int
    batch: int
    correlation: float = 0.0
    distribution: str = "normal"
    fresh: bool = False


@dataclass(frozen=True)
class Place:
    """Where, in which numbers and drawn by whom; `chunk` is how many points go together, 0 as many as caches hold."""

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    generator: str = "torch"
    chunk: int = 0


class Plan(NamedTuple):
    """How the points go through, and the most bytes that signals and weights take at once."""

    chunk: int  # points in a chunk
    block: int  # points that see a group of layers before the next is drawn
    group: int  # layers whose weights are kept together
    held: int


class Looked(NamedTuple):
    """Of every point, float64 (P, R), at the layers asked for; `mean` to `inf` at those looked at closer.

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


def plan(points: Points, place: Place) -> Plan:
    """Bounded memory, whatever the number of points: see CHUNK, KEPT and BLOCK."""
    size, device = place.dtype.itemsize, place.device.type
    signal, weights = points.batch * points.width * size, points.width * (points.width + 1) * size
    own = signal + (weights if points.fresh else 0)
    chunk = min(len(points.sw), place.chunk or max(1, CHUNK[device] // own))
    group = 1 if points.fresh else max(1, min(points.depth, KEPT // weights))
    whole = points.fresh or group == points.depth
    block = len(points.sw) if whole else min(len(points.sw), max(chunk, BLOCK // signal))
    working = 6 * chunk * signal + (chunk if points.fresh else group) * weights
    return Plan(chunk, block, group, working + (0 if whole else block * signal))


def look(
    points: Points,
    seed: int,
    layers: Sequence[int],
    closer: Sequence[int],
    place: Place,
    advance: Advance = lambda done: None,
) -> Looked:
    """The networks of one seed, looked at in `layers`, and closer in some of them.

    Numbers depend on (seed, layer), and with fresh weights on (sigma_w, sigma_b), alone: not on the other points, nor
    on how many go together. With correlation 0 the point (sigma_w, 0) is the network of `task=stack` with that gain.
    """
    source = choose(GENERATORS, place.generator, "generator")
    planned, count = plan(points, place), len(points.sw)
    with torch.inference_mode():
        run = _Run(points, seed, source, place, frozenset(layers), frozenset(closer), planned, advance)
        found = [run.block(block) for block in _pieces(range(count), planned.block)]
        return Looked(*(torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True)))


def _pieces(whole: range, size: int) -> list[range]:
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def _renamed(draw: Draw, at: str) -> Draw:
    """The same source under keys of its own."""
    return lambda shape, seeds, what, layer, device: draw(shape, seeds, what + at, layer, device)


class _Chunk:
    """Some points on their way: their signal, and what has been seen of them."""

    def __init__(self, points: Points, who: range, x: Tensor, place: Place) -> None:
        self.who = who
        number = {"dtype": place.dtype, "device": place.device}
        self.sw, self.sb = (
            torch.tensor([values[k] for k in who], **number)[:, None, None]  # type: ignore[arg-type]
            for values in (points.sw, points.sb)
        )
        self.x = x.expand(len(who), *x.shape).contiguous()
        self.biased = any(points.sb[k] for k in who)
        self.sizes: list[Tensor] = []
        self.seen: list[list[Tensor]] = [[] for _ in Looked._fields[:-1]]

    def result(self) -> list[Tensor]:
        sizes = torch.stack(self.sizes, -1)
        dead = ~((sizes > 0) & (sizes < torch.inf))
        died_at = torch.where(dead.any(-1), dead.int().argmax(-1) + 1, 0)
        return [*(torch.stack(each, -1) for each in self.seen), died_at]


@dataclass
class _Run:
    """The networks of one seed."""

    points: Points
    seed: int
    source: Generator
    place: Place
    layers: frozenset[int]
    closer: frozenset[int]
    planned: Plan
    advance: Advance

    def __post_init__(self) -> None:
        self.x = self._inputs()
        self.kept: list[Layer] | None = None

    def block(self, who: range) -> list[Tensor]:
        """All layers of some points: group by group of layers, and in each chunk by chunk of points."""
        p, chunks, done = self.points, dict[range, _Chunk](), []
        for group in _pieces(range(1, p.depth + 1), p.depth if p.fresh else self.planned.group):
            shared = None if p.fresh else self._shared(group)
            for part in _pieces(who, self.planned.chunk):
                chunk = chunks.pop(part, None) or _Chunk(p, part, self.x, self.place)
                for k, layer in enumerate(group):
                    self._step(chunk, layer, self._fresh(layer, part) if shared is None else shared[k])
                self.advance(len(part) * len(group))
                if group[-1] == p.depth:
                    done.append(chunk.result())
                else:
                    chunks[part] = chunk
        return [torch.cat(each) for each in zip(*done, strict=True)]

    def _step(self, chunk: _Chunk, layer: int, weights: Layer) -> None:
        w, b = weights
        z = chunk.x @ w if w.dim() == 3 else (chunk.x.flatten(0, 1) @ w).view_as(chunk.x)
        if chunk.biased:
            torch.addcmul(chunk.sb * b, z, chunk.sw, out=z)
        else:
            z.mul_(chunk.sw)
        size = torch.maximum(z.amax((1, 2)), -z.amin((1, 2)))  # nan where one is; no tensor of |z| is made
        chunk.sizes.append(size)
        if layer in self.layers:
            for into, value in zip(chunk.seen[:2], lengths(z, size), strict=True):
                into.append(value)
        if layer in self.closer:
            for into, value in zip(chunk.seen[2:], details(z, size, self.points.row), strict=True):
                into.append(value)
        chunk.x = self.points.row.phi(z)

    def _shared(self, group: Sequence[int]) -> list[Layer]:
        if self.kept is not None:
            return self.kept
        drawn = [self._draw(self.source, layer) for layer in group]
        self.kept = drawn if len(drawn) == self.points.depth else None
        return drawn

    def _fresh(self, layer: int, who: range) -> Layer:
        """A point's own weights, keyed by its coordinates: the same in every plane that holds it."""
        drawn = []
        for k in who:
            at = f" at {self.points.sw[k]!r}, {self.points.sb[k]!r}"
            own = Generator(*(_renamed(draw, at) for draw in self.source))
            drawn.append(self._draw(own, layer))
        w, b = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        return w, b.unsqueeze(1)

    def _draw(self, source: Generator, layer: int) -> Layer:
        p, place = self.points, self.place
        own = Weights(source, [self.seed], layer, place.device)
        w = DISTRIBUTIONS[p.distribution]((p.width, p.width), 1 / sqrt(p.width), own)
        b = source.gaussian((p.width,), [self.seed], "bias", layer, place.device)
        return w[0].to(place.device, place.dtype), b[0].to(place.device, place.dtype)

    def _inputs(self) -> Tensor:
        """(N, I): sqrt(c) times what all inputs have in common and sqrt(1 - c) times what is their own."""
        p, device = self.points, self.place.device
        own = self.source.gaussian((p.batch, p.width), [self.seed], "input", 0, device)[0]
        common = self.source.gaussian((1, p.width), [self.seed], "common input", 0, device)[0]
        mixed = own * sqrt(1 - p.correlation) + common * sqrt(p.correlation) if p.correlation else own
        return mixed.to(device, self.place.dtype)


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
