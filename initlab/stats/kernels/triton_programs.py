# mypy: ignore-errors
"""The programs of `triton_rows.py` that measure blocks, in Triton's language: its compiler reads this source.

Every program makes one block of one tensor and stores what the block says about itself; `triton_merge.py` puts the
blocks of a tensor together. Numbers are looked at by their bits, since a GPU's float arithmetic may take subnormal
numbers for 0; sums are taken in float64, of distances from the unit's smallest entry: a large mean costs no digits.

What a block keeps (P blocks of a tensor, C units): cells (P, 6, C) = finite entries of the unit, the smallest, their
mean and M2 from there, entries other than 0, heading; tallies (P, 3) = smallest, largest, vectors of length > 0.
Counts by sign and octave, behind them of zeros, inf, -inf and nan, are added up for the whole tensor. Without a batch
all of a block is one unit.
"""

import triton
import triton.language as tl

INFINITE = tl.constexpr(0x7F800000)  # bits of inf; those of nan are above
CELLS = tl.constexpr(6)
TALLIES = tl.constexpr(3)
ZEROS, INFS, MINUS_INFS, NANS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
RELU, MASK = tl.constexpr(1), tl.constexpr(2)  # what `measure_batched` makes of x; 0 makes nothing


@triton.jit
def single(x):
    """x in float32, exactly; bfloat16 is its upper half, and a conversion of its subnormal numbers may give 0."""
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def round_to(x, like):
    """x, float32, to the nearest number of another format, even mantissas first: the same on every device."""
    if like.dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = tl.where((bits & 0x7FFFFFFF) > INFINITE, (bits >> 16) | 64, nearest)
        narrow = quiet.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = x.to(like.dtype)
    return narrow


@triton.jit
def bits_of(x):
    return single(x).to(tl.int32, bitcast=True)


@triton.jit
def finite_and_wide(x, inside):
    """Which entries are finite, and those in float64; 0 elsewhere."""
    finite = inside & ((bits_of(x) & 0x7FFFFFFF) < INFINITE)
    return finite, tl.where(finite, single(x), 0.0).to(tl.float64)


@triton.jit
def count_bins(x, inside, ENTRIES: tl.constexpr, LOWEST: tl.constexpr, OCTAVES: tl.constexpr, BINS: tl.constexpr):
    """How many entries of a tile fall in every bin; the last bin takes what is outside."""
    bits = bits_of(x)
    magnitude = bits & 0x7FFFFFFF
    # A subnormal number is its mantissa times 2^-149, and the mantissa is an exact float.
    small = ((magnitude & 0x7FFFFF).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127 - 149
    exponent = magnitude >> 23
    octave = tl.where(exponent == 0, small, exponent - 127)
    negative = bits < 0
    place = octave - LOWEST + tl.where(negative, OCTAVES, 0)
    place = tl.where(magnitude == 0, 2 * OCTAVES + ZEROS, place)
    place = tl.where(magnitude == INFINITE, 2 * OCTAVES + tl.where(negative, MINUS_INFS, INFS), place)
    place = tl.where(magnitude > INFINITE, 2 * OCTAVES + NANS, place)
    return tl.histogram(tl.reshape(tl.where(inside, place, BINS - 1), (ENTRIES,)), BINS)


@triton.jit
def add_counts(bins, counts, BINS: tl.constexpr):
    """Adds a block's counts to those of its tensor; whole numbers: the same in any order."""
    tl.atomic_add(bins + tl.arange(0, BINS), counts, mask=counts > 0, sem="relaxed")


@triton.jit
def scan(x, inside, squares, low, high):
    """What must be known of whole vectors before their parts can be measured: all (ROWS,)."""
    finite, wide = finite_and_wide(x, inside)
    squares += tl.sum(wide * wide, 1)
    low = tl.minimum(low, tl.min(tl.where(finite, wide, float("inf")), 1))
    high = tl.maximum(high, tl.max(tl.where(finite, wide, float("-inf")), 1))
    return squares, low, high


@triton.jit
def store_tallies(tallies, low, high, alive):
    """Stores a block's tallies."""
    tl.store(tallies, tl.min(low, 0))
    tl.store(tallies + 1, tl.max(high, 0))
    tl.store(tallies + 2, tl.sum(alive.to(tl.float64), 0))


@triton.jit
def store_cells(x, inside, squares, cells, units, c):
    """Stores the cells of the units of a tile (ROWS, COLUMNS) of vectors of these squared lengths."""
    inverse = tl.where(squares > 0, 1 / tl.sqrt(tl.where(squares > 0, squares, 1.0)), 0.0)
    finite, wide = finite_and_wide(x, inside)
    n = tl.sum(finite.to(tl.float64), 0)
    pivot = tl.where(n > 0, tl.min(tl.where(finite, wide, float("inf")), 0), 0.0)
    away = tl.where(finite, wide - pivot[None, :], 0.0)
    # Rounding may lift a mean over the largest entry; at most there, a constant unit has a variance of exactly 0.
    mean = tl.minimum(tl.sum(away, 0) / tl.maximum(n, 1.0), tl.max(away, 0))
    centred = tl.where(finite, away - mean[None, :], 0.0)
    nonzero = tl.sum((inside & ((bits_of(x) & 0x7FFFFFFF) != 0)).to(tl.float64), 0)
    here = units < c
    tl.store(cells + units, n, mask=here)
    tl.store(cells + c + units, pivot, mask=here)
    tl.store(cells + 2 * c + units, mean, mask=here)
    tl.store(cells + 3 * c + units, tl.sum(centred * centred, 0), mask=here)
    tl.store(cells + 4 * c + units, nonzero, mask=here)
    tl.store(cells + 5 * c + units, tl.sum(wide * inverse[:, None], 0), mask=here)


@triton.jit
def make_output(x, gate, at, inside, KIND: tl.constexpr):
    """relu(x), or the part of the gradient x that a ReLU of output `gate` lets through; nan opens the gate."""
    out = x
    if KIND != 0:
        bits = bits_of(x)
        if KIND == MASK:
            bits = bits_of(tl.load(gate + at, mask=inside, other=0.0))
        out = tl.where((bits > 0) | ((bits & 0x7FFFFFFF) > INFINITE), x, tl.zeros_like(x))
    return out


@triton.jit
def measure_batched(
    x_at,
    gate,
    out_at,
    x_cells,
    x_tallies,
    x_bins,
    out_cells,
    out_tallies,
    out_bins,
    n,
    c,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOWEST: tl.constexpr,
    OCTAVES: tl.constexpr,
    BINS: tl.constexpr,
):
    """ROWS vectors of one tensor (N, C): measures x; makes `out` of it, where KIND says so, and measures that too.

    `out` may lie on x: a program has read its whole block for the tallies before it writes the first entry.
    """
    block = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    begin = tl.program_id(0).to(tl.int64) * n * c
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x_squares, out_squares = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64)
    x_low, out_low = x_squares + float("inf"), x_squares + float("inf")
    x_high, out_high = x_squares + float("-inf"), x_squares + float("-inf")
    for start in range(0, c, COLUMNS):
        units = start + tl.arange(0, COLUMNS)
        inside = (rows[:, None] < n) & (units[None, :] < c)
        at = begin + rows[:, None] * c + units[None, :]
        x = tl.load(x_at + at, mask=inside, other=0.0)
        x_squares, x_low, x_high = scan(x, inside, x_squares, x_low, x_high)
        if KIND != 0:
            out = make_output(x, gate, at, inside, KIND)
            out_squares, out_low, out_high = scan(out, inside, out_squares, out_low, out_high)
    store_tallies(x_tallies + block * TALLIES, x_low, x_high, x_squares > 0)
    if KIND != 0:
        store_tallies(out_tallies + block * TALLIES, out_low, out_high, out_squares > 0)
    x_counts, out_counts = tl.zeros((BINS,), tl.int32), tl.zeros((BINS,), tl.int32)
    for start in range(0, c, COLUMNS):
        units = start + tl.arange(0, COLUMNS)
        inside = (rows[:, None] < n) & (units[None, :] < c)
        at = begin + rows[:, None] * c + units[None, :]
        x = tl.load(x_at + at, mask=inside, other=0.0)
        store_cells(x, inside, x_squares, x_cells + block * CELLS * c, units, c)
        x_counts += count_bins(x, inside, ROWS * COLUMNS, LOWEST, OCTAVES, BINS)
        if KIND != 0:
            out = make_output(x, gate, at, inside, KIND)
            tl.store(out_at + at, out, mask=inside)
            store_cells(out, inside, out_squares, out_cells + block * CELLS * c, units, c)
            out_counts += count_bins(out, inside, ROWS * COLUMNS, LOWEST, OCTAVES, BINS)
    add_counts(x_bins + tl.program_id(0).to(tl.int64) * BINS, x_counts, BINS)
    if KIND != 0:
        add_counts(out_bins + tl.program_id(0).to(tl.int64) * BINS, out_counts, BINS)


@triton.jit
def flat(
    x, inside, cells, tallies, bins, ENTRIES: tl.constexpr, LOWEST: tl.constexpr, OCTAVES: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """Everything about one block of a tensor without a batch, as one unit of as many vectors of no length."""
    block = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    finite, wide = finite_and_wide(x, inside)
    none = tl.zeros((ENTRIES,), tl.float64)
    low, high = tl.where(finite, wide, float("inf")), tl.where(finite, wide, float("-inf"))
    store_tallies(tallies + block * TALLIES, low, high, none)
    store_cells(x[:, None], inside[:, None], none, cells + block * CELLS, tl.arange(0, 1), 1)
    counts = count_bins(x, inside, ENTRIES, LOWEST, OCTAVES, BINS)
    add_counts(bins + tl.program_id(0).to(tl.int64) * BINS, counts, BINS)


@triton.jit
def measure_flat(
    x_at,
    cells,
    tallies,
    bins,
    entries,
    ENTRIES: tl.constexpr,
    LOWEST: tl.constexpr,
    OCTAVES: tl.constexpr,
    BINS: tl.constexpr,
):
    """ENTRIES entries of a tensor without a batch."""
    place = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    inside = place < entries
    x = tl.load(x_at + tl.program_id(0).to(tl.int64) * entries + place, mask=inside, other=0.0)
    flat(x, inside, cells, tallies, bins, ENTRIES, LOWEST, OCTAVES, BINS)


@triton.jit
def measure_update(
    w_at,
    g_at,
    lr_at,
    lr_step,
    g_cells,
    g_tallies,
    g_bins,
    u_cells,
    u_tallies,
    u_bins,
    w_cells,
    w_tallies,
    w_bins,
    entries,
    ENTRIES: tl.constexpr,
    LOWEST: tl.constexpr,
    OCTAVES: tl.constexpr,
    BINS: tl.constexpr,
):
    """w <- w - lr g in place, in float32 and rounded once; measures g, the step w made, and the new w."""
    which = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    inside = place < entries
    at = which * entries + place
    old = tl.load(w_at + at, mask=inside, other=0.0)
    g = tl.load(g_at + at, mask=inside, other=0.0)
    lr = tl.load(lr_at + which * lr_step).to(tl.float32)
    new = round_to(single(old) - lr * single(g), old)
    step = round_to(single(new) - single(old), old)
    tl.store(w_at + at, new, mask=inside)
    flat(g, inside, g_cells, g_tallies, g_bins, ENTRIES, LOWEST, OCTAVES, BINS)
    flat(step, inside, u_cells, u_tallies, u_bins, ENTRIES, LOWEST, OCTAVES, BINS)
    flat(new, inside, w_cells, w_tallies, w_bins, ENTRIES, LOWEST, OCTAVES, BINS)
