/* One decoding step of a whole model: a tape of operations, walked by a team of threads from token ids to logits.

   byrote/model/capture.py writes the tape; weights, caches and tables are read where PyTorch keeps them. Rows are batch x tokens, a
   few at a time, everything is fp32
   but weights that may be int8. What each operation reads and writes stands with it. */

#include "decode_step/attend.h"
#include "decode_step/draft.h"
#include "decode_step/experts.h"
#include "decode_step/latent_index.h"
#include "decode_step/streams.h"
#include "decode_step/window.h"

enum { EMBED, TURN, LINEAR, LATENT, ATTEND, ROUTE, EXPERTS_UP, EXPERTS_DOWN, MANIFOLD_ENTER, FREE_ENTER, LEAVE, MEAN, NORM, MEMORY };
enum { INDEX_SCORE = MEMORY + 1, INDEX_CHOOSE, INDEX_KEEP, ATTEND_CHOICE, WINDOW_TURN, WINDOW_KEEP, WINDOW_ATTEND, GROUPED };
enum { JOIN = GROUPED + 1, SPREAD };
enum { IS_NORMED = 1, ADDS = 2, GATES = 4, FROM_MEMORY = 8 }; /* flags of LINEAR */

/* y [rows][outputs] = x W', or added to it; GATES: of twice as many outputs, y = silu(gate) * linear part. x NULL: the final
   hidden state, or what memory layer `index` read; y NULL: the logits. w: weight, gain of the norm, scales of int8. */
static void linear_op(worker *w, const op *o) {
    product p = {.width = o->width, .stride = o->width, .outputs = o->outputs, .count = w->rows, .limit = w->s->limit};
    const float *x = rows_of(w, o, o->x ? o->x : o->flags & FROM_MEMORY ? w->c->memory[o->index] : w->c->hidden, o->w[1], o->flags & IS_NORMED);
    float *y = o->y ? o->y : w->c->logits;
    read_weight(&p, o, 0);
    for (long m = 0; m < w->rows; m++) p.x[m] = x + m * o->width, p.y[m] = y + m * o->outputs, p.scale[m] = 1;
    run_product(&p, first_of(w, o->outputs), end_of(w, o->outputs), o->flags & GATES ? SWIGLU : o->flags & ADDS ? ADD : SET);
}

static void run_op(worker *w, const op *o) {
    static void (*const run[])(worker *, const op *) = {
        embed_op,          turn_op,       linear_op, latent_op, attend_op, route_op,  experts_up_op, experts_down_op,
        manifold_enter_op, free_enter_op, leave_op,  mean_op,   norm_op,   memory_op,
        [INDEX_SCORE] = index_score_op, [INDEX_CHOOSE] = index_choose_op, [INDEX_KEEP] = index_keep_op, [ATTEND_CHOICE] = attend_choice_op,
        [WINDOW_TURN] = window_turn_op, [WINDOW_KEEP] = window_keep_op, [WINDOW_ATTEND] = window_attend_op, [GROUPED] = grouped_op,
        [JOIN] = join_op, [SPREAD] = spread_op,
    };
    run[o->code](w, o);
}

#if defined(_OPENMP)
extern int omp_get_thread_num(void), omp_get_num_threads(void);
#endif

static void walk(const sizes *s, const op *tape, long count, const call *c, meeting *meet_at, long thread, long threads) {
    worker w = {.s = s, .c = c, .rows = c->batch * c->tokens, .thread = thread, .threads = threads, .meet = meet_at};
    float *own = c->own + thread * c->own_numbers;
    w.coef = own;
    w.gates = w.coef + MOST_STREAMS * (MOST_STREAMS + 2) * MOST_ROWS;
    w.normed = w.gates + MOST_ROWS * (s->top_k + 1);
    for (long i = 0; i < count; i++) {
        run_op(&w, tape + i);
        if (tape[i].sync) meet(&w);
    }
}

/* Returns 0. */
int decode_step(const sizes *s, const op *tape, long count, const call *c) {
    meeting here = {0};
#if defined(_OPENMP)
#pragma omp parallel num_threads(c->threads)
    walk(s, tape, count, c, &here, omp_get_thread_num(), omp_get_num_threads());
#else
    walk(s, tape, count, c, &here, 0, 1);
#endif
    return 0;
}

static int64_t best_id(const float *logits, long count) {
    long best = 0;
    for (long i = 1; i < count; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

/* `steps` times a token of each text: what the logits like best -> picked [steps][batch], which the next step reads, one place on and
   from the hidden state of this one in memory slot 0. Returns 0. */
int decode_drafts(const sizes *s, const op *tape, long count, const call *c, long steps, int64_t *picked) {
    call at = *c;
    int64_t positions[MOST_ROWS];
    const float *memory[1] = {c->memory[0]};
    memcpy(positions, c->positions, c->batch * sizeof(int64_t));
    at.positions = positions, at.memory = memory;
    for (long step = 0; step < steps; step++, picked += c->batch) {
        decode_step(s, tape, count, &at);
        for (long b = 0; b < c->batch; b++) {
            picked[b] = best_id(c->logits + b * tape[count - 1].outputs, tape[count - 1].outputs);
            positions[b]++;
        }
        at.ids = picked, memory[0] = c->hidden, at.before++;
    }
    return 0;
}
