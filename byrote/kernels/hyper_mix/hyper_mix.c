/* mHC around one site: leave the site before, enter the next one, or both in one pass over the streams.

   Formulas: reference.py beside this file. Tokens go in tiles; a tile's streams stay in cache as floats from the mixing that
   made them to their products with fn and the sum that the site reads, so memory is read once and written once. Each of
   `threads` parts owns a contiguous run of tiles and its own sums over tokens, added in the order of the parts: results depend
   on `threads`, never on scheduling. */

#include "hyper_mix/coefficients.h"
#include <stdlib.h>

#define MAX_R 8

/* What the compiler knows of a call where it matters: number of streams, their dtype, whether D is a multiple of LANES. */
typedef struct {
    int R, bf16, whole;
} form;

typedef struct {
    const void *old, *y; /* y NULL: no site is left, `old` are the streams */
    const float *post, *comb;
    void *streams;
    const float *fn, *base, *scale; /* fn NULL: no site is entered */
    void *x;
    float *post_out, *comb_out, *z, *inverse_rms;
} forward_data;

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

/* Row t of the tile in [N, D], and stream j of token t in [N, R, D]. */
INLINE row token_row(const work *w, const void *x, long t, const form as) { return row_at(x, w->first + t, w->s->D, as.bf16, as.whole); }

INLINE row stream_row(const work *w, const void *x, long t, int j, const form as) {
    return row_at(x, (w->first + t) * as.R + j, w->s->D, as.bf16, as.whole);
}

/* ---- forward ---- */

/* Copies the streams into the tile, and the sums of their squares into `square` if it is not NULL. */
INLINE void load_streams(const work *w, const void *streams, float *square, const form as) {
    for (long t = 0; t < w->n; t++) {
        lanes sum = {0};
        for (int j = 0; j < as.R; j++)
            for (long d = 0; d < w->s->D; d += LANES) {
                lanes h = load_row(stream_row(w, streams, t, j, as), d);
                store(w->flat + t * w->S + j * w->P + d, h);
                sum += h * h;
            }
        if (square) square[t] = sum_lanes(sum);
    }
}

/* Mixes the old streams and y into the tile, and into memory. */
INLINE void mix(const work *w, const forward_data *a, const form as) {
    const long D = w->s->D, P = w->P;
    for (long t = 0; t < w->n; t++) {
        const long token = w->first + t;
        float *f = w->flat + t * w->S;
        lanes square = {0}, post[MAX_R], comb[MAX_R * MAX_R];
        for (int k = 0; k < as.R; k++) post[k] = splat(a->post[token * as.R + k]);
        for (int i = 0; i < as.R * as.R; i++) comb[i] = splat(a->comb[token * as.R * as.R + i]);
        for (long d = 0; d < D; d += LANES) {
            lanes h[MAX_R], y = load_row(token_row(w, a->y, t, as), d);
            for (int j = 0; j < as.R; j++) h[j] = load_row(stream_row(w, a->old, t, j, as), d);
            for (int k = 0; k < as.R; k++) {
                lanes sum = post[k] * y;
                for (int j = 0; j < as.R; j++) sum += comb[j * as.R + k] * h[j];
                sum = store_row(stream_row(w, a->streams, t, k, as), d, sum);
                store(f + k * P + d, sum);
                square += sum * sum;
            }
        }
        w->square[t] = sum_lanes(square);
    }
}

/* x = sum_i pre_i h_i. */
INLINE void collapse(const work *w, void *x, const form as) {
    for (long t = 0; t < w->n; t++)
        for (long d = 0; d < w->s->D; d += LANES) {
            lanes sum = {0};
            for (int i = 0; i < as.R; i++) sum += w->coef[i * TILE + t] * load(w->flat + t * w->S + i * w->P + d);
            store_row(token_row(w, x, t, as), d, sum);
        }
}

/* [count][TILE] -> rows of `count` numbers a token, or back; tokens beyond the tile's read as zero. */
static void write_rows(const work *w, float *to, const float *from, int count) {
    for (long t = 0; t < w->n; t++)
        for (int m = 0; m < count; m++) to[(w->first + t) * count + m] = from[m * TILE + t];
}

static void read_rows(const work *w, float *to, const float *from, int count) {
    for (int m = 0; m < count; m++)
        for (long t = 0; t < TILE; t++) to[m * TILE + t] = t < w->n && from ? from[(w->first + t) * count + m] : 0;
}

INLINE void forward_tile(const work *w, const forward_data *a, const form as) {
    const int M = w->s->M;
    if (a->y) mix(w, a, as);
    else load_streams(w, a->old, w->square, as);
    if (!a->fn) return;
    project(w);
    for (long t = 0; t < w->n; t++) {
        const float inverse_rms = 1.0f / __builtin_sqrtf(w->square[t] / (float)(as.R * w->s->D) + w->s->norm_eps);
        a->inverse_rms[w->first + t] = inverse_rms;
        for (int m = 0; m < M; m++) w->z[m * TILE + t] *= inverse_rms;
    }
    write_rows(w, a->z, w->z, M);
    coefficients(w, a->base, a->scale, M);
    if (M > as.R) write_rows(w, a->post_out, w->coef + as.R * TILE, as.R);
    if (M > as.R) write_rows(w, a->comb_out, w->coef + 2 * as.R * TILE, as.R * as.R);
    collapse(w, a->x, as);
}

/* ---- backward ---- */

/* The streams as the right operand of the products: two tokens side by side in a unit, zero beyond the last. */
INLINE void pair_streams(const work *w, const void *streams, const form as) {
    for (long t = 0; t < w->n; t += 2)
        for (int j = 0; j < as.R; j++) {
            const row one = stream_row(w, streams, t, j, as), two = stream_row(w, streams, t + 1, j, as);
            unit *to = w->pairs + t / 2 * w->S + j * w->P;
            for (long d = 0; d < w->s->D; d += LANES) {
                lanes second = t + 1 < w->n ? load_row(two, d) : splat(0);
                bit_lanes both = pair_units((bit_lanes)load_row(one, d), (bit_lanes)second);
                memcpy(to + d, &both, sizeof both);
            }
        }
}

/* pull[i] = <d_x, h_i>, the cotangent of pre. */
INLINE void collapse_back(const work *w, const backward_data *a, const form as) {
    memset(w->pull, 0, sizeof(float) * as.R * TILE);
    for (long t = 0; t < w->n && a->d_x; t++) {
        lanes dot[MAX_R] = {0};
        for (long d = 0; d < w->s->D; d += LANES) {
            lanes x = load_row(token_row(w, a->d_x, t, as), d);
            for (int i = 0; i < as.R; i++) dot[i] += x * load_row(stream_row(w, a->streams, t, i, as), d);
        }
        for (int i = 0; i < as.R; i++) w->pull[i * TILE + t] = sum_lanes(dot[i]);
    }
}

/* grad = d_streams + pre d_x + square f: all of it but the products. */
INLINE void start_grad(const work *w, const backward_data *a, const form as) {
    const long D = w->s->D;
    for (long t = 0; t < w->n; t++) {
        for (int i = 0; i < as.R; i++) {
            const float pre = w->coef[i * TILE + t], own = w->square[t];
            float *grad = w->grad + t * w->S + i * w->P;
            for (long d = 0; d < D; d += LANES) {
                lanes g = a->d_streams ? load_row(stream_row(w, a->d_streams, t, i, as), d) : splat(0);
                if (a->d_x) g += pre * load_row(token_row(w, a->d_x, t, as), d);
                if (a->fn) g += own * load_row(stream_row(w, a->streams, t, i, as), d);
                store(grad + d, g);
            }
        }
    }
}

/* The tile's cotangent through h'_k = post_k y + sum_j comb[j, k] h_j. */
INLINE void leave_back(const work *w, const backward_data *a, const form as) {
    const long D = w->s->D;
    for (long t = 0; t < w->n; t++) {
        const long token = w->first + t;
        const float *post = a->post + token * as.R, *comb = a->comb + token * as.R * as.R, *grad = w->grad + t * w->S;
        lanes d_comb[MAX_R * MAX_R] = {0}, d_post[MAX_R] = {0};
        for (long d = 0; d < D; d += LANES) {
            lanes g[MAX_R], y = load_row(token_row(w, a->y, t, as), d), d_y = {0};
            for (int k = 0; k < as.R; k++) {
                g[k] = load(grad + k * w->P + d);
                d_post[k] += y * g[k];
                d_y += post[k] * g[k];
            }
            store_row(token_row(w, a->d_y, t, as), d, d_y);
            for (int j = 0; j < as.R; j++) {
                lanes h = load_row(stream_row(w, a->old, t, j, as), d), d_h = {0};
                for (int k = 0; k < as.R; k++) {
                    d_comb[j * as.R + k] += h * g[k];
                    d_h += comb[j * as.R + k] * g[k];
                }
                store_row(stream_row(w, a->d_old, t, j, as), d, d_h);
            }
        }
        for (int k = 0; k < as.R; k++) a->d_post[token * as.R + k] = sum_lanes(d_post[k]);
        for (int i = 0; i < as.R * as.R; i++) a->d_comb[token * as.R * as.R + i] = sum_lanes(d_comb[i]);
    }
}

INLINE void backward_tile(const work *w, const backward_data *a, const form as) {
    const int M = w->s->M;
    if (a->fn) {
        float inverse_rms[TILE] = {0};
        memcpy(inverse_rms, a->inverse_rms + w->first, w->n * sizeof(float));
        read_rows(w, w->z, a->z, M);
        coefficients(w, a->base, a->scale, as.R);
        collapse_back(w, a, as);
        if (M > as.R) read_rows(w, w->pull + as.R * TILE, a->d_post_out, as.R);
        if (M > as.R) read_rows(w, w->pull + 2 * as.R * TILE, a->d_comb_out, as.R * as.R);
        coefficients_back(w, inverse_rms, a->base, a->scale);
        if (PAIRS && as.bf16) pair_streams(w, a->streams, as);
        else load_streams(w, a->streams, NULL, as);
    }
    start_grad(w, a, as);
    if (a->fn) project_back(w);
    if (a->y) {
        leave_back(w, a, as);
        return;
    }
    for (long t = 0; t < w->n; t++)
        for (int i = 0; i < as.R; i++)
            for (long d = 0; d < w->s->D; d += LANES) {
                const lanes g = load(w->grad + t * w->S + i * w->P + d);
                store_row(stream_row(w, a->d_old, t, i, as), d, g);
            }
}

/* ---- work space, parts, entry points ---- */

/* Lays a part's arrays into one zeroed block; only the size when `block` is NULL. */
static size_t place(work *w, const sizes *s, int backward, char *block) {
    const long P = round_up(s->D, LANES), K = P * s->R, S = (K / LANES | 1) * LANES;
    const int pairs = PAIRS && backward && s->bf16, M = s->M;
    const size_t tile = sizeof(float) * TILE, rows = tile * round_up(M, ROWS);
    const size_t flat = sizeof(float) * S * min_long(TILE, round_up(s->N, GROUP));
    const struct {
        void *field;
        size_t bytes;
    } plan[] = {
        {&w->flat, flat},
        {&w->z, rows},
        {&w->coef, rows},
        {&w->square, tile},
        {&w->grad, backward * flat},
        {&w->pull, backward * rows},
        {&w->pairs, pairs * sizeof(unit) * S * TILE / 2},
        {&w->pull_down, pairs * rows},
        {&w->pull_along, pairs * rows},
        {&w->dfn, backward * sizeof(float) * round_up(M, ROWS) * S},
        {&w->dbase, backward * rows},
        {&w->dscale, backward * tile * 3},
        {&w->path, backward * sizeof(lanes) * sinkhorn_path_lanes(s->R, s->iters)},
    };
    size_t used = 0;
    w->s = s;
    w->P = P;
    w->K = K;
    w->S = S;
    for (size_t i = 0; i < sizeof plan / sizeof *plan; i++) {
        char *at = block + used;
        if (block) memcpy(plan[i].field, &at, sizeof at);
        used += round_up(plan[i].bytes, 64);
    }
    return used;
}

/* fn with rows S apart and P numbers a stream, then, where the backward wants them, the same as units; NULL: no memory.
   A few tokens take fn as it lies, if it has no ragged ends. */
static float *pack_fn(const float *fn, const sizes *s, int backward, work *w) {
    const int pairs = PAIRS && backward && s->bf16, M = s->M;
    const long numbers = M * w->S, units = pairs * units_for(M, 1) * w->S;
    w->fn = fn;
    w->fn_stride = s->R * s->D;
    w->fn_units = (const unit *)fn;
    if (w->P == s->D && s->N <= 4 * TILE && !pairs) return (float *)fn;
    float *packed = aligned_alloc(64, round_up(sizeof(float) * (numbers + units), 64));
    if (!packed) return NULL;
    memset(packed, 0, sizeof(float) * numbers);
    for (long piece = 0; piece < M * s->R; piece++)
        memcpy(packed + piece / s->R * w->S + piece % s->R * w->P, fn + piece * s->D, s->D * sizeof(float));
    w->fn = packed;
    w->fn_stride = w->S;
    w->fn_units = (unit *)packed + (pairs ? numbers : 0);
    if (pairs) pack_pairs((unit *)packed + numbers, w->S, M, packed, w->S, M, w->S, 0, 1);
    return packed;
}

static void sum_parts(const work *w, const backward_data *a) {
    const sizes *s = w->s;
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

INLINE void run_part(work *w, int part, const forward_data *f, const backward_data *b, const form as) {
    const long tiles = (w->s->N + TILE - 1) / TILE, end = tiles * (part + 1) / w->s->threads;
    for (long tile = tiles * part / w->s->threads; tile < end; tile++) {
        w->first = tile * TILE;
        w->n = min_long(TILE, w->s->N - w->first);
        if (f) forward_tile(w, f, as);
        else backward_tile(w, b, as);
    }
}

static void run_any(work *w, int part, const forward_data *f, const backward_data *b) {
    const int bf16 = w->s->bf16, fast = w->s->R == 4 && w->s->D % LANES == 0;
    if (fast && f && bf16) run_part(w, part, f, NULL, (form){4, 1, 1});
    else if (fast && f) run_part(w, part, f, NULL, (form){4, 0, 1});
    else if (fast && bf16) run_part(w, part, NULL, b, (form){4, 1, 1});
    else if (fast) run_part(w, part, NULL, b, (form){4, 0, 1});
    else run_part(w, part, f, b, (form){w->s->R, bf16, 0});
}

/* 0, or 1 when memory ran out. */
static int run(const sizes *s, const float *fn, const forward_data *f, const backward_data *b) {
    const int backward = b != NULL;
    work shape, *parts = calloc(s->threads, sizeof(work));
    const size_t bytes = place(&shape, s, backward, NULL);
    char *block = aligned_alloc(64, bytes * s->threads);
    float *packed = fn ? pack_fn(fn, s, backward, &shape) : NULL;
    const int failed = !parts || !block || (fn && !packed);
    if (!failed) {
#pragma omp parallel for schedule(static) num_threads(s->threads)
        for (int part = 0; part < s->threads; part++) {
            memset(block + part * bytes, 0, bytes);
            parts[part] = shape;
            place(&parts[part], s, backward, block + part * bytes);
            run_any(&parts[part], part, f, b);
        }
        if (backward && fn) sum_parts(parts, b);
    }
    if (packed != fn) free(packed);
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
