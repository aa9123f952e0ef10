/* What cpu.py hands to select.c and attend.c; formulas in reference.py beside this file. */

#pragma once
#include "product.h"

/* Keys of one kind: [B][S] rows of numbers, each row dense. */
typedef struct {
    const void *start;
    long batch, row; /* numbers from one to the next */
} key_rows;

typedef struct {
    long threads, bf16, B, T, S, J, I, top_k;
    const void *q; /* [B][T][J][I] */
    key_rows k;
    const float *weight;        /* [B][T][J] */
    const int64_t *first, *end; /* [B][T] */
    int64_t *index;             /* [B][T][top_k] */
    uint8_t *valid;
} selection;

typedef struct {
    long threads, bf16, B, T, S, H, X, V, K;
    const void *q; /* [B][T][H][X] */
    key_rows keys;
    const int64_t *index; /* [B][T][K] */
    const uint8_t *valid;
    const float *sink; /* [H] or NULL */
    float *out, *lse;  /* [B][T][H][V], [B][T][H] */
    const float *d_out, *delta; /* [B][T][H][V], [B][T][H]: <d_out, out> */
    float *d_q, *d_keys; /* [B][T][H][X]; one [B][S][X] for each thread, which receives the sum in the first */
    double scale;
} attending;

INLINE const char *key_at(const key_rows *k, long b, long s, const int bf16) {
    return (const char *)k->start + (b * k->batch + s * k->row) * (bf16 ? 2 : 4);
}
