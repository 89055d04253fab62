// The plain sums of a tensor, and of what a pass makes of it, in two passes tile by tile: lengths of the vectors, then units.
#pragma once

#include "row_from_sums.h"

namespace {

// What is gathered of each unit of one tensor, with room for whole vectors.
struct Units {
    double *sum, *direction;
    float *low, *high;

    static constexpr long BYTES = 2 * sizeof(double) + 2 * sizeof(float);
    char *place(char *memory, long room) {
        sum = (double *)memory; direction = sum + room; low = (float *)(direction + room); high = low + room;
        std::memset(sum, 0, 2 * room * sizeof(double));
        for (long j = 0; j < room; j++) low[j] = INFINITY, high[j] = -INFINITY;
        return memory + room * BYTES;
    }
    void pour(Sums &s, long c, long room) const {
        for (long j = c; j < room; j++) low[j] = INFINITY, high[j] = -INFINITY;  // there are no such units
        D<HALF> sums{}, units{}, directions{};
        F<WIDE> lowest = F<WIDE>{} + INFINITY, highest = F<WIDE>{} - INFINITY;
        I<WIDE> dead{};
        for (long j = 0; j < room; j += HALF) {
            const D<HALF> x = load<HALF>(sum + j), y = load<HALF>(direction + j);
            sums += x; units += x * x; directions += y * y;
        }
        for (long j = 0; j < room; j += WIDE) {
            const F<WIDE> l = load<WIDE>(low + j), h = load<WIDE>(high + j);
            lowest = smaller(l, lowest); highest = larger(h, highest); dead += (l == 0) & (h == 0);
        }
        s.sum += total<HALF>(sums); s.unit_squares += total<HALF>(units); s.resultant += total<HALF>(directions);
        for (int k = 0; k < WIDE; k++) {
            s.low = lowest[k] < s.low ? lowest[k] : s.low; s.high = highest[k] > s.high ? highest[k] : s.high;
            s.dead -= dead[k];
        }
    }
};

// The memory of a thread, as large as it ever had to be.
inline char *scratch(long bytes) {
    thread_local std::vector<char> memory;
    if ((long)memory.size() < bytes + 64) memory.resize(bytes + 64);
    return (char *)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63);
}

// What stands beside x: nothing, or a tensor that is made of it entry by entry.
struct Alone {
    static constexpr bool BOTH = false, BOUNDS = false;
    void finish(const Units &, const Units &, long) const {}
};
// Squared lengths of R vectors of x, and behind the first four those of what `part` makes of them, which is written to
// `out`. `at` is the place of x in the tensor.
template <class Part, int R> inline Eight square(const float *x, const Part &part, long at, float *out, long c) {
    D<HALF> lengths[8] = {};
    double rest[8] = {0};
    blocks(c, [&](auto v, long j, auto lanes) {
        constexpr int V = decltype(v)::value, H = V > HALF ? HALF : V;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const long k = r * c + j;
            if constexpr (Part::BOTH) store(out + k, part.kept(load<V>(x + k), load<V>(part.beside(x, at) + k)));
#pragma GCC unroll 2
            for (int h = 0; h < V; h += H) {
                const D<H> d = counted<H>(widen<H>(load<H>(x + k + h)), lanes_of<H>(lanes, h));
                if constexpr (V == 1) rest[r] += d[0] * d[0]; else lengths[r] += d * d;
                if constexpr (Part::BOTH) {
                    const D<H> e = Part::BOUNDS ? counted<H>(widen<H>(load<H>(out + k + h)), lanes_of<H>(lanes, h)) : larger(d, D<H>{});
                    if constexpr (V == 1) rest[4 + r] += e[0] * e[0]; else lengths[4 + r] += e * e;
                }
            }
        }
    });
    Eight found = totals(lengths);
    for (int p = 0; p < 8 / HALF; p++) found.part[p] += load<HALF>(rest + HALF * p);
    return found;
}
// The sums of x (n, c) and of what `part` makes of it, which is written to `out` if that is not null; false where
// something is not finite: the sums and `out` then hold anything. `unit_sums`, (c) or null, are those of the second tensor.
template <class Part>
bool gather(const float *x, const Part &part, float *out, long n, long c, Sums &whole, Sums &some, float *unit_sums) {
    const long room = (c + 15) / 16 * 16, rows = rows_of_tile(c), lengths = rows + 8;
    char *memory = scratch(2 * room * Units::BYTES + 2 * lengths * sizeof(double) + rows * c * sizeof(float));
    Units all, kept;
    double *inverse = (double *)kept.place(all.place(memory, room), room), *inverse_kept = inverse + lengths;
    float *spare = (float *)(inverse_kept + lengths);
    Eight squares{}, alive{};
    F<WIDE> least = F<WIDE>{} + INFINITY;  // the smallest magnitude
    I<WIDE> zeros{};                       // minus the entries of the second tensor that are 0; of ReLU's no +0 is counted
    for (long from = 0; from < n; from += rows) {
        const long many = n - from < rows ? n - from : rows, start = from * c;
        float *to = out ? out + start : spare;
        Eight own{};  // squares of this tile
        for (long a = 0; a < many;) {
            const bool four = a + 4 <= many;
            const long k = start + a * c;
            const Eight found = four ? square<Part, 4>(x + k, part, k, to + a * c, c) : square<Part, 1>(x + k, part, k, to + a * c, c);
            for (int p = 0; p < 8 / HALF; p++) {
                own.part[p] += found.part[p];
                alive.part[p] += found.part[p] > 0 ? D<HALF>{} + 1.0 : D<HALF>{};
            }
            std::memcpy(inverse + a, &found, 4 * sizeof(double));
            std::memcpy(inverse_kept + a, (const double *)&found + 4, 4 * sizeof(double));
            a += four ? 4 : 1;
        }
        double finite = 0;
        for (int p = 0; p < 8 / HALF; p++) squares.part[p] += own.part[p], finite += total<HALF>(own.part[p]);
        if (!std::isfinite(finite)) return false;
        for (long a = 0; a < many; a += HALF) {
            store(inverse + a, inverse_root(load<HALF>(inverse + a)));
            if constexpr (Part::BOTH) store(inverse_kept + a, inverse_root(load<HALF>(inverse_kept + a)));
        }
        blocks(c, [&](auto v, long j, auto lanes) {
            constexpr int V = decltype(v)::value, H = V > HALF ? HALF : V, K = V / H;
            D<H> sum[K] = {}, direction[K] = {}, sum_kept[K] = {}, direction_kept[K] = {};
            F<V> low = load<V>(all.low + j), high = load<V>(all.high + j), small = F<V>{} + INFINITY;
            F<V> low_kept = load<V>(kept.low + j), high_kept = load<V>(kept.high + j);
            I<V> none{};
            const float *p = x + start + j, *q = to + j;
            for (long a = 0; a < many; a++, p += c, q += c) {
                const F<V> f = load<V>(p);
                prefetch(p + many * c);  // the next tile
                if constexpr (Part::BOUNDS) prefetch(part.beside(x, p - x + many * c));
                low = smaller(f, low); high = larger(f, high); small = nearest(f, small);
                if constexpr (Part::BOUNDS) {
                    const F<V> g = load<V>(q);
                    low_kept = smaller(g, low_kept); high_kept = larger(g, high_kept); none += g == 0;
                } else if constexpr (Part::BOTH) none += (I<V>)f >> 31;
#pragma GCC unroll 2
                for (int k = 0; k < K; k++) {
                    const D<H> d = widen<H>(load<H>(p + k * H));
                    sum[k] += d; direction[k] += d * inverse[a];
                    if constexpr (Part::BOTH) {
                        const D<H> e = Part::BOUNDS ? widen<H>(load<H>(q + k * H)) : larger(d, D<H>{});
                        sum_kept[k] += e; direction_kept[k] += e * inverse_kept[a];
                    }
                }
            }
            for (int k = 0; k < K; k++) {
                const I<H> mine = lanes_of<H>(lanes, k * H);
                const long at = j + k * H;
                store(all.sum + at, load<H>(all.sum + at) + counted<H>(sum[k], mine));
                store(all.direction + at, load<H>(all.direction + at) + counted<H>(direction[k], mine));
                if constexpr (Part::BOTH) {
                    store(kept.sum + at, load<H>(kept.sum + at) + counted<H>(sum_kept[k], mine));
                    store(kept.direction + at, load<H>(kept.direction + at) + counted<H>(direction_kept[k], mine));
                }
            }
            store(all.low + j, low); store(all.high + j, high);
            if constexpr (Part::BOUNDS) store(kept.low + j, low_kept), store(kept.high + j, high_kept);
            if constexpr (V == WIDE) least = smaller(small, least), zeros += none & lanes;
            else for (int k = 0; k < V; k++) least[k] = smaller(small[k], least[k]), zeros[k] += (none & lanes)[k];
        });
    }
    part.finish(all, kept, c);
    all.pour(whole, c, room);
    for (int k = 0; k < WIDE; k++) whole.least = smaller(whole.least, least[k]);
    for (int r = 0; r < 4; r++) whole.squares += squares.at(r), whole.alive += alive.at(r);
    if constexpr (Part::BOTH) {
        kept.pour(some, c, room);
        for (int r = 4; r < 8; r++) some.squares += squares.at(r), some.alive += alive.at(r);
        some.least = whole.least; some.zeros = 0;
        for (int k = 0; k < WIDE; k++) some.zeros -= zeros[k];
        if (unit_sums) for (long j = 0; j < c; j++) unit_sums[j] = (float)kept.sum[j];
    }
    return true;
}

void describe(const float *x, long n, long c, bool batched, double *row) {
    Sums s, none;
    if (!batched) {
        strips(n * c, [&](long from, long to) {
            Lane<HALF> lane[16 / HALF];
            const long whole = to & ~15L;
            for (long k = from; k < whole; k += 16) {
                prefetch(x + k + AHEAD);
                for (int l = 0; l < 16 / HALF; l++) lane[l].entries(load<HALF>(x + k + HALF * l));
            }
            Lane<1> last;
            for (long k = whole; k < to; k++) last.entries(load<1>(x + k));
            for (const auto &one : lane) one.pour(s);
            last.pour(s);
        });
    } else if (!gather(x, Alone(), nullptr, n, c, s, none, nullptr)) s.squares = NOTHING;
    describe_from(s, x, n, c, batched, row);
}

}  // namespace
