/* Latent attention of a few queries, absorbed: scores and sums in latent space (byrote/model/mla.py). The keys of a query are walked in
   blocks with a running maximum, so that nothing grows with the text.

   Shapes: C latent, K rotary, N no-position and V value width, X = C + K numbers kept a token. */

#pragma once
#include "decode_step/rows.h"

#define KEYS 64     /* of one block */
#define QUERIES 4   /* of one text, whose keys are read together */

/* cos and sin of every position of the call. */
static void turn_op(worker *w, const op *o) {
    const sizes *s = w->s;
    const long pairs = s->rope / 2;
    (void)o;
    for (long m = w->thread; m < w->rows; m += w->threads)
        for (long p = 0; p < pairs; p++) {
            const float angle = (float)w->c->positions[m] * s->frequencies[p];
            s->turn[m * s->rope + p] = __builtin_cosf(angle) * s->turn_scale;
            s->turn[m * s->rope + pairs + p] = __builtin_sinf(angle) * s->turn_scale;
        }
}

INLINE void rotate_as(const sizes *s, float *to, const float *from, long m, const long is_half) {
    const long pairs = s->rope / 2;
    const float *cos = s->turn + m * s->rope, *sin = cos + pairs;
    for (long p = 0; p < pairs; p++) {
        const long i = is_half ? p : 2 * p, j = is_half ? p + pairs : 2 * p + 1;
        const float a = from[i], b = from[j];
        to[i] = a * cos[p] - b * sin[p];
        to[j] = a * sin[p] + b * cos[p];
    }
}

INLINE void rotate(const sizes *s, float *to, const float *from, long m) { rotate_as(s, to, from, m, s->half); }

INLINE float *kept_at(const worker *w, const op *o, long text, long place) {
    const kept *k = w->c->caches + o->index;
    return k->start + text * k->stride + place * (w->s->latent + w->s->rope);
}

/* Normed latent and rotated key of the new tokens -> the cache. x [rows][C + K]; w: gain. */
static void latent_op(worker *w, const op *o) {
    const sizes *s = w->s;
    for (long m = w->thread; m < w->rows; m += w->threads) {
        const float *x = o->x + m * (s->latent + s->rope);
        float *to = kept_at(w, o, text_of(w, m), place_of(w, m));
        norm_row(to, x, o->w[0], s->latent, o->eps);
        rotate(s, to + s->latent, x + s->latent, m);
    }
}

typedef struct {       /* up to QUERIES queries of one text on their way */
    long text, first, count; /* query = token * heads + head */
    float *query, *sum;      /* [QUERIES][X], [QUERIES][width] */
    long width;              /* C, filled up to whole vectors */
    float top[QUERIES], total[QUERIES];
    float weight[QUERIES][KEYS];
} glance;

INLINE long row_of(const worker *w, const glance *g, int q) { return g->text * w->c->tokens + (g->first + q) / w->s->heads; }

/* The query in latent space: q^C W^UK, then the rotated q^R. */
INLINE void lift_query(worker *w, const op *o, glance *g, int q) {
    const sizes *s = w->s;
    const long row = row_of(w, g, q), head = (g->first + q) % s->heads, width = s->nope + s->rope;
    const float *x = o->x + (row * s->heads + head) * width, *up = o->w[0] + head * (s->nope + s->value) * s->latent;
    float *to = g->query + q * (s->latent + s->rope);
    memset(to, 0, s->latent * sizeof(float));
    for (long n = 0; n < s->nope; n++)
        for (long c = 0; c < s->latent; c++) to[c] += x[n] * up[n * s->latent + c];
    rotate(s, to + s->latent, x + s->nope, row);
}

INLINE int sees(const worker *w, const glance *g, int q, long key) {
    const long row = row_of(w, g, q), place = place_of(w, row), all = w->c->before + w->c->tokens;
    const int64_t *document = w->c->document ? w->c->document + g->text * all : NULL;
    return key <= place && (!document || (document[place] >= 0 && document[key] == document[place]));
}

INLINE long round_lanes(long count) { return (count + LANES - 1) / LANES * LANES; }

/* Scores of the keys [first, first + count) that query q does not see become -infinity. */
INLINE void hide_keys(worker *w, glance *g, int q, long first, long count) {
    const long open = w->c->document ? 0 : w->c->before + 1; /* every query sees the keys before this one */
    for (long k = open > first ? open - first : 0; k < count; k++)
        if (!sees(w, g, q, first + k)) g->weight[q][k] = -__builtin_inff();
}

/* Scores of one query -> exponentials against a maximum that only rises; what was summed under a lower one is scaled down. */
INLINE void weigh_query(glance *g, int q, long count, float scale) {
    float *weight = g->weight[q];
    lanes high = splat(g->top[q]), total = {0};
    for (long k = count; k < round_lanes(count); k++) weight[k] = -__builtin_inff();
    for (long k = 0; k < count; k += LANES) {
        const lanes v = load(weight + k) * scale;
        store(weight + k, v);
        high = select_lanes(v > high, v, high);
    }
    const float top = max_of(high);
    if (top == -__builtin_inff()) { /* nothing seen yet */
        memset(weight, 0, KEYS * sizeof(float));
        return;
    }
    for (long k = 0; k < count; k += LANES) {
        const lanes e = exp_lanes(load(weight + k) - top);
        store(weight + k, e);
        total += e;
    }
    const float keep = __builtin_expf(g->top[q] - top);
    if (keep != 1.0f)
        for (long c = 0; c < g->width; c++) g->sum[q * g->width + c] *= keep;
    g->top[q] = top;
    g->total[q] = g->total[q] * keep + sum_lanes(total);
}

/* sum[q][c ... c + vecs LANES) += weight[q][.] keys[.][c ...); `left` numbers of the last vector lie in the latent. */
INLINE void sum_panel(glance *g, const float *keys, long stride, long count, long c, long left, const int vecs, const int Q) {
    lanes total[QUERIES][4];
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) total[q][v] = load(g->sum + q * g->width + c + v * LANES);
    for (long k = 0; k < count; k++) {
        const float *key = keys + k * stride + c;
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            const lanes b = left < LANES ? part_of(key, left) : load(key + v * LANES);
#pragma GCC unroll 4
            for (int q = 0; q < Q; q++) total[q][v] += g->weight[q][k] * b;
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) store(g->sum + q * g->width + c + v * LANES, total[q][v]);
}

/* sum[.][0 ... C) += weight times the first C numbers of the keys, which lie X apart. */
INLINE void sum_keys_for(glance *g, const float *keys, long C, long X, long count, const int Q) {
    long c = 0;
    for (; c + 4 * LANES <= C; c += 4 * LANES) sum_panel(g, keys, X, count, c, LANES, 4, Q);
    if (c + 2 * LANES <= C) sum_panel(g, keys, X, count, c, LANES, 2, Q), c += 2 * LANES;
    if (c + LANES <= C) sum_panel(g, keys, X, count, c, LANES, 1, Q), c += LANES;
    if (c < C) sum_panel(g, keys, X, count, c, C - c, 1, Q);
}

static void sum_keys(glance *g, const float *keys, long C, long X, long count) {
    if (g->count == 1) sum_keys_for(g, keys, C, X, count, 1);
    else if (g->count == 2) sum_keys_for(g, keys, C, X, count, 2);
    else sum_keys_for(g, keys, C, X, count, QUERIES);
}

/* Scores of `count` keys, X numbers each. */
INLINE void score_keys(glance *g, const float *keys, long X, long count) {
    product p = {.weight = keys, .width = X, .stride = X, .outputs = count, .count = g->count};
    for (int q = 0; q < g->count; q++) p.x[q] = g->query + q * X, p.y[q] = g->weight[q];
    run_product(&p, 0, count, SET);
}

INLINE void read_keys(worker *w, const op *o, glance *g, long first, long count) {
    const long C = w->s->latent, X = C + w->s->rope;
    const float *keys = kept_at(w, o, g->text, first);
    score_keys(g, keys, X, count);
    for (int q = 0; q < g->count; q++) {
        hide_keys(w, g, q, first, count);
        weigh_query(g, q, count, w->s->attend_scale);
    }
    sum_keys(g, keys, C, X, count);
}

/* From the summed latents to values: W^UV. A query that saw nothing (padding) gets zeros. */
INLINE void lower_sum(worker *w, const op *o, glance *g, int q) {
    const sizes *s = w->s;
    const long row = row_of(w, g, q), head = (g->first + q) % s->heads;
    const float *down = o->w[0] + (head * (s->nope + s->value) + s->nope) * s->latent;
    product p = {.weight = down, .width = s->latent, .stride = s->latent, .outputs = s->value, .count = 1};
    float *sum = g->sum + q * g->width;
    for (long c = 0; c < s->latent; c++) sum[c] = g->total[q] == 0 ? 0 : sum[c] / g->total[q];
    p.x[0] = sum, p.y[0] = o->y + (row * s->heads + head) * s->value;
    run_product(&p, 0, s->value, SET);
}

static void attend_some(worker *w, const op *o, long text, long first, long count) {
    const sizes *s = w->s;
    const long keys = w->c->before + w->c->tokens, width = round_lanes(s->latent);
    float query[QUERIES * (s->latent + s->rope)], sum[QUERIES * width];
    glance g = {.text = text, .first = first, .count = count, .query = query, .sum = sum, .width = width};
    memset(sum, 0, sizeof sum);
    for (int q = 0; q < count; q++) {
        g.top[q] = -__builtin_inff();
        lift_query(w, o, &g, q);
    }
    for (long key = 0; key < keys; key += KEYS) read_keys(w, o, &g, key, keys - key < KEYS ? keys - key : KEYS);
    for (int q = 0; q < count; q++) lower_sum(w, o, &g, q);
}

/* x [rows][heads][N + K] -> y [rows][heads][V]; w: W^UK and W^UV, [heads][N + V][C]. */
static void attend_op(worker *w, const op *o) {
    const long all = w->c->tokens * w->s->heads, fair = (w->c->batch * all + w->threads - 1) / w->threads;
    const long each = fair < QUERIES ? fair : QUERIES, groups = (all + each - 1) / each;
    for (long job = w->thread; job < w->c->batch * groups; job += w->threads) {
        const long first = job % groups * each;
        attend_some(w, o, job / groups, first, all - first < each ? all - first : each);
    }
}
