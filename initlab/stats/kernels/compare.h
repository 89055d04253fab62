// Tensors against each other, against a few numbers, and in another order of memory.
#pragma once

#include "lanes.h"

namespace {

// A square of 16 x 16, in rows of `stride`, as its transpose.
inline void turn_square(const float *x, long stride, float *out, long out_stride) {
#ifdef __AVX512F__
    __m512 r[16];
    for (int k = 0; k < 16; k++) r[k] = _mm512_loadu_ps(x + k * stride);
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
    for (int step = 8; step; step /= 2) {  // blocks of this side change places across the diagonal
        const __m512i side = _mm512_set1_epi32(step), second = _mm512_set1_epi32(16);
        const __mmask16 right = _mm512_test_epi32_mask(lane, side);
        const __m512i low = _mm512_mask_add_epi32(lane, right, _mm512_sub_epi32(lane, side), second);
        const __m512i high = _mm512_mask_add_epi32(_mm512_add_epi32(lane, side), right, lane, second);
#pragma GCC unroll 16
        for (int k = 0; k < 16; k++)
            if (!(k & step)) {
                const __m512 upper = r[k], lower = r[k + step];
                r[k] = _mm512_permutex2var_ps(upper, low, lower); r[k + step] = _mm512_permutex2var_ps(upper, high, lower);
            }
    }
    for (int k = 0; k < 16; k++) _mm512_storeu_ps(out + k * out_stride, r[k]);
#else
    for (int q = 0; q < 16; q++)
        for (int p = 0; p < 16; p++) out[p * out_stride + q] = x[q * stride + p];
#endif
}

inline bool is_bad(float x) { return (bits_of(x) << 1) >= 0xff000000; }

// Sums of squares of how far a lies from b, and of b.
struct Distance {
    D<HALF> difference[4] = {}, squares[4] = {};
    double away = 0, whole = 0;
    inline void entry(double x, double y) { away += (x - y) * (x - y); whole += y * y; }
    inline void entries(int lane, const float *a, const float *b) {
        const D<HALF> y = widen<HALF>(load<HALF>(b)), d = widen<HALF>(load<HALF>(a)) - y;
        difference[lane] += d * d; squares[lane] += y * y;
    }
    void along(const float *a, const float *b, long n) {
        const long even = n / (4 * HALF) * (4 * HALF);
        for (long j = 0; j < even; j += 4 * HALF)
            for (int lane = 0; lane < 4; lane++) entries(lane, a + j + HALF * lane, b + j + HALF * lane);
        for (long j = even; j < n; j++) entry(a[j], b[j]);
    }
    void across(const float *a, const float *b, long n, long c) {  // a (n, c), and b in memory as its transpose
        alignas(64) float square[16][16];
        for (long i = 0; i < n; i += 16)
            for (long j = 0; j < c; j += 16)
                if (n - i >= 16 && c - j >= 16) {
                    turn_square(b + j * n + i, n, square[0], 16);
                    for (int p = 0; p < 16; p++)
                        for (int k = 0; k < 16 / HALF; k++)
                            entries((p * (16 / HALF) + k) & 3, a + (i + p) * c + j + HALF * k, square[p] + HALF * k);
                } else
                    for (long p = i; p < n && p < i + 16; p++)
                        for (long q = j; q < c && q < j + 16; q++) entry(a[p * c + q], b[q * n + p]);
    }
    void sum() {
        for (int lane = 0; lane < 4; lane++)
            for (int v = 0; v < HALF; v++) away += difference[lane][v], whole += squares[lane][v];
    }
};

}  // namespace

extern "C" {

// How far each of some tensors is from another: ||a - b|| / ||b||, 0 where they are equal, nan where an entry of either
// is not finite; behind these errors stand the numbers of such entries. `units`: 0, or the columns of a matrix a whose
// partner lies in memory as its transpose.
void compare_many(const int64_t *addresses, const int64_t *references, const int64_t *sizes, const int64_t *units, long count,
                  double *out) {
    for (long k = 0; k < count; k++) {
        const float *a = reinterpret_cast<const float *>(addresses[k]), *b = reinterpret_cast<const float *>(references[k]);
        Distance d;
        if (units[k]) d.across(a, b, sizes[k] / units[k], units[k]);
        else d.along(a, b, sizes[k]);
        d.sum();
        int64_t bad = 0;
        if (!std::isfinite(d.away + d.whole)) {
            const long c = units[k] ? units[k] : sizes[k], n = sizes[k] / c, stride = units[k] ? n : 1;
            for (long i = 0; i < n; i++)
                for (long j = 0; j < c; j++) bad += is_bad(a[i * c + j]) || is_bad(b[i + j * stride]);
        }
        out[k] = bad ? NOTHING : d.away == 0 ? 0 : std::sqrt(d.away) / std::sqrt(d.whole);
        out[count + k] = bad;
    }
}

// Which share of the n entries of each of e tensors lies in one of some stretches, from edges[2 k] to edges[2 k + 1].
void share_inside(const float *x, long e, long n, const float *edges, long stretches, double *shares) {
    for (long k = 0; k < e; k++, x += n) {
        int64_t inside = 0;
        for (long from = 0; from < n; from += STRIP) {
            const long to = n - from < STRIP ? n : from + STRIP;
            for (long part = 0; part < stretches; part++) {
                const float low = edges[2 * part], high = edges[2 * part + 1];
                int32_t some = 0;
                for (long j = from; j < to; j++) some += (x[j] >= low) & (x[j] <= high);
                inside += some;
            }
        }
        shares[k] = (double)inside / n;
    }
}

// (n, c, s) becomes (n, s, c).
void units_last(const float *x, long n, long c, long s, float *out) {
    for (long i = 0; i < n; i++, x += c * s, out += c * s)
        for (long p = 0; p < s; p += 16)
            for (long j = 0; j < c; j += 16)
                if (s - p >= 16 && c - j >= 16) turn_square(x + j * s + p, s, out + p * c + j, c);
                else
                    for (long q = p; q < s && q < p + 16; q++)
                        for (long k = j; k < c && k < j + 16; k++) out[q * c + k] = x[k * s + q];
}

}
