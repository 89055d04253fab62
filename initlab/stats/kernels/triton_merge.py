# mypy: ignore-errors
"""The program of `triton_rows.py` that puts the blocks of a tensor together, in Triton's language.

What a block keeps: `triton_programs.py`. Counts, smallest and largest entry are exact; moments merge by Chan's formula,
over the blocks of a unit, then over the units, their means all taken from the tensor's smallest entry.
"""

import triton
import triton.language as tl

from initlab.stats.kernels.triton_programs import CELLS, INFS, MINUS_INFS, NANS, TALLIES, ZEROS

LANES = tl.constexpr(128)  # blocks whose tallies are looked at together


@triton.jit
def load_units(cells, blocks, c, units, unit_step, cell_step):
    """The cells of some units over all blocks, by Chan's formula; each unit's mean is a pivot and what is beyond it."""
    none = tl.zeros_like(units).to(tl.float64)
    n, pivot, mean, m2, nonzero, heading = none, none, none, none, none, none
    for block in range(blocks):
        at, here = cells + block * CELLS * c + units * unit_step, units < c
        more = tl.load(at, mask=here, other=0.0)
        its_pivot = tl.load(at + cell_step, mask=here, other=0.0)
        pivot = tl.where(n > 0, pivot, its_pivot)  # that of the first block with anything finite
        total = n + more
        share = more / tl.maximum(total, 1.0)
        away = (its_pivot - pivot) + tl.load(at + 2 * cell_step, mask=here, other=0.0) - mean
        away = tl.where(more > 0, away, 0.0)
        m2 += tl.load(at + 3 * cell_step, mask=here, other=0.0) + away * away * n * share
        mean += away * share
        nonzero += tl.load(at + 4 * cell_step, mask=here, other=0.0)
        heading += tl.load(at + 5 * cell_step, mask=here, other=0.0)
        n = total
    return n, pivot, mean, m2, nonzero, heading


@triton.jit
def merge_units(cells, blocks, c, COLUMNS: tl.constexpr):
    """Puts the cells of some units over all blocks of a tensor in the place of those of its first block."""
    cells += tl.program_id(0).to(tl.int64) * blocks * CELLS * c
    units = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    n, pivot, mean, m2, nonzero, heading = load_units(cells, blocks, c, units, 1, c)
    at, here = cells + units, units < c
    tl.store(at, n, mask=here)
    tl.store(at + c, pivot, mask=here)
    tl.store(at + 2 * c, mean, mask=here)
    tl.store(at + 3 * c, m2, mask=here)
    tl.store(at + 4 * c, nonzero, mask=here)
    tl.store(at + 5 * c, heading, mask=here)


@triton.jit
def store_moments(
    cells, fields, step, blocks, c, cell_step, reference, BATCHED: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Stores the fields that come from the cells: mean, m2, within, dead and resultant."""
    none = tl.zeros((COLUMNS,), tl.float64)
    n, mean, m2, spread, known, dead, resultant = none, none, none, none, none, none, none
    for start in range(0, c, COLUMNS):
        units = start + tl.arange(0, COLUMNS)
        more, pivot, its_mean, its_m2, nonzero, heading = load_units(
            cells, blocks, c, units, 1 if BATCHED else CELLS, cell_step
        )  # fmt: skip
        some = more > 0
        away = tl.where(some, (pivot - reference) + its_mean - mean, 0.0)
        share = more / tl.maximum(n + more, 1.0)
        m2 += its_m2 + away * away * n * share
        mean += away * share
        n += more
        spread += tl.where(some, its_m2 / tl.maximum(more, 1.0), 0.0)
        known += some.to(tl.float64)
        dead += ((nonzero == 0) & (units < c)).to(tl.float64)
        resultant += heading * heading
    total = tl.sum(n, 0)
    middle = tl.sum(n * mean, 0) / total
    away = mean - middle
    tl.store(fields + 6 * step, middle + reference)
    tl.store(fields + 7 * step, tl.where(total > 0, tl.sum(m2 + n * away * away, 0), float("nan")))
    unknown = tl.sum(none, 0) + float("nan")
    tl.store(fields + 10 * step, tl.sum(spread, 0) / tl.sum(known, 0) if BATCHED else unknown)
    tl.store(fields + 11 * step, tl.sum(dead, 0) / c if BATCHED else unknown)
    tl.store(fields + 13 * step, tl.sum(resultant, 0) if BATCHED else unknown)


@triton.jit
def total_of(counts, chosen):
    return tl.sum(tl.where(chosen, counts, 0), 0).to(tl.float64)


@triton.jit
def store_counts(
    bins, fields, histogram, step, entries, preactivation, NORMAL: tl.constexpr, OCTAVES: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """Stores the histogram, and the fields that are sums of its bins."""
    place = tl.arange(0, BINS)
    counts = tl.load(bins + place)
    tl.store(histogram + place, counts, mask=place < 2 * OCTAVES)
    octave = place % OCTAVES
    zeros, nans = total_of(counts, place == 2 * OCTAVES + ZEROS), total_of(counts, place == 2 * OCTAVES + NANS)
    infs = (place == 2 * OCTAVES + INFS) | (place == 2 * OCTAVES + MINUS_INFS)
    tl.store(fields, zeros * 0 + entries)
    tl.store(fields + step, nans)
    tl.store(fields + 2 * step, total_of(counts, infs))
    tl.store(fields + 3 * step, total_of(counts, (place < 2 * OCTAVES) & (octave < NORMAL)))
    tl.store(fields + 4 * step, zeros)
    tl.store(fields + 5 * step, zeros * 0)
    closed = total_of(counts, (place >= OCTAVES) & (place < 2 * OCTAVES)) + zeros + nans
    closed += total_of(counts, place == 2 * OCTAVES + MINUS_INFS)
    tl.store(fields + 14 * step, tl.where(preactivation, closed / entries, float("nan")))


@triton.jit
def merge(
    cells,
    tallies,
    bins,
    fields,
    histogram,
    tallied,
    blocks,
    c,
    cell_step,
    entries,
    saturated,
    NORMAL: tl.constexpr,
    OCTAVES: tl.constexpr,
    BATCHED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BINS: tl.constexpr,
):
    """The row (F,) of one tensor, fields of all tensors side by side, and its histogram (2, B), from its blocks.

    Without a batch the blocks are looked at as units of one block: `c` is how many there are. The first `saturated`
    tensors are preactivations of a ReLU.
    """
    which, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    tallies, fields = tallies + which * tallied * TALLIES, fields + which
    cells += which * tallied * CELLS * (c if BATCHED else 1)
    low, high = tl.full((LANES,), float("inf"), tl.float64), tl.full((LANES,), float("-inf"), tl.float64)
    alive = tl.zeros((LANES,), tl.float64)
    for start in range(0, tallied, LANES):
        block = start + tl.arange(0, LANES)
        low = tl.minimum(low, tl.load(tallies + block * TALLIES, mask=block < tallied, other=float("inf")))
        high = tl.maximum(high, tl.load(tallies + block * TALLIES + 1, mask=block < tallied, other=float("-inf")))
        alive += tl.load(tallies + block * TALLIES + 2, mask=block < tallied, other=0.0)
    low, high, alive = tl.min(low, 0), tl.max(high, 0), tl.sum(alive, 0)
    some = low < float("inf")
    tl.store(fields + 8 * step, tl.where(some, low, float("nan")))
    tl.store(fields + 9 * step, tl.where(some, high, float("nan")))
    tl.store(fields + 12 * step, alive if BATCHED else alive + float("nan"))
    reference = tl.where(some, low, 0.0)
    store_moments(cells, fields, step, blocks, c, cell_step, reference, BATCHED, COLUMNS)
    bins, histogram = bins + which * BINS, histogram + which * 2 * OCTAVES
    store_counts(bins, fields, histogram, step, entries, which < saturated, NORMAL, OCTAVES, BINS)
