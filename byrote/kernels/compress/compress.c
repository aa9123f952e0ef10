/* V4's compressor, forward and backward; formulas in reference.py beside this file.

   One item is one entry. Of its slots the first `span` belong to the previous group (overlapping only), the others to its own; slots
   are read twice, once for the largest gate and once for powers and sums, a few lanes of channels at a time. Cotangents of values and
   gates are written by the entries that own them: each half of a token has one entry, so nothing is summed but the bias. */

#include "lanes.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    long threads, bf16, overlap, back;
    long B, S, E, M, W;
    const void *values, *gates;          /* [B][S][X] */
    const float *bias;                   /* [M][X] */
    const int64_t *last;                 /* [B][E] */
    const uint8_t *opens;                /* [B][E] */
    void *entries;                       /* [B][E][W]; backward: their cotangents */
    void *d_values, *d_gates;            /* zeroed by the caller */
    float *d_bias;                       /* [threads][M][X], zeroed by the caller */
} problem;

typedef struct {
    long token, place, half; /* of one slot: row of the batch, place in its group, first channel */
} slot;

INLINE slot slot_of(const problem *p, long last, long i) {
    const long own = !p->overlap || i >= p->M, place = i % p->M;
    return (slot){last - (own ? 0 : p->M) - (p->M - 1) + place, place, p->overlap && own ? p->W : 0};
}

INLINE row numbers_at(const void *start, long numbers, long width, const int bf16) {
    return (row){(char *)start + numbers * (bf16 ? 2 : 4), width, bf16, 0};
}

INLINE lanes gate_at(const problem *p, long batch, slot s, long at, const int bf16) {
    const long X = p->overlap ? 2 * p->W : p->W;
    const row gates = numbers_at(p->gates, (batch * p->S + s.token) * X + s.half, p->W, bf16);
    const row bias = {(char *)(p->bias + s.place * X + s.half), p->W, 0, 0};
    return load_row(gates, at) + load_row(bias, at);
}

INLINE lanes value_at(const problem *p, long batch, slot s, long at, const int bf16) {
    const long X = p->overlap ? 2 * p->W : p->W;
    return load_row(numbers_at(p->values, (batch * p->S + s.token) * X + s.half, p->W, bf16), at);
}

/* e^(gate − top); the difference comes first, so that large gates lose no digits. */
INLINE lanes power_of(lanes gate, lanes top) { return power_lanes((gate - top) * (float)M_LOG2E); }

/* Of channels [at, at + LANES): the entry; `top` and `scale` turn a slot's gate into its weight. */
INLINE lanes pool(const problem *p, long batch, long last, long first, long slots, long at, lanes *top, lanes *scale, const int bf16) {
    *top = splat(-3.4e38f);
    for (long i = first; i < slots; i++) *top = at_least(gate_at(p, batch, slot_of(p, last, i), at, bf16), *top);
    lanes total = {0}, sum = {0};
    for (long i = first; i < slots; i++) {
        const slot s = slot_of(p, last, i);
        const lanes power = power_of(gate_at(p, batch, s, at, bf16), *top);
        total += power;
        sum += power * value_at(p, batch, s, at, bf16);
    }
    *scale = splat(1) / total;
    return sum * *scale;
}

INLINE void spread(const problem *p, long batch, long last, long first, long slots, long at, long entry, float *d_bias, const int bf16) {
    const long X = p->overlap ? 2 * p->W : p->W;
    lanes top, scale;
    const lanes pooled = pool(p, batch, last, first, slots, at, &top, &scale, bf16);
    const lanes above = load_row(numbers_at(p->entries, entry * p->W, p->W, bf16), at);
    for (long i = first; i < slots; i++) {
        const slot s = slot_of(p, last, i);
        const long start = (batch * p->S + s.token) * X + s.half;
        const lanes weighed = power_of(gate_at(p, batch, s, at, bf16), top) * scale * above;
        const lanes d_gate = weighed * (value_at(p, batch, s, at, bf16) - pooled);
        store_row(numbers_at(p->d_values, start, p->W, bf16), at, weighed);
        store_row(numbers_at(p->d_gates, start, p->W, bf16), at, d_gate);
        const row bias = {(char *)(d_bias + s.place * X + s.half), p->W, 0, 0};
        store_row(bias, at, load_row(bias, at) + d_gate);
    }
}

INLINE void entry_of(const problem *p, long entry, float *d_bias, const int bf16) {
    const long batch = entry / p->E, last = p->last[entry], slots = p->overlap ? 2 * p->M : p->M;
    const long first = p->overlap && p->opens[entry] ? p->M : 0;
    for (long at = 0; at < p->W; at += LANES) {
        lanes top, scale;
        if (last < 0 && !p->back) store_row(numbers_at(p->entries, entry * p->W, p->W, bf16), at, splat(0));
        else if (last >= 0 && p->back) spread(p, batch, last, first, slots, at, entry, d_bias, bf16);
        else if (last >= 0)
            store_row(numbers_at(p->entries, entry * p->W, p->W, bf16), at, pool(p, batch, last, first, slots, at, &top, &scale, bf16));
    }
}

int compress(const problem *p) {
    const long X = p->overlap ? 2 * p->W : p->W;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (long thread = 0; thread < p->threads; thread++) {
        const long all = p->B * p->E, from = all * thread / p->threads, end = all * (thread + 1) / p->threads;
        float *d_bias = p->d_bias ? p->d_bias + thread * p->M * X : NULL;
        for (long entry = from; entry < end; entry++)
            if (p->bf16) entry_of(p, entry, d_bias, 1);
            else entry_of(p, entry, d_bias, 0);
    }
    return 0;
}
