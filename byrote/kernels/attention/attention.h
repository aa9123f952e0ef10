/* What attention.c's forward and backward share: the problem, which keys a query may see, and powers of two.

   Queries go in blocks of QUERIES, keys in tiles of KEYS; scores exist ROWS queries at a time, in the first-level cache.
   Exponentials are powers of two: scores are multiplied by scale * log2(e).

   Names: B batch, H heads, T queries, S keys, K query/key width, V value width. */

#pragma once
#include "product.h"

#define QUERIES 64
#define KEYS 256
#define STEP (KEYS + LANES) /* from row to row of what has KEYS columns: a power of two would crowd the rows into few sets of the cache */

typedef struct {
    char *start;
    long batch, head, row; /* numbers from one to the next; those of a row lie side by side */
} heads;

/* The keys [first, end) hold all that a query sees; with gaps, its row of the mask says which of them. */
typedef struct {
    int32_t first, end, gaps;
} span;

typedef struct {
    long threads, bf16, causal;
    long B, H, T, S, K, V;
    heads q, k, v, out, rest, d_out, d_q, d_k, d_v; /* rest: what rounding took from out; NULL for fp32 */
    const uint8_t *mask;                            /* [B][T][S], 0: hidden; NULL: nothing is */
    long mask_batch, mask_row;
    float *lse; /* [B][H][T], base 2; NULL: not wanted */
    double scale;
    span *spans; /* [B][T], filled in here */
} problem;

INLINE char *row_of(const heads *x, long row, const int bf16) { return x->start + row * x->row * (bf16 ? 2 : 4); }

/* The same problem with everything at the first row of one head. */
static problem only_head(const problem *p, long head) {
    problem one = *p;
    heads *all[] = {&one.q, &one.k, &one.v, &one.out, &one.rest, &one.d_out, &one.d_q, &one.d_k, &one.d_v};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i]->start) all[i]->start += (head / p->H * all[i]->batch + head % p->H * all[i]->head) * (p->bf16 ? 2 : 4);
    if (one.mask) one.mask += head / p->H * one.mask_batch;
    if (one.lse) one.lse += head * p->T;
    one.spans += head / p->H * p->T;
    return one;
}

/* ---- which keys a query sees ---- */

static span span_of(const uint8_t *mask, long keys) {
    long first = 0, end = keys, count = 0;
    uint64_t eight;
    for (; first + 8 <= end && (memcpy(&eight, mask + first, 8), !eight); first += 8) {}
    for (; first + 8 <= end && (memcpy(&eight, mask + end - 8, 8), !eight); end -= 8) {}
    while (first < end && !mask[first]) first++;
    while (first < end && !mask[end - 1]) end--;
    for (long s = first; s < end; s++) count += mask[s];
    return (span){(int32_t)first, (int32_t)end, count < end - first};
}

static void find_spans(const problem *p) {
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (long i = 0; i < p->B * p->T; i++) {
        const long batch = i / p->T, t = i % p->T, keys = p->causal ? min_long(p->S, t + 1) : p->S;
        if (p->mask) p->spans[i] = span_of(p->mask + batch * p->mask_batch + t * p->mask_row, keys);
        else p->spans[i] = (span){0, (int32_t)keys, 0};
    }
}

/* What some queries see of a tile: keys [first, end), counted from the tile's first one. */
typedef struct {
    long first, end;
} range;

/* All that queries [t, t + count) see of the tile at `key`, from a whole panel on, in whole lanes. */
static range range_of(const problem *p, long t, long count, long key) {
    range all = {KEYS, 0};
    for (long last = min_long(t + count, p->T); t < last; t++) {
        const long first = max_long(p->spans[t].first - key, 0), end = min_long(p->spans[t].end - key, KEYS);
        if (first >= end) continue;
        all.first = min_long(all.first, first / PANEL * PANEL);
        all.end = max_long(all.end, round_up(end, LANES));
    }
    return all;
}

/* The vectors of the tile of which each of queries t and t + more sees all keys. */
INLINE range plain_range(const problem *p, long t, long more, long key) {
    range r = {0, KEYS};
    for (long i = t; i <= t + more; i++) {
        if (i >= p->T || p->spans[i].gaps) return (range){0, 0};
        r.first = max_long(r.first, round_up(max_long(p->spans[i].first - key, 0), LANES));
        r.end = min_long(r.end, max_long(p->spans[i].end - key, 0) / LANES * LANES);
    }
    return r;
}

/* Which of the keys [key, key + LANES) query t sees. */
INLINE signed_lanes visible(const problem *p, long t, long key) {
    signed_lanes index = {0}, yes = {0};
    if (t >= p->T) return yes;
    for (int i = 0; i < LANES; i++) index[i] = i;
    yes = index >= (signed_lanes){0} + (int32_t)(p->spans[t].first - key);
    yes &= index < (signed_lanes){0} + (int32_t)(p->spans[t].end - key);
    if (p->spans[t].gaps && key < p->S) {
        typedef uint8_t byte_lanes __attribute__((vector_size(LANES)));
        byte_lanes m = {0};
        memcpy(&m, p->mask + t * p->mask_row + key, min_long(LANES, p->S - key));
        yes &= __builtin_convertvector(m, signed_lanes) != 0;
    }
    return yes;
}

/* ---- rows of results ---- */

/* Sums, times `scale`, become row `t` of `to`; `rest`, unless NULL, receives what rounding takes. */
INLINE void write_row(const heads *to, const heads *rest, long t, long width, const float *from, float scale, const int bf16) {
    for (long at = 0; at < width; at += LANES) {
        const lanes v = load(from + at) * scale, kept = store_row((row){row_of(to, t, bf16), width, bf16, 0}, at, v);
        if (rest && rest->start) store_row((row){row_of(rest, t, bf16), width, bf16, 0}, at, v - kept);
    }
}

INLINE void write_rows(const heads *to, long first, long rows, long width, const float *from, long stride, float scale, const int bf16) {
    for (long r = 0; r < rows; r++) write_row(to, NULL, first + r, width, from + r * stride, scale, bf16);
}
