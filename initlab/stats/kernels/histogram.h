// How many entries of a tensor lie in which octave, by sign.
#pragma once

#include "lanes.h"

namespace {

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

}  // namespace
