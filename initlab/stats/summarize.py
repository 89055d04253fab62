"""One row of numbers about a tensor, from which its statistics derive and which merges with the rows of other shards.

The door of the row format: FIELDS, `summarize` and `derive`, `row` and `merge` (units.py), `histogram` (octaves.py).
Two roads lead to a row: the safe one is right whatever the entries are; the plain one takes sums of squares in a few
passes on a CPU, and hands over to the safe one every tensor whose sums do not show that they may be trusted.
Knows nothing of networks, keys and frames. Legend: E ensemble, N batch, C units, F fields, S statistics.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from initlab.stats.histogram import histogram as histogram
from initlab.stats.histogram import octaves as octaves
from initlab.stats.kernels.cpu import library
from initlab.stats.reference import BLOCK, SAFE, checked, power_of_two, safe_row
from initlab.stats.reference import FIELDS as FIELDS
from initlab.stats.reference import Row as Row
from initlab.stats.reference import merge as merge
from initlab.stats.reference import row as row
from initlab.stats.workspace import AT_ONCE, workspace

Array = NDArray[np.float64]

_AT = {name: place for place, name in enumerate(FIELDS)}
# Rounding of plain sums grows by (plain / centred sum of squares): 2^8 leaves a digit and a half below 1e-12.
_CANCELLED = 2.0**-8
# Below this the units may be constant, and the batch variance inside them exactly 0: the safe road says so.
_CONSTANT = 1e-10


def summarize(x: Tensor, batched: bool = True, accelerated: bool = True) -> Tensor:
    """The row of (..., N, C) over its last two dimensions, (F, ...) in float64; never waits for a GPU.

    `batched` says that N counts inputs; else `within`, `dead`, `alive` and `resultant` have no meaning and are nan.
    Of an empty tensor everything but the counts is nan. `accelerated` false takes plain PyTorch in any case.
    """
    x = checked(x)
    if accelerated and compiled(x):
        return _compiled(x, batched, bins=False)[0]
    if x.device.type != "cpu" or x.numel() == 0 or x.shape[-1] > AT_ONCE:
        return safe_row(x, batched).fields
    return torch.from_numpy(_plain(x.reshape(-1, *x.shape[-2:]), batched)).view(-1, *x.shape[:-2])


def summarize_and_count(x: Tensor, batched: bool = True, accelerated: bool = True) -> tuple[Tensor, Tensor]:
    """The row (F, ...) and the histogram (..., 2, B) of a tensor; together they cost little more than the row."""
    if accelerated and compiled(x):
        return _compiled(x, batched, bins=True)
    return summarize(x, batched, accelerated), histogram(x)


def compiled(x: Tensor) -> bool:
    """Whether the compiled passes take this tensor: float32 on a CPU, and a compiler was found."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0 and library() is not None


def _compiled(x: Tensor, batched: bool, bins: bool) -> tuple[Tensor, Tensor]:
    x, lead = x.detach().contiguous(), x.shape[:-2]
    fields = np.empty((lead.numel(), len(FIELDS)))
    low, high = octaves(x.dtype)
    counts = torch.zeros((*lead, 2, high - low + 1) if bins else 0, dtype=torch.int32)
    found = library()
    assert found is not None
    address = counts.data_ptr() if bins else None
    found.describe_rows(x.data_ptr(), lead.numel(), *x.shape[-2:], int(batched), fields.ctypes.data, address)
    return torch.from_numpy(fields.T.copy()).view(len(FIELDS), *lead), counts


class InPlace:
    """ReLU and its mask written into tensors (E, N, C) that take turns, with the rows of what they were and became.

    `tensors` is (turns, E, N, C), contiguous and for the `compiled` passes. The rows of `calls` calls at most stand in
    one piece of memory until they are taken.
    """

    def __init__(self, tensors: Tensor, calls: int) -> None:
        found = library()
        assert found is not None and tensors.is_contiguous()
        e, n, c = tensors.shape[1:]
        self._relu, self._mask = found.relu_job, found.mask_job
        self._held = tensors, torch.empty(e, c)  # what the addresses below point to
        jobs = [[t.data_ptr(), 0, self._held[1].data_ptr(), e, n, c, 0, e, 0] for t in tensors]
        self._jobs, self._rows = np.array(jobs, dtype=np.int64), np.empty((calls, 2, e, len(FIELDS)))
        self._job = [int(job.ctypes.data) for job in self._jobs]
        self._start, self._used = int(self._rows.ctypes.data), 0

    def _next(self) -> int:
        if self._used == len(self._rows):
            raise RuntimeError(f"{self._used} calls were made: take their rows first")
        self._used += 1
        return self._start + (self._used - 1) * self._rows.strides[0]

    def relu(self, turn: int) -> None:
        """max(z, 0) into the tensor of that turn; `saturated` of z is the share that does not come through, nan too."""
        self._relu(self._job[turn], self._next(), None)

    def mask(self, turn: int, z: Tensor) -> None:
        """ReLU's backward: 0 into the tensor of that turn where z <= 0; z contiguous (E, N, C)."""
        self._jobs[turn, 1] = z.data_ptr()
        self._mask(self._job[turn], self._next(), None)

    def take(self) -> Tensor:
        """Rows (F, 2 calls, E): of each call the one before and the one after."""
        rows = torch.from_numpy(self._rows[: self._used].copy()).flatten(0, 1).movedim(-1, 0)
        self._used = 0
        return rows


class _Sums(NamedTuple):
    """What plain sums say of (E, N, C), each (E,) but for those over the batch, (E, C); those of its parts add up."""

    second: Array  # sum of squares
    unit: Array  # (E, C)
    heading: Array  # (E, C), sum of the vectors divided by their lengths
    alive: Array
    nonzero: Array
    below: Array  # entries smaller than the smallest normal number, zeros among them
    risky: Array  # vectors of float64 so small that their squares may have left it


def _plain(x: Tensor, batched: bool) -> Array:
    """The rows (F, E) of (E, N, C) on a CPU by plain sums, and by the safe road where these may not be trusted.

    They may where all entries are finite, no square leaves float64 and centring takes at most 255/256 of the sum of
    squares; where it takes more inside the units alone, these are centred in a second pass.
    """
    narrow = x if x.dtype in (torch.float32, torch.float64) else x.float()  # exact, and what a processor is made for
    size = max(1, AT_ONCE // x[0].numel())
    fields = np.full((len(FIELDS), len(x)), np.nan)
    with np.errstate(all="ignore"):  # nan and inf are data
        parts = [_sums(part, torch.finfo(x.dtype).tiny, batched) for part in torch.split(narrow, size)]
        sums = parts[0] if len(parts) == 1 else _Sums(*map(np.concatenate, zip(*parts, strict=True)))
        good = _fill(fields, narrow, sums, batched)
    if not good.all():
        rest = torch.split(x[torch.from_numpy(~good)], max(1, BLOCK["cpu"] // x[0].numel()))
        fields[:, ~good] = np.concatenate([safe_row(part, batched).fields.numpy() for part in rest], -1)
    return fields


def _sums(x: Tensor, tiny: float, batched: bool) -> _Sums:
    """A few passes over what the cache holds; a single network that does not fit is read in parts of its batch."""
    rows = AT_ONCE // (len(x) * x.shape[-1])
    if rows < x.shape[-2]:
        parts = [_sums(part, tiny, batched) for part in torch.split(x, rows, -2)]
        return _Sums(*(np.add.reduce(column) for column in zip(*parts, strict=True)))
    wide, squares = workspace(x.shape, torch.float64)
    _, flags = workspace(x.shape, x.dtype)  # in the place of the squares, when these are summed
    wide.copy_(x)
    lengths = torch.mul(wide, wide, out=squares).sum(-1).numpy()
    unit = wide.sum(-2).numpy()
    # Counts are sums of ones, exact in float32 below 2^24.
    below = torch.abs(x, out=flags).lt_(tiny).sum((-2, -1)).numpy()
    nonzero = torch.ne(x, 0, out=flags).sum((-2, -1)).numpy() if below.any() else np.full(len(x), float(x[0].numel()))
    heading = unit
    if batched:
        inverse = np.divide(1, np.sqrt(lengths), out=np.zeros_like(lengths), where=lengths > 0)
        heading = torch.bmm(torch.from_numpy(inverse).unsqueeze(-2), wide).squeeze(-2).numpy()
    return _Sums(
        second=lengths.sum(-1),
        unit=unit,
        heading=heading,
        alive=np.count_nonzero(lengths, -1).astype(np.float64),
        nonzero=nonzero.astype(np.float64),
        below=below.astype(np.float64),
        risky=(lengths < 2.0 ** (-2 * SAFE)).sum(-1) if x.dtype == torch.float64 else np.zeros(len(x)),
    )


def _fill(fields: Array, x: Tensor, sums: _Sums, batched: bool) -> NDArray[np.bool_]:
    """Write the rows of (E, N, C); say of which networks they may be trusted."""
    n, c = x.shape[-2:]
    low, high = (edge.numpy().astype(np.float64) for edge in (x.amin((-2, -1)), x.amax((-2, -1))))
    mean = sums.unit.sum(-1) / (n * c)
    m2 = sums.second - n * c * mean * mean
    good: NDArray[np.bool_] = np.isfinite(sums.second) & (np.maximum(-low, high) < 2.0**SAFE) & (sums.risky == 0)
    good &= (m2 > _CANCELLED * sums.second) | (sums.second == 0)
    zeros = n * c - sums.nonzero
    fields[: _AT["mean"]] = 0
    fields[_AT["count"]] = n * c
    fields[_AT["n_subnormal"]], fields[_AT["n_zero"]] = sums.below - zeros, zeros
    fields[_AT["mean"]], fields[_AT["m2"]] = mean, m2
    fields[_AT["min"]], fields[_AT["max"]] = low, high
    if batched:
        inside, sure = _inside(x, sums)
        good &= sure
        fields[_AT["within"]], fields[_AT["dead"]] = inside / (n * c), _dead(x, sums.unit, low)
        fields[_AT["alive"]], fields[_AT["resultant"]] = sums.alive, np.square(sums.heading).sum(-1)
    return good


def _inside(x: Tensor, sums: _Sums) -> tuple[Array, NDArray[np.bool_]]:
    """Sum of squared distances from the unit's mean over the batch and the units (E,), and where it may be trusted."""
    means = sums.unit / x.shape[-2]
    inside = sums.second - x.shape[-2] * np.square(means).sum(-1)
    cancelled = ~(inside > _CANCELLED * sums.second) & (sums.second > 0) & np.isfinite(sums.second)
    if cancelled.any():
        which = torch.from_numpy(cancelled)
        centre = torch.from_numpy(means)[which].unsqueeze(-2)
        parts = torch.split(x[which], max(1, AT_ONCE // (len(x) * x.shape[-1])), -2)
        inside[cancelled] = sum((part - centre).square_().sum((-2, -1)).numpy() for part in parts)
    return inside, (inside > _CONSTANT * sums.second) | (sums.second == 0)


def _dead(x: Tensor, unit: Array, low: Array) -> Array:
    """Share of units that are 0 in the whole batch: their sums are 0, and tell it where no entry is negative."""
    silent: NDArray[np.bool_] = unit == 0
    if (silent.any(-1) & (low < 0)).any():
        silent &= ~(x != 0).any(-2).numpy()
    return np.asarray(silent.mean(-1), np.float64)


# Statistic -> how it comes from a row; the order is that of signal/stats.py.
_DERIVED: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "count": lambda f: f["count"],
    "n_nan": lambda f: f["n_nan"],
    "n_inf": lambda f: f["n_inf"],
    "n_subnormal": lambda f: f["n_subnormal"],
    "mean": lambda f: f["mean"] * f["scale"],
    "std": lambda f: (f["m2"] / f["finite"]).sqrt() * f["scale"],
    "rms": lambda f: f["root"] * f["scale"],
    "q": lambda f: (f["root"] * f["scale"]).square(),
    "norm": lambda f: f["root"] * f["finite"].sqrt() * f["scale"],
    "min": lambda f: f["min"],
    "max": lambda f: f["max"],
    "frac_zero": lambda f: f["n_zero"] / f["count"],
    "frac_saturated": lambda f: f["saturated"],
    "frac_dead": lambda f: f["dead"],
    "std_within": lambda f: f["within"].sqrt() * f["scale"],
    "cosine": lambda f: _cosine(f["resultant"], f["alive"]),
}


def derive(fields: Tensor, names: Iterable[str] = _DERIVED) -> Tensor:
    """The statistics (S, ...) of rows (F, ...), in the order of STATISTICS in signal/stats.py, or those that are named.

    std = sqrt(m2 / n) 2^e, rms = sqrt(m2 / n + mean^2) 2^e, n finite entries. All are as exact as the row as long as
    float64 can say them: q = rms^2 is inf beyond an rms of 1e154 and 0 below 1e-162. The cosine is a difference: its
    error is a rounding of the larger of itself and 1 / (k - 1), what k vectors reach that cancel.
    """
    named = dict(zip(FIELDS, fields, strict=True))
    named["finite"] = named["count"] - named["n_nan"] - named["n_inf"]
    named["scale"] = power_of_two(named["exponent"])
    named["root"] = (named["m2"] / named["finite"] + named["mean"].square()).sqrt()
    return torch.stack([_DERIVED[name](named) for name in names])


def _cosine(resultant: Tensor, k: Tensor) -> Tensor:
    """Mean over pairs a != b of cos(x_a, x_b) = (resultant - k) / (k (k - 1)), k vectors of length > 0."""
    return torch.where(k > 1, ((resultant - k) / (k * (k - 1))).clamp(-1, 1), torch.nan)
