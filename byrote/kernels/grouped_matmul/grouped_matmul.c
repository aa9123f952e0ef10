/* One product per expert over tokens sorted by expert, and the gradients; products and packing in product.h.

   Three passes over the same three tensors, rows x [N][D], grad [N][F] and weights [E][F][D]:
       forward   out[n]  = W_e x[n]         summed along the rows of W_e
       inputs    d_x[n]  = W_e^T grad[n]    summed down the rows of W_e
       weights   d_W_e   = sum_n grad[n] x[n]^T
   Each is cut into jobs that any thread may take, because experts differ in load. A job packs what it needs into memory of its
   thread, which stays in cache; every number is computed by one job, in one order. Weights may be float where rows are bfloat16:
   they are rounded while they are packed, and their gradient is written as float without having been rounded. */

#include "product.h"
#include <stdlib.h>

#define UNITS 256 /* units summed before the next rows: two panels of them stay in the second-level cache */
#define JOBS 4    /* a thread, at least: with fewer, the last one would be waited for too long */

typedef struct {
    long threads, bf16, weight_bf16;
    long N, D, F, E;
    const int32_t *ends; /* [E] */
    const void *x, *grad, *weight;
    long x_row, grad_row; /* numbers from one row to the next */
    void *out;            /* rows of the dtype of x, or weights */
} problem;

/* Rows of expert e, whatever `ends` holds. */
INLINE long first_row(const problem *p, long e) { return e ? max_long(0, min_long(p->ends[e - 1], p->N)) : 0; }

INLINE long end_row(const problem *p, long e) { return max_long(first_row(p, e), min_long(p->ends[e], p->N)); }

/* Into how many jobs each of `count` pieces of work is cut. */
INLINE long split_of(const problem *p, long count, long most) {
    return max_long(1, min_long(most, (JOBS * p->threads + count - 1) / count));
}

INLINE long panels_for(long columns) { return (columns + PANEL - 1) / PANEL; }

INLINE const char *number_at(const void *base, long index, const int bf16) { return (const char *)base + index * (bf16 ? 2 : 4); }

/* ---- rows: forward and the gradient of the inputs ---- */

/* A panel of the columns of W_e or its transpose. */
INLINE void pack_weights(const problem *p, unit *to, long e, long panel, const int turned, const int from_bf16, const int bf16) {
    const long column = panel * PANEL;
    if (turned) {
        const char *from = number_at(p->weight, e * p->F * p->D + column, from_bf16);
        pack_pairs(to, PANEL, p->F, from, p->D, p->F, min_long(PANEL, p->D - column), from_bf16, bf16);
    } else {
        const char *from = number_at(p->weight, (e * p->F + column) * p->D, from_bf16);
        pack_across(to, PANEL, from, p->D, min_long(PANEL, p->F - column), p->D, from_bf16, bf16);
    }
}

static void pack_any(const problem *p, unit *to, long e, long panel, int turned) {
    if (!p->bf16) turned ? pack_weights(p, to, e, panel, 1, 0, 0) : pack_weights(p, to, e, panel, 0, 0, 0);
    else if (p->weight_bf16) turned ? pack_weights(p, to, e, panel, 1, 1, 1) : pack_weights(p, to, e, panel, 0, 1, 1);
    else turned ? pack_weights(p, to, e, panel, 1, 0, 1) : pack_weights(p, to, e, panel, 0, 0, 1);
}

/* ROWS rows from `n` (fewer before `end`) against a panel. */
INLINE void multiply_rows(const problem *p, const unit *packed, unit *spare, long n, long end, long panel, int turned, const int bf16) {
    const long inner = turned ? p->F : p->D, columns = turned ? p->D : p->F, units = units_for(inner, bf16), column = panel * PANEL;
    const long stride = turned ? p->grad_row : p->x_row, rows = min_long(ROWS, end - n), wide = min_long(PANEL, columns - column);
    const char *from = number_at(turned ? p->grad : p->x, n * stride, bf16);
    left_units a = {(const unit *)from, stride / unit_width(bf16), 1};
    if (rows < ROWS || inner % unit_width(bf16) || stride % unit_width(bf16) || (uintptr_t)from % sizeof(unit)) {
        pack_rows(spare, ROWS, from, stride, rows, inner, bf16);
        a = (left_units){spare, units, 1};
    }
    float c[ROWS * PANEL];
    product(a, (right_units){packed, PANEL, 0}, units, round_up(wide, LANES), c, PANEL, NULL, bf16);
    for (long r = 0; r < rows; r++) {
        const row to = {(char *)number_at(p->out, (n + r) * columns + column, bf16), wide, bf16, 0};
        for (long at = 0; at < wide; at += LANES) store_row(to, at, load(c + r * PANEL + at));
    }
}

/* A job: a panel of one expert's weights and a share of its rows. */
static void multiply_job(const problem *p, unit *packed, unit *spare, long job, long split, int turned) {
    const long panels = panels_for(turned ? p->D : p->F), e = job / (panels * split), panel = job / split % panels, part = job % split;
    const long first = first_row(p, e), count = end_row(p, e) - first;
    const long from = count * part / split / ROWS * ROWS, to = part + 1 == split ? count : count * (part + 1) / split / ROWS * ROWS;
    if (from < to) pack_any(p, packed, e, panel, turned);
    for (long n = first + from; n < first + to; n += ROWS)
        if (p->bf16) multiply_rows(p, packed, spare, n, first + to, panel, turned, 1);
        else multiply_rows(p, packed, spare, n, first + to, panel, turned, 0);
}

/* 0, or 1 when memory ran out. */
static int run_rows(const problem *p, int turned) {
    const long units = units_for(turned ? p->F : p->D, p->bf16), panels = panels_for(turned ? p->D : p->F);
    const long split = split_of(p, p->E * panels, p->N / ROWS), size = round_up(units * (PANEL + ROWS), LANES);
    unit *work = aligned_alloc(64, sizeof(unit) * size * p->threads);
    long next = 0;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (long thread = 0; thread < p->threads; thread++)
        for (long job = 0; work;) {
#pragma omp atomic capture
            job = next++;
            if (job >= p->E * panels * split) break;
            multiply_job(p, work + thread * size, work + thread * size + units * PANEL, job, split, turned);
        }
    free(work);
    return !work;
}

/* ---- weights ---- */

/* d_W_e for PANEL rows (of F) by PANEL columns (of D). */
INLINE void sum_panel(const problem *p, const unit *grad, const unit *x, long units, long e, long f, long d, const int bf16) {
    float c[PANEL * PANEL], ones[ROWS];
    const long rows = min_long(PANEL, p->F - f), wide = min_long(PANEL, p->D - d);
    for (long r = 0; r < ROWS; r++) ones[r] = 1;
    for (long u = 0; u == 0 || u < units; u += UNITS)
        for (long r = 0; r < rows; r += ROWS) {
            const left_units a = {grad + u * PANEL + r, 1, PANEL};
            const right_units b = {x + u * PANEL, PANEL, 0};
            product(a, b, min_long(UNITS, units - u), round_up(wide, LANES), c + r * PANEL, PANEL, u ? ones : NULL, bf16);
        }
    for (long r = 0; r < rows; r++) {
        const row to = {(char *)number_at(p->out, (e * p->F + f + r) * p->D + d, p->weight_bf16), wide, p->weight_bf16, 0};
        for (long at = 0; at < wide; at += LANES) store_row(to, at, load(c + r * PANEL + at));
    }
}

/* A job: an expert and a share of the panels of its grad. */
INLINE void sum_job(const problem *p, unit *work, long job, long split, const int bf16) {
    const long panels_f = panels_for(p->F), panels_d = panels_for(p->D), e = job / split, part = job % split;
    const long first = first_row(p, e), count = end_row(p, e) - first, units = units_for(count, bf16);
    const long from = panels_f * part / split, to = panels_f * (part + 1) / split;
    unit *grad = work + panels_d * units * PANEL;
    const char *x_rows = number_at(p->x, first * p->x_row, bf16), *g_rows = number_at(p->grad, first * p->grad_row, bf16);
    for (long d = 0; from < to && d < p->D; d += PANEL)
        pack_pairs(work + d * units, PANEL, count, number_at(x_rows, d, bf16), p->x_row, count, min_long(PANEL, p->D - d), bf16, bf16);
    for (long f = from * PANEL; f < min_long(to * PANEL, p->F); f += PANEL) {
        pack_pairs(grad, PANEL, count, number_at(g_rows, f, bf16), p->grad_row, count, min_long(PANEL, p->F - f), bf16, bf16);
        for (long d = 0; d < p->D; d += PANEL) sum_panel(p, grad, work + d * units, units, e, f, d, bf16);
    }
}

/* 0, or 1 when memory ran out. */
static int run_weights(const problem *p) {
    long most = 0, next = 0;
    for (long e = 0; e < p->E; e++) most = max_long(most, end_row(p, e) - first_row(p, e));
    const long split = split_of(p, p->E, panels_for(p->F)), size = (panels_for(p->D) + 1) * PANEL * (units_for(most, p->bf16) + 1);
    unit *work = aligned_alloc(64, sizeof(unit) * size * p->threads);
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (long thread = 0; thread < p->threads; thread++)
        for (long job = 0; work;) {
#pragma omp atomic capture
            job = next++;
            if (job >= p->E * split) break;
            if (p->bf16) sum_job(p, work + thread * size, job, split, 1);
            else sum_job(p, work + thread * size, job, split, 0);
        }
    free(work);
    return !work;
}

int grouped_forward(const problem *p) { return run_rows(p, 0); }

int grouped_inputs(const problem *p) { return run_rows(p, 1); }

int grouped_weights(const problem *p) { return run_weights(p); }

/* Whether this build has vectors wide enough to be worth its use. */
int grouped_is_wide(void) { return LANES >= 8; }
