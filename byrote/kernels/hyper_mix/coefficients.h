/* From the products z of a tile to pre, post and comb, and back; one lane is one token. Formulas: reference.py beside this file. */

#pragma once
#include "hyper_mix/tile.h"
#include "sinkhorn/sinkhorn.h"

/* Which of the three scales belongs to row m. */
INLINE int gate_of(int m, int R) { return m < R ? 0 : m < 2 * R ? 1 : 2; }

/* z (already divided by the root mean square) -> the first M rows of coef. With M == R there is nothing but pre. */
INLINE void coefficients_for(const work *w, const float *base, const float *scale, int M, int R) {
    for (int t = 0; t < TILE; t += LANES) {
        lanes mixes[R * R];
        for (int m = 0; m < M; m++) {
            lanes logit = load(w->z + m * TILE + t) * scale[gate_of(m, R)] + base[m];
            if (m < R) store(w->coef + m * TILE + t, sigmoid_lanes(logit) + w->s->eps);
            else if (m < 2 * R) store(w->coef + m * TILE + t, 2.0f * sigmoid_lanes(logit));
            else mixes[m - 2 * R] = logit;
        }
        if (M == R) continue;
        sinkhorn_lanes(mixes, R, w->s->iters, w->s->eps);
        for (int i = 0; i < R * R; i++) store(w->coef + (2 * R + i) * TILE + t, mixes[i]);
    }
}

/* `pull` enters as the cotangent of the coefficients and leaves as that of fn f, `square` as that of f itself; sums over tokens
   are added to dbase [M][TILE] and dscale [3][TILE]. */
INLINE void coefficients_back_for(const work *w, const float *inverse_rms, const float *base, const float *scale, int R) {
    const int M = w->s->M;
    for (int t = 0; t < TILE; t += LANES) {
        lanes mixes[R * R], grad[R * R], along = {0}, rms = load(inverse_rms + t);
        for (int i = 0; i < M - 2 * R; i++) {
            mixes[i] = load(w->z + (2 * R + i) * TILE + t) * scale[2] + base[2 * R + i];
            grad[i] = load(w->pull + (2 * R + i) * TILE + t);
        }
        if (M > R) sinkhorn_back_lanes(grad, mixes, (lanes *)w->path, R, w->s->iters, w->s->eps);
        for (int m = 0; m < M; m++) {
            const int gate = gate_of(m, R), at = m * TILE + t;
            lanes z = load(w->z + at), g;
            if (gate < 2) {
                lanes open = sigmoid_lanes(z * scale[gate] + base[m]);
                g = load(w->pull + at) * open * (1.0f - open) * (gate ? 2.0f : 1.0f);
            } else g = grad[m - 2 * R];
            store(w->dbase + at, load(w->dbase + at) + g);
            store(w->dscale + gate * TILE + t, load(w->dscale + gate * TILE + t) + g * z);
            g *= scale[gate];
            along += g * z;
            store(w->pull + at, g * rms);
        }
        store(w->square + t, -along * rms * rms / (float)(R * w->s->D));
    }
}

static void coefficients(const work *w, const float *base, const float *scale, int M) {
    if (w->s->R == 4) coefficients_for(w, base, scale, M, 4);
    else coefficients_for(w, base, scale, M, w->s->R);
}

static void coefficients_back(const work *w, const float *inverse_rms, const float *base, const float *scale) {
    if (w->s->R == 4) coefficients_back_for(w, inverse_rms, base, scale, 4);
    else coefficients_back_for(w, inverse_rms, base, scale, w->s->R);
}
