/* What lies between the sub-layers: embedding, residual streams and memory (byrote/kernels/hyper_mix, engram_gate: reference.py).

   Streams are [rows][R][D]. Each thread mixes its own columns of all rows with coefficients that it has worked out for itself,
   so that entering and leaving a site needs no meeting of its own. */

#pragma once
#include "decode_step/rows.h"
#include "sinkhorn/sinkhorn.h"

INLINE float *coef_at(worker *w, long i) { return w->coef + i * MOST_ROWS; }

INLINE const float *stream_at(const worker *w, const float *streams, long m, long r) { return streams + (m * w->s->streams + r) * w->s->dim; }

/* y: streams, each a copy of the embedding; w: table. */
static void embed_op(worker *w, const op *o) {
    const long D = w->s->dim, first = first_of(w, D), end = end_of(w, D);
    for (long m = 0; m < w->rows; m++)
        for (long r = 0; r < w->s->streams; r++)
            memcpy(o->y + (m * w->s->streams + r) * D + first, o->w[0] + w->c->ids[m] * D + first, (end - first) * sizeof(float));
}

/* ---- coefficients: pre [R], post [R], comb [R][R] of every row, [.][MOST_ROWS] ---- */

/* From the products z [rows][outputs] of an mHC site, already divided by the root mean square; w: base, scale. */
static void manifold_coef(worker *w, const op *o) {
    const int R = w->s->streams, M = o->outputs;
    for (int t = 0; t < w->rows; t += LANES) {
        lanes mixes[MOST_STREAMS * MOST_STREAMS];
        for (int i = 0; i < M; i++) {
            float z[LANES] = {0};
            for (int m = t; m < w->rows && m < t + LANES; m++) z[m - t] = o->x[m * M + i];
            const lanes logit = load(z) * o->w[1][i < R ? 0 : i < 2 * R ? 1 : 2] + o->w[0][i];
            if (i < R) store(coef_at(w, i) + t, sigmoid_lanes(logit) + w->s->mix_eps);
            else if (i < 2 * R) store(coef_at(w, i) + t, 2.0f * sigmoid_lanes(logit));
            else mixes[i - 2 * R] = logit;
        }
        if (M == R) continue;
        sinkhorn_lanes(mixes, R, w->s->sinkhorn_iters, w->s->mix_eps);
        for (int i = 0; i < R * R; i++) store(coef_at(w, 2 * R + i) + t, mixes[i]);
    }
}

/* Of an unconstrained site. w: theta_pre, theta_post, theta_res, base_pre, base_post, base_res, scale. */
static void free_coef(worker *w, const op *o, const float *streams) {
    const long R = w->s->streams, D = w->s->dim;
    const float *scale = o->w[6];
    for (long m = 0; m < w->rows; m++)
        for (long r = 0; r < R; r++) {
            const float *x = stream_at(w, streams, m, r), rms = inverse_rms(x, D, o->eps);
            coef_at(w, r)[m] = scale[0] * __builtin_tanhf(dot(x, o->w[0], D) * rms) + o->w[3][r];
            coef_at(w, R + r)[m] = scale[1] * __builtin_tanhf(dot(x, o->w[1], D) * rms) + o->w[4][r];
            for (long k = 0; k < R; k++)
                coef_at(w, 2 * R + r * R + k)[m] = scale[2] * __builtin_tanhf(dot(x, o->w[2] + k * D, D) * rms) + o->w[5][r * R + k];
        }
}

/* ---- one site ---- */

/* y [rows][D] = sum of pre times stream. */
static void collapse(worker *w, const float *streams, float *y) {
    const long D = w->s->dim, R = w->s->streams;
    for (long m = 0; m < w->rows; m++)
        for (long d = first_of(w, D); d < end_of(w, D); d++) {
            float sum = 0;
            for (long r = 0; r < R; r++) sum += coef_at(w, r)[m] * stream_at(w, streams, m, r)[d];
            y[m * D + d] = sum;
        }
}

/* x: z of this site; w: base, scale, streams. outputs == R: a read-out. */
static void manifold_enter_op(worker *w, const op *o) {
    manifold_coef(w, o);
    collapse(w, o->w[2], o->y);
}

/* x: streams; w: as free_coef. */
static void free_enter_op(worker *w, const op *o) {
    free_coef(w, o, o->x);
    collapse(w, o->x, o->y);
}

/* y: the mean of the streams x. */
static void mean_op(worker *w, const op *o) {
    for (long r = 0; r < w->s->streams; r++)
        for (long m = 0; m < w->rows; m++) coef_at(w, r)[m] = 1.0f / w->s->streams;
    collapse(w, o->x, o->y);
}

/* Streams y: each its share of x [rows][D] and a mixture of the old ones, comb applied transposed. */
static void leave_op(worker *w, const op *o) {
    const long D = w->s->dim, R = w->s->streams;
    for (long m = 0; m < w->rows; m++)
        for (long d = first_of(w, D); d < end_of(w, D); d++) {
            float old[MOST_STREAMS], *at = o->y + m * R * D + d;
            for (long j = 0; j < R; j++) old[j] = at[j * D];
            for (long k = 0; k < R; k++) {
                float sum = coef_at(w, R + k)[m] * o->x[m * D + d];
                for (long j = 0; j < R; j++) sum += coef_at(w, 2 * R + j * R + k)[m] * old[j];
                at[k * D] = sum;
            }
        }
}

/* y [rows][D]: x normed; w: gain. */
static void norm_op(worker *w, const op *o) {
    float *y = o->y ? o->y : w->c->hidden;
    const long D = o->width;
    for (long m = 0; m < w->rows; m++) {
        const float *x = o->x + m * D, scale = inverse_rms(x, D, o->eps);
        for (long d = first_of(w, D); d < end_of(w, D); d++) y[m * D + d] = x[d] * scale * o->w[0][d];
    }
}

/* ---- memory ---- */

enum { KEYS_AT, STREAM_GAIN, KEY_GAIN, TAPS, CONV_GAIN };

INLINE float open_gate(float score, long hard) {
    if (hard) return score > 0;
    const float size = __builtin_fabsf(score), root = __builtin_sqrtf(size > 1e-6f ? size : 1e-6f);
    return 1.0f / (1.0f + __builtin_expf(score > 0 ? -root : score < 0 ? root : score)); /* 0 and NaN stay what they are */
}

/* Gate of every row and stream -> coef [r]; what turns the value into its norm -> coef [R + r]. */
static void gates_of(worker *w, const op *o, const float *streams) {
    const long D = w->s->dim, R = w->s->streams;
    for (long m = 0; m < w->rows; m++) {
        const float *value = o->x + m * D, mean = dot(value, value, D) / D;
        for (long r = 0; r < R; r++) {
            const float *h = stream_at(w, streams, m, r), *k = stream_at(w, o->w[KEYS_AT], m, r);
            float sum = 0;
            for (long d = 0; d < D; d++) sum += h[d] * (o->w[STREAM_GAIN][r * D + d] * o->w[KEY_GAIN][r * D + d]) * k[d];
            const float score = sum * inverse_rms(h, D, o->eps) * inverse_rms(k, D, o->eps) / __builtin_sqrtf(D);
            const float alpha = coef_at(w, r)[m] = open_gate(score, w->s->hard);
            coef_at(w, R + r)[m] = alpha / __builtin_sqrtf(alpha * alpha * mean + o->eps);
        }
    }
}

INLINE float spoken_at(worker *w, const op *o, long m, long r, long d) {
    return coef_at(w, w->s->streams + r)[m] * o->x[m * w->s->dim + d] * o->w[CONV_GAIN][r * w->s->dim + d];
}

/* The normed value `back` tokens before row m: of this call, or of the tail; 0 where another document was. */
INLINE float heard_at(worker *w, const op *o, long m, long back, long r, long d) {
    const sizes *s = w->s;
    const tail *t = w->c->tails + o->index;
    const long place = place_of(w, m), inside = m % w->c->tokens - back;
    const int64_t *document = w->c->document ? w->c->document + text_of(w, m) * (w->c->before + w->c->tokens) : NULL;
    if (place < back || (document && document[place - back] != document[place])) return 0;
    if (inside >= 0) return spoken_at(w, o, m - back, r, d);
    return t->old[((text_of(w, m) * t->keep + t->keep + inside) * s->streams + r) * s->dim + d];
}

/* The tail after this call: its entries move up and the new ones follow. */
INLINE void keep_tail(worker *w, const op *o, long text, long r, long first, long end) {
    const tail *t = w->c->tails + o->index;
    const long R = w->s->streams, D = w->s->dim, T = w->c->tokens;
    for (long i = 0; i < t->keep; i++) {
        float *to = t->new + ((text * t->keep + i) * R + r) * D;
        if (i + T < t->keep) memcpy(to + first, to + (t->old - t->new) + T * R * D + first, (end - first) * sizeof(float));
        else for (long d = first; d < end; d++) to[d] = spoken_at(w, o, text * T + i + T - t->keep, r, d);
    }
}

/* x: value [rows][D]; y: streams; w: keys [rows][R][D], two gains [R][D], taps [R][D][W] and the gain of their norm or NULL. */
static void memory_op(worker *w, const op *o) {
    const sizes *s = w->s;
    const long D = s->dim, first = first_of(w, D), end = end_of(w, D);
    gates_of(w, o, o->y);
    meet(w); /* the gates read streams whole */
    for (long m = 0; m < w->rows; m++)
        for (long r = 0; r < s->streams; r++)
            for (long d = first; d < end; d++) {
                float sum = 0;
                for (long j = 0; o->w[TAPS] && j < s->taps; j++)
                    sum += heard_at(w, o, m, j * s->dilation, r, d) * o->w[TAPS][(r * D + d) * s->taps + j];
                o->y[(m * s->streams + r) * D + d] += coef_at(w, r)[m] * o->x[m * D + d] + silu(sum);
            }
    for (long text = 0; o->w[TAPS] && text < w->c->batch; text++)
        for (long r = 0; r < s->streams; r++) keep_tail(w, o, text, r, first, end);
}
