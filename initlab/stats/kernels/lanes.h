// Vectors of floats, the sums that a pass gathers in them, and the fields of a row.
//
// Legend: n batch, c units; V lanes of a vector; `row` holds FIELDS doubles, in the order of FIELDS in reference.py.
#pragma once

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

// What plain sums gather of one tensor.
struct Sums {
    double sum = 0, squares = 0, unit_squares = 0, resultant = 0, alive = 0;
    float low = INFINITY, high = -INFINITY, least = INFINITY;  // least: the smallest magnitude
    long dead = 0, zeros = -1;  // -1: not counted
};

template <bool FUSE> inline double add_square(double sum, double x) {
    if constexpr (FUSE) return std::fma(x, x, sum);
    volatile double square = x * x;
    return sum + square;
}

// V units at a time, or V lanes of a tensor without units.
template <int V> struct Lane {
    D<V> sum{}, squares{}, direction{};
    F<V> low = F<V>{} + INFINITY, high = F<V>{} - INFINITY;
    I<V> least = I<V>{} + 0x7f800000;  // magnitudes compare as their bits do
    inline void bounds(F<V> x) { low = x < low ? x : low; high = x > high ? x : high; }
    inline void nearest(F<V> x) { const I<V> m = (I<V>)x & 0x7fffffff; least = m < least ? m : least; }
    inline void entries(F<V> x) { const D<V> d = widen<V>(x); bounds(x); nearest(x); sum += d; squares += d * d; }
    // Vectors of FUSED lanes and more add their squares without rounding them first. Said here, or it would hang on what
    // a compiler inlines, and the last digit of a row with it.
    template <int FUSED> void pour(Sums &s) const {
        for (int k = 0; k < V; k++) {
            s.sum += sum[k]; s.squares += squares[k];
            s.unit_squares = add_square<(V >= FUSED)>(s.unit_squares, sum[k]);
            s.resultant = add_square<(V >= FUSED)>(s.resultant, direction[k]);
            s.low = low[k] < s.low ? low[k] : s.low; s.high = high[k] > s.high ? high[k] : s.high;
            s.least = std::fmin(s.least, float_of(least[k])); s.dead += low[k] == 0 && high[k] == 0;
        }
    }
};

}  // namespace
