/* A tile of TILE tokens, and its products with fn.

   N tokens, R streams, D model, P = D rounded up to LANES, K = R * P, M = rows of fn (R * (R + 2), or R to read out). Rows of K
   numbers lie S apart, an odd number of cache lines, so that rows worked on together do not evict each other. In [m][TILE]
   arrays the token runs fastest, so that one lane is one token. Tokens beyond the end of a tile hold zeros or leftovers;
   whatever comes of them is never written. */

#pragma once
#include "product.h"

#define TILE 16
#define GROUP 4    /* tokens whose products are formed together, in registers */
#define CHUNK 1024 /* numbers of a token between two reductions: six rows of fn stay in the first-level cache */
#define BLOCK (4 * PANEL) /* columns of the products in the backward: all rows of fn stay there */

/* The backward of bf16 streams multiplies pairs of bfloat16, where one instruction does that; the forward is always in fp32. */
#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define PAIRS 1
#else
#define PAIRS 0
#endif

typedef struct {
    int threads, bf16;
    long N, D;
    int R, M, iters;
    float eps, norm_eps;
} sizes;

/* One part's work space. */
typedef struct {
    const sizes *s;
    long P, K, S;
    long first, n;        /* the tile: n tokens from the first */
    long fn_stride;       /* numbers from one row of fn to the next */
    const float *fn;      /* [M][K] */
    const unit *fn_units; /* the same as right operand of the backward, [units of M][K] */
    float *flat;          /* [TILE][K] streams f entering the site */
    float *grad;          /* [TILE][K] their cotangent */
    float *z;             /* [M][TILE] products fn f over the root mean square */
    float *coef;          /* [M][TILE] pre, post, comb */
    float *square;        /* [TILE] sum of f^2; in the backward: factor of f in its own cotangent */
    float *pull;          /* [M][TILE] cotangent of coef, then of fn f; up to a multiple of ROWS, rows of zeros follow */
    unit *pairs;          /* [TILE / 2][K] in place of flat: two tokens a unit */
    unit *pull_down;      /* [units of M][TILE] pull: two rows a unit */
    unit *pull_along;     /* [M][TILE / 2] pull: two tokens a unit */
    float *dfn;           /* [M][K] cotangent of fn: this part's sum over tokens */
    float *dbase;         /* [M][TILE] the same of base, before the sum over the lanes */
    float *dscale;        /* [3][TILE] the same of scale */
    float *path;          /* Sinkhorn's */
} work;

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

/* z = fn f for the tokens of the tile. */
static void project(const work *w) {
    const int M = w->s->M;
    memset(w->z, 0, sizeof(float) * M * TILE);
    for (long k = 0; k < w->K; k += CHUNK) {
        const long length = min_long(CHUNK, w->K - k);
        for (int m = 0, outs; m < M; m += outs) {
            outs = M - m >= 6 ? 6 : M - m >= 4 ? 4 : 1;
            for (long t = 0; t < w->n; t += GROUP) {
                const float *f = w->flat + t * w->S + k, *fn = w->fn + m * w->fn_stride + k;
                float *z = w->z + m * TILE + t;
                if (outs == 6) dot_block(f, w->S, fn, w->fn_stride, z, length, 6);
                else if (outs == 4) dot_block(f, w->S, fn, w->fn_stride, z, length, 4);
                else dot_block(f, w->S, fn, w->fn_stride, z, length, 1);
            }
        }
    }
}

/* pull as left operands of bfloat16, summed over m and summed over tokens. */
INLINE void pack_pull(const work *w) {
    pack_pairs(w->pull_down, TILE, w->s->M, w->pull, TILE, w->s->M, TILE, 0, 1);
    for (int m = 0; m < (int)round_up(w->s->M, ROWS); m++)
        for (int t = 0; t < TILE; t += LANES)
            store_row((row){w->pull_along + m * TILE / 2, TILE, 1, 1}, t, load(w->pull + m * TILE + t));
}

/* Both cotangents of the products: grad_t += sum_m pull[m][t] fn_m, and dfn_m += sum_t pull[m][t] f_t. */
INLINE void project_back_as(const work *w, const int bf16) {
    static const float all[ROWS] = {1, 1, 1, 1};
    const long fn_units = units_for(w->s->M, bf16), tokens = units_for(w->n, bf16), row = TILE / unit_width(bf16);
    const unit *down = bf16 ? w->pull_down : (unit *)w->pull, *along = bf16 ? w->pull_along : (unit *)w->pull;
    for (long k = 0; k < w->K; k += BLOCK) {
        const long columns = min_long(BLOCK, w->K - k);
        const right_units fn = {w->fn_units + k, w->fn_stride, PANEL}, f = {(bf16 ? w->pairs : (unit *)w->flat) + k, w->S, PANEL};
        for (long t = 0; t < w->n; t += ROWS) {
            const left_units pull = {down + t, 1, TILE};
            product(pull, fn, fn_units, columns, w->grad + t * w->S + k, w->S, all, bf16);
        }
        for (int m = 0; m < w->s->M; m += ROWS) {
            const left_units pull = {along + m * row, row, 1};
            product(pull, f, tokens, columns, w->dfn + m * w->S + k, w->S, all, bf16);
        }
    }
}

static void project_back(const work *w) {
    if (PAIRS && w->s->bf16) {
        pack_pull(w);
        project_back_as(w, 1);
    } else project_back_as(w, 0);
}
