/* Sinkhorn-Knopp for LANES tokens at a time: one lane is one token, mixes[j * R + k] holds entry [j, k] of all of them.
   The formulas are in reference.py beside this file. */

#pragma once
#include "lanes.h"

/* Length of the path the backward walks: softmax, then (inverse sums, matrix) after each of 2 iters - 1 divisions. */
INLINE long sinkhorn_path_lanes(int R, int iters) { return R * R + (2L * iters - 1) * (R + R * R); }

/* One division by column sums (over j) or row sums (over k); inverse[r] receives 1 / (sum + eps). */
INLINE void sinkhorn_divide(lanes *mixes, lanes *inverse, int R, int columns, float eps) {
    for (int r = 0; r < R; r++) {
        lanes total = splat(eps);
        for (int i = 0; i < R; i++) total += mixes[columns ? i * R + r : r * R + i];
        inverse[r] = 1.0f / total;
        for (int i = 0; i < R; i++) mixes[columns ? i * R + r : r * R + i] *= inverse[r];
    }
}

/* G' -> G = (G' - sum G' P') / sum, with P' the divided matrix. */
INLINE void sinkhorn_divide_back(lanes *grad, const lanes *mixes, const lanes *inverse, int R, int columns) {
    for (int r = 0; r < R; r++) {
        lanes dot = {0};
        for (int i = 0; i < R; i++) dot += grad[columns ? i * R + r : r * R + i] * mixes[columns ? i * R + r : r * R + i];
        for (int i = 0; i < R; i++) {
            lanes *g = &grad[columns ? i * R + r : r * R + i];
            *g = (*g - dot) * inverse[r];
        }
    }
}

INLINE void sinkhorn_softmax(lanes *mixes, int R) {
    for (int j = 0; j < R; j++) {
        lanes *row = mixes + j * R, top = row[0], total = {0};
        for (int k = 1; k < R; k++) top = select_lanes(row[k] > top, row[k], top);
        for (int k = 0; k < R; k++) total += row[k] = exp_lanes(row[k] - top);
        for (int k = 0; k < R; k++) row[k] /= total;
    }
}

/* Logits in, mixes out, in place. */
INLINE void sinkhorn_lanes(lanes *mixes, int R, int iters, float eps) {
    lanes inverse[R];
    sinkhorn_softmax(mixes, R);
    for (int i = 0; i < R * R; i++) mixes[i] += eps;
    sinkhorn_divide(mixes, inverse, R, 1, eps);
    for (int t = 1; t < iters; t++) {
        sinkhorn_divide(mixes, inverse, R, 0, eps);
        sinkhorn_divide(mixes, inverse, R, 1, eps);
    }
}

/* Cotangent of the mixes in, cotangent of the logits out, in place; `mixes` enters as the logits, `path` is scratch. */
INLINE void sinkhorn_back_lanes(lanes *grad, lanes *mixes, lanes *path, int R, int iters, float eps) {
    const int square = R * R, steps = 2 * iters - 1;
    lanes *share = path, *trail = path + square;
    sinkhorn_softmax(mixes, R);
    memcpy(share, mixes, square * sizeof(lanes));
    for (int i = 0; i < square; i++) mixes[i] += eps;
    for (int s = 0; s < steps; s++) {
        lanes *here = trail + s * (R + square);
        sinkhorn_divide(mixes, here, R, s % 2 == 0, eps);
        memcpy(here + R, mixes, square * sizeof(lanes));
    }
    for (int s = steps - 1; s >= 0; s--) {
        lanes *here = trail + s * (R + square);
        sinkhorn_divide_back(grad, here + R, here, R, s % 2 == 0);
    }
    for (int j = 0; j < R; j++) {
        lanes dot = {0};
        for (int k = 0; k < R; k++) dot += grad[j * R + k] * share[j * R + k];
        for (int k = 0; k < R; k++) grad[j * R + k] = share[j * R + k] * (grad[j * R + k] - dot);
    }
}
