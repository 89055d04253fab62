// Vectors of floats, the sums that a pass gathers in them, and the fields of a row.
//
// Legend: n batch, c units; V lanes of a vector; `row` holds FIELDS doubles, in the order of FIELDS in reference.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __AVX__
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
// Plain sums lose digits with the terms that one lane adds up, in a tile and then tile by tile, and with (sum of squares /
// M2). Up to 256 terms M2 may be 2^-8 of the sum of squares: measured errors then stay below 1e-13. With more tiles it must
// be so much more.
constexpr double CANCELLED = 1.0 / 256, TERMS = 256;
constexpr long STRIP = 16 * 256;  // entries of a tensor without units between two emptyings of its lanes
constexpr long AHEAD = 1024;      // entries, a page of memory: what will be read then is asked for now

// Lanes of a whole vector of floats, and of one of doubles: a compiler takes wider ones apart lane by lane.
#if defined(__AVX512F__)
constexpr int WIDE = 16, HALF = 8;
#elif defined(__AVX2__)
constexpr int WIDE = 8, HALF = 4;
#else
constexpr int WIDE = 4, HALF = 2;
#endif

template <int V> struct Lanes {
    typedef float F __attribute__((vector_size(4 * V), aligned(4)));
    typedef double D __attribute__((vector_size(8 * V), aligned(8)));
    typedef int32_t I __attribute__((vector_size(4 * V), aligned(4)));
    typedef int64_t L __attribute__((vector_size(8 * V), aligned(8)));
};
template <int V> using F = typename Lanes<V>::F;
template <int V> using D = typename Lanes<V>::D;
template <int V> using I = typename Lanes<V>::I;
template <int V> using L = typename Lanes<V>::L;

// Copies of 32 bytes may be made by halves that the next instruction waits for: memory is read and written as vectors.
template <class X> inline X load_as(const void *p) {
    typedef X Anywhere __attribute__((aligned(4), may_alias));
    return *static_cast<const Anywhere *>(p);
}
template <int V> inline F<V> load(const float *p) { return load_as<F<V>>(p); }
template <int V> inline D<V> load(const double *p) { return load_as<D<V>>(p); }
template <int V> inline I<V> load(const int32_t *p) { return load_as<I<V>>(p); }
inline void prefetch(const float *p) { __builtin_prefetch(p, 0, 2); }
template <class T, class X> inline void store(T *p, X x) {
    typedef X Anywhere __attribute__((aligned(4), may_alias));
    *reinterpret_cast<Anywhere *>(p) = x;
}
template <int V> inline D<V> widen(F<V> x) { return __builtin_convertvector(x, D<V>); }
// The smaller and the larger of two, and the smaller magnitude: the second where the first is nan.
template <class T> inline T smaller(T x, T y) { return x < y ? x : y; }
template <class T> inline T larger(T x, T y) { return x > y ? x : y; }
inline uint32_t bits_of(float x) { uint32_t b; std::memcpy(&b, &x, 4); return b; }
inline float float_of(int32_t b) { float x; std::memcpy(&x, &b, 4); return x; }
template <int V> inline double total(D<V> x) { double t = 0; for (int k = 0; k < V; k++) t += x[k]; return t; }
#ifdef __AVX__
// By halves: one after the other, the lanes of every vector would wait for each other.
template <> inline double total<4>(D<4> x) {
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128((__m256d)x), _mm256_extractf128_pd((__m256d)x, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
template <> inline D<4> widen<4>(F<4> x) { return (D<4>)_mm256_cvtps_pd((__m128)x); }  // one instruction, not four
template <> inline F<8> smaller(F<8> x, F<8> y) { return (F<8>)_mm256_min_ps((__m256)x, (__m256)y); }
template <> inline F<8> larger(F<8> x, F<8> y) { return (F<8>)_mm256_max_ps((__m256)x, (__m256)y); }
template <> inline D<4> larger(D<4> x, D<4> y) { return (D<4>)_mm256_max_pd((__m256d)x, (__m256d)y); }
#endif
#ifdef __AVX512F__
template <> inline D<8> widen<8>(F<8> x) { return (D<8>)_mm512_cvtps_pd((__m256)x); }
template <> inline F<16> smaller(F<16> x, F<16> y) { return (F<16>)_mm512_min_ps((__m512)x, (__m512)y); }
template <> inline F<16> larger(F<16> x, F<16> y) { return (F<16>)_mm512_max_ps((__m512)x, (__m512)y); }
template <> inline D<8> larger(D<8> x, D<8> y) { return (D<8>)_mm512_max_pd((__m512d)x, (__m512d)y); }
template <> inline double total<8>(D<8> x) {
    return total<4>((D<4>)_mm256_add_pd(_mm512_castpd512_pd256((__m512d)x), _mm512_extractf64x4_pd((__m512d)x, 1)));
}
#endif

// Eight numbers in vectors.
struct Eight {
    D<HALF> part[8 / HALF];
    double at(int k) const { return part[k / HALF][k % HALF]; }
};

// The totals of eight vectors, in their order.
inline Eight totals(const D<HALF> *x) {
    Eight found;
#if defined(__AVX512F__)
    const auto *v = (const __m512d *)x;
    __m512d two[4], four[2];
    for (int k = 0; k < 4; k++)
        two[k] = _mm512_add_pd(_mm512_unpacklo_pd(v[2 * k], v[2 * k + 1]), _mm512_unpackhi_pd(v[2 * k], v[2 * k + 1]));
    const __m512i low = _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0), high = _mm512_set_epi64(15, 14, 7, 6, 11, 10, 3, 2);
    for (int k = 0; k < 2; k++)
        four[k] = _mm512_add_pd(_mm512_permutex2var_pd(two[2 * k], low, two[2 * k + 1]),
                                _mm512_permutex2var_pd(two[2 * k], high, two[2 * k + 1]));
    found.part[0] = (D<8>)_mm512_add_pd(_mm512_shuffle_f64x2(four[0], four[1], 0x44), _mm512_shuffle_f64x2(four[0], four[1], 0xEE));
#elif defined(__AVX2__)
    const auto *v = (const __m256d *)x;
    for (int k = 0; k < 2; k++) {
        const __m256d low = _mm256_hadd_pd(v[4 * k], v[4 * k + 1]), high = _mm256_hadd_pd(v[4 * k + 2], v[4 * k + 3]);
        found.part[k] = (D<4>)_mm256_add_pd(_mm256_permute2f128_pd(low, high, 0x21), _mm256_blend_pd(low, high, 12));
    }
#else
    for (int k = 0; k < 8; k++) found.part[k / HALF][k % HALF] = total<HALF>(x[k]);
#endif
    return found;
}

// H lanes from h on.
template <int H, class T> inline I<H> lanes_of(T x, int h) {
#ifdef __AVX512F__
    if constexpr (H == 8 && sizeof x == 64) return (I<8>)(h ? _mm512_extracti64x4_epi64((__m512i)x, 1) : _mm512_castsi512_si256((__m512i)x));
#endif
    I<H> y;
    std::memcpy(&y, (const int32_t *)&x + h, sizeof y);
    return y;
}
// The smaller magnitude.
template <class T> inline T nearest(T x, T y) {
#ifdef __AVX512DQ__
    if constexpr (sizeof x == 64) return (T)_mm512_range_ps((__m512)x, (__m512)y, 10);
#endif
    constexpr int V = sizeof x / 4;
    return smaller((T)((I<V>)x & 0x7fffffff), y);
}
// 1 / sqrt(x), and 0 for 0.
inline D<HALF> inverse_root(D<HALF> x) {
    const auto none = x == 0;
    D<HALF> y;
#if defined(__AVX512F__)
    y = (D<8>)_mm512_rsqrt14_pd((__m512d)x);  // 14 bits, then 28 and 56 by Newton's method
    for (int k = 0; k < 2; k++) y += y * (0.5 - 0.5 * x * y * y);
#elif defined(__AVX2__)
    y = 1 / (D<4>)_mm256_sqrt_pd((__m256d)x);
#else
    for (int k = 0; k < HALF; k++) y[k] = 1 / std::sqrt(x[k]);
#endif
    return (D<HALF>)((L<HALF>)y & ~(L<HALF>)none);
}

// What plain sums gather of one tensor.
struct Sums {
    double sum = 0, squares = 0, unit_squares = 0, resultant = 0, alive = 0;
    float low = INFINITY, high = -INFINITY, least = INFINITY;  // least: the smallest magnitude
    long dead = 0, zeros = -1;  // -1: not counted
};

// V lanes of a tensor without units.
template <int V> struct Lane {
    D<V> sum{}, squares{};
    F<V> low = F<V>{} + INFINITY, high = F<V>{} - INFINITY;
    I<V> least = I<V>{} + 0x7f800000;  // magnitudes compare as their bits do
    inline void entries(F<V> x) {
        const D<V> d = widen<V>(x);
        low = smaller(x, low); high = larger(x, high); least = smaller((I<V>)x & 0x7fffffff, least);
        sum += d; squares += d * d;
    }
    void pour(Sums &s) const {
        for (int k = 0; k < V; k++) {
            s.sum += sum[k]; s.squares += squares[k];
            s.low = low[k] < s.low ? low[k] : s.low; s.high = high[k] > s.high ? high[k] : s.high;
            s.least = std::fmin(s.least, float_of(least[k]));
        }
    }
};

}  // namespace
