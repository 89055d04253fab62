// Rows of statistics, made in passes over memory that a training step makes anyway: ReLU, its mask, the update.
//
// The same row as moments.py, for float32 on a CPU. Sums run in float64, where squares of float32 neither overflow nor
// vanish, so a row's exponent is 0. The quick road takes plain sums; where subnormal, nan, inf or a cancellation
// show up, the row is made again by the careful road, which centres before it squares.
// Legend: e networks, n batch, c units, contiguous (e, n, c); `row` holds FIELDS doubles and `bins` BINS counts a network.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AVX512BW__) && defined(__AVX512VPOPCNTDQ__)
#define BIT_PLANES 1
#endif

namespace {

enum Field { COUNT, NANS, INFS, SUBNORMALS, ZEROS, EXPONENT, MEAN, M2, LOW, HIGH, WITHIN, DEAD, ALIVE, RESULTANT, SATURATED, FIELDS };

constexpr long LOWEST = -149, OCTAVES = 277, BINS = 2 * OCTAVES;  // floor(log2 |x|) of float32, positive then negative
constexpr float TINY = std::numeric_limits<float>::min();
constexpr double NOTHING = std::numeric_limits<double>::quiet_NaN();
// Plain sums lose digits with the terms that one lane adds up and with (sum of squares / M2). Up to 256 terms M2 may be
// 2^-8 of the sum of squares: measured errors then stay below 1e-13. With more terms it must be so much more.
constexpr double CANCELLED = 1.0 / 256, TERMS = 256;
constexpr long STRIP = 16 * 256;  // entries of a tensor without units between two emptyings of its lanes

template <int V> struct Lanes {
    typedef float F __attribute__((vector_size(4 * V), aligned(4)));
    typedef double D __attribute__((vector_size(8 * V), aligned(8)));
    typedef int32_t I __attribute__((vector_size(4 * V), aligned(4)));
};
template <int V> using F = typename Lanes<V>::F;
template <int V> using D = typename Lanes<V>::D;
template <int V> using I = typename Lanes<V>::I;

template <int V> inline F<V> load(const float *p) { F<V> x; std::memcpy(&x, p, sizeof x); return x; }
template <int V> inline void store(float *p, F<V> x) { std::memcpy(p, &x, sizeof x); }
template <int V> inline D<V> widen(F<V> x) { return __builtin_convertvector(x, D<V>); }
#ifdef __AVX512F__
template <> inline D<8> widen<8>(F<8> x) { return (D<8>)_mm512_cvtps_pd((__m256)x); }  // one instruction, not four
#endif
inline uint32_t bits_of(float x) { uint32_t b; std::memcpy(&b, &x, 4); return b; }
inline float float_of(int32_t b) { float x; std::memcpy(&x, &b, 4); return x; }

// What the quick road gathers of one tensor.
struct Sums {
    double sum = 0, squares = 0, unit_squares = 0, resultant = 0, alive = 0;
    float low = INFINITY, high = -INFINITY, least = INFINITY;  // least: the smallest magnitude
    long dead = 0, zeros = -1;  // -1: not counted
};

// V units at a time, or V lanes of a tensor without units.
template <int V> struct Lane {
    D<V> sum{}, squares{}, direction{};
    F<V> low = F<V>{} + INFINITY, high = F<V>{} - INFINITY;
    I<V> least = I<V>{} + 0x7f800000;  // magnitudes compare as their bits do
    inline void bounds(F<V> x) { low = x < low ? x : low; high = x > high ? x : high; }
    inline void nearest(F<V> x) { const I<V> m = (I<V>)x & 0x7fffffff; least = m < least ? m : least; }
    inline void entries(F<V> x) { const D<V> d = widen<V>(x); bounds(x); nearest(x); sum += d; squares += d * d; }
    void pour(Sums &s) const {
        for (int k = 0; k < V; k++) {
            s.sum += sum[k]; s.squares += squares[k]; s.unit_squares += sum[k] * sum[k];
            s.resultant += direction[k] * direction[k];
            s.low = low[k] < s.low ? low[k] : s.low; s.high = high[k] > s.high ? high[k] : s.high;
            s.least = std::fmin(s.least, float_of(least[k])); s.dead += low[k] == 0 && high[k] == 0;
        }
    }
};

// --- the careful road -------------------------------------------------------------------------------------------------

// Everything is taken as its distance from a pivot near the mean, which float64 holds exactly.
void careful(const float *x, long n, long c, bool batched, double *row) {
    std::vector<double> mean(c), m2(c), left(c), direction(c), finite(c), unit_zeros(c);
    double nans = 0, infs = 0, subnormals = 0, low = INFINITY, high = -INFINITY, alive = 0, sum = 0, total = 0;
    for (long a = 0; a < n; a++) {
        double squares = 0;
        for (long j = 0; j < c; j++) {
            const double v = x[a * c + j];
            if (!std::isfinite(v)) { nans += std::isnan(v); infs += std::isinf(v); continue; }
            finite[j]++; total++; sum += v; squares += v * v;
            low = v < low ? v : low; high = v > high ? v : high;
            unit_zeros[j] += v == 0; subnormals += v != 0 && std::fabs(v) < TINY;
        }
        if (batched && squares > 0) {
            const double inverse = 1 / std::sqrt(squares);
            alive++;
            for (long j = 0; j < c; j++) { const double v = x[a * c + j]; if (std::isfinite(v)) direction[j] += v * inverse; }
        }
    }
    const double pivot = total ? (float)(sum / total) : 0;
    auto each = [&](auto f) {
        for (long a = 0; a < n; a++)
            for (long j = 0; j < c; j++) { const double v = x[a * c + j]; if (std::isfinite(v)) f(j, v - pivot); }
    };
    each([&](long j, double d) { mean[j] += d; });
    double off = 0;
    for (long j = 0; j < c; j++) { off += mean[j]; mean[j] = finite[j] ? mean[j] / finite[j] : 0; }
    off /= total;
    each([&](long j, double d) { d -= mean[j]; m2[j] += d * d; left[j] += d; });
    double pooled = 0, within = 0, resultant = 0, zeros = 0, dead = 0, units = 0;
    for (long j = 0; j < c; j++) {
        if (finite[j]) {
            m2[j] -= left[j] * left[j] / finite[j];  // what the rounded mean leaves over
            pooled += m2[j] + finite[j] * (mean[j] - off) * (mean[j] - off);
            within += m2[j] / finite[j]; units++;
        }
        resultant += direction[j] * direction[j]; zeros += unit_zeros[j]; dead += unit_zeros[j] == n;
    }
    row[NANS] = nans; row[INFS] = infs; row[SUBNORMALS] = subnormals; row[ZEROS] = zeros;
    row[MEAN] = total ? pivot + off : NOTHING; row[M2] = total ? pooled : NOTHING;
    row[LOW] = total ? low : NOTHING; row[HIGH] = total ? high : NOTHING;
    row[WITHIN] = batched ? within / units : NOTHING; row[DEAD] = batched ? dead / c : NOTHING;
    row[ALIVE] = batched ? alive : NOTHING; row[RESULTANT] = batched ? resultant : NOTHING;
}

// --- from sums to a row; false where the careful road is needed -----------------------------------------------------------

// Calls f(from, to) for strip after strip.
template <class Part> inline void strips(long n, const Part &f) {
    for (long from = 0; from < n; from += STRIP) f(from, n - from < STRIP ? n : from + STRIP);
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
    if (!quick(s, x, n, c, batched, row)) careful(x, n, c, batched, row);
}

// --- the histogram ------------------------------------------------------------------------------------------------------

inline void bin_one(float x, int32_t *bins) {
    const uint32_t b = bits_of(x), magnitude = b & 0x7fffffff;
    const long biased = magnitude >> 23;
    if (magnitude == 0 || biased == 255) return;
    const long octave = biased ? biased - 127 : 31 - __builtin_clz(magnitude) + LOWEST;
    bins[(b >> 31) * OCTAVES + octave - LOWEST]++;
}

#ifdef BIT_PLANES
// Sixteen octaves below `top`, both signs: every count is the population of an intersection of five bit planes.
inline void count_planes(const uint64_t (*plane)[8], __m512i *counts) {
    const __m512i all = _mm512_set1_epi64(-1);
    __m512i p[5];
    for (int q = 0; q < 5; q++) p[q] = _mm512_load_si512(plane[q]);
#pragma GCC unroll 2
    for (int s = 0; s < 2; s++) {
        const __m512i m4 = s ? p[4] : _mm512_andnot_si512(p[4], all);
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) {
            const __m512i m3 = u & 2 ? _mm512_and_si512(p[3], m4) : _mm512_andnot_si512(p[3], m4);
            const __m512i m2 = u & 1 ? _mm512_and_si512(p[2], m3) : _mm512_andnot_si512(p[2], m3);
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) {
                const __m512i m1 = v & 2 ? _mm512_and_si512(p[1], m2) : _mm512_andnot_si512(p[1], m2);
                const __m512i m0 = v & 1 ? _mm512_and_si512(p[0], m1) : _mm512_andnot_si512(p[0], m1);
                __m512i *count = counts + 16 * s + 4 * u + v;
                *count = _mm512_add_epi64(*count, _mm512_popcnt_epi64(m0));
            }
        }
    }
}

// The planes of 64 entries; returned are those more than fourteen octaves below the top, zeros and subnormals left out.
inline uint64_t split_planes(const float *x, __m512i top, uint64_t (*plane)[8], int k) {
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,
                                         31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    const __m512i ab = _mm512_permutex2var_epi16(_mm512_loadu_si512(x), odd, _mm512_loadu_si512(x + 16));
    const __m512i cd = _mm512_permutex2var_epi16(_mm512_loadu_si512(x + 32), odd, _mm512_loadu_si512(x + 48));
    plane[4][k] = (uint64_t)_mm512_movepi16_mask(ab) | (uint64_t)_mm512_movepi16_mask(cd) << 32;
    const __m256i low = _mm512_cvtepi16_epi8(_mm512_srli_epi16(ab, 7)), high = _mm512_cvtepi16_epi8(_mm512_srli_epi16(cd, 7));
    const __m512i biased = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    const __m512i below = _mm512_min_epu8(_mm512_subs_epu8(top, biased), _mm512_set1_epi8(15));
    for (int q = 0; q < 4; q++) plane[q][k] = _mm512_test_epi8_mask(below, _mm512_set1_epi8(1 << q));
    return _mm512_mask_cmpeq_epi8_mask(_mm512_test_epi8_mask(biased, biased), below, _mm512_set1_epi8(15));
}

void histogram(const float *x, long n, float largest, bool subnormals, int32_t *bins) {
    const int top = bits_of(largest) >> 23;
    const long whole = largest < INFINITY && top > 15 && !subnormals ? n & ~511L : 0;
    __m512i counts[32];
    for (auto &count : counts) count = _mm512_setzero_si512();
    for (long start = 0; start < whole; start += 512) {
        alignas(64) uint64_t plane[5][8];
        for (int k = 0; k < 8; k++) {
            const float *here = x + start + 64 * k;
            for (uint64_t rest = split_planes(here, _mm512_set1_epi8((char)top), plane, k); rest; rest &= rest - 1)
                bin_one(here[__builtin_ctzll(rest)], bins);
        }
        count_planes(plane, counts);
    }
    for (int s = 0; s < 2 && whole; s++)
        for (int u = 0; u < 15; u++) bins[s * OCTAVES + top - u - 127 - LOWEST] += _mm512_reduce_add_epi64(counts[16 * s + u]);
    for (long k = whole; k < n; k++) bin_one(x[k], bins);
}
#else
void histogram(const float *x, long n, float, bool, int32_t *bins) {
    uint32_t table[4][512];  // four, so that two equal neighbours do not wait for each other
    std::memset(table, 0, sizeof table);
    for (long k = 0; k < n; k++) table[k & 3][bits_of(x[k]) >> 23]++;
    for (int s = 0; s < 2; s++) {
        for (int biased = 1; biased < 255; biased++)
            for (auto &t : table) bins[s * OCTAVES + biased - 127 - LOWEST] += t[256 * s + biased];
    }
    uint32_t small = 0;
    for (auto &t : table) small += t[0] + t[256];
    for (long k = 0; small && k < n; k++)
        if (!((bits_of(x[k]) >> 23) & 255)) bin_one(x[k], bins);
}
#endif

inline float largest(const double *row) {
    const double low = std::fabs(row[LOW]), high = std::fabs(row[HIGH]);
    return row[NANS] || row[INFS] || !(low < INFINITY) ? INFINITY : (float)(low > high ? low : high);
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
    void pour(Sums &s) const {
        for (auto &l : eights) l.pour(s);
        for (auto &l : fours) l.pour(s);
        for (auto &l : ones) l.pour(s);
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
            lane[0].pour(s); lane[1].pour(s); last.pour(s);
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
        lanes.pour(s);
        x -= (n + rows - 1) / rows * rows * c;
    }
    describe_from(s, x, n, c, batched, row);
}

// Two rows in one reading: x itself, and x where `inside` lets it through, else 0. Nothing is written but the sums of
// the units that remain, if asked for: they are the gradient of a bias.
template <class Inside>
void describe_both(const float *x, const Inside &inside, long n, long c, Sums &whole, Sums &part, float *unit_sums) {
    const Units units{c};
    Lanes_of all_lanes(units), some_lanes(units);
    const long rows = TILE / c + 1;
    std::vector<double> inverse(rows), inverse_kept(rows);
    for (long from = 0; from < n; from += rows) {
        const long many = n - from < rows ? n - from : rows, start = from * c;
        for (long a = 0; a < many; a++) {
            double squares = 0, kept = 0;
            D<8> sum{}, sum_kept{};
            units.each([&](auto v, long j, long) {
                constexpr int V = decltype(v)::value;
                const F<V> f = load<V>(x + start + a * c + j);
                const D<V> d = widen<V>(f), k = inside.kept(v, d, start + a * c + j);
                if constexpr (V == 8) sum += d * d, sum_kept += k * k; else squares += total<V>(d * d), kept += total<V>(k * k);
            });
            inverse[a] = squares + total<8>(sum);
            inverse_kept[a] = kept + total<8>(sum_kept);
        }
        invert_lengths(inverse.data(), many, whole);
        invert_lengths(inverse_kept.data(), many, part);
        units.each([&](auto v, long j, long b) {
            constexpr int V = decltype(v)::value;
            Lane<V> all = all_lanes.at(v, b), some = some_lanes.at(v, b);
            for (long a = 0; a < many; a++) {
                const F<V> f = load<V>(x + start + a * c + j);
                const D<V> d = widen<V>(f), k = inside.kept(v, d, start + a * c + j);
                all.bounds(f); all.nearest(f); all.sum += d; all.direction += d * inverse[a];
                inside.bounds(v, some, f, start + a * c + j); some.sum += k; some.direction += k * inverse_kept[a];
            }
            inside.finish(some, all);
            all_lanes.at(v, b) = all; some_lanes.at(v, b) = some;
        });
    }
    all_lanes.pour(whole); some_lanes.pour(part);
    if (unit_sums)
        units.each([&](auto v, long j, long b) {
            for (int u = 0; u < decltype(v)::value; u++) unit_sums[j + u] = (float)some_lanes.at(v, b).sum[u];
        });
    part.least = whole.least;
    if (!std::isfinite(whole.squares)) part.squares = NOTHING;
}

struct Above {  // ReLU lets through what is above 0, or nan
    template <class W> inline auto kept(W, D<W::value> d, long) const {
#ifdef __AVX512F__
        if constexpr (W::value == 8) return (D<8>)_mm512_max_pd((__m512d)d, __m512d{});
        else
#endif
        return d > 0 ? d : D<W::value>{};
    }
    template <class W> inline void bounds(W, Lane<W::value> &, F<W::value>, long) const {}
    template <int V> inline void finish(Lane<V> &some, const Lane<V> &all) const {
        some.low = all.low <= 0 ? F<V>{} : all.low; some.high = all.high <= 0 ? F<V>{} : all.high;
    }
};
struct Where {  // its mask, where its output is above 0, or nan
    const float *activation;
    template <class W> inline auto kept(W, D<W::value> d, long k) const {
        constexpr int V = W::value;
        const F<V> a = load<V>(activation + k);
#ifdef __AVX512VL__
        if constexpr (V == 8) return (D<8>)_mm512_maskz_mov_pd(_mm256_cmp_ps_mask((__m256)a, __m256{}, _CMP_NLE_UQ), (__m512d)d);
        else
#endif
        return widen<V>(a) <= 0 ? D<V>{} : d;
    }
    template <class W> inline void bounds(W, Lane<W::value> &some, F<W::value> x, long k) const {
        constexpr int V = W::value;
        const F<V> kept = load<V>(activation + k) <= 0 ? F<V>{} : x;
        some.bounds(kept);
    }
    template <int V> inline void finish(Lane<V> &, const Lane<V> &) const {}
};

// u = (w - lr g) - w, and the sums of all three.
template <int V>
[[gnu::noinline]] void move(  // inlined, the sums would go through memory: the compiler forgets that nothing overlaps
    const float *__restrict w, const float *__restrict g, float *__restrict u, long from, long to, float lr, Sums &sw,
          Sums &sg, Sums &su) {
    Lane<V> lw, lg, lu;
    for (long j = from; j < to; j += V) {
        const F<V> old = load<V>(w + j), grad = load<V>(g + j), moved = old - lr * grad - old;
        lw.entries(old); lg.entries(grad); lu.entries(moved);
        store<V>(u + j, moved);
    }
    lw.pour(sw); lg.pour(sg); lu.pour(su);
}

// The sums of x, which is copied to `kept`.
template <int V> [[gnu::noinline]] void keep(const float *__restrict x, float *__restrict kept, long from, long to, Sums &s) {
    Lane<V> lane;
    for (long j = from; j < to; j += V) { const F<V> f = load<V>(x + j); lane.entries(f); store<V>(kept + j, f); }
    lane.pour(s);
}

// The sums of x - old.
template <int V> [[gnu::noinline]] void change(const float *x, const float *old, long from, long to, Sums &s) {
    Lane<V> lane;
    for (long j = from; j < to; j += V) lane.entries(load<V>(x + j) - load<V>(old + j));
    lane.pour(s);
}

}  // namespace

extern "C" {

long fields() { return FIELDS; }
long bins() { return BINS; }

// A tensor alone; `bins` may be null.
void describe_rows(const float *x, long e, long n, long c, int batched, double *row, int32_t *bins) {
    for (long k = 0; k < e; k++, x += n * c, row += FIELDS) {
        describe(x, n, c, batched, row);
        if (bins) { histogram(x, n * c, largest(row), row[SUBNORMALS] > 0, bins); bins += BINS; }
    }
}

// What a step does to one tensor: where it lies, its shape, and the places of its rows in the step's rows and bins.
struct Job {
    float *x, *other, *unit_sums;
    int64_t e, n, c, first, second, third;
};

// Histograms of any length one after the other: the lowest octave, how many octaves, counts of positive and of negative
// entries from there on. `starts` says where that of a place begins.
struct Arena {
    int32_t *memory;
    int64_t used, *starts;

    void append(const int32_t *bins, int64_t place, int signs) {
        long low = 0, high = OCTAVES - 1;
        while (low < high && !bins[low] && !bins[OCTAVES + low]) low++;
        while (high > low && !bins[high] && !bins[OCTAVES + high]) high--;
        int32_t *out = memory + used;
        const long size = high - low + 1;
        starts[place] = used; used += 2 + 2 * size;
        out[0] = low + LOWEST; out[1] = size;
        std::memcpy(out + 2, bins + low, size * sizeof *out);
        if (signs == 2) std::memcpy(out + 2 + size, bins + OCTAVES + low, size * sizeof *out);
        else std::memset(out + 2 + size, 0, size * sizeof *out);
    }
};

// The rows and histograms of one step.
struct Page {
    double *rows;
    Arena *arena;
    double *row(int64_t place, int64_t k) const { return rows + (place + k) * FIELDS; }
    void count(const float *x, int64_t size, int64_t place, int64_t k, int64_t positive = -1) const {
        if (!arena) return;
        int32_t bins[BINS] = {0};
        const double *found = row(place, k);
        histogram(x, size, largest(found), found[SUBNORMALS] > 0, bins);
        arena->append(bins, place + k, 2);
        if (positive >= 0) arena->append(bins, positive + k, 1);
    }
};

// x, at `first`.
void describe_job(const Job *job, double *rows, Arena *arena) {
    const Page page{rows, arena};
    for (int64_t k = 0; k < job->e; k++) {
        const float *x = job->x + k * job->n * job->c;
        describe(x, job->n, job->c, true, page.row(job->first, k));
        page.count(x, job->n * job->c, job->first, k);
    }
}

// The row of z at `first`, the counts of z and of max(z, 0), and the sums of max(z, 0).
static Sums above(const Page &page, const Job *job, int64_t k, const float *z) {
    Sums whole, part;
    describe_both(z, Above(), job->n, job->c, whole, part, nullptr);
    describe_from(whole, z, job->n, job->c, true, page.row(job->first, k));
    page.count(z, job->n * job->c, job->first, k, job->second);
    return part;
}

// x at `first`, and at `second` the row of max(x, 0), which is not made.
void foresee_job(const Job *job, double *rows, Arena *arena) {
    const Page page{rows, arena};
    const int64_t n = job->n, c = job->c;
    const float *z = job->x;
    for (int64_t k = 0; k < job->e; k++, z += n * c) {
        double *row_a = page.row(job->second, k);
        Sums part = above(page, job, k, z);
        int32_t zeros = 0;
        for (int64_t j = 0; j < n * c; j++) zeros += z[j] <= 0;
        part.zeros = zeros;
        if (part.least >= TINY && quick(part, z, n, c, true, row_a)) continue;
        std::vector<float> a(z, z + n * c);  // small numbers and nan are looked for where they would be
        for (float &v : a) v = v <= 0 ? 0.0f : v;
        describe_from(part, a.data(), n, c, true, row_a);
    }
}

// Tensors without a batch, n = 1: x at `first`; where `other` is given x is kept there.
void entries_jobs(const Job *job, int64_t jobs, double *rows, Arena *arena) {
    const Page page{rows, arena};
    for (; jobs > 0; jobs--, job++) {
        const int64_t n = job->c;
        double *row = page.row(job->first, 0);
        if (job->other) {
            Sums s;
            strips(n, [&](long from, long to) {
                keep<8>(job->x, job->other, from, to & ~7L, s);
                keep<1>(job->x, job->other, to & ~7L, to, s);
            });
            describe_from(s, job->x, n, 1, false, row);
        } else describe(job->x, n, 1, false, row);
        page.count(job->x, n, job->first, 0);
    }
}

// What has become of x since it was kept in `other`, which is worth nothing afterwards: x - other, at `first`.
void change_jobs(const Job *job, int64_t jobs, double *rows, Arena *arena) {
    const Page page{rows, arena};
    for (; jobs > 0; jobs--, job++) {
        const int64_t n = job->c;
        double *row = page.row(job->first, 0);
        Sums s;
        strips(n, [&](long from, long to) {
            change<8>(job->x, job->other, from, to & ~7L, s);
            change<1>(job->x, job->other, to & ~7L, to, s);
        });
        if (!arena && s.least >= TINY && quick(s, job->other, n, 1, false, row)) continue;
        for (int64_t j = 0; j < n; j++) job->other[j] = job->x[j] - job->other[j];
        describe_from(s, job->other, n, 1, false, row);
        page.count(job->other, n, job->first, 0);
    }
}

// The preactivation x becomes max(x, 0): it at `first`, the activation at `second`.
void relu_job(const Job *job, double *rows, Arena *arena) {
    const Page page{rows, arena};
    const int64_t n = job->n, c = job->c;
    float *z = job->x;
    for (int64_t k = 0; k < job->e; k++, z += n * c) {
        double *row_z = page.row(job->first, k), *row_a = page.row(job->second, k);
        Sums part = above(page, job, k, z);
        int32_t zeros = 0;
        for (int64_t j = 0; j < n * c; j++) { zeros += z[j] <= 0; z[j] = z[j] <= 0 ? 0.0f : z[j]; }
        part.zeros = zeros;
        describe_from(part, z, n, c, true, row_a);
        row_z[SATURATED] = (zeros + row_z[NANS]) / row_z[COUNT];
    }
}

// The gradient x of ReLU's output becomes that of its input, 0 wherever the output `other` is: before at `first`, after
// at `second`; the sums over the batch are the gradient of the bias.
void mask_job(const Job *job, double *rows, Arena *arena) {
    const Page page{rows, arena};
    const int64_t n = job->n, c = job->c;
    float *g = job->x, *unit_sums = job->unit_sums;
    const float *a = job->other;
    for (int64_t k = 0; k < job->e; k++, g += n * c, a += n * c, unit_sums += c) {
        double *row_a = page.row(job->first, k), *row_z = page.row(job->second, k);
        Sums whole, part;
        describe_both(g, Where{a}, n, c, whole, part, unit_sums);
        describe_from(whole, g, n, c, true, row_a);
        page.count(g, n * c, job->first, k);
        int32_t zeros = 0;
        for (int64_t j = 0; j < n * c; j++) { const float kept = a[j] <= 0 ? 0.0f : g[j]; g[j] = kept; zeros += kept == 0; }
        part.zeros = zeros;
        describe_from(part, g, n, c, true, row_z);
        page.count(g, n * c, job->second, k);
    }
}

// The parameter x becomes x - lr other: its old values at `first`, its gradient at `second`, what changed at `third`.
void update_jobs(const Job *job, int64_t jobs, float lr, double *rows, Arena *arena) {
    const Page page{rows, arena};
    std::vector<float> change;
    for (; jobs > 0; jobs--, job++) {
        const int64_t n = job->c;
        float *w = job->x;
        const float *g = job->other;
        change.resize(n);
        float *u = change.data();
        for (int64_t k = 0; k < job->e; k++, w += n, g += n) {
            Sums sw, sg, su;
            strips(n, [&](long from, long to) {
                move<8>(w, g, u, from, to & ~7L, lr, sw, sg, su);
                move<1>(w, g, u, to & ~7L, to, lr, sw, sg, su);
            });
            double *row_w = page.row(job->first, k), *row_g = page.row(job->second, k), *row_u = page.row(job->third, k);
            describe_from(sw, w, n, 1, false, row_w);
            describe_from(sg, g, n, 1, false, row_g);
            describe_from(su, u, n, 1, false, row_u);
            page.count(w, n, job->first, k); page.count(g, n, job->second, k); page.count(u, n, job->third, k);
            for (int64_t j = 0; j < n; j++) w[j] -= lr * g[j];
        }
    }
}

}
