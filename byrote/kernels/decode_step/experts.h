/* Routing, and the chosen experts of a few rows: rows that chose the same expert read its weights together (byrote/model/moe.py). */

#pragma once
#include "decode_step/rows.h"

INLINE float affinity(float logit, long softplus) {
    if (!softplus) return 1.0f / (1.0f + __builtin_expf(-logit));
    return __builtin_sqrtf(logit > 20.0f ? logit : __builtin_log1pf(__builtin_expf(logit)));
}

/* The largest of `count` that is not taken, the first of equals. */
INLINE long best_of(const float *value, const char *taken, long count) {
    long best = -1;
    for (long i = 0; i < count; i++)
        if (!taken[i] && (best < 0 || value[i] > value[best])) best = i;
    return best;
}

/* Takes the experts of all but the best `top_groups` groups; a group counts by its two best experts. */
static void close_groups(const sizes *s, const float *biased, char *taken) {
    const long size = s->experts / s->groups;
    float score[s->groups];
    char open[s->groups];
    memset(open, 0, s->groups);
    for (long g = 0; g < s->groups; g++) {
        char used[size];
        memset(used, 0, size);
        const long first = best_of(biased + g * size, used, size);
        used[first] = 1;
        score[g] = biased[g * size + first] + (size > 1 ? biased[g * size + best_of(biased + g * size, used, size)] : 0);
    }
    for (long k = 0; k < s->top_groups; k++) open[best_of(score, open, s->groups)] = 1;
    for (long e = 0; e < s->experts; e++) taken[e] = !open[e / size];
}

/* `table`: [vocabulary][top_k], experts by token id, or NULL: by score and bias. */
static void route_row(worker *w, const float *logits, const float *bias, const int64_t *table, long m) {
    const sizes *s = w->s;
    float score[s->experts], biased[s->experts], sum = 1e-20f;
    char taken[s->experts];
    memset(taken, 0, s->experts);
    for (long e = 0; e < s->experts; e++) biased[e] = (score[e] = affinity(logits[e], s->softplus)) + (bias ? bias[e] : 0);
    if (!table && s->top_groups < s->groups) close_groups(s, biased, taken);
    for (long k = 0; k < s->top_k; k++) {
        const long e = table ? table[w->c->ids[m] * s->top_k + k] : best_of(biased, taken, s->experts);
        taken[e] = 1;
        w->chosen[m * s->top_k + k] = e;
        sum += w->gates[m * s->top_k + k] = score[e];
    }
    for (long k = 0; k < s->top_k; k++) w->gates[m * s->top_k + k] *= (s->normalize ? 1.0f / sum : 1.0f) * s->route_scale;
}

/* x: logits [rows][experts]; w: bias or NULL, table or NULL. Every thread chooses for itself. */
static void route_op(worker *w, const op *o) {
    for (long m = 0; m < w->rows; m++) route_row(w, o->x + m * w->s->experts, o->w[0], (const int64_t *)o->w[1], m);
}

/* How often the row of pair p chose the same expert before: 0, but for tables that name one twice. */
INLINE long times_before(const worker *w, long p) {
    long times = 0;
    for (long q = p - p % w->s->top_k; q < p; q++) times += w->chosen[q] == w->chosen[p];
    return times;
}

/* The (row, slot) pairs of pair `first`'s expert, from `first` on, one a row; 0 where an earlier pair took them along. */
static long pairs_of(const worker *w, long first, int *pairs) {
    const long all = w->rows * w->s->top_k, times = times_before(w, first);
    long found = 0;
    for (long p = 0; p < first; p++)
        if (w->chosen[p] == w->chosen[first] && times_before(w, p) == times) return 0;
    for (long p = first; p < all; p++)
        if (w->chosen[p] == w->chosen[first] && times_before(w, p) == times) pairs[found++] = p;
    return found;
}

/* x [rows][width] -> y [rows * top_k][hidden], times the gate; w: gate and linear part [experts][2 hidden][width], gain of the norm. */
static void experts_up_op(worker *w, const op *o) {
    const sizes *s = w->s;
    const float *x = rows_of(w, o, o->x, o->w[1], 1);
    int pairs[MOST_ROWS];
    for (long first = 0; first < w->rows * s->top_k; first++) {
        product p = {.width = o->width, .stride = o->width, .outputs = s->hidden, .limit = s->limit, .count = pairs_of(w, first, pairs)};
        p.weight = o->w[0] + w->chosen[first] * 2 * s->hidden * o->width;
        for (long i = 0; i < p.count; i++) {
            p.x[i] = x + pairs[i] / s->top_k * o->width;
            p.y[i] = o->y + pairs[i] * s->hidden;
            p.scale[i] = w->gates[pairs[i]];
        }
        if (p.count) run_product(&p, first_of(w, s->hidden), end_of(w, s->hidden), SWIGLU);
    }
}

/* x [rows * top_k][hidden] -> y [rows][outputs], added to it if `flags`; w: [experts][outputs][hidden]. */
static void experts_down_op(worker *w, const op *o) {
    const sizes *s = w->s;
    const long from = first_of(w, o->outputs), end = end_of(w, o->outputs);
    int pairs[MOST_ROWS];
    for (long m = 0; m < w->rows && !o->flags; m++) memset(o->y + m * o->outputs + from, 0, (end - from) * sizeof(float));
    for (long first = 0; first < w->rows * s->top_k; first++) {
        product p = {.width = s->hidden, .stride = s->hidden, .outputs = o->outputs, .count = pairs_of(w, first, pairs)};
        p.weight = o->w[0] + w->chosen[first] * o->outputs * s->hidden;
        for (long i = 0; i < p.count; i++) {
            p.x[i] = o->x + pairs[i] * s->hidden;
            p.y[i] = o->y + pairs[i] / s->top_k * o->outputs;
        }
        if (p.count) run_product(&p, from, end, ADD);
    }
}
