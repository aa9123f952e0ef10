/* RMSNorm of N rows of D numbers and its backward; formulas in reference.py beside this file.

   Rows of x lie `stride` numbers apart, all others are dense. Each of `threads` parts owns a run of rows and its own sum for the
   gain, added in the order of the parts: results depend on `threads`, never on scheduling. */

#include "lanes.h"

INLINE float square_sum(row r) {
    lanes even = {0}, odd = {0};
    for (long d = 0; d < r.length; d += 2 * LANES) {
        lanes a = load_row(r, d), b = d + LANES < r.length ? load_row(r, d + LANES) : splat(0);
        even += a * a;
        odd += b * b;
    }
    return sum_lanes(even + odd);
}

INLINE row row_apart(const void *base, long index, long stride, long length, int bf16, int whole) {
    return (row){(char *)base + index * stride * (bf16 ? 2 : 4), length, bf16, whole};
}

INLINE void forward_rows(long first, long end, long D, long stride, float eps, const void *x, const float *gain, void *y, float *inverse_rms,
                         const int bf16, const int whole) {
    const row gains = row_at(gain, 0, D, 0, whole);
    for (long n = first; n < end; n++) {
        const row in = row_apart(x, n, stride, D, bf16, whole), out = row_at(y, n, D, bf16, whole);
        const float scale = 1.0f / __builtin_sqrtf(square_sum(in) / D + eps);
        for (long d = 0; d < D; d += LANES) store_row(out, d, load_row(in, d) * scale * load_row(gains, d));
        inverse_rms[n] = scale;
    }
}

INLINE void backward_rows(long first, long end, long D, long stride, const void *x, const float *gain, const float *inverse_rms, const void *grad,
                          void *d_x, float *d_gain, const int bf16, const int whole) {
    const row gains = row_at(gain, 0, D, 0, whole), sums = row_at(d_gain, 0, D, 0, whole);
    memset(d_gain, 0, D * sizeof(float));
    for (long n = first; n < end; n++) {
        const row in = row_apart(x, n, stride, D, bf16, whole), above = row_at(grad, n, D, bf16, whole), out = row_at(d_x, n, D, bf16, whole);
        const float scale = inverse_rms[n];
        lanes along = {0};
        for (long d = 0; d < D; d += LANES) {
            lanes product = load_row(in, d) * load_row(above, d);
            along += product * load_row(gains, d);
            store_row(sums, d, load_row(sums, d) + product * scale);
        }
        const float pull = sum_lanes(along) * scale * scale / D;
        for (long d = 0; d < D; d += LANES) store_row(out, d, scale * (load_row(above, d) * load_row(gains, d) - load_row(in, d) * pull));
    }
}

/* Both return 0. */
int rms_norm_forward(int threads, int bf16, long N, long D, long stride, float eps, const void *x, const float *gain, void *y, float *inverse_rms) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; part++) {
        const long first = N * part / threads, end = N * (part + 1) / threads;
        if (bf16 && D % LANES == 0) forward_rows(first, end, D, stride, eps, x, gain, y, inverse_rms, 1, 1);
        else if (D % LANES == 0) forward_rows(first, end, D, stride, eps, x, gain, y, inverse_rms, 0, 1);
        else forward_rows(first, end, D, stride, eps, x, gain, y, inverse_rms, bf16, 0);
    }
    return 0;
}

/* `d_gain` has `threads` rows; the first receives the sum. */
int rms_norm_backward(int threads, int bf16, long N, long D, long stride, const void *x, const float *gain, const float *inverse_rms, const void *grad,
                      void *d_x, float *d_gain) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; part++) {
        const long first = N * part / threads, end = N * (part + 1) / threads;
        float *own = d_gain + part * D;
        if (bf16 && D % LANES == 0) backward_rows(first, end, D, stride, x, gain, inverse_rms, grad, d_x, own, 1, 1);
        else if (D % LANES == 0) backward_rows(first, end, D, stride, x, gain, inverse_rms, grad, d_x, own, 0, 1);
        else backward_rows(first, end, D, stride, x, gain, inverse_rms, grad, d_x, own, bf16, 0);
    }
    for (int part = 1; part < threads; part++)
        for (long d = 0; d < D; d++) d_gain[d] += d_gain[part * D + d];
    return 0;
}
