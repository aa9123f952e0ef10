/* Attention of each query to its own chosen keys, forward and backward; formulas in reference.py.

   One key head serves all query heads, so a query's products are matrix products: its heads against KEYS gathered keys at a time,
   with a running maximum and sum (arXiv 2205.14135). The keys are widened to fp32 as they are gathered; everything is summed in
   fp32. Each thread owns a run of queries and, in the backward, its own sum for the keys, added in the order of the threads. */

#include <math.h>
#include <stdlib.h>
#include "sparse_index.h"

#define KEYS 64

typedef struct {
    long Hp, Xp, Vp, found; /* widths rounded up; keys in the present block */
    float *q, *g;           /* [Hp][Xp], [Hp][Vp] */
    float *keys;            /* [KEYS][Xp], zeros behind the last */
    unit *across;           /* the same, packed to be summed along X */
    float *scores, *slopes; /* [Hp][KEYS]: scores, then their exponentials; slopes of scores */
    float *o, *d_q;         /* [Hp][Vp], [Hp][Xp] */
    float *d_keys;          /* [KEYS][Xp] */
    float *top, *total, *keep, *ones; /* [Hp] */
    long *from;             /* [KEYS] where each gathered key came from */
} work;

INLINE void widen_row(float *to, long wide, const void *from, long width, const int bf16) {
    const row source = {(void *)from, width, bf16, 0};
    for (long at = 0; at < wide; at += LANES) store(to + at, at < width ? load_row(source, at) : splat(0));
}

/* The next valid keys from slot k on; returns the slot to go on from. */
INLINE long gather(const attending *p, work *w, long b, const int64_t *index, const uint8_t *valid, long k, const int bf16) {
    for (w->found = 0; k < p->K && w->found < KEYS; k++) {
        if (!valid[k]) continue;
        widen_row(w->keys + w->found * w->Xp, w->Xp, key_at(&p->keys, b, index[k], bf16), p->X, bf16);
        w->from[w->found++] = index[k];
    }
    memset(w->keys + w->found * w->Xp, 0, (KEYS - w->found) * w->Xp * sizeof(float));
    if (w->found) pack_across(w->across, KEYS, w->keys, w->Xp, KEYS, p->X, 0, 0);
    return k;
}

/* to[Hp][KEYS] = rows [Hp][wide] times the first `width` channels of the gathered keys. */
static void against_keys(const attending *p, const work *w, const float *rows, long wide, long width, float *to) {
    const right_units keys = {w->across, PANEL, units_for(p->X, 0) * PANEL};
    for (long h = 0; h < w->Hp; h += ROWS)
        product((left_units){(const unit *)rows + h * wide, wide, 1}, keys, width, KEYS, to + h * KEYS, KEYS, NULL, 0);
}

/* to[Hp][columns] += weights[Hp][KEYS] times the gathered keys, after scaling row h by keep[h]. */
static void pull(const work *w, const float *weights, float *to, long columns, const float *keep) {
    const right_units keys = {(const unit *)w->keys, w->Xp, PANEL};
    for (long h = 0; h < w->Hp; h += ROWS)
        product((left_units){(const unit *)weights + h * KEYS, KEYS, 1}, keys, w->found, columns, to + h * columns, columns, keep + h, 0);
}

/* Lanes [at, at + LANES) of a row of scores, `empty` where no key was gathered. */
INLINE lanes real_lanes(const work *w, const float *scores, long at, lanes empty) {
    signed_lanes place;
    for (int i = 0; i < LANES; i++) place[i] = at + i;
    return select_lanes(place < (int32_t)w->found, load(scores + at), empty);
}

/* Scores of one head become exponentials; its maximum, sum and `keep` move on. */
INLINE void soften(work *w, long h, float scale) {
    float *scores = w->scores + h * KEYS;
    lanes high = splat(-INFINITY), sum = {0};
    for (long at = 0; at < KEYS; at += LANES) {
        const lanes s = real_lanes(w, scores, at, splat(-INFINITY)) * scale;
        store(scores + at, s);
        high = at_least(s, high);
    }
    const float top = fmaxf(max_of(high), w->top[h]), keep = w->top[h] == -INFINITY ? 0 : expf(w->top[h] - top);
    for (long at = 0; at < KEYS; at += LANES) {
        const lanes power = real_lanes(w, (store(scores + at, exp_lanes(load(scores + at) - top)), scores), at, splat(0));
        store(scores + at, power);
        sum += power;
    }
    w->keep[h] = keep, w->top[h] = top;
    w->total[h] = w->total[h] * keep + sum_lanes(sum);
}

INLINE void forward_query(const attending *p, work *w, long b, long n, const int bf16) {
    const char *q = (const char *)p->q + n * p->H * p->X * (bf16 ? 2 : 4);
    for (long h = 0; h < p->H; h++) {
        widen_row(w->q + h * w->Xp, w->Xp, q + h * p->X * (bf16 ? 2 : 4), p->X, bf16);
        w->top[h] = p->sink ? p->sink[h] : -INFINITY;
        w->total[h] = p->sink ? 1 : 0;
    }
    memset(w->o, 0, w->Hp * w->Vp * sizeof(float));
    for (long k = 0; k < p->K;) {
        k = gather(p, w, b, p->index + n * p->K, p->valid + n * p->K, k, bf16);
        if (!w->found) break;
        against_keys(p, w, w->q, w->Xp, p->X, w->scores);
        for (long h = 0; h < p->H; h++) soften(w, h, (float)p->scale);
        pull(w, w->scores, w->o, w->Vp, w->keep);
    }
    for (long h = 0; h < p->H; h++) {
        const row out = row_at(p->out, n * p->H + h, p->V, 0, 0);
        const float inverse = w->total[h] > 0 ? 1 / w->total[h] : 0;
        for (long at = 0; at < p->V; at += LANES) store_row(out, at, load(w->o + h * w->Vp + at) * inverse);
        if (p->lse) p->lse[n * p->H + h] = w->top[h] + logf(w->total[h]);
    }
}

/* Exponentials and slopes of one head, from its scores and what the keys' values pulled. */
INLINE void slope(const attending *p, work *w, long n, long h) {
    const float lse = p->lse[n * p->H + h], delta = p->delta[n * p->H + h];
    for (long at = h * KEYS, end = at + KEYS; at < end; at += LANES) {
        store(w->scores + at, exp_lanes(load(w->scores + at) * (float)p->scale - lse));
        const lanes power = real_lanes(w, w->scores + h * KEYS, at - h * KEYS, splat(0));
        store(w->scores + at, power);
        store(w->slopes + at, power * (load(w->slopes + at) - delta) * (float)p->scale);
    }
}

/* d_keys of the block = slopesᵀ q + powersᵀ g, added where the keys came from. */
INLINE void push_keys(const attending *p, work *w, float *d_keys, long b) {
    for (long k = 0; k < w->found; k += ROWS) {
        float *to = w->d_keys + k * w->Xp;
        const left_units slopes = {(unit *)w->slopes + k, 1, KEYS}, powers = {(unit *)w->scores + k, 1, KEYS};
        product(slopes, (right_units){(unit *)w->q, w->Xp, PANEL}, p->H, w->Xp, to, w->Xp, NULL, 0);
        product(powers, (right_units){(unit *)w->g, w->Vp, PANEL}, p->H, w->Vp, to, w->Xp, w->ones, 0);
    }
    for (long k = 0; k < w->found; k++) {
        const row sum = row_at(d_keys, b * p->S + w->from[k], p->X, 0, 0);
        for (long at = 0; at < p->X; at += LANES) store_row(sum, at, load_row(sum, at) + load(w->d_keys + k * w->Xp + at));
    }
}

INLINE void backward_query(const attending *p, work *w, float *d_keys, long b, long n, const int bf16) {
    const char *q = (const char *)p->q + n * p->H * p->X * (bf16 ? 2 : 4);
    for (long h = 0; h < p->H; h++) {
        widen_row(w->q + h * w->Xp, w->Xp, q + h * p->X * (bf16 ? 2 : 4), p->X, bf16);
        widen_row(w->g + h * w->Vp, w->Vp, p->d_out + (n * p->H + h) * p->V, p->V, 0);
    }
    memset(w->d_q, 0, w->Hp * w->Xp * sizeof(float));
    for (long k = 0; k < p->K;) {
        k = gather(p, w, b, p->index + n * p->K, p->valid + n * p->K, k, bf16);
        if (!w->found) break;
        against_keys(p, w, w->q, w->Xp, p->X, w->scores);
        against_keys(p, w, w->g, w->Vp, p->V, w->slopes);
        for (long h = 0; h < p->H; h++) slope(p, w, n, h);
        pull(w, w->slopes, w->d_q, w->Xp, w->ones);
        push_keys(p, w, d_keys, b);
    }
    for (long h = 0; h < p->H; h++) {
        const row out = row_at(p->d_q, n * p->H + h, p->X, 0, 0);
        for (long at = 0; at < p->X; at += LANES) store_row(out, at, load(w->d_q + h * w->Xp + at));
    }
}

/* Pointers into `block`; only the size when it is NULL. */
static size_t place(work *w, const attending *p, char *block) {
    *w = (work){.Hp = round_up(p->H, ROWS), .Xp = round_up(p->X, LANES), .Vp = round_up(p->V, LANES)};
    const struct {
        void *field;
        long numbers;
    } plan[] = {
        {&w->q, w->Hp * w->Xp},    {&w->g, w->Hp * w->Vp},      {&w->keys, KEYS * w->Xp},   {&w->across, KEYS * p->X},
        {&w->scores, w->Hp * KEYS}, {&w->slopes, w->Hp * KEYS},  {&w->o, w->Hp * w->Vp},     {&w->d_q, w->Hp * w->Xp},
        {&w->d_keys, KEYS * w->Xp}, {&w->top, w->Hp},            {&w->total, w->Hp},         {&w->keep, w->Hp},
        {&w->ones, w->Hp},          {&w->from, 2 * KEYS},
    };
    size_t used = 0;
    for (size_t i = 0; i < sizeof plan / sizeof *plan; i++) {
        char *start = block + used;
        if (block) memcpy(plan[i].field, &start, sizeof start);
        used += round_up(plan[i].numbers * 4, 64);
    }
    for (long h = 0; block && h < w->Hp; h++) w->ones[h] = 1;
    return used;
}

INLINE void run_queries(const attending *p, work *w, float *d_keys, long first, long end, const int bf16) {
    for (long n = first; n < end; n++)
        if (d_keys) backward_query(p, w, d_keys, n / p->T, n, bf16);
        else forward_query(p, w, n / p->T, n, bf16);
}

/* 0, or 1 when memory ran out. */
static int run(const attending *p, int backward) {
    work shape;
    const size_t bytes = place(&shape, p, NULL);
    const long N = p->B * p->T, numbers = p->B * p->S * p->X;
    char *room = aligned_alloc(64, round_up(bytes * p->threads, 64));
    if (!room) return 1;
    memset(room, 0, bytes * p->threads); /* heads that do not exist stay zero */
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (long thread = 0; thread < p->threads; thread++) {
        const long first = N * thread / p->threads, end = N * (thread + 1) / p->threads;
        float *d_keys = backward ? p->d_keys + thread * numbers : NULL;
        work w;
        place(&w, p, room + thread * bytes);
        if (d_keys) memset(d_keys, 0, numbers * sizeof(float));
        if (p->bf16) run_queries(p, &w, d_keys, first, end, 1);
        else run_queries(p, &w, d_keys, first, end, 0);
    }
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (long part = 0; part < p->threads; part++)
        for (long thread = 1; backward && thread < p->threads; thread++)
            for (long i = numbers * part / p->threads; i < numbers * (part + 1) / p->threads; i++)
                p->d_keys[i] += p->d_keys[thread * numbers + i];
    free(room);
    return 0;
}

int attend_forward(const attending *p) { return run(p, 0); }

int attend_backward(const attending *p) { return run(p, 1); }
