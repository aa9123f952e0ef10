/* What attention.c's forward and backward share: the problem, its tiles, and which keys of a tile a query may see.

   Queries go in blocks of QUERIES, keys in tiles of KEYS; a tile of scores exists ROWS queries at a time and lives in the
   first-level cache. Exponentials are powers of two: scores are multiplied by scale * log2(e).

   Names: B batch, H heads, T queries, S keys, K query/key width, V value width. */

#pragma once
#include "product.h"

#define QUERIES 64
#define KEYS 64

typedef struct {
    char *start;
    long batch, head, row; /* numbers from one to the next; those of a row lie side by side */
} heads;

typedef struct {
    long threads, bf16, causal;
    long B, H, T, S, K, V;
    heads q, k, v, out, rest, d_out, d_q, d_k, d_v; /* rest: what rounding took from out; NULL for fp32 */
    const uint8_t *mask; /* [B][T][S], 0: hidden; NULL: nothing is */
    long mask_batch, mask_row;
    float *lse; /* [B][H][T], base 2; NULL: not wanted */
    double scale;
} problem;

/* A block of queries against a tile of keys. */
typedef struct {
    long query, key, queries, keys; /* first ones and how many */
    const uint8_t *mask;            /* of the first query and key; NULL: all that order allows is seen */
    long mask_row;
    int causal, hidden; /* hidden: no query sees any key */
} tile;

INLINE long min_long(long a, long b) { return a < b ? a : b; }

INLINE long max_long(long a, long b) { return a > b ? a : b; }

INLINE char *row_of(const heads *x, long row, const int bf16) { return x->start + row * x->row * (bf16 ? 2 : 4); }

/* The same problem with everything at the first row of one head. */
static problem only_head(const problem *p, long head) {
    problem one = *p;
    heads *all[] = {&one.q, &one.k, &one.v, &one.out, &one.rest, &one.d_out, &one.d_q, &one.d_k, &one.d_v};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i]->start) all[i]->start += (head / p->H * all[i]->batch + head % p->H * all[i]->head) * (p->bf16 ? 2 : 4);
    if (one.mask) one.mask += head / p->H * one.mask_batch;
    if (one.lse) one.lse += head * p->T;
    return one;
}

/* Keys of the tile that its query t may see by order, from the first one on. */
INLINE long seen(const tile *x, long t) {
    if (t >= x->queries) return 0;
    return x->causal ? max_long(0, min_long(x->keys, x->query + t - x->key + 1)) : x->keys;
}

static tile tile_at(const problem *p, long query, long key) {
    tile x = {query, key, min_long(QUERIES, p->T - query), min_long(KEYS, p->S - key), NULL, p->mask_row, p->causal, 0};
    if (!p->mask) return x;
    x.mask = p->mask + query * p->mask_row + key;
    int any = 0, all = 1;
    for (long t = 0; t < x.queries; t++)
        for (long s = 0; s < x.keys; s++) {
            any |= x.mask[t * x.mask_row + s];
            all &= x.mask[t * x.mask_row + s];
        }
    x.hidden = !any;
    if (all) x.mask = NULL;
    return x;
}

/* Which of the keys [at, at + LANES) a query sees: those before `keys`, unless its row of the mask hides them. */
INLINE signed_lanes visible(const uint8_t *mask, long at, long keys) {
    signed_lanes index = {0};
    for (int i = 0; i < LANES; i++) index[i] = i;
    signed_lanes yes = index < (signed_lanes){0} + (int32_t)(keys - at);
    if (mask) {
        typedef uint8_t byte_lanes __attribute__((vector_size(LANES)));
        byte_lanes m = {0};
        if (at < keys) memcpy(&m, mask + at, min_long(LANES, keys - at));
        yes &= __builtin_convertvector(m, signed_lanes) != 0;
    }
    return yes;
}

/* The larger of each pair; a NaN in b stays. */
INLINE lanes larger(lanes a, lanes b) {
#if defined(__AVX512F__)
    return (lanes)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return select_lanes(a > b, a, b);
#endif
}

INLINE float max_of(lanes v) {
    float part[LANES];
    store(part, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] = part[i] > part[i + width] ? part[i] : part[i + width];
    return part[0];
}

/* 2^v to 2e-7 for v <= 127, exactly 1 at 0; below -125 it stays near 2^-125. */
INLINE lanes power_lanes(lanes v) {
    v = larger(splat(-125.0f), v);
    const lanes shifted = v + 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, which then ends the bits */
    const lanes r = v - (shifted - 12582912.0f);
    lanes p = splat(1.326472731307149e-3f);
    p = p * r + 9.671512991189957e-3f;
    p = p * r + 5.550733581185341e-2f;
    p = p * r + 2.4022242426872253e-1f;
    p = p * r + 6.931470036506653e-1f;
    p = p * r + 1.0f;
    return (lanes)((bit_lanes)p + ((bit_lanes)shifted << 23));
}
