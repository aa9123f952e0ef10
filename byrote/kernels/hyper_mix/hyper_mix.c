/* mHC around one site: leave the site before, enter the next one, or both in one pass over the streams.

   Formulas: reference.py beside this file. Tokens go in tiles of TILE; a tile's streams stay in cache as floats from the
   mixing that made them to the M products with fn and the sum that the site reads, so the streams are read once and written
   once. The M numbers of a token are handled lane-wise, one lane a token. Each of `threads` parts owns a contiguous run of
   tiles and its own sums over tokens, added in the order of the parts: results depend on `threads`, never on scheduling.

   Names: N tokens, R streams, D model, P = D rounded up to LANES, K = R * P, M = rows of fn (R * (R + 2), or R to read out).
   In [m][TILE] arrays the token runs fastest. */

#include "hyper_mix/tile.h"
#include <stdlib.h>


typedef struct {
    const void *old, *y; /* y NULL: no site is left, `old` are the streams */
    const float *post, *comb;
    void *streams;
    const float *fn, *base, *scale; /* fn NULL: no site is entered */
    void *x;
    float *post_out, *comb_out, *z, *inverse_rms;
} forward_data;

/* Copies the streams of `n` tokens from `first` into the tile; w->square receives the sum of their squares. */
INLINE void load_tile(const work *w, const sizes *s, long first, long n, const int R, const int bf16, const int whole, const void *streams) {
    for (long t = 0; t < n; t++) {
        lanes square = {0};
        for (int j = 0; j < R; j++) {
            const row from = row_at(streams, (first + t) * R + j, s->D, bf16, whole);
            for (long d = 0; d < s->D; d += LANES) {
                lanes h = load_row(from, d);
                store(w->flat + t * w->S + j * w->P + d, h);
                square += h * h;
            }
        }
        w->square[t] = sum_lanes(square);
    }
}

/* Mixes the old streams and y into the tile, and into memory. */
INLINE void mix_tile(const work *w, const sizes *s, long first, long n, const int R, const int bf16, const int whole, const forward_data *a) {
    const long D = s->D, P = w->P;
    for (long t = 0; t < n; t++) {
        const long token = first + t;
        float *f = w->flat + t * w->S;
        lanes square = {0}, post[MAX_R], comb[MAX_R * MAX_R];
        for (int k = 0; k < R; k++) post[k] = splat(a->post[token * R + k]);
        for (int i = 0; i < R * R; i++) comb[i] = splat(a->comb[token * R * R + i]);
        for (long d = 0; d < D; d += LANES) {
            lanes h[MAX_R], y = load_row(row_at(a->y, token, D, bf16, whole), d);
            for (int j = 0; j < R; j++) h[j] = load_row(row_at(a->old, token * R + j, D, bf16, whole), d);
            for (int k = 0; k < R; k++) {
                lanes sum = post[k] * y;
                for (int j = 0; j < R; j++) sum += comb[j * R + k] * h[j];
                sum = store_row(row_at(a->streams, token * R + k, D, bf16, whole), d, sum);
                store(f + k * P + d, sum);
                square += sum * sum;
            }
        }
        w->square[t] = sum_lanes(square);
    }
}

/* x = sum_i pre_i h_i for the tokens of the tile. */
INLINE void collapse(const work *w, const sizes *s, long first, long n, const int R, const int bf16, const int whole, void *x) {
    for (long t = 0; t < n; t++)
        for (long d = 0; d < s->D; d += LANES) {
            lanes sum = {0};
            for (int i = 0; i < R; i++) sum += w->coef[i * TILE + t] * load(w->flat + t * w->S + i * w->P + d);
            store_row(row_at(x, first + t, s->D, bf16, whole), d, sum);
        }
}

/* [count][TILE] -> rows of `count` numbers a token, or back; tokens beyond n read as zero. */
static void write_rows(float *to, const float *from, long first, long n, int count) {
    for (long t = 0; t < n; t++)
        for (int m = 0; m < count; m++) to[(first + t) * count + m] = from[m * TILE + t];
}

static void read_rows(float *to, const float *from, long first, long n, int count) {
    for (int m = 0; m < count; m++)
        for (long t = 0; t < TILE; t++) to[m * TILE + t] = t < n && from ? from[(first + t) * count + m] : 0;
}

INLINE void forward_tile(work *w, const sizes *s, const forward_data *a, long first, long n, const int R, const int bf16, const int whole) {
    const int M = s->M;
    if (a->y) mix_tile(w, s, first, n, R, bf16, whole, a);
    else load_tile(w, s, first, n, R, bf16, whole, a->old);
    if (!a->fn) return;
    project(w, M, n);
    for (long t = 0; t < n; t++) {
        const float inverse_rms = 1.0f / __builtin_sqrtf(w->square[t] / (float)(R * s->D) + s->norm_eps);
        a->inverse_rms[first + t] = inverse_rms;
        for (int m = 0; m < M; m++) w->z[m * TILE + t] *= inverse_rms;
    }
    write_rows(a->z, w->z, first, n, M);
    coefficients(w, a->base, a->scale, s, M);
    if (M > R) write_rows(a->post_out, w->coef + R * TILE, first, n, R);
    if (M > R) write_rows(a->comb_out, w->coef + 2 * R * TILE, first, n, R * R);
    collapse(w, s, first, n, R, bf16, whole, a->x);
}

typedef struct {
    const void *d_streams, *d_x; /* NULL: zero */
    const float *d_post_out, *d_comb_out;
    const void *streams; /* those the entered site saw */
    const float *fn, *base, *scale, *z, *inverse_rms;
    float *d_fn, *d_base, *d_scale;
    const void *old, *y;
    const float *post, *comb;
    void *d_old, *d_y;
    float *d_post, *d_comb;
} backward_data;

/* grad = d_streams + pre d_x, row by row; w->pull[i] receives <d_x, h_i>, the cotangent of pre. */
INLINE void collapse_back(const work *w, const sizes *s, const backward_data *a, long first, long n, const int R, const int bf16, const int whole) {
    const long D = s->D;
    memset(w->pull, 0, sizeof(float) * R * TILE);
    for (long t = 0; t < n; t++) {
        lanes dot[MAX_R] = {0};
        float *grad = w->grad + t * w->S;
        const float *f = w->flat + t * w->S;
        for (long d = 0; d < D; d += LANES) {
            lanes dx = a->d_x ? load_row(row_at(a->d_x, first + t, D, bf16, whole), d) : splat(0);
            for (int i = 0; i < R; i++) {
                lanes above = a->d_streams ? load_row(row_at(a->d_streams, (first + t) * R + i, D, bf16, whole), d) : splat(0);
                if (a->fn) above += w->coef[i * TILE + t] * dx;
                if (a->fn) dot[i] += dx * load(f + i * w->P + d);
                store(grad + i * w->P + d, above);
            }
        }
        for (int i = 0; i < R; i++) w->pull[i * TILE + t] = sum_lanes(dot[i]);
    }
}

/* The tile's cotangent through h'_k = post_k y + sum_j comb[j, k] h_j. */
INLINE void leave_back(const work *w, const sizes *s, const backward_data *a, long first, long n, const int R, const int bf16, const int whole) {
    const long D = s->D;
    for (long t = 0; t < n; t++) {
        const long token = first + t;
        const float *post = a->post + token * R, *comb = a->comb + token * R * R, *grad = w->grad + t * w->S;
        lanes d_comb[MAX_R * MAX_R] = {0}, d_post[MAX_R] = {0};
        for (long d = 0; d < D; d += LANES) {
            lanes g[MAX_R], y = load_row(row_at(a->y, token, D, bf16, whole), d), d_y = {0};
            for (int k = 0; k < R; k++) {
                g[k] = load(grad + k * w->P + d);
                d_post[k] += y * g[k];
                d_y += post[k] * g[k];
            }
            store_row(row_at(a->d_y, token, D, bf16, whole), d, d_y);
            for (int j = 0; j < R; j++) {
                lanes h = load_row(row_at(a->old, token * R + j, D, bf16, whole), d), d_h = {0};
                for (int k = 0; k < R; k++) {
                    d_comb[j * R + k] += h * g[k];
                    d_h += comb[j * R + k] * g[k];
                }
                store_row(row_at(a->d_old, token * R + j, D, bf16, whole), d, d_h);
            }
        }
        for (int k = 0; k < R; k++) a->d_post[token * R + k] = sum_lanes(d_post[k]);
        for (int i = 0; i < R * R; i++) a->d_comb[token * R * R + i] = sum_lanes(d_comb[i]);
    }
}

INLINE void backward_tile(work *w, const sizes *s, const backward_data *a, long first, long n, const int R, const int bf16, const int whole) {
    const int M = s->M;
    float inverse_rms[TILE] = {0};
    if (a->fn) {
        load_tile(w, s, first, n, R, bf16, whole, a->streams);
        read_rows(w->z, a->z, first, n, M);
        memcpy(inverse_rms, a->inverse_rms + first, n * sizeof(float));
        coefficients(w, a->base, a->scale, s, R);
    }
    collapse_back(w, s, a, first, n, R, bf16, whole);
    if (a->fn) {
        if (M > R) read_rows(w->pull + R * TILE, a->d_post_out, first, n, R);
        if (M > R) read_rows(w->pull + 2 * R * TILE, a->d_comb_out, first, n, R * R);
        coefficients_back(w, inverse_rms, a->base, a->scale, s);
        project_back(w, M, n);
    }
    if (a->y) {
        leave_back(w, s, a, first, n, R, bf16, whole);
        return;
    }
    for (long t = 0; t < n; t++)
        for (int i = 0; i < R; i++)
            for (long d = 0; d < s->D; d += LANES)
                store_row(row_at(a->d_old, (first + t) * R + i, s->D, bf16, whole), d, load(w->grad + t * w->S + i * w->P + d));
}

/* ---- work space, parts, entry points ---- */

/* Pointers into one zeroed block for one part; only the size when `block` is NULL. */
static size_t place(work *w, const sizes *s, int backward, char *block) {
    const long P = (s->D + LANES - 1) / LANES * LANES, K = P * s->R, S = (K / LANES | 1) * LANES, tokens = min_long(TILE, (s->N + GROUP - 1) / GROUP * GROUP);
    const size_t tile = sizeof(float) * TILE, flat = sizeof(float) * tokens * S, rows = tile * s->M;
    const struct {
        float **field;
        size_t bytes;
    } plan[] = {
        {&w->flat, flat},
        {&w->z, rows},
        {&w->coef, rows},
        {&w->square, tile},
        {&w->grad, backward * flat},
        {&w->pull, backward * rows},
        {&w->dfn, backward * sizeof(float) * s->M * S},
        {&w->dbase, backward * rows},
        {&w->dscale, backward * tile * 3},
        {&w->path, backward * sizeof(lanes) * sinkhorn_path_lanes(s->R, s->iters)},
    };
    size_t used = 0;
    w->P = P;
    w->K = K;
    w->S = S;
    for (size_t i = 0; i < sizeof plan / sizeof *plan; i++) {
        if (block) *plan[i].field = (float *)(block + used);
        used += (plan[i].bytes + 63) / 64 * 64;
    }
    return used;
}

/* fn with rows of R pieces of P numbers, S apart; NULL: no memory. A few tokens take fn as it is, if that has no ragged ends. */
static const float *pack_fn(const float *fn, const sizes *s, work *w) {
    w->fn_stride = s->R * s->D;
    if (w->P == s->D && s->N <= 4 * TILE) return fn;
    float *packed = aligned_alloc(64, s->M * w->S * sizeof(float));
    w->fn_stride = w->S;
    if (packed) memset(packed, 0, s->M * w->S * sizeof(float));
    for (long piece = 0; packed && piece < s->M * s->R; piece++)
        memcpy(packed + piece / s->R * w->S + piece % s->R * w->P, fn + piece * s->D, s->D * sizeof(float));
    return packed;
}

static void sum_parts(const work *w, const sizes *s, const backward_data *a) {
    const int M = s->M, R = s->R;
#pragma omp parallel for schedule(static) num_threads(s->threads)
    for (int m = 0; m < M; m++) {
        for (int i = 0; i < R; i++)
            for (long d = 0; d < s->D; d++) {
                float total = 0;
                for (int p = 0; p < s->threads; p++) total += w[p].dfn[m * w[p].S + i * w[p].P + d];
                a->d_fn[(m * R + i) * s->D + d] = total;
            }
        a->d_base[m] = 0;
        for (int p = 0; p < s->threads; p++)
            for (int t = 0; t < TILE; t++) a->d_base[m] += w[p].dbase[m * TILE + t];
    }
    for (int part = 0; part < (M > R ? 3 : 1); part++) {
        a->d_scale[part] = 0;
        for (int p = 0; p < s->threads; p++)
            for (int t = 0; t < TILE; t++) a->d_scale[part] += w[p].dscale[part * TILE + t];
    }
}

INLINE void run_part(work *w, const sizes *s, int part, const forward_data *f, const backward_data *b, const int R, const int bf16, const int whole) {
    const long tiles = (s->N + TILE - 1) / TILE, end = tiles * (part + 1) / s->threads;
    for (long tile = tiles * part / s->threads; tile < end; tile++) {
        const long first = tile * TILE, n = min_long(TILE, s->N - first);
        if (f) forward_tile(w, s, f, first, n, R, bf16, whole);
        else backward_tile(w, s, b, first, n, R, bf16, whole);
    }
}

static void run_any(work *w, const sizes *s, int part, const forward_data *f, const backward_data *b) {
    const int fast = s->R == 4 && s->D % LANES == 0;
    if (fast && f && s->bf16) run_part(w, s, part, f, NULL, 4, 1, 1);
    else if (fast && f) run_part(w, s, part, f, NULL, 4, 0, 1);
    else if (fast && s->bf16) run_part(w, s, part, NULL, b, 4, 1, 1);
    else if (fast) run_part(w, s, part, NULL, b, 4, 0, 1);
    else run_part(w, s, part, f, b, s->R, s->bf16, 0);
}

/* 0, or 1 when memory ran out. */
static int run(const sizes *s, const float *fn, const forward_data *f, const backward_data *b) {
    work shape, *parts = calloc(s->threads, sizeof(work));
    const size_t bytes = place(&shape, s, b != NULL, NULL);
    char *block = aligned_alloc(64, bytes * s->threads);
    const float *packed = fn ? pack_fn(fn, s, &shape) : NULL;
    const int failed = !parts || !block || (fn && !packed);
    if (!failed) {
#pragma omp parallel for schedule(static) num_threads(s->threads)
        for (int part = 0; part < s->threads; part++) {
            memset(block + part * bytes, 0, bytes);
            place(&parts[part], s, b != NULL, block + part * bytes);
            parts[part].fn = packed;
            parts[part].fn_stride = shape.fn_stride;
            run_any(&parts[part], s, part, f, b);
        }
        if (b && fn) sum_parts(parts, s, b);
    }
    if (packed != fn) free((void *)packed);
    free(block);
    free(parts);
    return failed;
}

int hyper_forward(int threads, int bf16, long N, long D, int R, int M, int iters, float eps, float norm_eps, const void *old, const void *y,
                  const float *post, const float *comb, void *streams, const float *fn, const float *base, const float *scale, void *x,
                  float *post_out, float *comb_out, float *z, float *inverse_rms) {
    const sizes s = {threads, bf16, N, D, R, M, iters, eps, norm_eps};
    const forward_data a = {old, y, post, comb, streams, fn, base, scale, x, post_out, comb_out, z, inverse_rms};
    return run(&s, fn, &a, NULL);
}

int hyper_backward(int threads, int bf16, long N, long D, int R, int M, int iters, float eps, const void *d_streams, const void *d_x,
                   const float *d_post_out, const float *d_comb_out, const void *streams, const float *fn, const float *base,
                   const float *scale, const float *z, const float *inverse_rms, float *d_fn, float *d_base, float *d_scale,
                   const void *old, const void *y, const float *post, const float *comb, void *d_old, void *d_y, float *d_post,
                   float *d_comb) {
    const sizes s = {threads, bf16, N, D, R, M, iters, eps, 0};
    const backward_data a = {d_streams, d_x, d_post_out, d_comb_out, streams, fn, base, scale, z, inverse_rms, d_fn, d_base, d_scale,
                             old, y, post, comb, d_old, d_y, d_post, d_comb};
    return run(&s, fn, NULL, &a);
}
