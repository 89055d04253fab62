"""Means over Gaussian variables by quadrature, for functions with kinks and for variances large and small.

`u` is standard normal; z = sqrt(q) u. Gauss-Legendre panels have edges on the kinks and, since activations change on
the scale z = 1, edges that halve towards 0 where q is large. Gauss-Hermite would miss every kink. A second, lower order
says how far off a panel is; panels that are too far off are halved until they are not, and a mean that has not
converged is refused. Everything is float64.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from initlab.errors import UsageError

Function = Callable[[Tensor], Tensor]

REACH = 14.0  # the tail beyond weighs 1e-44
PAIR_REACH = 9.0  # beyond: 2e-19
PER_PANEL = 24
PAIR_PER_PANEL = 20
CHUNK = 2**17  # points of a plane that are looked at together
CHECK, CHECK_PAIR = 16, 14  # nodes of the lower order
GOAL, ENOUGH = 1e-10, 1e-9  # error over the mean of |f|: what is sought, and what is refused beyond
MOST_PANELS = 2**14  # that are looked at for one mean
MOST_POINTS = 2**26  # of one mean over a plane, 1 to 2 s
END = 37.0  # from here on the density leaves float64


@lru_cache
def _legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return nodes, weights


def _octaves(q: float) -> int:
    """How often panels halve towards 0 so that the innermost ends at z = 1 or less."""
    return max(0, math.ceil(math.log2(q) / 2)) if 0 < q < math.inf else 0


def _regular_edges(octaves: int, kinks: tuple[float, ...]) -> np.ndarray:
    halving = 2.0 ** -np.arange(1, octaves + 1)
    edges = np.unique(np.concatenate([np.arange(-REACH, REACH + 1), halving, -halving, kinks]))
    return np.asarray(edges[np.abs(edges) <= REACH])


@lru_cache(maxsize=512)
def _line(octaves: int, kinks: tuple[float, ...], per_panel: int = PER_PANEL) -> tuple[Tensor, Tensor]:
    """Nodes u and weights (density included); kinks in units of u."""
    u, lengths = panels(_regular_edges(octaves, kinks), per_panel)
    return torch.from_numpy(u), torch.from_numpy(lengths * (np.exp(-u * u / 2) / math.sqrt(2 * math.pi)))


def line(q: float = 1.0, kinks: tuple[float, ...] = ()) -> tuple[Tensor, Tensor]:
    """Nodes u and weights such that sum(weights * f(sqrt(q) u)) = E[f(sqrt(q) u)]; `kinks` are places z of f."""
    return _line(_octaves(q), tuple(k / math.sqrt(q) for k in kinks if q > 0))


def gaussian_mean(f: Function, kinks: tuple[float, ...] = (), q: float = 1.0) -> float:
    """E[f(sqrt(q) u)]; relative error below 1e-12 for the table of activations, q from 0.01 to 400.

    Raises UsageError for what has not converged to 1e-9 of E|f|.
    """
    return float(gaussian_means(lambda z, u: f(z), torch.tensor([q], dtype=torch.float64), kinks))


def gaussian_means(f: Callable[[Tensor, Tensor], Tensor], q: Tensor, kinks: tuple[float, ...] = ()) -> Tensor:
    """E[f(sqrt(q) u, u)] for many q at once; f gets z and u of shape (Q, nodes). Shape of q.

    Raises UsageError for what has not converged to 1e-9 of E|f|.
    """
    found = estimate_means(f, q, kinks)
    _refuse_unconverged(found, q)
    return found.value


class Estimate(NamedTuple):
    """Means of f, how far off they may be, and the means of |f| that this is to be compared with; all of one shape."""

    value: Tensor
    error: Tensor
    size: Tensor


def _refuse_unconverged(found: Estimate, q: Tensor) -> None:
    share = (found.error / found.size.where(found.size > 0, 1)).nan_to_num(nan=math.inf)
    if bool((share > ENOUGH).any()):
        worst = int(share.argmax())
        at = float(q.expand_as(share).flatten()[worst])
        limit = float(share.max())
        how = "does not exist" if math.isinf(limit) else f"has not converged to better than {limit:.1g}"
        raise UsageError(f"activation: a mean over Gaussian preactivations of second moment {at:.4g} {how}")


def estimate_means(
    f: Callable[[Tensor, Tensor], Tensor], q: Tensor, kinks: tuple[float, ...] = (), most: int = MOST_PANELS
) -> Estimate:
    """`gaussian_means` with its errors, converged or not; at most `most` panels are looked at for each q."""
    parts = torch.split(q.reshape(-1), 64 if any(kinks) else 1024)
    found = [_measure_means(f, part, kinks if any(kinks) else (), most) for part in parts]
    return Estimate(*(torch.cat(x).reshape(q.shape) for x in zip(*found, strict=True)))


def _measure_means(f: Callable[[Tensor, Tensor], Tensor], q: Tensor, kinks: tuple[float, ...], most: int) -> Estimate:
    octaves, root = _octaves(float(q.max())), q.sqrt()[:, None]
    fine, coarse = (_line(octaves, (), n) for n in (PER_PANEL, CHECK))
    edges = _regular_edges(octaves, ())
    if kinks:  # edges that move with q
        moving = np.array(kinks) / root.numpy()
        moving[np.abs(moving) > REACH] = 0
        edges = np.sort(np.concatenate([np.broadcast_to(edges, (len(q), len(edges))), moving], -1), -1)
        fine, coarse = (_normal(torch.from_numpy(edges), n) for n in (PER_PANEL, CHECK))
    values, rough = (f(root * u, u.expand(len(q), -1)) for u, _ in (fine, coarse))
    value = values @ fine[1] if fine[1].ndim == 1 else (values * fine[1]).sum(-1)
    weighted = values * fine[1]
    off = (_panel_sums(weighted, PER_PANEL) - _panel_sums(rough * coarse[1], CHECK)).abs()
    sizes = _panel_sums(weighted.abs_(), PER_PANEL)
    error, size = off.sum(-1), sizes.sum(-1)
    ends = torch.maximum(sizes[:, 0], sizes[:, -1])
    sure = (error <= GOAL * size) & (ends < 1e-17 * size)
    rows = (~sure).nonzero().flatten()
    if len(rows):
        own = [np.unique(edges[k] if kinks else edges) for k in rows.tolist()]
        found = refine_means(lambda u, k: f(root[rows[k]] * u, u), own, most)[0]
        value[rows], error[rows], size[rows] = torch.from_numpy(found).unbind(-1)
    return Estimate(value, error, size)


def _panel_sums(x: Tensor, per_panel: int) -> Tensor:
    return x.reshape(len(x), -1, per_panel).sum(-1)


def refine_means(
    f: Callable[[Tensor, Tensor], Tensor],
    edges: Sequence[np.ndarray],
    most: int = MOST_PANELS,
    goal: float = 0.01 * GOAL,
) -> tuple[np.ndarray, np.ndarray]:
    """E[f(u, k)], its error and E|f| for every k, (K, 3), by panels between edges[k], halved where they are off.

    f gets u (P, nodes) and k (P,). A panel is off by more than `goal` E|f|; panels beyond the edges are added as long
    as they count. Also returns all edges in the end, those of all means together.
    """
    count = len(edges)
    owner = np.repeat(np.arange(count), [len(one) - 1 for one in edges])
    low, high = (np.concatenate([one[side] for one in edges]) for side in (slice(None, -1), slice(1, None)))
    ends = np.array([[one[0], one[-1]] for one in edges])
    total, seen, kept = np.zeros((count, 3)), np.zeros(count), [*edges]

    def add_up(numbers: np.ndarray, some: np.ndarray) -> np.ndarray:
        return np.stack([np.bincount(owner[some], one, count) for one in numbers[some].T], -1)

    while len(low):
        found = _measure_panels(f, low, high, owner)
        every = np.ones(len(low), dtype=bool)
        seen += np.bincount(owner, minlength=count)
        size = total[:, 2] + add_up(found, every)[:, 2]
        with np.errstate(invalid="ignore"):
            done = (found[:, 1] <= goal * size[owner]) | (high - low < 1e-13)
            stopped = (seen > most) | ~np.isfinite(size)
            counts = (size[owner] == 0) | ~(found[:, 2] < 1e-17 * size[owner])
        total += add_up(found, done | stopped[owner])
        left = ~done & ~stopped[owner]
        middle = (low[left] + high[left]) / 2
        parts = [(low[left], middle, owner[left]), (middle, high[left], owner[left])]
        for side, sign in ((0, -1.0), (1, 1.0)):  # a panel further out, if the outermost one counts
            outermost = (high if side else low) == ends[owner, side]
            k = owner[outermost & counts & done & ~stopped[owner] & (np.abs(ends[owner, side]) < END)]
            inner, outer = ends[k, side], ends[k, side] + sign
            parts.append((np.minimum(inner, outer), np.maximum(inner, outer), k))
            ends[k, side] = outer
            kept.append(outer)
        kept.append(middle)
        low, high, owner = (np.concatenate(x) for x in zip(*parts, strict=True))
    total[:, 1] = np.where(np.isnan(total[:, 1]), math.inf, total[:, 1])
    return total, np.unique(np.concatenate(kept))


def _measure_panels(
    f: Callable[[Tensor, Tensor], Tensor], low: np.ndarray, high: np.ndarray, owner: np.ndarray
) -> np.ndarray:
    """The integral over each panel with the normal density, how far off it is, and that of |f|, (P, 3)."""
    sums = []
    for n in (PER_PANEL, CHECK):
        nodes, weights = _legendre(n)
        half, middle = (high - low)[:, None] / 2, (high + low)[:, None] / 2
        u = middle + half * nodes
        density = half * weights * np.exp(-u * u / 2) / math.sqrt(2 * math.pi)
        parts = zip(*(torch.split(torch.from_numpy(x), CHUNK // n) for x in (u, owner)), strict=True)
        values = torch.cat([f(*part) for part in parts]).numpy()
        with np.errstate(all="ignore"):  # what is inf or nan has no mean
            sums.append(((values * density).sum(-1), (np.abs(values) * density).sum(-1)))
    (fine, size), (coarse, _) = sums
    with np.errstate(invalid="ignore"):
        return np.stack([fine, np.abs(fine - coarse), size], -1)


def pair_mean(
    f: Function,
    q: Tensor | float,
    c: Tensor | float,
    kinks: tuple[float, ...] = (),
    per_panel: int | None = PAIR_PER_PANEL,
) -> Tensor:
    """E[f(z1) f(z2)] for Gaussian z1, z2 of variance q and correlation c; q and c broadcast.

    z1, z2 = sqrt(q) (a s +- b d) with s, d standard normal, a^2 = (1 + c)/2, b^2 = (1 - c)/2. For every d the panels
    of s have their edges where z1 or z2 meets a kink, so that a correlation of nearly 1, whose kinks nearly coincide,
    costs no accuracy. Error below 1e-10 for the table of activations.
    per_panel: nodes of a panel; None is for any function: the result is checked by a lower order, refined where that is
    off, and refused by a UsageError where it has not converged to 1e-9 of E f^2.
    """
    one, other = torch.as_tensor(q, dtype=torch.float64), torch.as_tensor(c, dtype=torch.float64)
    both = torch.stack([one + 0 * other, other + 0 * one])
    shape = both.shape[1:]
    flat_q, flat_c = both.reshape(2, -1)
    fine, n = _octaves(float(flat_q.max())), len(_centres(kinks))
    orders = (PAIR_PER_PANEL, CHECK_PAIR) if per_panel is None else (per_panel,)
    points = (4 + fine + n * (n - 1) // 2) * (7 + 2 * n * (1 + 2 * fine)) * orders[0] ** 2  # of one integral
    step = max(1, CHUNK // points)
    pieces = [slice(k, k + step) for k in range(0, len(flat_q), step)]
    found, *check = (
        torch.cat([_plane(f, flat_q[p], flat_c[p], kinks, order) for p in pieces]).reshape(shape) for order in orders
    )
    return _refine_pairs(f, both, kinks, found, check[0]) if check else found


def _refine_pairs(f: Function, both: Tensor, kinks: tuple[float, ...], found: Tensor, check: Tensor) -> Tensor:
    """Once more, by a line of lines, the means whose two orders differ, and those that the panels do not reach."""
    q, c = both
    values, lines = torch.unique(q, return_inverse=True)
    size = estimate_means(lambda z, u: f(z).square(), values, kinks)
    _refuse_unconverged(size, values)
    beyond = estimate_means(lambda z, u: f(z).square() * (u.abs() > PAIR_REACH - 1), values, kinks)
    scale = size.value[lines]
    off = ~((found - check).abs() <= ENOUGH * scale) | ~(beyond.value <= GOAL / 100 * size.value)[lines]
    for at in off.nonzero().unbind():
        k = tuple(at.tolist())
        value, error = torch.tensor([_measure_pair(f, float(q[k]), float(c[k]), kinks)], dtype=torch.float64).mT
        _refuse_unconverged(Estimate(value, error, scale[k][None]), q[k])
        found[k] = value
    return found


def _measure_pair(f: Function, q: float, c: float, kinks: tuple[float, ...]) -> tuple[float, float]:
    """E[f(z1) f(z2)] and its error: over u of f(z1) times the mean over v of f(z2), z2 = sqrt(q) (c u + sqrt(1-c^2) v).

    The panels of v have their edges where those of E f^2 had to be halved.
    """
    root, rest = math.sqrt(q), math.sqrt(max(0.0, (1 - c) * (1 + c)))
    start = _regular_edges(_octaves(q), tuple(k / root for k in kinks))
    edges = refine_means(lambda u, _: f(root * u).square(), [start], goal=0.1 * GOAL)[1]
    reach = float(np.abs(edges).max())
    regular, moving = torch.arange(-reach, reach + 1, 2, dtype=torch.float64), torch.from_numpy(edges)
    nodes = len(edges) * (PAIR_PER_PANEL + CHECK)
    rough = [0.0]  # the largest difference of two orders of v, as it counts over u

    def find_means(u: Tensor) -> Tensor:
        moved = ((moving - c * u[:, None]) / rest).clamp(-reach, reach)
        every = torch.cat([regular.expand(len(u), -1), moved], -1).sort(-1).values
        orders = []
        for n in (PAIR_PER_PANEL, CHECK):
            v, weights = _normal(every, n)
            orders.append((f(root * (c * u[:, None] + rest * v)) * weights).sum(-1))
        counts = f(root * u) * torch.exp(-u * u / 2) * (orders[0] - orders[1])
        rough[0] = max(rough[0], float(counts.abs().max()))
        return orders[0]

    def evaluate_product(u: Tensor, _: Tensor) -> Tensor:
        if not rest:
            return f(root * u) * f(math.copysign(root, c) * u)
        inner = [find_means(part) for part in torch.split(u.flatten(), max(1, 4 * CHUNK // nodes))]
        return f(root * u) * torch.cat(inner).reshape(u.shape)

    most = int(MOST_POINTS / (nodes * (PER_PANEL + CHECK)))
    if most < len(start):
        return math.nan, math.inf
    (value, error, _), *_ = refine_means(evaluate_product, [start], most, 0.1 * GOAL)[0].tolist()
    return value, error + reach * rough[0]


def _centres(kinks: tuple[float, ...]) -> tuple[float, ...]:
    """Where a function changes: its kinks, and 0, about which the smooth ones bend."""
    return tuple(sorted({0.0, *kinks}))


def panels(edges: np.ndarray, per_panel: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes between sorted edges (..., P) and their weights, no density: (..., (P - 1) n)."""
    nodes, weights = _legendre(per_panel)
    half, middle = np.diff(edges)[..., None] / 2, (edges[..., 1:] + edges[..., :-1])[..., None] / 2
    shape = (*edges.shape[:-1], -1)
    return (middle + half * nodes).reshape(shape), (half * weights).reshape(shape)


def _normal(edges: Tensor, per_panel: int) -> tuple[Tensor, Tensor]:
    """`panels` with the normal density in the weights."""
    u, lengths = (torch.from_numpy(x) for x in panels(edges.numpy(), per_panel))
    return u, lengths * torch.exp(-u * u / 2) / math.sqrt(2 * math.pi)


def _plane(f: Function, q: Tensor, c: Tensor, kinks: tuple[float, ...], per_panel: int) -> Tensor:
    """`pair_mean` for vectors q and c; the integrand is even in d, so half the plane does."""
    root = q.sqrt()[:, None]
    a, b = ((1 + c) / 2).clamp(min=0).sqrt()[:, None], ((1 - c) / 2).clamp(min=0).sqrt()[:, None]
    places = _centres(kinks)
    octaves = _octaves(float(q.max()))
    halving = 2.0 ** -torch.arange(1, octaves + 1, dtype=torch.float64)
    tiny = 1e-300
    meetings = [abs(k - j) / (2 * b * root + tiny) for i, k in enumerate(places) for j in places[:i]]
    opposed = float((b / a)[a > 0].max()) if bool((a > 0).any()) else 0.0  # near c = -1 the outer scale is a / b
    nearing = 2.0 ** -torch.arange(1, 1 + max(octaves, _octaves(opposed**2)), dtype=torch.float64)
    regular = torch.cat([torch.arange(0, PAIR_REACH + 1, 3, dtype=torch.float64), nearing]).expand(len(q), -1)
    d, d_weights = _normal(torch.cat([regular, *meetings], -1).clamp(max=PAIR_REACH).sort(-1).values, per_panel)
    crossings = [(k / (root + tiny) + sign * b * d) / (a + tiny) for k in places for sign in (1, -1)]
    around = torch.cat([torch.zeros(1, dtype=torch.float64), halving, -halving])
    moving = (torch.stack(crossings, -1).unsqueeze(-1) + around / (a + tiny)[..., None, None]).flatten(-2)
    fixed = torch.arange(-PAIR_REACH, PAIR_REACH + 1, 3, dtype=torch.float64).expand(*d.shape, -1)
    edges = torch.cat([fixed, moving], -1).clamp(-PAIR_REACH, PAIR_REACH).sort(-1).values
    s, s_weights = _normal(edges, per_panel)
    along, across = a.unsqueeze(-1) * s, (b * d).unsqueeze(-1)
    scale = root.unsqueeze(-1)
    product = f(scale * (along + across)) * f(scale * (along - across))
    inner = (product * s_weights).sum(-1)
    return 2 * (inner * d_weights).sum(-1)
