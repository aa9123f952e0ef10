/* What a tape is made of, and the team of threads that walks it. Mirrored in cpu.py; what each operation does: decode_step.c.

   Every thread walks all operations. Within one it does its own share of the numbers written, or, where that is cheaper than a
   meeting, all of them into memory of its own; the team meets behind operations marked `sync`. Results never depend on threads. */

#pragma once
#include "lanes.h"
#include <sched.h>

#define MOST_ROWS 16 /* of a call: batch x tokens */
#define MOST_STREAMS 8
#define MOST_CHOSEN 32 /* experts of one row */
#define POINTERS 8

typedef struct { /* the model */
    long dim, streams, vocab;
    long heads, latent, rope, nope, value, half;
    long experts, top_k, groups, top_groups, normalize, softplus, hidden; /* hidden: width of one routed expert */
    long taps, dilation, hard, sinkhorn_iters;
    float attend_scale, turn_scale, route_scale, limit, mix_eps;
    const float *frequencies; /* [rope / 2] */
    float *turn;              /* [MOST_ROWS][2][rope / 2]: cos, sin of this call */
} sizes;

typedef struct {
    long code, sync, index; /* index: which cache, tail or memory slot */
    long width, outputs;    /* of a product: numbers in, numbers out */
    long flags;
    float eps;
    const float *w[POINTERS];
    const float *x;
    float *y;
} op;

typedef struct { /* [batch][...][width], `stride` numbers from text to text */
    float *start;
    long stride;
} kept;

typedef struct { /* [batch][keep][streams][dim], before and after */
    const float *old;
    float *new;
    long keep;
} tail;

typedef struct { /* one step */
    long threads, batch, tokens, before; /* before: tokens each text held until now */
    const int64_t *ids, *positions;      /* [batch * tokens] */
    const int64_t *document;             /* [batch][before + tokens] or NULL: every text is one document */
    const float *const *memory;          /* [batch * tokens][width]: the rows of each memory layer, side by side */
    const kept *caches;
    const tail *tails;
    float *hidden, *logits; /* [batch * tokens][dim], [...][vocab] */
    float *own;             /* [threads][own_numbers] */
    long own_numbers;
} call;

typedef struct { /* where the team meets: arrivals only ever count up */
    long arrived __attribute__((aligned(64)));
    long opened __attribute__((aligned(64)));
} meeting;

typedef struct {
    const sizes *s;
    const call *c;
    long rows, thread, threads, met;
    meeting *meet;
    float *normed;      /* [MOST_ROWS][longest row], the first part of what this thread owns */
    float *coef;        /* [streams (streams + 2)][MOST_ROWS] */
    float *gates;       /* [rows * top_k] */
    int chosen[MOST_ROWS * MOST_CHOSEN];
} worker;

#define SPINS 2000 /* about 20 microseconds; whoever waits longer lets others run */

static void meet(worker *w) {
    if (w->threads == 1) return;
    const long turn = ++w->met;
    if (__atomic_add_fetch(&w->meet->arrived, 1, __ATOMIC_ACQ_REL) == turn * w->threads) {
        __atomic_store_n(&w->meet->opened, turn, __ATOMIC_RELEASE);
        return;
    }
    for (long spins = 0; __atomic_load_n(&w->meet->opened, __ATOMIC_ACQUIRE) < turn; spins++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        if (spins >= SPINS) sched_yield();
    }
}

/* This thread's share of `count` numbers, by whole cache lines. */
INLINE long share_at(long count, long thread, long threads) {
    const long lines = (count + 15) / 16, first = lines * thread / threads * 16;
    return first < count ? first : count;
}
INLINE long first_of(const worker *w, long count) { return share_at(count, w->thread, w->threads); }
INLINE long end_of(const worker *w, long count) { return share_at(count, w->thread + 1, w->threads); }

INLINE long text_of(const worker *w, long row) { return row / w->c->tokens; }
INLINE long place_of(const worker *w, long row) { return w->c->before + row % w->c->tokens; }
