// The row of a tensor: from plain sums where they may be trusted, else centred before it is squared.
//
// Sums run in float64, where squares of float32 neither overflow nor vanish, so a row's exponent is 0. Where subnormal,
// nan, inf or a cancellation show up in the plain sums the row is made again by `careful`.
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

// Every entry is taken as its distance from a pivot of its own unit, near the unit's mean: units may differ by any factor,
// and what varies inside a small one is not lost beside a large one.
void careful(const float *x, long n, long c, bool batched, double *row) {
    std::vector<double> pivot(c), mean(c), m2(c), left(c), direction(c), finite(c), unit_zeros(c);
    double nans = 0, infs = 0, subnormals = 0, low = INFINITY, high = -INFINITY, alive = 0, sum = 0, total = 0;
    for (long a = 0; a < n; a++) {
        double squares = 0;
        for (long j = 0; j < c; j++) {
            const double v = x[a * c + j];
            if (!std::isfinite(v)) { nans += std::isnan(v); infs += std::isinf(v); continue; }
            finite[j]++; total++; sum += v; pivot[j] += v; squares += v * v;
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
    for (long j = 0; j < c; j++) pivot[j] = finite[j] ? (float)(pivot[j] / finite[j]) : 0;
    auto each = [&](auto f) {
        for (long a = 0; a < n; a++)
            for (long j = 0; j < c; j++) { const double v = x[a * c + j]; if (std::isfinite(v)) f(j, v - pivot[j]); }
    };
    each([&](long j, double d) { mean[j] += d; });
    const double middle = total ? (float)(sum / total) : 0;  // of all units, for the spread of their means
    double off = 0;
    for (long j = 0; j < c; j++) {
        off += mean[j] + finite[j] * (pivot[j] - middle);
        mean[j] = finite[j] ? mean[j] / finite[j] : 0;
    }
    off /= total;
    each([&](long j, double d) { d -= mean[j]; m2[j] += d * d; left[j] += d; });
    double pooled = 0, within = 0, resultant = 0, zeros = 0, dead = 0, units = 0;
    for (long j = 0; j < c; j++) {
        if (finite[j]) {
            m2[j] -= left[j] * left[j] / finite[j];  // what the rounded mean leaves over
            const double away = pivot[j] - middle + mean[j] - off;
            pooled += m2[j] + finite[j] * away * away;
            within += m2[j] / finite[j]; units++;
        }
        resultant += direction[j] * direction[j]; zeros += unit_zeros[j]; dead += unit_zeros[j] == n;
    }
    row[NANS] = nans; row[INFS] = infs; row[SUBNORMALS] = subnormals; row[ZEROS] = zeros;
    row[MEAN] = total ? middle + off : NOTHING; row[M2] = total ? pooled : NOTHING;
    row[LOW] = total ? low : NOTHING; row[HIGH] = total ? high : NOTHING;
    row[WITHIN] = batched ? within / units : NOTHING; row[DEAD] = batched ? dead / c : NOTHING;
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

bool quick(const Sums &s, const float *x, long n, long c, bool batched, double *row) {
    const double count = (double)n * c, mean = s.sum / count, m2 = s.squares - s.sum * mean;
    const double unit_m2 = s.squares - s.unit_squares / n, least = s.squares * CANCELLED * (batched && n > TERMS ? n / TERMS : 1);
    row[COUNT] = count; row[EXPONENT] = 0; row[SATURATED] = NOTHING;
    if (!std::isfinite(s.squares)) return false;
    if (s.squares > 0 && (!(m2 > least) || (batched && !(unit_m2 > least)))) return false;  // without, all entries are 0
    row[NANS] = row[INFS] = row[SUBNORMALS] = 0; row[ZEROS] = s.zeros < 0 ? 0 : s.zeros;
    if (s.least < TINY) count_small(x, (long)count, row);
    row[MEAN] = mean; row[M2] = m2; row[LOW] = s.low; row[HIGH] = s.high;
    row[WITHIN] = batched ? unit_m2 / count : NOTHING; row[DEAD] = batched ? (double)s.dead / c : NOTHING;
    row[ALIVE] = batched ? s.alive : NOTHING; row[RESULTANT] = batched ? s.resultant : NOTHING;
    return true;
}

// The row of x from its sums, or where they do not do from x itself.
void describe_from(const Sums &s, const float *x, long n, long c, bool batched, double *row) {
    if (!quick(s, x, n, c, batched, row) && !is_lost(x, n * c, batched, row)) careful(x, n, c, batched, row);
}

// --- two passes over (n, c): lengths of the vectors, then units -------------------------------------------------------------

// Units in blocks of eight, four and one; a row of blocks has its lanes.
struct Units {
    const long c, eights = c / 8, fours = c % 8 / 4, ones = c % 4;
    template <class Block> inline void each(const Block &f) const {
        long j = 0;
        for (long k = 0; k < eights; k++, j += 8) f(std::integral_constant<int, 8>(), j, k);
        for (long k = 0; k < fours; k++, j += 4) f(std::integral_constant<int, 4>(), j, k);
        for (long k = 0; k < ones; k++, j++) f(std::integral_constant<int, 1>(), j, k);
    }
};
struct Lanes_of {
    std::vector<Lane<8>> eights; std::vector<Lane<4>> fours; std::vector<Lane<1>> ones;
    explicit Lanes_of(const Units &u) : eights(u.eights), fours(u.fours), ones(u.ones) {}
    inline Lane<8> &at(std::integral_constant<int, 8>, long k) { return eights[k]; }
    inline Lane<4> &at(std::integral_constant<int, 4>, long k) { return fours[k]; }
    inline Lane<1> &at(std::integral_constant<int, 1>, long k) { return ones[k]; }
    template <int FUSED> void pour(Sums &s) const {
        for (auto &l : eights) l.template pour<FUSED>(s);
        for (auto &l : fours) l.template pour<FUSED>(s);
        for (auto &l : ones) l.template pour<FUSED>(s);
    }
};

constexpr long TILE = 4096;  // entries that stay in the nearest cache between the two passes

// Squared lengths of `many` vectors become inverse lengths, 0 for a vector of zeros.
inline void invert_lengths(double *lengths, long many, Sums &s) {
    double squares = 0, alive = 0;
    for (long a = 0; a < many; a++) squares += lengths[a], alive += lengths[a] > 0;
    for (long a = 0; a < many; a++) lengths[a] = lengths[a] > 0 ? 1 / std::sqrt(lengths[a]) : 0;
    s.squares += squares; s.alive += alive;
}

template <int V> inline double total(D<V> x) { double t = 0; for (int k = 0; k < V; k++) t += x[k]; return t; }
#ifdef __AVX512F__
// By halves: one after the other, the lanes of every vector would wait for each other.
template <> inline double total<4>(D<4> x) {
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128((__m256d)x), _mm256_extractf128_pd((__m256d)x, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
template <> inline double total<8>(D<8> x) {
    return total<4>((D<4>)_mm256_add_pd(_mm512_castpd512_pd256((__m512d)x), _mm512_extractf64x4_pd((__m512d)x, 1)));
}
#endif

void describe(const float *x, long n, long c, bool batched, double *row) {
    Sums s;
    if (!batched) {
        strips(n * c, [&](long from, long to) {
            Lane<8> lane[2];
            const long whole = to & ~15L;
            for (long k = from; k < whole; k += 16) lane[0].entries(load<8>(x + k)), lane[1].entries(load<8>(x + k + 8));
            Lane<1> last;
            for (long k = whole; k < to; k++) last.entries(load<1>(x + k));
            lane[0].pour<4>(s); lane[1].pour<4>(s); last.pour<4>(s);
        });
    } else {
        const Units units{c};
        Lanes_of lanes(units);
        const long rows = TILE / c + 1;
        std::vector<double> inverse(rows);
        for (long from = 0; from < n; from += rows, x += rows * c) {
            const long many = n - from < rows ? n - from : rows;
            for (long a = 0; a < many; a++) {
                double squares = 0;
                D<8> sum{};
                units.each([&](auto v, long j, long) {
                    constexpr int V = decltype(v)::value;
                    const D<V> d = widen<V>(load<V>(x + a * c + j));
                    if constexpr (V == 8) sum += d * d; else squares += total<V>(d * d);
                });
                inverse[a] = squares + total<8>(sum);
            }
            invert_lengths(inverse.data(), many, s);
            units.each([&](auto v, long j, long k) {
                constexpr int V = decltype(v)::value;
                Lane<V> lane = lanes.at(v, k);
                for (long a = 0; a < many; a++) {
                    const F<V> f = load<V>(x + a * c + j);
                    const D<V> d = widen<V>(f);
                    lane.bounds(f); lane.nearest(f); lane.sum += d; lane.direction += d * inverse[a];
                }
                lanes.at(v, k) = lane;
            });
        }
        lanes.pour<4>(s);
        x -= (n + rows - 1) / rows * rows * c;
    }
    describe_from(s, x, n, c, batched, row);
}

}  // namespace
