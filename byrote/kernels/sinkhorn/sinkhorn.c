/* sinkhorn and its backward over [N, R, R] float matrices, LANES tokens at a time. */

#include "sinkhorn/sinkhorn.h"
#include <stdlib.h>

INLINE void gather(lanes *to, const float *from, long first, long n, int square) {
    float part[LANES] = {0};
    for (int i = 0; i < square; i++) {
        for (long t = 0; t < n; t++) part[t] = from[(first + t) * square + i];
        to[i] = load(part);
    }
}

INLINE void scatter(float *to, const lanes *from, long first, long n, int square) {
    float part[LANES];
    for (int i = 0; i < square; i++) {
        store(part, from[i]);
        for (long t = 0; t < n; t++) to[(first + t) * square + i] = part[t];
    }
}

INLINE void forward_group(long first, long n, int R, int iters, float eps, const float *logits, float *mixes) {
    lanes work[R * R];
    gather(work, logits, first, n, R * R);
    sinkhorn_lanes(work, R, iters, eps);
    scatter(mixes, work, first, n, R * R);
}

INLINE void backward_group(long first, long n, int R, int iters, float eps, const float *logits, const float *grad, float *out,
                           lanes *path) {
    lanes work[R * R], pulled[R * R];
    gather(work, logits, first, n, R * R);
    gather(pulled, grad, first, n, R * R);
    sinkhorn_back_lanes(pulled, work, path, R, iters, eps);
    scatter(out, pulled, first, n, R * R);
}

/* Both return 0, or 1 when memory ran out. */
int sinkhorn_forward(int threads, long N, int R, int iters, float eps, const float *logits, float *mixes) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long first = 0; first < N; first += LANES) {
        long n = N - first < LANES ? N - first : LANES;
        if (R == 4) forward_group(first, n, 4, iters, eps, logits, mixes);
        else forward_group(first, n, R, iters, eps, logits, mixes);
    }
    return 0;
}

int sinkhorn_backward(int threads, long N, int R, int iters, float eps, const float *logits, const float *grad, float *out) {
    const size_t path_bytes = (sinkhorn_path_lanes(R, iters) * sizeof(lanes) + 63) / 64 * 64;
    char *paths = aligned_alloc(64, path_bytes * threads);
    if (!paths) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; part++) {
        lanes *path = (lanes *)(paths + part * path_bytes);
        const long groups = (N + LANES - 1) / LANES, end = groups * (part + 1) / threads;
        for (long group = groups * part / threads; group < end; group++) {
            long first = group * LANES, n = N - first < LANES ? N - first : LANES;
            if (R == 4) backward_group(first, n, 4, iters, eps, logits, grad, out, path);
            else backward_group(first, n, R, iters, eps, logits, grad, out, path);
        }
    }
    free(paths);
    return 0;
}
