/* V4's attention: a window of single tokens, compressed entries, a sink (byrote/model/csa.py; pooling: byrote/kernels/compress).

   Caches are appended to in place: places of this call count from 0, and what is read before them lies at negative ones.

   Shapes: K head width, X channels of a compressor, M tokens of a group, W width of an entry. */

#pragma once
#include "decode_step/index.h"

typedef struct { /* a compressor */
    long width, channels;
    float eps;
    const float *values, *gates, *bias, *gain; /* [rows][X] twice, [M][X], [W] */
    stretch open, entries;                     /* values and gates side by side; entries from the first on */
    const int64_t *counts;                     /* [batch]: entries before this call */
} pool;

typedef struct { /* one block */
    chooser index;
    long heads, width, rope, window, ratio, overlaps, pools;
    float scale, eps, turn_scale;
    const float *frequencies, *turn, *sink, *gain; /* [rope / 2], [MOST_ROWS][rope]: cos and sin of this call, [heads], [K] */
    float *queries;                                /* [rows][heads][K] */
    float *index_queries;                          /* [rows][J][I] */
    stretch near;
    const int64_t *places; /* [rows]: tokens of the same document before */
    pool pool[2];
} window_block;

INLINE window_block *window_of(const op *o) { return (window_block *)o->w[0]; }

/* y [MOST_ROWS][width]: cos and sin of every position; w: frequencies; eps: amplitude. */
static void window_turn_op(worker *w, const op *o) {
    const long pairs = o->width / 2;
    for (long m = w->thread; m < w->rows; m += w->threads)
        for (long p = 0; p < pairs; p++) {
            const float angle = (float)w->c->positions[m] * o->w[0][p];
            o->y[m * o->width + p] = __builtin_cosf(angle) * o->eps;
            o->y[m * o->width + pairs + p] = __builtin_sinf(angle) * o->eps;
        }
}

/* Turns adjacent pairs in place; `way` -1 turns back. */
INLINE void turn_pairs(float *x, const float *cos, const float *sin, long pairs, float way) {
    for (long p = 0; p < pairs; p++) {
        const float a = x[2 * p], b = x[2 * p + 1];
        x[2 * p] = a * cos[p] - b * way * sin[p];
        x[2 * p + 1] = a * way * sin[p] + b * cos[p];
    }
}

/* The last channels of x, `width` wide, by the position of row m. */
INLINE void turn_last(const window_block *v, float *x, long width, long m, float way) {
    const float *cos = v->turn + m * v->rope;
    turn_pairs(x + width - v->rope, cos, cos + v->rope / 2, v->rope / 2, way);
}

/* ---- groups ---- */

INLINE int closes_group(const worker *w, const window_block *v, long m) { return v->places[m] % v->ratio == v->ratio - 1 && !is_padding(w, m); }

/* Groups that the text of row m has closed in this call, before it. */
INLINE long closed_before(const worker *w, const window_block *v, long m) {
    long closed = 0;
    for (long i = m - m % w->c->tokens; i < m; i++) closed += closes_group(w, v, i);
    return closed;
}

/* What row m sees of the entries: those of its document. */
static void see_entries(const worker *w, window_block *v, long m) {
    const long end = v->pool->counts[text_of(w, m)] + closed_before(w, v, m) + closes_group(w, v, m);
    v->index.end[m] = end;
    v->index.first[m] = is_padding(w, m) ? end : end - (v->places[m] + 1) / v->ratio;
}

typedef struct { /* one token of a group, and the half of its channels that speaks */
    const float *value, *gate, *bias;
} voice;

/* Token i of the group that row m closes; with an overlap the group before comes first, then this one's other half. */
INLINE voice voice_of(const worker *w, const window_block *v, const pool *p, long m, long i) {
    const long inside = m % w->c->tokens, back = (v->overlaps ? 2 : 1) * v->ratio - 1 - i, half = v->overlaps && i >= v->ratio ? p->width : 0;
    const float *bias = p->bias + i % v->ratio * p->channels + half;
    if (back <= inside) return (voice){p->values + (m - back) * p->channels + half, p->gates + (m - back) * p->channels + half, bias};
    const float *old = p->open.start + text_of(w, m) * p->open.stride + (inside - back) * 2 * p->channels + half;
    return (voice){old, old + p->channels, bias};
}

INLINE lanes part_or_all(const float *from, long left) { return left < LANES ? part_of(from, left) : load(from); }

/* LANES channels from d on of one entry: values under a softmax of gates. `left` of them exist. */
INLINE lanes pool_lanes(const worker *w, const window_block *v, const pool *p, long m, long from, long count, long d, long left) {
    lanes top = splat(-__builtin_inff()), total = {0}, sum = {0};
    for (long i = from; i < count; i++) {
        const voice t = voice_of(w, v, p, m, i);
        const lanes gate = part_or_all(t.gate + d, left) + part_or_all(t.bias + d, left), high = at_least(gate, top);
        const lanes keep = exp_lanes(top - high), weight = exp_lanes(gate - high);
        total = total * keep + weight;
        sum = sum * keep + weight * part_or_all(t.value + d, left);
        top = high;
    }
    return sum / total;
}

/* The entry that row m closes: pooled, normed, turned by the position of the group's first token. */
static void write_entry(worker *w, const window_block *v, const pool *p, long m) {
    const long b = text_of(w, m), count = (v->overlaps ? 2 : 1) * v->ratio, from = v->overlaps && v->places[m] < v->ratio ? v->ratio : 0;
    float *entry = p->entries.start + b * p->entries.stride + (p->counts[b] + closed_before(w, v, m)) * p->width;
    float pooled[round_lanes(p->width)], cos[v->rope], *sin = cos + v->rope / 2;
    for (long d = 0; d < p->width; d += LANES) store(pooled + d, pool_lanes(w, v, p, m, from, count, d, p->width - d));
    norm_row(entry, pooled, p->gain, p->width, p->eps);
    for (long i = 0; i < v->rope / 2; i++) {
        const float angle = (float)(w->c->positions[m] - (v->ratio - 1)) * v->frequencies[i];
        cos[i] = __builtin_cosf(angle) * v->turn_scale, sin[i] = __builtin_sinf(angle) * v->turn_scale;
    }
    turn_pairs(entry + p->width - v->rope, cos, sin, v->rope / 2, 1);
}

/* ---- operations; w: the block ---- */

/* x [rows][K]: keys before their norm. Queries are normed and turned in place; keys, open groups and entries go to the caches. */
static void window_keep_op(worker *w, const op *o) {
    window_block *v = window_of(o);
    const long K = v->width;
    for (long m = w->thread; m < w->rows; m += w->threads) {
        const long b = text_of(w, m), t = m % w->c->tokens;
        float *key = v->near.start + b * v->near.stride + t * K, *query = v->queries + m * v->heads * K;
        norm_row(key, o->x + m * K, v->gain, K, o->eps);
        turn_last(v, key, K, m, 1);
        for (long h = 0; h < v->heads; h++) {
            norm_row(query + h * K, query + h * K, NULL, K, v->eps);
            turn_last(v, query + h * K, K, m, 1);
        }
        for (long j = 0; j < v->index.heads; j++) turn_last(v, v->index_queries + (m * v->index.heads + j) * v->index.width, v->index.width, m, 1);
        for (const pool *p = v->pool; p < v->pool + v->pools; p++) {
            const long X = p->channels;
            float *open = p->open.start + b * p->open.stride + t * 2 * X;
            memcpy(open, p->values + m * X, X * sizeof(float));
            memcpy(open + X, p->gates + m * X, X * sizeof(float));
        }
        if (v->pools) see_entries(w, v, m);
    }
    for (long job = w->thread; job < w->rows * v->pools; job += w->threads)
        if (closes_group(w, v, job % w->rows)) write_entry(w, v, v->pool + job / w->rows, job % w->rows);
}

static void attend_window(const worker *w, const op *o, const window_block *v, long m, long head, long count) {
    const long K = v->width, b = text_of(w, m), here = m % w->c->tokens, width = round_lanes(K);
    const long back = is_padding(w, m) ? -1 : v->places[m] < v->window - 1 ? v->places[m] : v->window - 1;
    float sum[QUERIES * width];
    glance g = {.text = b, .count = count, .query = v->queries + (m * v->heads + head) * K, .sum = sum, .width = width};
    memset(sum, 0, sizeof sum);
    for (int q = 0; q < count; q++) g.top[q] = v->sink[head + q], g.total[q] = 1;
    read_listed(&g, v->near.start + b * v->near.stride + (here - back) * K, NULL, back + 1, K, K, v->scale);
    if (v->pools) read_choice(&g, &v->index, m, v->pool->entries.start + b * v->pool->entries.stride, K, K, v->scale);
    for (int q = 0; q < count; q++) {
        float *y = o->y + (m * v->heads + head + q) * K;
        for (long d = 0; d < K; d++) y[d] = sum[q * width + d] / g.total[q];
        turn_last(v, y, K, m, -1);
    }
}

/* y [rows][heads][K] */
static void window_attend_op(worker *w, const op *o) {
    const window_block *v = window_of(o);
    const sharing share = share_heads(w, v->heads);
    for (long job = w->thread; job < share.jobs; job += w->threads) {
        const long head = job % share.groups * share.each, left = v->heads - head;
        attend_window(w, o, v, job / share.groups, head, left < share.each ? left : share.each);
    }
}

/* y [rows][G][outputs] from x [rows][G][width]; w: weight [G][outputs][width]; index: G. */
static void grouped_op(worker *w, const op *o) {
    for (long g = 0; g < o->index; g++) {
        product p = {.weight = o->w[0] + g * o->outputs * o->width, .width = o->width, .stride = o->width, .outputs = o->outputs, .count = w->rows};
        for (long m = 0; m < w->rows; m++) {
            p.x[m] = o->x + (m * o->index + g) * o->width;
            p.y[m] = o->y + (m * o->index + g) * o->outputs;
        }
        run_product(&p, first_of(w, o->outputs), end_of(w, o->outputs), SET);
    }
}
