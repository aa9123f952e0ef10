/* The K best keys of each query, in order of index; rules in reference.py.

   A block of queries walks over the keys together, PANEL keys at a time: these are packed once, multiplied with the index heads of
   every query that sees some of them, and reduced to one score a key while the products are in registers. The scores of a block,
   QUERIES times S, are all that is ever held. */

#include <stdlib.h>
#include "sparse_index.h"
#include "threshold.h"

#define QUERIES 16

typedef struct {
    unit *q, *panel; /* [QUERIES][J up to ROWS][units], one packed panel */
    float *weight;   /* [QUERIES][J up to ROWS], zeros where there is no head */
    float *tile;     /* [ROWS][PANEL] */
    float *scores;   /* [QUERIES][S up to PANEL] */
    uint32_t *left;  /* candidates of the later rounds */
} work;

/* Writes the choice of one query whose span is [first, end) with these scores. */
static void choose(const selection *p, float *scores, long first, long end, uint32_t *left, int64_t *index, uint8_t *valid) {
    const long n = end - first, count = max_long(0, min_long(n, p->top_k));
    if (n > p->top_k) pick(scores, n, p->top_k, left, first, index);
    else
        for (long i = 0; i < count; i++) index[i] = first + i;
    for (long at = count; at < p->top_k; at++) index[at] = 0;
    memset(valid, 1, count);
    memset(valid + count, 0, p->top_k - count);
}

/* scores[0..PANEL) = sum over heads of weight * ReLU(q k) for one query and a packed panel. */
INLINE void score_panel(const selection *p, const work *w, const unit *q, const float *weight, float *scores, const int bf16) {
    const long units = units_for(p->I, bf16);
    lanes sum[VECS] = {{0}};
    for (long j = 0; j < p->J; j += ROWS) {
        product((left_units){q + j * units, units, 1}, (right_units){w->panel, PANEL, 0}, units, PANEL, w->tile, PANEL, NULL, bf16);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int v = 0; v < VECS; v++) sum[v] += weight[j + r] * at_least(load(w->tile + r * PANEL + v * LANES), splat(0));
    }
#pragma GCC unroll 4
    for (int v = 0; v < VECS; v++) store(scores + v * LANES, sum[v]);
}

/* The queries [t, t + count) of row b; scores lie from `low` on. */
INLINE void select_block(const selection *p, const work *w, long b, long t, long count, const int bf16) {
    const long units = units_for(p->I, bf16), heads = round_up(p->J, ROWS), wide = round_up(p->S, PANEL);
    const int64_t *first = p->first + b * p->T + t, *end = p->end + b * p->T + t;
    long low = p->S, high = 0;
    for (long i = 0; i < count; i++) {
        const char *q = (const char *)p->q + (b * p->T + t + i) * p->J * p->I * (bf16 ? 2 : 4);
        pack_rows(w->q + i * heads * units, heads, q, p->I, p->J, p->I, bf16);
        memset(w->weight + i * heads, 0, heads * sizeof(float));
        memcpy(w->weight + i * heads, p->weight + (b * p->T + t + i) * p->J, p->J * sizeof(float));
        if (end[i] - first[i] > p->top_k) low = min_long(low, first[i]), high = max_long(high, end[i]);
    }
    for (long s = low; s < high; s += PANEL) {
        pack_across(w->panel, PANEL, key_at(&p->k, b, s, bf16), p->k.row, min_long(PANEL, p->S - s), p->I, bf16, bf16);
        for (long i = 0; i < count; i++)
            if (first[i] < s + PANEL && end[i] > s)
                score_panel(p, w, w->q + i * heads * units, w->weight + i * heads, w->scores + i * wide + s - low, bf16);
    }
    for (long i = 0; i < count; i++) {
        const long at = (b * p->T + t + i) * p->top_k;
        choose(p, w->scores + i * wide + max_long(0, first[i] - low), first[i], end[i], w->left, p->index + at, p->valid + at);
    }
}

/* Pointers into `block`; only the size when it is NULL. */
static size_t place(work *w, const selection *p, char *block) {
    const long units = units_for(p->I, p->bf16), heads = round_up(p->J, ROWS), wide = round_up(p->S, PANEL);
    const struct {
        void *field;
        long numbers;
    } plan[] = {
        {&w->q, QUERIES * heads * units}, {&w->panel, units * PANEL},          {&w->weight, QUERIES * heads},
        {&w->tile, ROWS * PANEL},         {&w->scores, QUERIES * wide + PANEL}, {&w->left, wide},
    };
    size_t used = 0;
    for (size_t i = 0; i < sizeof plan / sizeof *plan; i++) {
        char *start = block + used;
        if (block) memcpy(plan[i].field, &start, sizeof start);
        used += round_up(plan[i].numbers * 4, 64);
    }
    return used;
}

/* 0, or 1 when memory ran out. */
int index_select(const selection *p) {
    work shape;
    const size_t bytes = place(&shape, p, NULL);
    const long blocks = (p->T + QUERIES - 1) / QUERIES;
    char *room = aligned_alloc(64, round_up(bytes * p->threads, 64));
    long next = 0;
    if (!room) return 1;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (long thread = 0; thread < p->threads; thread++) {
        work w;
        place(&w, p, room + thread * bytes);
        for (long item = 0;;) {
#pragma omp atomic capture
            item = next++;
            if (item >= p->B * blocks) break;
            const long b = item / blocks, t = item % blocks * QUERIES, count = min_long(QUERIES, p->T - t);
            if (p->bf16) select_block(p, &w, b, t, count, 1);
            else select_block(p, &w, b, t, count, 0);
        }
    }
    free(room);
    return 0;
}
