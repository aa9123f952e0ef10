/* V3.2's sparse attention: latent attention to the keys that an indexer chose (byrote/model/dsa.py). */

#pragma once
#include "decode_step/index.h"

typedef struct { /* one block */
    chooser index;
    float *queries;           /* [rows][J][I] */
    const float *gain, *bias; /* of the keys' LayerNorm */
    const int64_t *places;    /* [rows]: tokens of the same document before */
    long hadamard;
} latent_index;

/* Times the Hadamard matrix of its width, over the root of it. */
static void hadamard_row(float *x, long width) {
    const float scale = 1.0f / __builtin_sqrtf(width);
    for (long half = 1; half < width; half *= 2)
        for (long i = 0; i < width; i++)
            if (!(i & half)) {
                const float a = x[i], b = x[i + half];
                x[i] = a + b, x[i + half] = a - b;
            }
    for (long i = 0; i < width; i++) x[i] *= scale;
}

static void finish_index(const worker *w, const latent_index *d, float *x, long m) {
    rotate_as(w->s, x, x, m, 1);
    if (d->hadamard) hadamard_row(x, d->index.width);
}

static void centre_row(float *y, const float *x, const latent_index *d, float eps) {
    const long I = d->index.width;
    float mean = 0, square = 0;
    for (long i = 0; i < I; i++) mean += x[i] / I;
    for (long i = 0; i < I; i++) square += (x[i] - mean) * (x[i] - mean) / I;
    for (long i = 0; i < I; i++) y[i] = (x[i] - mean) / __builtin_sqrtf(square + eps) * d->gain[i] + d->bias[i];
}

/* x [rows][I]: keys before their norm -> the cache; queries in place. w: the block. */
static void index_keep_op(worker *w, const op *o) {
    latent_index *d = (latent_index *)o->w[0];
    for (long m = w->thread; m < w->rows; m += w->threads) {
        const long b = text_of(w, m), own = place_of(w, m);
        float *key = d->index.keys.start + b * d->index.keys.stride + own * d->index.width;
        centre_row(key, o->x + m * d->index.width, d, o->eps);
        finish_index(w, d, key, m);
        for (long j = 0; j < d->index.heads; j++) finish_index(w, d, d->queries + (m * d->index.heads + j) * d->index.width, m);
        d->index.end[m] = own + 1;
        d->index.first[m] = is_padding(w, m) ? own + 1 : own - d->places[m];
    }
}

static void attend_choice(worker *w, const op *o, const chooser *c, long m, long head, long count) {
    const sizes *s = w->s;
    const long X = s->latent + s->rope, width = round_lanes(s->latent);
    float query[QUERIES * X], sum[QUERIES * width];
    glance g = {.text = text_of(w, m), .first = m % w->c->tokens * s->heads + head, .count = count, .query = query, .sum = sum, .width = width};
    memset(sum, 0, sizeof sum);
    for (int q = 0; q < count; q++) {
        g.top[q] = -__builtin_inff();
        lift_query(w, o, &g, q);
    }
    read_choice(&g, c, m, kept_at(w, o, g.text, 0), s->latent, X, s->attend_scale);
    for (int q = 0; q < count; q++) lower_sum(w, o, &g, q);
}

/* As attend_op, of what was chosen. w: W^UK and W^UV, the block. */
static void attend_choice_op(worker *w, const op *o) {
    const chooser *c = &((const latent_index *)o->w[1])->index;
    const sharing share = share_heads(w, w->s->heads);
    for (long job = w->thread; job < share.jobs; job += w->threads) {
        const long head = job % share.groups * share.each, left = w->s->heads - head;
        attend_choice(w, o, c, job / share.groups, head, left < share.each ? left : share.each);
    }
}
