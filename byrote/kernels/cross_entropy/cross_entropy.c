/* Loss of each row of logits and, in place of the logits, its slope; see reference.py beside this file.

   One row at a time: highest logit, exponentials kept in fp32 beside, their sum, then (softmax - one-hot) * factor. */

#include <math.h>
#include <stdlib.h>
#include "lanes.h"

typedef struct {
    long V;
    float factor;
    int slope;
    void *logits;
    const int64_t *targets;
    float *losses;
} data;

static const int64_t IGNORED = -100;

INLINE float logit_at(row r, long at) { return r.bf16 ? widen((short_lanes){((uint16_t *)r.start)[at]})[0] : ((float *)r.start)[at]; }

INLINE void clear(row r) { memset(r.start, 0, r.length * (r.bf16 ? 2 : 4)); }

/* Exponentials of the row above its highest logit, in `kept`; their sum. Lanes beyond the end hold zero. */
INLINE float exponentials(row r, float high, float *kept) {
    const lanes top = splat(high);
    lanes sum = {0};
    for (long v = 0; v < r.length; v += LANES) {
        lanes e = exp_lanes(load_row(r, v) - top);
        if (r.length - v < LANES)
            for (long i = r.length - v; i < LANES; i++) e[i] = 0.0f;
        store(kept + v, e);
        sum += e;
    }
    return sum_lanes(sum);
}

INLINE float highest(row r) {
    lanes top = splat(-INFINITY);
    long v = 0;
    for (; v + LANES <= r.length; v += LANES) top = at_least(load_row(r, v), top);
    float high = max_of(top);
    for (; v < r.length; v++) high = logit_at(r, v) > high ? logit_at(r, v) : high;
    return high;
}

INLINE void some_rows(const data *a, long first, long end, float *kept, const int bf16, const int whole) {
    for (long n = first; n < end; n++) {
        const row r = row_at(a->logits, n, a->V, bf16, whole);
        const int64_t target = a->targets[n];
        if (target == IGNORED) {
            a->losses[n] = 0.0f;
            if (a->slope) clear(r);
            continue;
        }
        const float high = highest(r), picked = logit_at(r, target), sum = exponentials(r, high, kept);
        a->losses[n] = logf(sum) + high - picked;
        if (!a->slope) continue;
        const float share = a->factor / sum;
        kept[target] -= sum;
        for (long v = 0; v < a->V; v += LANES) store_row(r, v, load(kept + v) * share);
    }
}

static int run_part(const data *a, long first, long end, int bf16) {
    const int whole = a->V % LANES == 0;
    float *kept = malloc((a->V + LANES) * sizeof *kept);
    if (!kept) return 1;
    if (whole && bf16) some_rows(a, first, end, kept, 1, 1);
    else if (whole) some_rows(a, first, end, kept, 0, 1);
    else some_rows(a, first, end, kept, bf16, 0);
    free(kept);
    return 0;
}

/* Returns 0, or 1 where memory ran out. */
int cross_entropy_rows(int threads, int bf16, long N, long V, float factor, int slope, void *logits, const int64_t *targets, float *losses) {
    const data a = {V, factor, slope, logits, targets, losses};
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : failed)
    for (int part = 0; part < threads; part++) failed += run_part(&a, N * part / threads, N * (part + 1) / threads, bf16);
    return failed > 0;
}
