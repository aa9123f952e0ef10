/* A tile of TILE tokens and what is done with it while it lies in cache: products with fn, coefficients, and their backward.

   N tokens, R streams, D model, P = D rounded up to LANES, K = R * P, M = rows of fn (R * (R + 2), or R to read out). Rows of
   K numbers lie S apart, an odd number of cache lines, so that rows worked on together do not evict each other. In [m][TILE]
   arrays the token runs fastest, so that one lane is one token. Tokens beyond the end of a tile hold zeros or
   leftovers; whatever is computed from them is never written. */

#pragma once
#include "sinkhorn/sinkhorn.h"

#define TILE 16
#define GROUP 4 /* tokens whose products are formed together, in registers */
#define MAX_R 8
#define CHUNK 1024 /* numbers of a token between two reductions: six rows of fn stay in the first-level cache */

typedef struct {
    int threads, bf16;
    long N, D;
    int R, M, iters;
    float eps, norm_eps;
} sizes;

typedef struct {
    long P, K, S;
    long fn_stride;
    const float *fn; /* [M][K] */
    float *flat;     /* [TILE][K] streams entering the site */
    float *grad;     /* [TILE][K] their cotangent */
    float *z;        /* [M][TILE] */
    float *pull;     /* [M][TILE] cotangent of the products fn f */
    float *square;   /* [TILE] sum of f^2; in the backward: factor of f in its own cotangent */
    float *coef;     /* [M][TILE] pre, post, comb */
    float *dfn;      /* [M][K], this part's sum */
    float *dbase;    /* [M][TILE], before the sum over the lanes */
    float *dscale;   /* [3][TILE] */
    float *path;     /* Sinkhorn's */
} work;

static inline long min_long(long a, long b) { return a < b ? a : b; }

/* ---- products with fn: GROUP tokens at a time, so that each number loaded is used several times ---- */

/* z[o][t] += <f_t, fn_o> over `length` numbers, GROUP tokens by `outs` rows. */
INLINE void dot_block(const float *f, long S, const float *fn, long fn_stride, float *z, long length, const int outs) {
    lanes sum[GROUP][6] = {0};
    for (long k = 0; k < length; k += LANES) {
        lanes w[6];
#pragma GCC unroll 6
        for (int o = 0; o < outs; o++) w[o] = hold(fn + o * fn_stride + k);
#pragma GCC unroll 4
        for (int t = 0; t < GROUP; t++) {
            lanes v = hold(f + t * S + k);
#pragma GCC unroll 6
            for (int o = 0; o < outs; o++) sum[t][o] += v * w[o];
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < GROUP; t++)
#pragma GCC unroll 6
        for (int o = 0; o < outs; o++) z[o * TILE + t] += sum_lanes(sum[t][o]);
}

static void project(const work *w, int M, long n) {
    const long K = w->K;
    memset(w->z, 0, sizeof(float) * M * TILE);
    for (long k = 0; k < K; k += CHUNK) {
        const long length = min_long(CHUNK, K - k);
        for (int m = 0, outs; m < M; m += outs) {
            outs = M - m >= 6 ? 6 : M - m >= 4 ? 4 : 1;
            for (long t = 0; t < n; t += GROUP) {
                const float *f = w->flat + t * w->S + k, *fn = w->fn + m * w->fn_stride + k;
                float *z = w->z + m * TILE + t;
                if (outs == 6) dot_block(f, w->S, fn, w->fn_stride, z, length, 6);
                else if (outs == 4) dot_block(f, w->S, fn, w->fn_stride, z, length, 4);
                else dot_block(f, w->S, fn, w->fn_stride, z, length, 1);
            }
        }
    }
}

/* grad_t += sum_m pull[m][t] fn_m + own_t f_t on `vecs` vectors from number k, GROUP tokens from t. */
INLINE void pull_block(const work *w, int M, long t0, long k, const int vecs) {
    const float *f = w->flat + t0 * w->S + k, *fn = w->fn + k, *pull = w->pull + t0, *own = w->square + t0;
    float *grad = w->grad + t0 * w->S + k;
    lanes sum[GROUP][4];
#pragma GCC unroll 4
    for (int t = 0; t < GROUP; t++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) sum[t][v] = load(grad + t * w->S + v * LANES) + own[t] * load(f + t * w->S + v * LANES);
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            lanes row = hold(fn + m * w->fn_stride + v * LANES);
#pragma GCC unroll 4
            for (int t = 0; t < GROUP; t++) sum[t][v] += pull[m * TILE + t] * row;
        }
#pragma GCC unroll 4
    for (int t = 0; t < GROUP; t++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) store(grad + t * w->S + v * LANES, sum[t][v]);
}

/* dfn_o += sum_t pull[o][t] f_t on `vecs` vectors from number k, `outs` rows from m. */
INLINE void weight_block(const work *w, int m, long n, long k, const int outs, const int vecs) {
    const float *f = w->flat + k, *pull = w->pull + m * TILE;
    float *dfn = w->dfn + m * w->S + k;
    lanes sum[6][4];
#pragma GCC unroll 6
    for (int o = 0; o < outs; o++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) sum[o][v] = load(dfn + o * w->S + v * LANES);
    for (long t = 0; t < n; t++) {
        lanes x[4];
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) x[v] = hold(f + t * w->S + v * LANES);
#pragma GCC unroll 6
        for (int o = 0; o < outs; o++)
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) sum[o][v] += pull[o * TILE + t] * x[v];
    }
#pragma GCC unroll 6
    for (int o = 0; o < outs; o++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) store(dfn + o * w->S + v * LANES, sum[o][v]);
}

INLINE void project_back_at(const work *w, int M, long n, long k, const int vecs) {
    for (long t = 0; t < n; t += GROUP) pull_block(w, M, t, k, vecs);
    for (int m = 0; m < M / 6 * 6; m += 6) weight_block(w, m, n, k, 6, vecs);
    for (int m = M / 6 * 6; m < M; m++) weight_block(w, m, n, k, 1, vecs);
}

static void project_back(const work *w, int M, long n) {
    long k = 0;
    for (; k + 4 * LANES <= w->K; k += 4 * LANES) project_back_at(w, M, n, k, 4);
    for (; k < w->K; k += LANES) project_back_at(w, M, n, k, 1);
}

/* ---- coefficients, one lane a token ---- */

/* z (already divided by the root mean square) -> coef. With M == R there is nothing but pre. */
INLINE void coefficients_for(const work *w, const float *base, const float *scale, int R, int M, int iters, float eps) {
    for (int t = 0; t < TILE; t += LANES) {
        lanes mixes[R * R];
        for (int m = 0; m < M; m++) {
            lanes logit = load(w->z + m * TILE + t) * scale[m < R ? 0 : m < 2 * R ? 1 : 2] + base[m];
            if (m < R) store(w->coef + m * TILE + t, sigmoid_lanes(logit) + eps);
            else if (m < 2 * R) store(w->coef + m * TILE + t, 2.0f * sigmoid_lanes(logit));
            else mixes[m - 2 * R] = logit;
        }
        if (M == R) continue;
        sinkhorn_lanes(mixes, R, iters, eps);
        for (int i = 0; i < R * R; i++) store(w->coef + (2 * R + i) * TILE + t, mixes[i]);
    }
}

/* `pull` enters as the cotangent of the coefficients and leaves as that of fn f; sums over tokens go to dbase and dscale. */
INLINE void coefficients_back_for(const work *w, const float *inverse_rms, const float *base, const float *scale, const sizes *s, int R) {
    const int M = s->M;
    for (int t = 0; t < TILE; t += LANES) {
        lanes mixes[R * R], grad[R * R], along = {0}, rms = load(inverse_rms + t);
        for (int i = 0; i < M - 2 * R; i++) {
            mixes[i] = load(w->z + (2 * R + i) * TILE + t) * scale[2] + base[2 * R + i];
            grad[i] = load(w->pull + (2 * R + i) * TILE + t);
        }
        if (M > R) sinkhorn_back_lanes(grad, mixes, (lanes *)w->path, R, s->iters, s->eps);
        for (int m = 0; m < M; m++) {
            const int part = m < R ? 0 : m < 2 * R ? 1 : 2, at = m * TILE + t;
            lanes z = load(w->z + at), g;
            if (part < 2) {
                lanes gate = sigmoid_lanes(z * scale[part] + base[m]);
                g = load(w->pull + at) * gate * (1.0f - gate) * (part ? 2.0f : 1.0f);
            } else g = grad[m - 2 * R];
            store(w->dbase + at, load(w->dbase + at) + g);
            store(w->dscale + part * TILE + t, load(w->dscale + part * TILE + t) + g * z);
            g *= scale[part];
            along += g * z;
            store(w->pull + at, g * rms);
        }
        store(w->square + t, -along * rms * rms / (float)(R * s->D));
    }
}

static void coefficients(const work *w, const float *base, const float *scale, const sizes *s, int M) {
    if (s->R == 4) coefficients_for(w, base, scale, 4, M, s->iters, s->eps);
    else coefficients_for(w, base, scale, s->R, M, s->iters, s->eps);
}

static void coefficients_back(const work *w, const float *inverse_rms, const float *base, const float *scale, const sizes *s) {
    if (s->R == 4) coefficients_back_for(w, inverse_rms, base, scale, s, 4);
    else coefficients_back_for(w, inverse_rms, base, scale, s, s->R);
}
