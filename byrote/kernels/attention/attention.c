/* Attention, forward and backward; formulas in reference.py beside this file, products in product.h.

   Work is cut into items: one head, and every `split`-th block of its queries (forward) or tile of its keys (backward). Items
   write to places of their own, so that results depend on how often heads are split, never on scheduling.

   Forward, for ROWS queries against a tile of keys: scores, their running maximum, their powers, and the products with the
   values, all before the next ROWS. Backward: the powers again, from the log-sum-exp the forward left; then
       slope = power * (<d_out, values> - <d_out, out>)
   which is wanted in two orders, with pairs of keys in a unit for d_q, and with pairs of queries for d_k. */

#include "attention/attention.h"
#include <math.h>
#include <stdlib.h>

typedef struct {
    long Ku, Vu, Kp, Vp;  /* widths in units, and rounded up to lanes */
    float *scores, *pull; /* [ROWS][KEYS] */
    float ones[ROWS];
    unit *k_across, *v_across, *k_pairs, *v_pairs;
    /* forward */
    unit *q_block, *powers;
    float *o, *top, *total; /* [QUERIES][Vp], [QUERIES], [QUERIES][LANES] */
    /* backward */
    unit *q_rows, *q_pairs, *g_rows, *g_pairs; /* g: d_out */
    unit *p_pairs, *d_pairs, *d_rows;          /* powers and slopes: [QUERIES / pair][KEYS] twice, [QUERIES][KEYS / pair] */
    float *delta, *d_q, *d_k, *d_v;            /* delta: <d_out, out> */
} work;

/* Packed operands, from a column that begins a panel, or from a unit on. */
INLINE right_units across(const unit *at, long units, long column) { return (right_units){at + column * units, PANEL, units * PANEL}; }

INLINE right_units pairs(const unit *at, long columns, long u) { return (right_units){at + u * columns, columns, PANEL}; }

/* ---- forward ---- */

/* Scaled scores of query t; those it does not see are far below all others. */
INLINE lanes scores_at(const problem *p, const work *w, long t, long key, long at, float scale, const int edge) {
    const lanes v = load(w->scores + t % ROWS * KEYS + at) * scale;
    return edge ? select_lanes(visible(p, t, key + at), v, splat(-INFINITY)) : v;
}

INLINE lanes powers_at(const problem *p, const work *w, long t, long key, long at, float scale, float top, const int edge) {
    const lanes e = power_lanes(load(w->scores + t % ROWS * KEYS + at) * scale - top);
    return edge ? select_lanes(visible(p, t, key + at), e, splat(0)) : e;
}

INLINE float peak(const problem *p, const work *w, long t, long key, range r, range plain, float scale) {
    lanes high = splat(w->top[t % QUERIES]);
    for (long at = r.first; at < r.end; at += LANES)
        if (at >= plain.first && at < plain.end) high = at_least(scores_at(p, w, t, key, at, scale, 0), high);
        else high = at_least(scores_at(p, w, t, key, at, scale, 1), high);
    return max_of(high);
}

/* The scores become powers of two above the maximum; the return value is their sum. */
INLINE lanes soften(const problem *p, const work *w, long t, long key, range r, range plain, float scale, const int bf16) {
    const row to = {w->powers + t % ROWS * units_for(KEYS, bf16), KEYS, bf16, 1};
    const float top = w->top[t % QUERIES];
    lanes sum = {0};
    for (long at = r.first; at < r.end; at += LANES) {
        lanes e;
        if (at >= plain.first && at < plain.end) e = powers_at(p, w, t, key, at, scale, top, 0);
        else e = powers_at(p, w, t, key, at, scale, top, 1);
        store_row(to, at, e);
        sum += e;
    }
    return sum;
}

/* Both for ROWS queries, so that the processor may work on one while it waits for another; `keep` scales what was summed before. */
INLINE void soften_rows(const problem *p, work *w, long t, long key, range r, float *keep, const int bf16) {
    const float scale = (float)(p->scale * M_LOG2E);
    range plain[ROWS];
    for (long i = 0; i < ROWS; i++) {
        float *top = w->top + t % QUERIES + i;
        plain[i] = plain_range(p, t + i, 0, key);
        const float high = peak(p, w, t + i, key, r, plain[i], scale);
        keep[i] = power_lanes(splat(*top - high))[0];
        *top = high;
    }
    for (long i = 0; i < ROWS; i++) {
        float *total = w->total + (t % QUERIES + i) * LANES;
        const lanes sum = soften(p, w, t + i, key, r, plain[i], scale, bf16);
        store(total, load(total) * keep[i] + sum);
    }
}

/* A block of queries against a tile of keys. */
INLINE void forward_tile(const problem *p, work *w, long query, long key, const int bf16) {
    for (long t = query; t < min_long(query + QUERIES, p->T); t += ROWS) {
        const range r = range_of(p, t, ROWS, key);
        if (r.first >= r.end) continue;
        const left_units q = {w->q_block + (t - query) * w->Ku, w->Ku, 1};
        product(q, across(w->k_across, w->Ku, key + r.first), w->Ku, r.end - r.first, w->scores + r.first, KEYS, NULL, bf16);
        float keep[ROWS];
        soften_rows(p, w, t, key, r, keep, bf16);
        const long skip = units_for(r.first, bf16), units = units_for(r.end, bf16) - skip, from = units_for(key, bf16) + skip;
        const left_units powers = {w->powers + skip, units_for(KEYS, bf16), 1};
        product(powers, pairs(w->v_pairs, w->Vp, from), units, w->Vp, w->o + (t - query) * w->Vp, w->Vp, keep, bf16);
    }
}

INLINE void forward_block(const problem *p, work *w, long query, const int bf16) {
    const long queries = min_long(QUERIES, p->T - query);
    pack_rows(w->q_block, QUERIES, row_of(&p->q, query, bf16), p->q.row, queries, p->K, bf16);
    memset(w->o, 0, sizeof(float) * QUERIES * w->Vp);
    memset(w->total, 0, sizeof(float) * QUERIES * LANES);
    for (long t = 0; t < QUERIES; t++) w->top[t] = -3.4e38f;
    for (long key = 0; key < p->S; key += KEYS) forward_tile(p, w, query, key, bf16);
    for (long t = 0; t < queries; t++) {
        const float total = sum_lanes(load(w->total + t * LANES)), inverse = total == 0 ? 0 : 1 / total;
        write_row(&p->out, &p->rest, query + t, p->V, w->o + t * w->Vp, inverse, bf16);
        if (p->lse) p->lse[query + t] = total == 0 ? 0 : w->top[t] + log2f(total);
    }
}

INLINE void forward_item(const problem *p, work *w, long part, long split, const int bf16) {
    pack_across(w->k_across, round_up(p->S, KEYS), row_of(&p->k, 0, bf16), p->k.row, p->S, p->K, bf16, bf16);
    pack_pairs(w->v_pairs, w->Vp, round_up(p->S, KEYS), row_of(&p->v, 0, bf16), p->v.row, p->S, p->V, bf16, bf16);
    for (long query = part * QUERIES; query < p->T; query += split * QUERIES) forward_block(p, w, query, bf16);
}

/* ---- backward ---- */

INLINE void prepare_queries(const problem *p, work *w, const int bf16) {
    const long padded = round_up(p->T, QUERIES);
    const char *q = row_of(&p->q, 0, bf16), *g = row_of(&p->d_out, 0, bf16);
    pack_rows(w->q_rows, padded, q, p->q.row, p->T, p->K, bf16);
    pack_pairs(w->q_pairs, w->Kp, padded, q, p->q.row, p->T, p->K, bf16, bf16);
    pack_rows(w->g_rows, padded, g, p->d_out.row, p->T, p->V, bf16);
    pack_pairs(w->g_pairs, w->Vp, padded, g, p->d_out.row, p->T, p->V, bf16, bf16);
    memset(w->d_q, 0, sizeof(float) * padded * w->Kp);
    for (long t = 0; t < p->T; t++) {
        const row out = {row_of(&p->out, t, bf16), p->V, bf16, 0}, above = {row_of(&p->d_out, t, bf16), p->V, bf16, 0};
        const row rest = {row_of(&p->rest, t, bf16), p->V, bf16, 0};
        lanes sum = {0};
        for (long at = 0; at < p->V; at += LANES)
            sum += (bf16 ? load_row(out, at) + load_row(rest, at) : load_row(out, at)) * load_row(above, at);
        w->delta[t] = sum_lanes(sum);
    }
}

INLINE void prepare_keys(const problem *p, work *w, long key, const int bf16) {
    const long keys = min_long(KEYS, p->S - key);
    const char *k = row_of(&p->k, key, bf16), *v = row_of(&p->v, key, bf16);
    pack_across(w->k_across, KEYS, k, p->k.row, keys, p->K, bf16, bf16);
    pack_across(w->v_across, KEYS, v, p->v.row, keys, p->V, bf16, bf16);
    pack_pairs(w->k_pairs, w->Kp, KEYS, k, p->k.row, keys, p->K, bf16, bf16);
    memset(w->d_k, 0, sizeof(float) * KEYS * w->Kp);
    memset(w->d_v, 0, sizeof(float) * KEYS * w->Vp);
}

/* One vector of query t: its powers and slopes. */
INLINE void slope(const problem *p, const work *w, long t, long key, long at, lanes *power, lanes *d, const int edge) {
    const long i = t % ROWS * KEYS + at;
    if (edge && t >= p->T) return;
    *power = power_lanes(load(w->scores + i) * (float)(p->scale * M_LOG2E) - p->lse[t]);
    *d = *power * (load(w->pull + i) - w->delta[t]);
    if (!edge) return;
    const signed_lanes yes = visible(p, t, key + at);
    *power = select_lanes(yes, *power, splat(0));
    *d = select_lanes(yes, *d, splat(0));
}

/* Two queries, so that their bfloat16 can share units; a float is a unit of its own. */
INLINE void slope_pair(const problem *p, const work *w, long t, long key, long at, const int bf16, const int edge) {
    const long t0 = t % QUERIES;
    lanes power[2] = {0}, d[2] = {0};
    for (int i = 0; i < 2; i++) slope(p, w, t + i, key, at, power + i, d + i, edge);
    if (!bf16) {
        for (int i = 0; i < 2; i++) store((float *)w->p_pairs + (t0 + i) * STEP + at, power[i]);
        for (int i = 0; i < 2; i++) store((float *)w->d_pairs + (t0 + i) * STEP + at, d[i]);
        return;
    }
    const short_lanes p0 = narrow(power[0]), p1 = narrow(power[1]), d0 = narrow(d[0]), d1 = narrow(d[1]);
    const bit_lanes both_p = pair_units((bit_lanes)widen(p0), (bit_lanes)widen(p1));
    const bit_lanes both_d = pair_units((bit_lanes)widen(d0), (bit_lanes)widen(d1));
    memcpy(w->p_pairs + t0 / 2 * STEP + at, &both_p, sizeof both_p);
    memcpy(w->d_pairs + t0 / 2 * STEP + at, &both_d, sizeof both_d);
    memcpy((uint16_t *)w->d_rows + t0 * STEP + at, &d0, sizeof d0);
    memcpy((uint16_t *)w->d_rows + (t0 + 1) * STEP + at, &d1, sizeof d1);
}

/* Powers and slopes of ROWS queries from t; pairs that are not seen become zero, so that d_k and d_v may run over them. */
APART void slopes(const problem *p, work *w, long t, long key, range r, const int bf16) {
    const left_units q = {w->q_rows + t * w->Ku, w->Ku, 1}, g = {w->g_rows + t * w->Vu, w->Vu, 1};
    const long wide = r.end - r.first;
    if (wide > 0) {
        product(q, across(w->k_across, w->Ku, r.first), w->Ku, wide, w->scores + r.first, KEYS, NULL, bf16);
        product(g, across(w->v_across, w->Vu, r.first), w->Vu, wide, w->pull + r.first, KEYS, NULL, bf16);
    }
    for (long pair = t; pair < t + ROWS; pair += 2) {
        const range plain = plain_range(p, pair, 1, key);
        for (long at = r.first; at < r.end; at += LANES)
            if (at >= plain.first && at < plain.end) slope_pair(p, w, pair, key, at, bf16, 0);
            else slope_pair(p, w, pair, key, at, bf16, 1);
        for (long u = units_for(pair % QUERIES, bf16), end = u + units_for(2, bf16); u < end; u++)
            for (long at = 0; at < KEYS; at += LANES) {
                if (at >= r.first && at < r.end) continue;
                store((float *)w->p_pairs + u * STEP + at, splat(0));
                store((float *)w->d_pairs + u * STEP + at, splat(0));
            }
    }
}

/* d_v and d_k of ROWS keys from s: the sums over the queries [t, end) of the block. */
INLINE void pull_keys(work *w, long query, long s, long t, long end, const int bf16) {
    const long skip = units_for(t, bf16), units = units_for(end, bf16) - skip, from = units_for(query, bf16) + skip;
    const left_units powers = {w->p_pairs + skip * STEP + s, 1, STEP}, d = {w->d_pairs + skip * STEP + s, 1, STEP};
    product(powers, pairs(w->g_pairs, w->Vp, from), units, w->Vp, w->d_v + s * w->Vp, w->Vp, w->ones, bf16);
    product(d, pairs(w->q_pairs, w->Kp, from), units, w->Kp, w->d_k + s * w->Kp, w->Kp, w->ones, bf16);
}

INLINE void backward_tile(const problem *p, work *w, long query, long key, const int bf16) {
    range rows[QUERIES / ROWS];
    for (long i = 0; i < QUERIES / ROWS; i++) {
        rows[i] = range_of(p, query + i * ROWS, ROWS, key);
        slopes(p, w, query + i * ROWS, key, rows[i], bf16);
    }
    for (long s = 0; s < KEYS; s += LANES) { /* from the first to the last queries that see any of these keys */
        long first = 0, end = QUERIES / ROWS;
        while (first < end && (s < rows[first].first || s >= rows[first].end)) first++;
        while (first < end && (s < rows[end - 1].first || s >= rows[end - 1].end)) end--;
        for (long i = s; first < end && i < s + LANES; i += ROWS) pull_keys(w, query, i, first * ROWS, end * ROWS, bf16);
    }
    for (long i = 0; i < QUERIES / ROWS; i++) {
        const long row = bf16 ? STEP / 2 : STEP, skip = units_for(rows[i].first, bf16), units = units_for(rows[i].end, bf16) - skip;
        const left_units d = {(bf16 ? w->d_rows : w->d_pairs) + i * ROWS * row + skip, row, 1};
        float *d_q = w->d_q + (query + i * ROWS) * w->Kp;
        if (units > 0) product(d, pairs(w->k_pairs, w->Kp, skip), units, w->Kp, d_q, w->Kp, w->ones, bf16);
    }
}

INLINE void backward_item(const problem *p, work *w, long part, long split, const int bf16) {
    prepare_queries(p, w, bf16);
    for (long key = part * KEYS; key < p->S; key += split * KEYS) {
        const long keys = min_long(KEYS, p->S - key);
        prepare_keys(p, w, key, bf16);
        for (long query = 0; query < p->T; query += QUERIES) {
            const range seen = range_of(p, query, QUERIES, key);
            if (seen.first < seen.end) backward_tile(p, w, query, key, bf16);
        }
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
        {&w->p_pairs, b * units_for(QUERIES, p->bf16) * STEP},
        {&w->d_pairs, b * units_for(QUERIES, p->bf16) * STEP},
        {&w->d_rows, b * QUERIES * STEP / 2},
        {&w->delta, b * T},
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
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (long head = 0; head < p->B * p->H; head++) {
        const problem one = only_head(p, head);
        float *sum = partial + head * split * numbers;
        for (long part = 1; part < split; part++)
            for (long i = 0; i < numbers; i += LANES) store(sum + i, load(sum + i) + load(sum + part * numbers + i));
        write_rows(&one.d_q, 0, p->T, p->K, sum, round_up(p->K, LANES), (float)p->scale, p->bf16);
    }
}

/* 0, or 1 when memory ran out. */
static int run(const problem *given, int backward) {
    problem p = *given;
    const long count = p.B * p.H, tiles = backward ? (p.S + KEYS - 1) / KEYS : (p.T + QUERIES - 1) / QUERIES;
    const long split = count ? max_long(1, min_long(tiles, (p.threads + count - 1) / count)) : 1;
    const long numbers = round_up(p.T, QUERIES) * round_up(p.K, LANES); /* of one d_q */
    work shape;
    const size_t bytes = place(&shape, &p, backward, NULL);
    char *block = aligned_alloc(64, bytes * p.threads);
    float *partial = backward && split > 1 ? aligned_alloc(64, sizeof(float) * count * split * numbers) : NULL;
    p.spans = malloc(sizeof(span) * (p.B * p.T + 1));
    const int failed = !block || !p.spans || (backward && split > 1 && !partial);
    long next = 0;
    if (!failed) find_spans(&p);
#pragma omp parallel for schedule(static) num_threads(p.threads)
    for (long thread = 0; thread < p.threads; thread++) {
        work w;
        if (failed) continue;
        place(&w, &p, backward, block + thread * bytes);
        for (long item = 0;;) {
#pragma omp atomic capture
            item = next++;
            if (item >= count * split) break;
            if (partial) w.d_q = partial + item * numbers;
            run_item(&p, &w, item, split, backward);
        }
    }
    if (!failed && partial) sum_parts(&p, partial, split, numbers);
    free(p.spans);
    free(partial);
    free(block);
    return failed;
}

int attention_forward(const problem *p) { return run(p, 0); }

int attention_backward(const problem *p) { return run(p, 1); }

/* Whether this build has vectors wide enough to be worth its use. */
int attention_is_wide(void) { return LANES >= 8; }
