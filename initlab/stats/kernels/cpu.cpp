// Rows of statistics made by passes over memory that a training step makes anyway: ReLU, its mask, the update.
//
// The same rows as reference.py makes, for float32 on a CPU. Legend: e networks, n batch, c units, contiguous (e, n, c);
// rows are (k, e, FIELDS): those of the first tensor of all networks, then those of the second, ...

#include "compare.h"
#include "histogram.h"
#include "random.h"
#include "rows.h"

namespace {

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
    all_lanes.template pour<Inside::FUSED>(whole); some_lanes.template pour<Inside::FUSED>(part);
    if (unit_sums)
        units.each([&](auto v, long j, long b) {
            for (int u = 0; u < decltype(v)::value; u++) unit_sums[j + u] = (float)some_lanes.at(v, b).sum[u];
        });
    part.least = whole.least;
    if (!std::isfinite(whole.squares)) part.squares = NOTHING;
}

struct Above {  // ReLU lets through what is above 0, or nan
    static constexpr int FUSED = 8;
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
    static constexpr int FUSED = 1;
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
    lw.template pour<4>(sw); lg.template pour<4>(sg); lu.template pour<4>(su);
}

// Histograms of any length one after the other: the lowest octave, how many octaves, counts of positive and of negative
// entries from there on. `starts` says where that of each row begins.
struct Arena {
    int32_t *memory;
    int64_t used, *starts;

    void append(const int32_t *bins, int64_t row, int signs) {
        long low = 0, high = OCTAVES - 1;
        while (low < high && !bins[low] && !bins[OCTAVES + low]) low++;
        while (high > low && !bins[high] && !bins[OCTAVES + high]) high--;
        int32_t *out = memory + used;
        const long size = high - low + 1;
        starts[row] = used; used += 2 + 2 * size;
        out[0] = low + LOWEST; out[1] = size;
        std::memcpy(out + 2, bins + low, size * sizeof *out);
        if (signs == 2) std::memcpy(out + 2 + size, bins + OCTAVES + low, size * sizeof *out);
        else std::memset(out + 2 + size, 0, size * sizeof *out);
    }

    // The histogram of x, whose row is there; that of its positive entries alone belongs to the row `positive`.
    void count(const float *x, int64_t size, const double *rows, int64_t row, int64_t positive = -1) {
        int32_t bins[BINS] = {0};
        const double *of_x = rows + row * FIELDS;
        histogram(x, size, largest(of_x), of_x[SUBNORMALS] > 0, bins);
        append(bins, row, 2);
        if (positive >= 0) append(bins, positive, 1);
    }
};

}  // namespace

// What Python calls. `arena` is null where no histograms are wanted.
extern "C" {

// One row for each network.
void describe_rows(const float *x, long e, long n, long c, int batched, double *rows, Arena *arena) {
    for (long k = 0; k < e; k++, x += n * c) {
        describe(x, n, c, batched, rows + k * FIELDS);
        if (arena) arena->count(x, n * c, rows, k);
    }
}

// A row for each of some tensors of a single network, by their addresses, numbers of entries, and units: 1 where there is
// no batch. `before`, null or addresses of as many copies: each becomes x - copy and is what the row is about.
void describe_many(const int64_t *addresses, const int64_t *before, const int64_t *sizes, const int64_t *units, int batched,
                   long count, double *rows, Arena *arena) {
    for (long k = 0; k < count; k++) {
        const float *x = reinterpret_cast<const float *>(addresses[k]);
        if (before) {
            float *change = reinterpret_cast<float *>(before[k]);
            for (long j = 0; j < sizes[k]; j++) change[j] = x[j] - change[j];
            x = change;
        }
        describe(x, sizes[k] / units[k], units[k], batched, rows + k * FIELDS);
        if (arena) arena->count(x, sizes[k], rows, k);
    }
}

// The preactivation z becomes max(z, 0): two rows, before and after.
void relu_rows(float *z, long e, long n, long c, double *rows, Arena *arena) {
    for (long k = 0; k < e; k++, z += n * c) {
        double *row_z = rows + k * FIELDS, *row_a = rows + (e + k) * FIELDS;
        Sums whole, part;
        describe_both(z, Above(), n, c, whole, part, nullptr);
        describe_from(whole, z, n, c, true, row_z);
        if (arena) arena->count(z, n * c, rows, k, e + k);
        int32_t zeros = 0;
        for (long j = 0; j < n * c; j++) { zeros += z[j] <= 0; z[j] = z[j] <= 0 ? 0.0f : z[j]; }
        part.zeros = zeros;
        describe_from(part, z, n, c, true, row_a);
        row_z[SATURATED] = (zeros + row_z[NANS]) / row_z[COUNT];
    }
}

// The gradient g of ReLU's output becomes that of its input, 0 wherever the output or input a is not above 0: two rows,
// before and after. `sums`, (e, c) or null, are those over the batch: the gradient of the bias.
void mask_rows(float *g, const float *a, long e, long n, long c, float *sums, double *rows, Arena *arena) {
    for (long k = 0; k < e; k++, g += n * c, a += n * c) {
        double *row_a = rows + k * FIELDS, *row_z = rows + (e + k) * FIELDS;
        Sums whole, part;
        describe_both(g, Where{a}, n, c, whole, part, sums ? sums + k * c : nullptr);
        describe_from(whole, g, n, c, true, row_a);
        if (arena) arena->count(g, n * c, rows, k);
        int32_t zeros = 0;
        for (long j = 0; j < n * c; j++) { const float kept = a[j] <= 0 ? 0.0f : g[j]; g[j] = kept; zeros += kept == 0; }
        part.zeros = zeros;
        describe_from(part, g, n, c, true, row_z);
        if (arena) arena->count(g, n * c, rows, e + k);
    }
}

// The parameter w becomes w - lr g: three rows, of its old values, of its gradient, and of what changed.
void update_rows(float *w, const float *g, long e, long n, float lr, double *rows, Arena *arena) {
    std::vector<float> change(n);
    float *u = change.data();
    for (long k = 0; k < e; k++, w += n, g += n) {
        Sums sw, sg, su;
        strips(n, [&](long from, long to) {
            move<8>(w, g, u, from, to & ~7L, lr, sw, sg, su);
            move<1>(w, g, u, to & ~7L, to, lr, sw, sg, su);
        });
        const long row_w = k, row_g = e + k, row_u = 2 * e + k;
        describe_from(sw, w, n, 1, false, rows + row_w * FIELDS);
        describe_from(sg, g, n, 1, false, rows + row_g * FIELDS);
        describe_from(su, u, n, 1, false, rows + row_u * FIELDS);
        if (arena) { arena->count(w, n, rows, row_w); arena->count(g, n, rows, row_g); arena->count(u, n, rows, row_u); }
        for (long j = 0; j < n; j++) w[j] -= lr * g[j];
    }
}

}
