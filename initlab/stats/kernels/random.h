// Random numbers by position, as nn/philox.py makes them: Philox4x32-10 of Salmon et al. 2011, Box & Muller in float64.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#define WIDEST __attribute__((target("prefer-vector-width=512")))
#else
#define WIDEST
#endif

// Lanes of two vectors by their numbers, which are a P. GCC before 12 has one way to say it, and Clang the other.
#ifdef __clang__
#define PICK(P, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(P, a, b, ...) __builtin_shuffle(a, b, P{__VA_ARGS__})
#endif

namespace {

constexpr int AT_ONCE = 32;  // counters, of four words each, that the loops below take together

struct Words { uint32_t a[AT_ONCE], b[AT_ONCE], c[AT_ONCE], d[AT_ONCE]; };

// The words of counters from `first` on.
#ifdef __AVX512F__
// Upper and lower words of sixteen products: the even and the odd ones, put back in order.
inline void product(__m512i x, __m512i factor, __m512i &high, __m512i &low) {
    const __m512i even = _mm512_mul_epu32(x, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
    high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd);
    low = _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
}

inline void philox(Words &w, uint64_t first, uint64_t key) {
    const __m512i step = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i left = _mm512_set1_epi32(0xD2511F53), right = _mm512_set1_epi32(0xCD9E8D57);
    __m512i a[AT_ONCE / 16], b[AT_ONCE / 16], c[AT_ONCE / 16], d[AT_ONCE / 16];
    for (int k = 0; k < AT_ONCE / 16; k++) {
        a[k] = _mm512_add_epi32(_mm512_set1_epi32((uint32_t)first + 16 * k), step);
        b[k] = _mm512_set1_epi32((uint32_t)(first >> 32));
        c[k] = d[k] = _mm512_setzero_si512();
    }
    for (int turn = 0; turn < 10; turn++) {
        const __m512i low_key = _mm512_set1_epi32((uint32_t)key + turn * 0x9E3779B9u);
        const __m512i high_key = _mm512_set1_epi32((uint32_t)(key >> 32) + turn * 0xBB67AE85u);
        for (int k = 0; k < AT_ONCE / 16; k++) {
            __m512i up, down, high, low;
            product(a[k], left, up, down);
            product(c[k], right, high, low);
            a[k] = _mm512_ternarylogic_epi32(high, b[k], low_key, 0x96);  // exclusive or of three
            c[k] = _mm512_ternarylogic_epi32(up, d[k], high_key, 0x96);
            b[k] = low; d[k] = down;
        }
    }
    for (int k = 0; k < AT_ONCE / 16; k++) {
        _mm512_storeu_si512(w.a + 16 * k, a[k]); _mm512_storeu_si512(w.b + 16 * k, b[k]);
        _mm512_storeu_si512(w.c + 16 * k, c[k]); _mm512_storeu_si512(w.d + 16 * k, d[k]);
    }
}
#else
inline void philox(Words &w, uint64_t first, uint64_t key) {
    for (int k = 0; k < AT_ONCE; k++) {
        uint32_t a = (uint32_t)(first + k), b = (uint32_t)((first + k) >> 32), c = 0, d = 0;
#pragma GCC unroll 10
        for (int turn = 0; turn < 10; turn++) {
            const uint64_t left = (uint64_t)a * 0xD2511F53, right = (uint64_t)c * 0xCD9E8D57;
            a = (uint32_t)(right >> 32) ^ b ^ ((uint32_t)key + turn * 0x9E3779B9u);
            c = (uint32_t)(left >> 32) ^ d ^ ((uint32_t)(key >> 32) + turn * 0xBB67AE85u);
            b = (uint32_t)right; d = (uint32_t)left;
        }
        w.a[k] = a; w.b[k] = b; w.c[k] = c; w.d[k] = d;
    }
}
#endif

inline double from_bits(uint64_t bits) { double x; std::memcpy(&x, &bits, 8); return x; }
inline uint64_t to_bits(double x) { uint64_t bits; std::memcpy(&bits, &x, 8); return bits; }
inline double from_word(uint32_t word) { return (double)(int32_t)(word ^ 0x80000000) + 2147483648.5; }  // word + 1/2

// ln x for x above 0 and normal: x = 2^e m with m between sqrt(1/2) and sqrt(2), and the series of 2 artanh((m-1)/(m+1)).
inline double ln(double x) {
    const uint64_t shifted = to_bits(x) + (0x3FF0000000000000 - 0x3FE6A09E667F3BCD);  // carries into the exponent from sqrt(2) on
    const double e = from_bits((shifted >> 52) | 0x4330000000000000) - (4503599627370496.0 + 1023);
    const double m = from_bits((shifted & 0x000FFFFFFFFFFFFF) + 0x3FE6A09E667F3BCD);
    const double f = (m - 1) / (m + 1), s = f * f;
    double sum = 1.0 / 19;
    sum = sum * s + 1.0 / 17; sum = sum * s + 1.0 / 15; sum = sum * s + 1.0 / 13; sum = sum * s + 1.0 / 11;
    sum = sum * s + 1.0 / 9; sum = sum * s + 1.0 / 7; sum = sum * s + 1.0 / 5; sum = sum * s + 1.0 / 3;
    return e * 0.693147180559945309 + (2 * f + 2 * f * s * sum);
}

// Two standard normal numbers of two words. The turn is cut down to an eighth of one on either side, exactly; the series
// of sine and cosine are those of Taylor, to 1e-16 there.
inline void normal_pair(uint32_t first, uint32_t second, float &x, float &y) {
    const double turn = from_word(second) * 0x1p-30;  // in quarters
    const double rounded = turn + 6755399441055744.0;  // 1.5 2^52: the last bits are the whole number of quarters
    const uint64_t quarters = to_bits(rounded);
    const double t = (turn - (rounded - 6755399441055744.0)) * 1.57079632679489662, s = t * t;
    double sine = -1.0 / 1307674368000;
    sine = sine * s + 1.0 / 6227020800; sine = sine * s - 1.0 / 39916800; sine = sine * s + 1.0 / 362880;
    sine = sine * s - 1.0 / 5040; sine = sine * s + 1.0 / 120; sine = sine * s - 1.0 / 6;
    sine = t + t * s * sine;
    double cosine = 1.0 / 20922789888000;
    cosine = cosine * s - 1.0 / 87178291200; cosine = cosine * s + 1.0 / 479001600; cosine = cosine * s - 1.0 / 3628800;
    cosine = cosine * s + 1.0 / 40320; cosine = cosine * s - 1.0 / 720; cosine = cosine * s + 1.0 / 24;
    cosine = 1 - s * (0.5 - s * cosine);
    const double radius = std::sqrt(-2 * ln(from_word(first) * 0x1p-32));
    const uint64_t odd = 0 - (quarters & 1), swapped = (to_bits(sine) ^ to_bits(cosine)) & odd;
    x = (float)(radius * from_bits((to_bits(cosine) ^ swapped) ^ (quarters ^ quarters >> 1) << 63));
    y = (float)(radius * from_bits((to_bits(sine) ^ swapped) ^ (quarters >> 1) << 63));
}

inline float to_uniform(uint32_t word) { return (float)((int32_t)(word >> 8) * 2 + (1 - 16777216)) * 0x1p-24f; }

// Numbers of a block in the order of positions: of every counter its four.
inline void interleave(const float (*part)[AT_ONCE], float *out) {
    typedef float F __attribute__((vector_size(32), aligned(4)));
    typedef int32_t I __attribute__((vector_size(32)));
    for (int k = 0; k < AT_ONCE; k += 8) {
        F p[4], q[4];
        for (int j = 0; j < 4; j++) std::memcpy(&p[j], part[j] + k, sizeof p[j]);
        for (int j = 0; j < 4; j += 2) {  // pairs of four counters each
            q[j] = PICK(I, p[j], p[j + 1], 0, 8, 1, 9, 2, 10, 3, 11);
            q[j + 1] = PICK(I, p[j], p[j + 1], 4, 12, 5, 13, 6, 14, 7, 15);
        }
        for (int j = 0; j < 2; j++) {
            const F low = PICK(I, q[j], q[j + 2], 0, 1, 8, 9, 2, 3, 10, 11);
            const F high = PICK(I, q[j], q[j + 2], 4, 5, 12, 13, 6, 7, 14, 15);
            std::memcpy(out + 4 * k + 16 * j, &low, sizeof low); std::memcpy(out + 4 * k + 16 * j + 8, &high, sizeof high);
        }
    }
}

}  // namespace

// out (networks, many): the first `many` numbers of every key, normal or uniform on (-1, 1).
extern "C" WIDEST void draw_numbers(const uint64_t *keys, long networks, long many, int normal, float *out) {
    Words w;
    float part[4][AT_ONCE], block[4 * AT_ONCE];
    for (long e = 0; e < networks; e++, out += many)
        for (long from = 0; from < many; from += 4 * AT_ONCE) {
            philox(w, from / 4, keys[e]);
            if (normal) {
                for (int k = 0; k < AT_ONCE; k++) normal_pair(w.a[k], w.b[k], part[0][k], part[1][k]);
                for (int k = 0; k < AT_ONCE; k++) normal_pair(w.c[k], w.d[k], part[2][k], part[3][k]);
            } else
                for (int k = 0; k < AT_ONCE; k++) {
                    part[0][k] = to_uniform(w.a[k]); part[1][k] = to_uniform(w.b[k]);
                    part[2][k] = to_uniform(w.c[k]); part[3][k] = to_uniform(w.d[k]);
                }
            const long left = many - from < 4 * AT_ONCE ? many - from : 4 * AT_ONCE;
            interleave(part, block);
            for (long k = 0; k < left; k++) out[from + k] = block[k];
        }
}
