// Rows of statistics made by passes over memory that a training step makes anyway: ReLU, its mask, the update.
//
// The same rows as reference.py makes, for float32 on a CPU. Legend: e networks, n batch, c units, contiguous (e, n, c);
// rows are (k, e, FIELDS): those of the first tensor of all networks, then those of the second, ...

#include "compare.h"
#include "histogram.h"
#include "random.h"
#include "rows.h"

namespace {

struct Above {  // ReLU lets through what is above 0, or nan
    static constexpr bool BOTH = true, BOUNDS = false;
    const float *beside(const float *x, long) const { return x; }
    template <class T> T kept(T f, T) const { return larger(T{}, f); }
    void finish(const Units &all, const Units &kept, long c) const {
        for (long j = 0; j < c; j++) {
            kept.low[j] = all.low[j] <= 0 ? 0 : all.low[j]; kept.high[j] = all.high[j] <= 0 ? 0 : all.high[j];
        }
    }
};
struct Where {  // its mask, where its output is above 0, or nan
    static constexpr bool BOTH = true, BOUNDS = true;
    const float *activation;
    const float *beside(const float *, long at) const { return activation + at; }
    template <class T> T kept(T f, T a) const { return a <= 0 ? T{} : f; }
    void finish(const Units &, const Units &, long) const {}
};

// u = (w - lr g) - w, and the sums of all three.
template <int V>
[[gnu::noinline]] void move(  // inlined, the sums would go through memory: the compiler forgets that nothing overlaps
    const float *__restrict w, const float *__restrict g, float *__restrict u, long from, long to, float lr, Sums &sw,
          Sums &sg, Sums &su) {
    Lane<V> lw, lg, lu;
    for (long j = from; j < to; j += V) {
        if (j % 16 == 0) { prefetch(w + j + AHEAD); prefetch(g + j + AHEAD); }
        const F<V> old = load<V>(w + j), grad = load<V>(g + j), moved = old - lr * grad - old;
        lw.entries(old); lg.entries(grad); lu.entries(moved);
        store(u + j, moved);
    }
    lw.pour(sw); lg.pour(sg); lu.pour(su);
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
        if (largest(of_x) > 0) histogram(x, size, largest(of_x), of_x[SUBNORMALS] > 0, bins);  // else all are 0
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
            long j = 0;
            for (; j + WIDE <= sizes[k]; j += WIDE) {
                prefetch(x + j + AHEAD); prefetch(change + j + AHEAD);
                store(change + j, load<WIDE>(x + j) - load<WIDE>(change + j));
            }
            for (; j < sizes[k]; j++) change[j] = x[j] - change[j];
            x = change;
        }
        describe(x, sizes[k] / units[k], units[k], batched, rows + k * FIELDS);
        if (arena) arena->count(x, sizes[k], rows, k);
    }
}

// a = max(z, 0), which may stand in the memory of z: two rows, of z and of a.
void relu_rows(const float *z, float *a, long e, long n, long c, double *rows, Arena *arena) {
    for (long k = 0; k < e; k++, z += n * c, a += n * c) {
        double *row_z = rows + k * FIELDS, *row_a = rows + (e + k) * FIELDS;
        Sums whole, part;
        const bool known = gather(z, Above(), a == z ? nullptr : a, n, c, whole, part, nullptr);
        if (!known) whole.squares = part.squares = NOTHING;
        describe_from(whole, z, n, c, true, row_z);
        if (arena) arena->count(z, n * c, rows, k, e + k);
        if (!known || a == z)
            for (long j = 0; j < n * c; j++) a[j] = z[j] <= 0 ? 0.0f : z[j];
        describe_from(part, a, n, c, true, row_a);
        row_z[SATURATED] = (row_a[ZEROS] + row_z[NANS]) / row_z[COUNT];
    }
}

// From g, the gradient of ReLU's output, d, that of its input: 0 wherever the output or input a is not above 0. d may
// stand in the memory of g. Two rows, of g and of d. `sums`, (e, c) or null, are those of d over the batch: the gradient
// of the bias.
void mask_rows(const float *g, const float *a, float *d, long e, long n, long c, float *sums, double *rows, Arena *arena) {
    for (long k = 0; k < e; k++, g += n * c, a += n * c, d += n * c) {
        double *row_g = rows + k * FIELDS, *row_d = rows + (e + k) * FIELDS;
        float *unit_sums = sums ? sums + k * c : nullptr;
        Sums whole, part;
        const bool known = gather(g, Where{a}, d == g ? nullptr : d, n, c, whole, part, unit_sums);
        if (!known) whole.squares = part.squares = NOTHING;
        describe_from(whole, g, n, c, true, row_g);
        if (arena) arena->count(g, n * c, rows, k);
        if (!known || d == g)
            for (long j = 0; j < n * c; j++) d[j] = a[j] <= 0 ? 0.0f : g[j];
        if (!known && unit_sums)
            for (long j = 0; j < c; j++) {
                double sum = 0;
                for (long i = 0; i < n; i++) sum += d[i * c + j];
                unit_sums[j] = (float)sum;
            }
        describe_from(part, d, n, c, true, row_d);
        if (arena) arena->count(d, n * c, rows, e + k);
    }
}

// A linear activation, or its gradient: a = z, and two rows that are alike, but for the share of small slopes, which is
// `saturated` in the first of them.
void linear_rows(const float *z, float *a, long e, long n, long c, double saturated, double *rows) {
    for (long k = 0; k < e; k++) describe(z + k * n * c, n, c, true, rows + k * FIELDS);
    std::memcpy(rows + e * FIELDS, rows, e * FIELDS * sizeof *rows);
    for (long k = 0; k < e; k++) rows[k * FIELDS + SATURATED] = saturated;
    std::memcpy(a, z, e * n * c * sizeof *z);
}

// The statistics (S, count) of rows: the formulas of stats/statistics.py. From a field to the next, and from a row to the
// next, it is so many numbers.
void derive_rows(const double *rows, long count, long to_field, long to_row, double *out) {
    auto of = [&](int field, long k) { return rows[field * to_field + k * to_row]; };
    for (long k = 0; k < count; k++) {
        const double finite = of(COUNT, k) - of(NANS, k) - of(INFS, k), scale = std::ldexp(1.0, (int)of(EXPONENT, k));
        const double variance = of(M2, k) / finite, root = std::sqrt(variance + of(MEAN, k) * of(MEAN, k)), rms = root * scale;
        const double alive = of(ALIVE, k), cosine = (of(RESULTANT, k) - alive) / (alive * (alive - 1));
        const double found[] = {
            of(COUNT, k), of(NANS, k), of(INFS, k), of(SUBNORMALS, k), of(MEAN, k) * scale, std::sqrt(variance) * scale, rms,
            rms * rms, root * std::sqrt(finite) * scale, of(LOW, k), of(HIGH, k), of(ZEROS, k) / of(COUNT, k), of(SATURATED, k),
            of(DEAD, k), std::sqrt(of(WITHIN, k)) * scale, alive > 1 ? (cosine < -1 ? -1 : cosine > 1 ? 1 : cosine) : NOTHING,
        };
        for (int s = 0; s < (int)(sizeof found / sizeof *found); s++) out[s * count + k] = found[s];
    }
}

// Whether no row tells of nan or inf, or of an rms below `smallest`.
int all_inside(const double *rows, long count, double smallest) {
    for (long k = 0; k < count; k++, rows += FIELDS) {
        const double second = rows[M2] / (rows[COUNT] - rows[NANS] - rows[INFS]) + rows[MEAN] * rows[MEAN];
        if (rows[NANS] + rows[INFS] > 0 || !(std::ldexp(std::sqrt(second), (int)rows[EXPONENT]) >= smallest)) return 0;
    }
    return 1;
}

// The parameter w becomes w - lr g: three rows, of its old values, of its gradient, and of what changed.
void update_rows(float *w, const float *g, long e, long n, float lr, double *rows, Arena *arena) {
    std::vector<float> change(n);
    float *u = change.data();
    for (long k = 0; k < e; k++, w += n, g += n) {
        Sums sw, sg, su;
        strips(n, [&](long from, long to) {
            const long whole = to / HALF * HALF;  // strips begin at multiples of it
            move<HALF>(w, g, u, from, whole, lr, sw, sg, su);
            move<1>(w, g, u, whole, to, lr, sw, sg, su);
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
