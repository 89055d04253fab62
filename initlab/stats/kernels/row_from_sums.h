// The row of a tensor from its plain sums where they may be trusted, else from entries that are centred first.
//
// Sums run in float64, where squares of float32 neither overflow nor vanish, so a row's exponent is 0. Where a cancellation
// shows up in the plain sums `centre` corrects the row; where nan or inf do it is made again by `careful`.
#pragma once

#include <type_traits>

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

constexpr long LEAST_ROWS = 16;
constexpr long TILE = 8192;  // entries that stay in the nearest cache between the two passes, but at least four vectors

// Calls f(V, its first unit, which of its lanes count) for blocks of V units: of WIDE, and a last one of WIDE or HALF that
// may begin among those before it; or of one where there are fewer than HALF.
template <class Block> inline void blocks(long c, const Block &f) {
    constexpr int32_t PLACES[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    if (c < HALF) {
        for (long j = 0; j < c; j++) f(std::integral_constant<int, 1>(), j, I<1>{-1});
        return;
    }
    long whole = c / WIDE * WIDE;
    for (long j = 0; j < whole; j += WIDE) f(std::integral_constant<int, WIDE>(), j, I<WIDE>{} - 1);
    if (!whole) f(std::integral_constant<int, HALF>(), whole, I<HALF>{} - 1), whole = HALF;
    const int32_t left = c - whole;
    if (left > HALF) f(std::integral_constant<int, WIDE>(), c - WIDE, (I<WIDE>)(load<WIDE>(PLACES) >= WIDE - left));
    else if (left) f(std::integral_constant<int, HALF>(), c - HALF, (I<HALF>)(load<HALF>(PLACES) >= HALF - left));
}

// The lanes of x from h on that count, the others 0.
template <int H> inline D<H> counted(D<H> x, I<H> lanes) { return (D<H>)((L<H>)x & __builtin_convertvector(lanes, L<H>)); }

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
                constexpr int V = decltype(v)::value, H = V > HALF ? HALF : V;
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

}  // namespace
