/* Attention, forward and backward; formulas in reference.py beside this file, products in product.h.

   Work is cut into items: one head, and every `split`-th block of its queries (forward) or tile of its keys (backward). Items
   write to places of their own, so that results depend on how often heads are split, never on scheduling.

   Forward, for ROWS queries against a tile of keys: scores, their running maximum, their powers, and the products with the
   values, all before the next ROWS. Backward: the powers again, from the log-sum-exp the forward left; then
       d_scores = power * (d_out . values - <out, d_out>)
   which is wanted in two orders, with pairs of keys in a unit for d_q, and with pairs of queries for d_k. */

#include "attention/attention.h"
#include <math.h>
#include <stdlib.h>

typedef struct {
    long Ku, Vu, Kp, Vp; /* widths in units, and rounded up to lanes */
    float *scores, *pull; /* [ROWS][KEYS] */
    float ones[ROWS];
    unit *k_across, *v_across, *k_pairs, *v_pairs;
    /* forward */
    unit *q_block, *powers;
    float *o, *top, *total; /* [QUERIES][Vp], [QUERIES], [QUERIES][LANES] */
    /* backward */
    unit *q_rows, *q_pairs, *g_rows, *g_pairs; /* g: d_out */
    unit *p_pairs, *d_pairs, *d_rows;          /* [QUERIES / pair][KEYS], the same, [QUERIES][KEYS / pair] */
    float *delta, *lse, *d_q, *d_k, *d_v;
} work;

/* Sums, times `scale`, become row `t` of `to`; `rest`, unless NULL, receives what rounding takes. */
INLINE void write_lanes(const heads *to, const heads *rest, long t, long at, long width, lanes v, const int bf16, const int whole) {
    const lanes kept = store_row((row){row_of(to, t, bf16), width, bf16, whole}, at, v);
    if (rest && rest->start) store_row((row){row_of(rest, t, bf16), width, bf16, whole}, at, v - kept);
}

INLINE void write_row(const heads *to, const heads *rest, long t, long width, const float *from, float scale, const int bf16) {
    for (long at = 0; at < width; at += LANES)
        if (at + LANES <= width) write_lanes(to, rest, t, at, width, load(from + at) * scale, bf16, 1);
        else write_lanes(to, rest, t, at, width, load(from + at) * scale, bf16, 0);
}

/* ---- forward ---- */

/* The tile's scores of query t become powers of two above its new maximum; the return value scales what was summed before. */
INLINE float soften(const tile *x, float *s, long t, long columns, float scale, float *top, float *total, char *powers, const int bf16,
                    const int edge) {
    const uint8_t *mask = edge && x->mask ? x->mask + t * x->mask_row : NULL;
    const long keys = seen(x, t);
    lanes high = splat(*top), sum = {0};
    for (long at = 0; at < columns; at += LANES) {
        lanes v = load(s + at) * scale;
        if (edge) v = select_lanes(visible(mask, at, keys), v, splat(-INFINITY));
        store(s + at, v);
        high = larger(high, v);
    }
    const float now = max_of(high), keep = power_lanes(splat(*top - now))[0];
    for (long at = 0; at < columns; at += LANES) {
        lanes e = power_lanes(load(s + at) - now);
        if (edge) e = select_lanes(visible(mask, at, keys), e, splat(0));
        sum += e;
        if (bf16) {
            short_lanes h = narrow(e);
            memcpy(powers + at * 2, &h, sizeof h);
        } else store((float *)powers + at, e);
    }
    store(total, load(total) * keep + sum);
    *top = now;
    return keep;
}

INLINE void forward_tile(const problem *p, work *w, const tile *x, const int bf16) {
    const float scale = (float)(p->scale * M_LOG2E);
    for (long t = 0; t < x->queries; t += ROWS) {
        const long last = min_long(t + ROWS, x->queries) - 1, keys = seen(x, last), columns = round_up(keys, LANES);
        if (!keys) continue;
        const left_units q = {w->q_block + t * w->Ku, w->Ku, 1}, powers = {w->powers, units_for(KEYS, bf16), 1};
        product(q, (right_units){w->k_across + x->key * w->Ku, KEYS}, w->Ku, columns, w->scores, KEYS, NULL, bf16);
        float keep[ROWS];
        for (long r = 0; r < ROWS; r++) {
            float *s = w->scores + r * KEYS, *top = w->top + t + r, *total = w->total + (t + r) * LANES;
            char *to = (char *)(w->powers + r * powers.row);
            const int whole = !x->mask && seen(x, t + r) == columns;
            if (whole) keep[r] = soften(x, s, t + r, columns, scale, top, total, to, bf16, 0);
            else keep[r] = soften(x, s, t + r, columns, scale, top, total, to, bf16, 1);
        }
        const right_units values = {w->v_pairs + units_for(x->key, bf16) * w->Vp, w->Vp};
        product(powers, values, units_for(columns, bf16), w->Vp, w->o + t * w->Vp, w->Vp, keep, bf16);
    }
}

INLINE void forward_block(const problem *p, work *w, long query, const int bf16) {
    const long queries = min_long(QUERIES, p->T - query), keys = p->causal ? min_long(p->S, query + queries) : p->S;
    pack_rows(w->q_block, QUERIES, row_of(&p->q, query, bf16), p->q.row, queries, p->K, bf16);
    memset(w->o, 0, sizeof(float) * QUERIES * w->Vp);
    memset(w->total, 0, sizeof(float) * QUERIES * LANES);
    for (long t = 0; t < QUERIES; t++) w->top[t] = -3.4e38f;
    for (long key = 0; key < keys; key += KEYS) {
        const tile x = tile_at(p, query, key);
        if (!x.hidden) forward_tile(p, w, &x, bf16);
    }
    for (long t = 0; t < queries; t++) {
        const float total = sum_lanes(load(w->total + t * LANES)), inverse = total == 0 ? 0 : 1 / total;
        write_row(&p->out, &p->rest, query + t, p->V, w->o + t * w->Vp, inverse, bf16);
        if (p->lse) p->lse[query + t] = total == 0 ? 0 : w->top[t] + log2f(total);
    }
}

INLINE void forward_item(const problem *p, work *w, long part, long split, const int bf16) {
    const long keys = p->causal ? min_long(p->S, p->T) : p->S;
    for (long key = 0; key < keys; key += KEYS)
        pack_across(w->k_across + key * w->Ku, KEYS, row_of(&p->k, key, bf16), p->k.row, min_long(KEYS, keys - key), p->K, bf16);
    pack_pairs(w->v_pairs, w->Vp, round_up(keys, KEYS), row_of(&p->v, 0, bf16), p->v.row, keys, p->V, bf16);
    for (long query = part * QUERIES; query < p->T; query += split * QUERIES) forward_block(p, w, query, bf16);
}

/* ---- backward ---- */

/* <out, d_out> of each query, and what the forward left. */
INLINE void prepare_rows(const problem *p, work *w, const int bf16) {
    const long padded = round_up(p->T, QUERIES);
    for (long t = 0; t < p->T; t++) {
        lanes sum = {0};
        for (long at = 0; at < p->V; at += LANES) {
            const lanes out = (lanes)spread(row_of(&p->out, t, bf16), at, p->V, bf16);
            const lanes rest = bf16 ? (lanes)spread(row_of(&p->rest, t, bf16), at, p->V, bf16) : splat(0);
            sum += (out + rest) * (lanes)spread(row_of(&p->d_out, t, bf16), at, p->V, bf16);
        }
        w->delta[t] = sum_lanes(sum);
        w->lse[t] = p->lse[t];
    }
    const char *q = row_of(&p->q, 0, bf16), *g = row_of(&p->d_out, 0, bf16);
    pack_rows(w->q_rows, padded, q, p->q.row, p->T, p->K, bf16);
    pack_pairs(w->q_pairs, w->Kp, padded, q, p->q.row, p->T, p->K, bf16);
    pack_rows(w->g_rows, padded, g, p->d_out.row, p->T, p->V, bf16);
    pack_pairs(w->g_pairs, w->Vp, padded, g, p->d_out.row, p->T, p->V, bf16);
    memset(w->d_q, 0, sizeof(float) * padded * w->Kp);
}

INLINE void prepare_keys(const problem *p, work *w, long key, const int bf16) {
    const long keys = min_long(KEYS, p->S - key);
    const char *k = row_of(&p->k, key, bf16), *v = row_of(&p->v, key, bf16);
    pack_across(w->k_across, KEYS, k, p->k.row, keys, p->K, bf16);
    pack_across(w->v_across, KEYS, v, p->v.row, keys, p->V, bf16);
    pack_pairs(w->k_pairs, w->Kp, KEYS, k, p->k.row, keys, p->K, bf16);
    memset(w->d_k, 0, sizeof(float) * KEYS * w->Kp);
    memset(w->d_v, 0, sizeof(float) * KEYS * w->Vp);
}

/* One vector of query t: its powers, and the cotangent of its scaled scores. */
INLINE void slope(const work *w, const tile *x, long t, long at, float scale, lanes *power, lanes *d, const int edge) {
    const long r = t % ROWS * KEYS + at;
    const float delta = w->delta[x->query + t], lse = w->lse[x->query + t];
    *power = power_lanes(load(w->scores + r) * scale - lse);
    *d = *power * (load(w->pull + r) - delta);
    if (!edge) return;
    const signed_lanes yes = visible(x->mask ? x->mask + t * x->mask_row : NULL, at, seen(x, t));
    *power = select_lanes(yes, *power, splat(0));
    *d = select_lanes(yes, *d, splat(0));
}

/* Two queries, so that their bfloat16 can share units; a float is a unit of its own. */
INLINE void slope_pair(const work *w, const tile *x, long t, long at, float scale, const int bf16, const int edge) {
    lanes power[2] = {0}, d[2] = {0};
    for (int i = 0; i < 2; i++)
        if (t + i < x->queries) slope(w, x, t + i, at, scale, power + i, d + i, edge);
    if (!bf16) {
        for (int i = 0; i < 2; i++) store((float *)w->p_pairs + (t + i) * KEYS + at, power[i]);
        for (int i = 0; i < 2; i++) store((float *)w->d_pairs + (t + i) * KEYS + at, d[i]);
        return;
    }
    const short_lanes p0 = narrow(power[0]), p1 = narrow(power[1]), d0 = narrow(d[0]), d1 = narrow(d[1]);
    const bit_lanes both_p = pair_units((bit_lanes)widen(p0), (bit_lanes)widen(p1));
    const bit_lanes both_d = pair_units((bit_lanes)widen(d0), (bit_lanes)widen(d1));
    memcpy(w->p_pairs + t / 2 * KEYS + at, &both_p, sizeof both_p);
    memcpy(w->d_pairs + t / 2 * KEYS + at, &both_d, sizeof both_d);
    memcpy((uint16_t *)w->d_rows + t * KEYS + at, &d0, sizeof d0);
    memcpy((uint16_t *)w->d_rows + (t + 1) * KEYS + at, &d1, sizeof d1);
}

/* Powers and cotangents of the tile's scores, ROWS queries at a time; zero where nothing is seen. */
INLINE void slopes(const problem *p, work *w, const tile *x, const int bf16) {
    const float scale = (float)(p->scale * M_LOG2E);
    for (long t = 0; t < QUERIES; t += ROWS) {
        const long last = min_long(t + ROWS, x->queries) - 1, keys = last < t ? 0 : seen(x, last), columns = round_up(keys, LANES);
        const left_units q = {w->q_rows + (x->query + t) * w->Ku, w->Ku, 1}, g = {w->g_rows + (x->query + t) * w->Vu, w->Vu, 1};
        product(q, (right_units){w->k_across, KEYS}, w->Ku, columns, w->scores, KEYS, NULL, bf16);
        product(g, (right_units){w->v_across, KEYS}, w->Vu, columns, w->pull, KEYS, NULL, bf16);
        for (long pair = t; pair < t + ROWS; pair += 2) {
            const int whole = !x->mask && seen(x, pair) == columns && seen(x, pair + 1) == columns;
            for (long at = 0; whole && at < columns; at += LANES) slope_pair(w, x, pair, at, scale, bf16, 0);
            for (long at = 0; !whole && at < columns; at += LANES) slope_pair(w, x, pair, at, scale, bf16, 1);
            const long rest = (KEYS - columns) * sizeof(float);
            for (long u = units_for(pair, bf16); u < units_for(pair + 2, bf16); u++) {
                memset(w->p_pairs + u * KEYS + columns, 0, rest);
                memset(w->d_pairs + u * KEYS + columns, 0, rest);
            }
            for (long i = pair; bf16 && i < pair + 2; i++) memset((uint16_t *)w->d_rows + i * KEYS + columns, 0, rest / 2);
        }
    }
}

INLINE void backward_tile(const problem *p, work *w, const tile *x, const int bf16) {
    const long wide = unit_width(bf16), first_unit = units_for(x->query, bf16);
    slopes(p, w, x, bf16);
    for (long s = 0; s < x->keys; s += ROWS) {
        const long skip = x->causal ? max_long(0, x->key + s - x->query) / wide : 0, units = QUERIES / wide - skip;
        const left_units powers = {w->p_pairs + skip * KEYS + s, 1, KEYS}, d = {w->d_pairs + skip * KEYS + s, 1, KEYS};
        const right_units g = {w->g_pairs + (first_unit + skip) * w->Vp, w->Vp}, q = {w->q_pairs + (first_unit + skip) * w->Kp, w->Kp};
        if (units <= 0) continue;
        product(powers, g, units, w->Vp, w->d_v + s * w->Vp, w->Vp, w->ones, bf16);
        product(d, q, units, w->Kp, w->d_k + s * w->Kp, w->Kp, w->ones, bf16);
    }
    for (long t = 0; t < x->queries; t += ROWS) {
        const long keys = seen(x, min_long(t + ROWS, x->queries) - 1);
        const left_units d = bf16 ? (left_units){w->d_rows + t * KEYS / 2, KEYS / 2, 1} : (left_units){w->d_pairs + t * KEYS, KEYS, 1};
        float *d_q = w->d_q + (x->query + t) * w->Kp;
        product(d, (right_units){w->k_pairs, w->Kp}, units_for(keys, bf16), w->Kp, d_q, w->Kp, w->ones, bf16);
    }
}

INLINE void write_rows(const heads *to, long first, long rows, long width, const float *from, long stride, float scale,
                       const int bf16) {
    for (long r = 0; r < rows; r++) write_row(to, NULL, first + r, width, from + r * stride, scale, bf16);
}

INLINE void backward_item(const problem *p, work *w, long part, long split, const int bf16) {
    prepare_rows(p, w, bf16);
    for (long key = part * KEYS; key < p->S; key += split * KEYS) {
        prepare_keys(p, w, key, bf16);
        for (long query = p->causal ? key / QUERIES * QUERIES : 0; query < p->T; query += QUERIES) {
            const tile x = tile_at(p, query, key);
            if (!x.hidden) backward_tile(p, w, &x, bf16);
        }
        const long keys = min_long(KEYS, p->S - key);
        write_rows(&p->d_k, key, keys, p->K, w->d_k, w->Kp, (float)p->scale, bf16);
        write_rows(&p->d_v, key, keys, p->V, w->d_v, w->Vp, 1, bf16);
    }
    if (split == 1) write_rows(&p->d_q, 0, p->T, p->K, w->d_q, w->Kp, (float)p->scale, bf16);
}

/* ---- work space, items, entry points ---- */

/* Pointers into `block`; only the size when it is NULL. */
static size_t place(work *w, const problem *p, int backward, char *block) {
    const long T = round_up(p->T, QUERIES), S = round_up(backward ? KEYS : p->S, KEYS), b = backward, f = !backward;
    *w = (work){.Ku = units_for(p->K, p->bf16), .Vu = units_for(p->V, p->bf16), .Kp = round_up(p->K, LANES), .Vp = round_up(p->V, LANES)};
    const struct {
        void *field;
        long numbers; /* of 4 bytes */
    } plan[] = {
        {&w->scores, ROWS * KEYS},
        {&w->k_across, w->Ku * S},
        {&w->v_pairs, f * units_for(S, p->bf16) * w->Vp},
        {&w->q_block, f * QUERIES * w->Ku},
        {&w->powers, f * ROWS * units_for(KEYS, p->bf16)},
        {&w->o, f * QUERIES * w->Vp},
        {&w->top, f * QUERIES},
        {&w->total, f * QUERIES * LANES},
        {&w->pull, b * ROWS * KEYS},
        {&w->v_across, b * w->Vu * KEYS},
        {&w->k_pairs, b * units_for(KEYS, p->bf16) * w->Kp},
        {&w->q_rows, b * T * w->Ku},
        {&w->g_rows, b * T * w->Vu},
        {&w->q_pairs, b * units_for(T, p->bf16) * w->Kp},
        {&w->g_pairs, b * units_for(T, p->bf16) * w->Vp},
        {&w->p_pairs, b * QUERIES * KEYS},
        {&w->d_pairs, b * QUERIES * KEYS},
        {&w->d_rows, b * QUERIES * KEYS / 2},
        {&w->delta, b * T},
        {&w->lse, b * T},
        {&w->d_q, b * T * w->Kp},
        {&w->d_k, b * KEYS * w->Kp},
        {&w->d_v, b * KEYS * w->Vp},
    };
    size_t used = 0;
    for (size_t i = 0; i < sizeof plan / sizeof *plan; i++) {
        char *start = block + used;
        if (block) memcpy(plan[i].field, &start, sizeof start);
        used += round_up(plan[i].numbers * 4, 64);
    }
    for (int r = 0; r < ROWS; r++) w->ones[r] = 1;
    return used;
}

static void run_item(const problem *p, work *w, long item, long split, int backward) {
    const problem one = only_head(p, item / split);
    const long part = item % split;
    if (!backward && p->bf16) forward_item(&one, w, part, split, 1);
    else if (!backward) forward_item(&one, w, part, split, 0);
    else if (p->bf16) backward_item(&one, w, part, split, 1);
    else backward_item(&one, w, part, split, 0);
}

/* d_q of heads that were split: the parts' sums, added in order. */
static void sum_parts(const problem *p, float *partial, long split, long numbers) {
    const long Kp = round_up(p->K, LANES);
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (long head = 0; head < p->B * p->H; head++) {
        const problem one = only_head(p, head);
        float *sum = partial + head * split * numbers;
        for (long part = 1; part < split; part++)
            for (long i = 0; i < numbers; i += LANES) store(sum + i, load(sum + i) + load(sum + part * numbers + i));
        write_rows(&one.d_q, 0, p->T, p->K, sum, Kp, (float)p->scale, p->bf16);
    }
}

/* 0, or 1 when memory ran out. */
static int run(const problem *p, int backward) {
    const long count = p->B * p->H, tiles = backward ? (p->S + KEYS - 1) / KEYS : (p->T + QUERIES - 1) / QUERIES;
    const long split = count ? max_long(1, min_long(tiles, (p->threads + count - 1) / count)) : 1;
    const long numbers = round_up(p->T, QUERIES) * round_up(p->K, LANES); /* of one d_q */
    work shape;
    const size_t bytes = place(&shape, p, backward, NULL);
    char *block = aligned_alloc(64, bytes * p->threads);
    float *partial = backward && split > 1 ? aligned_alloc(64, sizeof(float) * count * split * numbers) : NULL;
    const int failed = !block || (backward && split > 1 && !partial);
    long next = 0;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (long thread = 0; thread < p->threads; thread++) {
        work w;
        if (failed) continue;
        place(&w, p, backward, block + thread * bytes);
        for (long item = 0;;) {
#pragma omp atomic capture
            item = next++;
            if (item >= count * split) break;
            if (partial) w.d_q = partial + item * numbers;
            run_item(p, &w, item, split, backward);
        }
    }
    if (!failed && partial) sum_parts(p, partial, split, numbers);
    free(partial);
    free(block);
    return failed;
}

int attention_forward(const problem *p) { return run(p, 0); }

int attention_backward(const problem *p) { return run(p, 1); }

/* Whether this build has vectors wide enough to be worth its use. */
int attention_is_wide(void) { return LANES >= 8; }
