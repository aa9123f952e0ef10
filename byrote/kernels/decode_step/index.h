/* A lightning indexer and attention to what it chose (byrote/kernels/sparse_index, rules of the choice in reference.py). Blocks with an
   indexer describe themselves in a structure of their own, whose address is w[0] of their operations; window.h and latent_index.h.

   Shapes: J index heads, I index width, K keys to choose, X numbers of a key. */

#pragma once
#include "decode_step/attend.h"
#include "sparse_index/threshold.h"

typedef struct { /* new rows of a cache: [batch][...][width], `stride` numbers from text to text, from the first new one on */
    float *start;
    long stride;
} stretch;

typedef struct {
    long heads, width, top_k; /* no heads: what a row may see, it reads */
    float scale;
    const float *queries, *weights; /* [rows][J][I], turned; [rows][J] */
    stretch keys;                   /* all of them, from the first on */
    float *scores;                  /* [MOST_ROWS][room] */
    uint32_t *left;                 /* [MOST_ROWS][room] */
    int64_t *chosen;                /* [MOST_ROWS][top_k], ascending */
    long room;
    long first[MOST_ROWS], end[MOST_ROWS]; /* what each row may see */
} chooser;

INLINE const chooser *chooser_of(const op *o) { return (const chooser *)o->w[0]; }

INLINE int is_padding(const worker *w, long m) {
    return w->c->document && w->c->document[text_of(w, m) * (w->c->before + w->c->tokens) + place_of(w, m)] < 0;
}

INLINE int chooses(const chooser *c, long m) { return c->heads && c->end[m] - c->first[m] > c->top_k; }

/* scores[0 ... count) of one row and as many keys, summed over heads. */
static void score_some(const chooser *c, long m, const float *keys, long count, float *scores) {
    float tile[MOST_ROWS][KEYS];
    memset(scores, 0, count * sizeof(float));
    for (long j = 0; j < c->heads; j += MOST_ROWS) {
        product p = {.weight = keys, .width = c->width, .stride = c->width, .outputs = count};
        p.count = c->heads - j < MOST_ROWS ? c->heads - j : MOST_ROWS;
        for (long i = 0; i < p.count; i++) p.x[i] = c->queries + (m * c->heads + j + i) * c->width, p.y[i] = tile[i];
        run_product(&p, 0, count, SET);
        for (long i = 0; i < p.count; i++) {
            const float weight = c->weights[m * c->heads + j + i] * c->scale;
            for (long k = 0; k < count; k++) scores[k] += weight * (tile[i][k] < 0 ? 0 : tile[i][k]);
        }
    }
}

/* w: chooser. Scores of all keys that a row chooses among; threads share the keys. */
static void index_score_op(worker *w, const op *o) {
    const chooser *c = chooser_of(o);
    for (long m = 0; m < w->rows; m++) {
        const long n = chooses(c, m) ? c->end[m] - c->first[m] : 0, end = end_of(w, n);
        const float *keys = c->keys.start + text_of(w, m) * c->keys.stride + c->first[m] * c->width;
        for (long k = first_of(w, n); k < end; k += KEYS)
            score_some(c, m, keys + k * c->width, end - k < KEYS ? end - k : KEYS, c->scores + m * c->room + k);
    }
}

/* w: chooser. */
static void index_choose_op(worker *w, const op *o) {
    const chooser *c = chooser_of(o);
    for (long m = w->thread; m < w->rows; m += w->threads)
        if (chooses(c, m)) pick(c->scores + m * c->room, c->end[m] - c->first[m], c->top_k, c->left + m * c->room, c->first[m], c->chosen + m * c->top_k);
}

/* Attends to `count` keys of X numbers, values their first C: those listed, or where there is no list the first ones. */
static void read_listed(glance *g, const float *keys, const int64_t *list, long count, long C, long X, float scale) {
    float near[list ? KEYS * X : 1];
    for (long k = 0; k < count; k += KEYS) {
        const long some = count - k < KEYS ? count - k : KEYS;
        for (long i = 0; list && i < some; i++) memcpy(near + i * X, keys + list[k + i] * X, X * sizeof(float));
        const float *block = list ? near : keys + k * X;
        score_keys(g, block, X, some);
        for (int q = 0; q < g->count; q++) weigh_query(g, q, some, scale);
        sum_keys(g, block, C, X, some);
    }
}

/* Attends to what row m chose, or to all it may see; `keys` are those of its text. */
static void read_choice(glance *g, const chooser *c, long m, const float *keys, long C, long X, float scale) {
    if (chooses(c, m)) read_listed(g, keys, c->chosen + m * c->top_k, c->top_k, C, X, scale);
    else if (c->end[m] > c->first[m]) read_listed(g, keys + c->first[m] * X, NULL, c->end[m] - c->first[m], C, X, scale);
}

/* Rows times groups of heads, as many groups as keep all threads busy. */
typedef struct {
    long each, groups, jobs;
} sharing;

INLINE sharing share_heads(const worker *w, long heads) {
    const long fair = (w->rows * heads + w->threads - 1) / w->threads, each = fair < QUERIES ? fair : QUERIES, groups = (heads + each - 1) / each;
    return (sharing){each, groups, w->rows * groups};
}
