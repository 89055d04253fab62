// The row of a tensor: from plain sums where they may be trusted, else centred before it is squared.
//
// Sums run in float64, where squares of float32 neither overflow nor vanish, so a row's exponent is 0. Where a cancellation
// shows up in the plain sums `centre` corrects the row; where nan or inf do it is made again by `careful`.
#pragma once

#include "lanes.h"

namespace {

// Calls f(from, to) for strip after strip.
template <class Part> inline void strips(long n, const Part &f) {
    for (long from = 0; from < n; from += STRIP) f(from, n - from < STRIP ? n : from + STRIP);
}

// The row of a tensor that has no finite entry, as all of a network that has diverged; says whether it is one.
bool is_lost(const float *x, long count, bool batched, double *row) {
    double nans = 0, infs = 0;
    strips(count, [&](long from, long to) {
        int32_t nan = 0, inf = 0;
        for (long k = from; k < to; k++) {
            const uint32_t magnitude = bits_of(x[k]) << 1;
            nan += magnitude > 0xff000000; inf += magnitude == 0xff000000;
        }
        nans += nan; infs += inf;
    });
    if (nans + infs < count) return false;
    row[NANS] = nans; row[INFS] = infs; row[SUBNORMALS] = row[ZEROS] = 0;
    row[MEAN] = row[M2] = row[LOW] = row[HIGH] = row[WITHIN] = NOTHING;
    row[DEAD] = row[ALIVE] = row[RESULTANT] = batched ? 0 : NOTHING;
    return true;
}

// Of each unit: the pivot that entries are taken as distances from, the mean of these, their squared distances from it, and
// how many there are.
struct Centred {
    std::vector<double> pivot, mean, m2, finite;
    explicit Centred(long c) : pivot(c), mean(c), m2(c), finite(c) {}

    // Mean, M2 and WITHIN of all units: they may differ by any factor, and what varies inside a small one is not lost beside
    // a large one.
    void pool(double sum, bool batched, double *row) const {
        double total = 0, off = 0, pooled = 0, within = 0, units = 0;
        for (double n : finite) total += n;
        const double middle = total ? (float)(sum / total) : 0;
        const long c = pivot.size();
        for (long j = 0; j < c; j++) off += finite[j] * (mean[j] + (pivot[j] - middle));
        off /= total;
        for (long j = 0; j < c; j++) {
            if (!finite[j]) continue;
            const double away = pivot[j] - middle + mean[j] - off;
            pooled += m2[j] + finite[j] * away * away;
            within += m2[j] / finite[j]; units++;
        }
        row[MEAN] = total ? middle + off : NOTHING; row[M2] = total ? pooled : NOTHING;
        row[WITHIN] = batched ? within / units : NOTHING;
    }
};

// The row of a tensor with nan or inf.
void careful(const float *x, long n, long c, bool batched, double *row) {
    Centred all(c);
    std::vector<double> left(c), direction(c), unit_zeros(c);
    double nans = 0, infs = 0, subnormals = 0, low = INFINITY, high = -INFINITY, alive = 0, sum = 0;
    for (long a = 0; a < n; a++) {
        double squares = 0;
        for (long j = 0; j < c; j++) {
            const double v = x[a * c + j];
            if (!std::isfinite(v)) { nans += std::isnan(v); infs += std::isinf(v); continue; }
            all.finite[j]++; sum += v; all.pivot[j] += v; squares += v * v;
            low = v < low ? v : low; high = v > high ? v : high;
            unit_zeros[j] += v == 0; subnormals += v != 0 && std::fabs(v) < TINY;
        }
        if (batched && squares > 0) {
            const double inverse = 1 / std::sqrt(squares);
            alive++;
            for (long j = 0; j < c; j++) { const double v = x[a * c + j]; if (std::isfinite(v)) direction[j] += v * inverse; }
        }
    }
    // Rounded to float32: that is the very entry of a constant unit, whose variance is then exactly 0.
    for (long j = 0; j < c; j++) all.pivot[j] = all.finite[j] ? (float)(all.pivot[j] / all.finite[j]) : 0;
    auto each = [&](auto f) {
        for (long a = 0; a < n; a++)
            for (long j = 0; j < c; j++) { const double v = x[a * c + j]; if (std::isfinite(v)) f(j, v - all.pivot[j]); }
    };
    each([&](long j, double d) { all.mean[j] += d; });
    for (long j = 0; j < c; j++) all.mean[j] = all.finite[j] ? all.mean[j] / all.finite[j] : 0;
    each([&](long j, double d) { d -= all.mean[j]; all.m2[j] += d * d; left[j] += d; });
    double resultant = 0, zeros = 0, dead = 0;
    for (long j = 0; j < c; j++) {
        if (all.finite[j]) all.m2[j] -= left[j] * left[j] / all.finite[j];  // what the rounded mean leaves over
        resultant += direction[j] * direction[j]; zeros += unit_zeros[j]; dead += unit_zeros[j] == n;
    }
    all.pool(sum, batched, row);
    row[NANS] = nans; row[INFS] = infs; row[SUBNORMALS] = subnormals; row[ZEROS] = zeros;
    row[LOW] = low <= high ? low : NOTHING; row[HIGH] = low <= high ? high : NOTHING; row[DEAD] = batched ? dead / c : NOTHING;
    row[ALIVE] = batched ? alive : NOTHING; row[RESULTANT] = batched ? resultant : NOTHING;
}

// Zeros and subnormal numbers are counted only where the smallest magnitude says that there are any.
void count_small(const float *x, long count, double *row) {
    double zeros = 0, small = 0;
    strips(count, [&](long from, long to) {
        int32_t zero = 0, below = 0;
        for (long k = from; k < to; k++) {
            const uint32_t magnitude = bits_of(x[k]) << 1;
            zero += magnitude == 0; below += magnitude < 0x01000000;
        }
        zeros += zero; small += below;
    });
    row[ZEROS] = zeros; row[SUBNORMALS] = small - zeros;
}

// --- two passes over (n, c), tile by tile: lengths of the vectors, then units ----------------------------------------------

constexpr long LEAST_ROWS = 16;
constexpr long TILE = 8192;  // entries that stay in the nearest cache between the two passes, but at least four vectors

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
        D<8> sums{}, units{}, directions{};
        F<16> lowest = F<16>{} + INFINITY, highest = F<16>{} - INFINITY;
        I<16> dead{};
        for (long j = 0; j < room; j += 8) {
            const D<8> x = load<8>(sum + j), y = load<8>(direction + j);
            sums += x; units += x * x; directions += y * y;
        }
        for (long j = 0; j < room; j += 16) {
            const F<16> l = load<16>(low + j), h = load<16>(high + j);
            lowest = smaller(l, lowest); highest = larger(h, highest); dead += (l == 0) & (h == 0);
        }
        s.sum += total<8>(sums); s.unit_squares += total<8>(units); s.resultant += total<8>(directions);
        for (int k = 0; k < 16; k++) {
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

// Calls f(V, its first unit, which of its lanes count) for blocks of V units: of sixteen, and a last one of sixteen or
// eight that may begin among those before it; or of one where there are not as many.
template <class Block> inline void blocks(long c, const Block &f) {
    const I<16> every = I<16>{} - 1;
    if (c < 16) {
        for (long j = 0; j < c; j++) f(std::integral_constant<int, 1>(), j, I<1>{-1});
        return;
    }
    const long whole = c / 16 * 16, left = c - whole;
    for (long j = 0; j < whole; j += 16) f(std::integral_constant<int, 16>(), j, every);
    const I<16> behind = I<16>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} >= (int32_t)(16 - left);
    if (left > 8) f(std::integral_constant<int, 16>(), c - 16, behind);
    else if (left) f(std::integral_constant<int, 8>(), c - 8, lanes_of<8>(behind, 8));
}
// The lanes of x from h on that count, the others 0.
template <int H> inline D<H> counted(D<H> x, I<H> lanes) { return (D<H>)((L<H>)x & __builtin_convertvector(lanes, L<H>)); }

// Squared lengths of R vectors of x, and behind the first four those of what `part` makes of them, which is written to
// `out`. `at` is the place of x in the tensor.
template <class Part, int R> inline D<8> square(const float *x, const Part &part, long at, float *out, long c) {
    D<8> lengths[8] = {};
    double rest[8] = {0};
    blocks(c, [&](auto v, long j, auto lanes) {
        constexpr int V = decltype(v)::value, H = V > 8 ? 8 : V;
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
    return totals(lengths) + load<8>(rest);
}

// How many rows (c) are looked at together: of few enough terms plain sums lose no digits that count.
inline long rows_of_tile(long c) {
    const long rows = TILE / c / 4 * 4;
    return rows < LEAST_ROWS ? LEAST_ROWS : rows > TERMS ? TERMS : rows;
}

// Mean, M2 and WITHIN of a finite x whose entries vary little beside their size.
void centre(const float *x, long n, long c, bool batched, double *row) {
    Centred all(c);
    std::vector<double> sum(c);
    const long rows = rows_of_tile(c);
    auto add = [&](double *distances, double *squares) {
        for (long from = 0; from < n; from += rows)
            blocks(c, [&](auto v, long j, auto lanes) {
                constexpr int V = decltype(v)::value, H = V > 8 ? 8 : V;
                for (int h = 0; h < V; h += H) {
                    const D<H> pivot = load<H>(all.pivot.data() + j + h);
                    const I<H> mine = lanes_of<H>(lanes, h);
                    D<H> one{}, two{};
                    for (long a = from; a < n && a < from + rows; a++) {
                        const D<H> d = widen<H>(load<H>(x + a * c + j + h)) - pivot;
                        one += d; two += d * d;
                    }
                    store(distances + j + h, load<H>(distances + j + h) + counted<H>(one, mine));
                    store(squares + j + h, load<H>(squares + j + h) + counted<H>(two, mine));
                }
            });
    };
    add(sum.data(), all.m2.data());
    double total = 0;
    for (long j = 0; j < c; j++) {
        total += sum[j]; all.finite[j] = n; all.m2[j] = 0;
        all.pivot[j] = (float)(sum[j] / n);  // the very entry of a constant unit, whose variance is then exactly 0
    }
    add(all.mean.data(), all.m2.data());
    for (long j = 0; j < c; j++) {
        all.mean[j] /= n;
        all.m2[j] -= n * all.mean[j] * all.mean[j];  // what the rounded pivot leaves over
    }
    all.pool(total, batched, row);
}

// The row of x from its sums, or where they do not do from x itself.
void describe_from(const Sums &s, const float *x, long n, long c, bool batched, double *row) {
    const double count = (double)n * c, mean = s.sum / count, m2 = s.squares - s.sum * mean;
    const double unit_m2 = s.squares - s.unit_squares / n, tiles = (double)n / rows_of_tile(c);
    const double least = s.squares * CANCELLED * (batched && tiles > TERMS ? tiles / TERMS : 1);
    row[COUNT] = count; row[EXPONENT] = 0; row[SATURATED] = NOTHING;
    if (!std::isfinite(s.squares)) {
        if (!is_lost(x, n * c, batched, row)) careful(x, n, c, batched, row);
        return;
    }
    row[NANS] = row[INFS] = row[SUBNORMALS] = 0; row[ZEROS] = s.zeros < 0 ? 0 : s.zeros;
    if (s.least < TINY) count_small(x, (long)count, row);
    row[MEAN] = mean; row[M2] = m2; row[LOW] = s.low; row[HIGH] = s.high;
    row[WITHIN] = batched ? unit_m2 / count : NOTHING; row[DEAD] = batched ? (double)s.dead / c : NOTHING;
    row[ALIVE] = batched ? s.alive : NOTHING; row[RESULTANT] = batched ? s.resultant : NOTHING;
    // Without squares all entries are 0.
    if (s.squares > 0 && (!(m2 > least) || (batched && !(unit_m2 > least)))) centre(x, n, c, batched, row);
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
    D<8> squares{}, alive{};
    F<16> least = F<16>{} + INFINITY;  // the smallest magnitude
    I<16> zeros{};                     // minus the entries of the second tensor that are 0; of ReLU's no +0 is counted
    for (long from = 0; from < n; from += rows) {
        const long many = n - from < rows ? n - from : rows, start = from * c;
        float *to = out ? out + start : spare;
        D<8> own{};  // squares of this tile
        for (long a = 0; a < many;) {
            const bool four = a + 4 <= many;
            const long k = start + a * c;
            const D<8> found = four ? square<Part, 4>(x + k, part, k, to + a * c, c) : square<Part, 1>(x + k, part, k, to + a * c, c);
            own += found; alive += found > 0 ? D<8>{} + 1.0 : D<8>{};
            std::memcpy(inverse + a, &found, 4 * sizeof(double));
            std::memcpy(inverse_kept + a, (const double *)&found + 4, 4 * sizeof(double));
            a += four ? 4 : 1;
        }
        squares += own;
        if (!std::isfinite(total<8>(own))) return false;
        for (long a = 0; a < many; a += 8) {
            store(inverse + a, inverse_root(load<8>(inverse + a)));
            if constexpr (Part::BOTH) store(inverse_kept + a, inverse_root(load<8>(inverse_kept + a)));
        }
        blocks(c, [&](auto v, long j, auto lanes) {
            constexpr int V = decltype(v)::value, H = V > 8 ? 8 : V, K = V / H;
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
            if constexpr (V == 16) least = smaller(small, least), zeros += none & lanes;
            else for (int k = 0; k < V; k++) least[k] = smaller(small[k], least[k]), zeros[k] += (none & lanes)[k];
        });
    }
    part.finish(all, kept, c);
    all.pour(whole, c, room);
    for (int k = 0; k < 16; k++) whole.least = smaller(whole.least, least[k]);
    for (int r = 0; r < 4; r++) whole.squares += squares[r], whole.alive += alive[r];
    if constexpr (Part::BOTH) {
        kept.pour(some, c, room);
        for (int r = 4; r < 8; r++) some.squares += squares[r], some.alive += alive[r];
        some.least = whole.least; some.zeros = 0;
        for (int k = 0; k < 16; k++) some.zeros -= zeros[k];
        if (unit_sums) for (long j = 0; j < c; j++) unit_sums[j] = (float)kept.sum[j];
    }
    return true;
}

void describe(const float *x, long n, long c, bool batched, double *row) {
    Sums s, none;
    if (!batched) {
        strips(n * c, [&](long from, long to) {
            Lane<8> lane[2];
            const long whole = to & ~15L;
            for (long k = from; k < whole; k += 16) {
                prefetch(x + k + AHEAD);
                lane[0].entries(load<8>(x + k)); lane[1].entries(load<8>(x + k + 8));
            }
            Lane<1> last;
            for (long k = whole; k < to; k++) last.entries(load<1>(x + k));
            lane[0].pour(s); lane[1].pour(s); last.pour(s);
        });
    } else if (!gather(x, Alone(), nullptr, n, c, s, none, nullptr)) s.squares = NOTHING;
    describe_from(s, x, n, c, batched, row);
}

}  // namespace
