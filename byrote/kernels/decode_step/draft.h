/* What multi-token prediction adds to a step: its input, of the next token and of what the model made of this one (byrote/model/mtp.py). */

#pragma once
#include "decode_step/rows.h"

/* y [rows][2 D]: the normed embedding of the row's token, then what memory slot `index` holds of the row, normed; w: table, two gains. */
static void join_op(worker *w, const op *o) {
    const long D = o->width;
    for (long m = w->thread; m < w->rows; m += w->threads) {
        float *y = o->y + m * 2 * D;
        norm_row(y, o->w[0] + w->c->ids[m] * D, o->w[1], D, o->eps);
        norm_row(y + D, w->c->memory[o->index] + m * D, o->w[2], D, o->eps);
    }
}

/* y: streams, each a copy of x [rows][D]. */
static void spread_op(worker *w, const op *o) {
    const long D = w->s->dim, first = first_of(w, D), end = end_of(w, D);
    for (long m = 0; m < w->rows; m++)
        for (long r = 0; r < w->s->streams; r++)
            memcpy(o->y + (m * w->s->streams + r) * D + first, o->x + m * D + first, (end - first) * sizeof(float));
}
