/* Gate, value and short convolution of a memory layer, forward and backward; formulas in reference.py beside this file.

   All streams of a token hear the same value v, scaled by a_r, so its norm is a_r v / sqrt(a_r^2 mean v^2 + eps): one factor c_r a token
   and stream, times v. The convolution therefore reads rows of v and these factors; the [T, R, D] tensor that it is defined on
   is never built.

   Forward: every token's score, gate and factor; then every token's streams. Backward: the convolution, by blocks of channels and
   backwards in time, so that a ring holds all cotangents a token needs; then every token's gate. Sums over tokens are kept
   per part and added in the order of the parts: results depend on `threads`, never on scheduling.

   Shapes: B batch, T tokens a row, N = B T, R streams, D model width, W taps. */

#include "lanes.h"

#define MAX_R 8
#define MAX_W 8
#define BLOCK 64 /* channels of a block; ring, taps and their cotangents fit the first-level cache */
#define FLOOR 1e-6f

typedef struct { /* mirrored in cpu.py */
    long B, T, R, D, W, dilation, hard;
    const void *streams, *keys, *value;
    const float *gain, *taps;  /* [R][D], [W][R][D] with the gain of the norm inside; W is 0 without convolution */
    const int64_t *document;   /* [B][T] or NULL */
    void *out;                 /* [N][R][D] */
    float *alpha, *kept;       /* [N][R], [N][4 R + 1]: scores, inverse root mean squares of h and k, factors c, mean v^2 */
    const void *d_out;
    const float *d_alpha;
    void *d_streams, *d_keys, *d_value;
    float *d_gain, *d_taps;    /* [threads][...], the first receives the sum */
    float *conv_value;         /* [N][D] cotangent of v through the convolution */
    float *conv_factor;        /* [blocks][N][R] cotangent of c, by blocks of channels */
} job;

INLINE float *kept_at(const job *j, long n) { return j->kept + n * (4 * j->R + 1); }
INLINE float factor_at(const job *j, long n, int r) { return kept_at(j, n)[3 * j->R + r]; }

/* Whether token n of its row sees the one `back` before it. */
INLINE int sees(const job *j, long n, long back) { return n % j->T >= back && (!j->document || j->document[n - back] == j->document[n]); }

INLINE float inverse_root(float v) { return 1.0f / __builtin_sqrtf(v); }

INLINE float soft_gate(float score) {
    const float size = __builtin_fabsf(score), root = __builtin_sqrtf(size > FLOOR ? size : FLOOR);
    return 1.0f / (1.0f + __builtin_expf(score > 0 ? -root : score < 0 ? root : score)); /* 0 and NaN stay what they are */
}

/* ---- forward ---- */

INLINE void score_token(const job *j, long n, float eps, const int R, const int bf16, const int whole) {
    const long D = j->D;
    const row value = row_at(j->value, n, D, bf16, whole);
    float *kept = kept_at(j, n);
    lanes square = {0};
    for (long d = 0; d < D; d += LANES) square += load_row(value, d) * load_row(value, d);
    const float mean = kept[4 * R] = sum_lanes(square) / D;
    for (int r = 0; r < R; r++) {
        const row stream = row_at(j->streams, n * R + r, D, bf16, whole), key = row_at(j->keys, n * R + r, D, bf16, whole);
        const row gain = row_at(j->gain, r, D, 0, whole);
        lanes dot = {0}, hh = {0}, kk = {0};
        for (long d = 0; d < D; d += LANES) {
            lanes h = load_row(stream, d), k = load_row(key, d);
            dot += h * load_row(gain, d) * k;
            hh += h * h;
            kk += k * k;
        }
        const float inverse_h = inverse_root(sum_lanes(hh) / D + eps), inverse_k = inverse_root(sum_lanes(kk) / D + eps);
        const float score = sum_lanes(dot) * inverse_h * inverse_k / __builtin_sqrtf(D);
        const float alpha = j->hard ? score > 0 : soft_gate(score);
        kept[r] = score;
        kept[R + r] = inverse_h;
        kept[2 * R + r] = inverse_k;
        kept[3 * R + r] = alpha * inverse_root(alpha * alpha * mean + eps);
        j->alpha[n * R + r] = alpha;
    }
}

/* Tokens whose v the taps of token n read, with the factors of each stream; what it does not see has factor 0. */
INLINE void look_back(const job *j, long n, long seen[MAX_W], float factor[MAX_W][MAX_R], const int R) {
    for (long w = 0; w < j->W; w++) {
        const int inside = sees(j, n, w * j->dilation);
        seen[w] = inside ? n - w * j->dilation : n;
        for (int r = 0; r < R; r++) factor[w][r] = inside ? factor_at(j, seen[w], r) : 0;
    }
}

INLINE void speak_token(const job *j, long n, const int R, const int bf16, const int whole) {
    const long D = j->D, W = j->W;
    const row value = row_at(j->value, n, D, bf16, whole);
    long seen[MAX_W];
    float factor[MAX_W][MAX_R];
    look_back(j, n, seen, factor, R);
    for (long d = 0; d < D; d += LANES) {
        lanes v = load_row(value, d), before[MAX_W];
        for (long w = 0; w < W; w++) before[w] = load_row(row_at(j->value, seen[w], D, bf16, whole), d);
        for (int r = 0; r < R; r++) {
            lanes sum = {0}, out = load_row(row_at(j->streams, n * R + r, D, bf16, whole), d) + j->alpha[n * R + r] * v;
            for (long w = 0; w < W; w++) sum += factor[w][r] * load_row(row_at(j->taps, w * R + r, D, 0, whole), d) * before[w];
            if (W) out += sum * sigmoid_lanes(sum);
            store_row(row_at(j->out, n * R + r, D, bf16, whole), d, out);
        }
    }
}

/* ---- backward ---- */

/* Writes du, the cotangent of the convolution's sum, of token n for channels [from, from + count) to `ring` [R][BLOCK]. */
INLINE void slope_token(const job *j, long n, long from, long count, float *ring, const int R, const int bf16, const int whole) {
    long seen[MAX_W];
    float factor[MAX_W][MAX_R];
    look_back(j, n, seen, factor, R);
    for (long d = 0; d < count; d += LANES) {
        lanes before[MAX_W];
        for (long w = 0; w < j->W; w++) before[w] = load_row(row_at(j->value, seen[w], j->D, bf16, whole), from + d);
        for (int r = 0; r < R; r++) {
            lanes sum = {0}, grad = load_row(row_at(j->d_out, n * R + r, j->D, bf16, whole), from + d);
            for (long w = 0; w < j->W; w++) sum += factor[w][r] * load_row(row_at(j->taps, w * R + r, j->D, 0, whole), from + d) * before[w];
            lanes open = sigmoid_lanes(sum);
            store(ring + r * BLOCK + d, grad * open * (1.0f + sum * (1.0f - open)));
        }
    }
}

/* What token n receives from the tokens whose taps see it; their slopes lie in `ring` [slots][R][BLOCK]. */
INLINE void gather_token(const job *j, long n, long from, long count, const float *ring, long slots, float *d_taps, float *d_factor, const int R,
                         const int bf16, const int whole) {
    const long t = n % j->T, D = j->D;
    const row value = row_at(j->value, n, D, bf16, whole), d_value = row_at(j->conv_value, n, D, 0, whole);
    lanes pulled[MAX_R] = {0};
    for (long d = 0; d < count; d += LANES) {
        lanes v = load_row(value, from + d), total = {0};
        for (long w = 0; w < j->W; w++) {
            const long later = n + w * j->dilation;
            if (t + w * j->dilation >= j->T || !sees(j, later, w * j->dilation)) continue;
            const float *slopes = ring + later % j->T % slots * R * BLOCK;
            for (int r = 0; r < R; r++) {
                const row tap = row_at(j->taps, w * R + r, D, 0, whole), sum = row_at(d_taps, w * R + r, D, 0, whole);
                lanes slope = load(slopes + r * BLOCK + d), along = slope * load_row(tap, from + d);
                const float factor = factor_at(j, n, r);
                store_row(sum, from + d, load_row(sum, from + d) + factor * slope * v);
                pulled[r] += along * v;
                total += factor * along;
            }
        }
        store_row(d_value, from + d, total);
    }
    for (int r = 0; r < R; r++) d_factor[n * R + r] = sum_lanes(pulled[r]);
}

INLINE void conv_back(const job *j, long b, long block, float *d_taps, const int R, const int bf16, const int whole) {
    const long from = block * BLOCK, count = j->D - from < BLOCK ? j->D - from : BLOCK, slots = (j->W - 1) * j->dilation + 1;
    float ring[slots * R * BLOCK];
    for (long t = j->T - 1; t >= 0; t--) {
        const long n = b * j->T + t;
        slope_token(j, n, from, count, ring + t % slots * R * BLOCK, R, bf16, whole);
        gather_token(j, n, from, count, ring, slots, d_taps, j->conv_factor + block * j->B * j->T * R, R, bf16, whole);
    }
}

/* Factors of one stream's own cotangents: dh = d_out + mix gain k - own_h h, dk = mix gain h - own_k k; returns its share of d(mean v^2). */
INLINE float gate_slopes(const job *j, long n, int r, float d_alpha, float eps, float *mix, float *own_h, float *own_k) {
    const long R = j->R, D = j->D, N = j->B * j->T, blocks = j->W ? (D + BLOCK - 1) / BLOCK : 0;
    const float *kept = kept_at(j, n), score = kept[r], inverse_h = kept[R + r], inverse_k = kept[2 * R + r], alpha = j->alpha[n * R + r];
    const float size = __builtin_fabsf(score), inverse = inverse_root(alpha * alpha * kept[4 * R] + eps), cube = inverse * inverse * inverse;
    float d_factor = 0;
    for (long block = 0; block < blocks; block++) d_factor += j->conv_factor[(block * N + n) * R + r];
    d_alpha += j->d_alpha[n * R + r] + d_factor * eps * cube;
    const float soft = soft_gate(score), slope = size > FLOOR ? d_alpha * soft * (1.0f - soft) * 0.5f / __builtin_sqrtf(size) : 0;
    *mix = slope * inverse_h * inverse_k / __builtin_sqrtf(D);
    *own_h = slope * score * inverse_h * inverse_h / D;
    *own_k = slope * score * inverse_k * inverse_k / D;
    return -0.5f * d_factor * alpha * alpha * alpha * cube;
}

INLINE void gate_back(const job *j, long n, float eps, float *d_gain, const int R, const int bf16, const int whole) {
    const long D = j->D;
    const row value = row_at(j->value, n, D, bf16, whole), d_value = row_at(j->d_value, n, D, bf16, whole);
    float mix[MAX_R], own_h[MAX_R], own_k[MAX_R], d_mean = 0;
    for (int r = 0; r < R; r++) {
        lanes dot = {0};
        for (long d = 0; d < D; d += LANES) dot += load_row(row_at(j->d_out, n * R + r, D, bf16, whole), d) * load_row(value, d);
        d_mean += gate_slopes(j, n, r, sum_lanes(dot), eps, &mix[r], &own_h[r], &own_k[r]);
    }
    for (long d = 0; d < D; d += LANES) {
        lanes total = 2.0f * d_mean / D * load_row(value, d);
        if (j->W) total += load_row(row_at(j->conv_value, n, D, 0, whole), d);
        for (int r = 0; r < R; r++) {
            const long at = n * R + r;
            lanes grad = load_row(row_at(j->d_out, at, D, bf16, whole), d), h = load_row(row_at(j->streams, at, D, bf16, whole), d);
            lanes k = load_row(row_at(j->keys, at, D, bf16, whole), d), gain = load_row(row_at(j->gain, r, D, 0, whole), d);
            const row sum = row_at(d_gain, r, D, 0, whole);
            total += j->alpha[at] * grad;
            store_row(row_at(j->d_streams, at, D, bf16, whole), d, grad + mix[r] * gain * k - own_h[r] * h);
            store_row(row_at(j->d_keys, at, D, bf16, whole), d, mix[r] * gain * h - own_k[r] * k);
            store_row(sum, d, load_row(sum, d) + mix[r] * h * k);
        }
        store_row(d_value, d, total);
    }
}

/* ---- parts and entry points ---- */

enum { SCORE, SPEAK, CONV_BACK, GATE_BACK };

/* Step `step` of the job for units [first, end): tokens, or pairs of batch row and block of channels. */
INLINE void run_units(const job *j, int step, long first, long end, int part, float eps, const int R, const int bf16, const int whole) {
    const long blocks = (j->D + BLOCK - 1) / BLOCK, size = R * j->D;
    for (long i = first; i < end; i++) {
        if (step == SCORE) score_token(j, i, eps, R, bf16, whole);
        if (step == SPEAK) speak_token(j, i, R, bf16, whole);
        if (step == CONV_BACK) conv_back(j, i / blocks, i % blocks, j->d_taps + part * j->W * size, R, bf16, whole);
        if (step == GATE_BACK) gate_back(j, i, eps, j->d_gain + part * size, R, bf16, whole);
    }
}

static void run(const job *j, int step, long units, int threads, int bf16, float eps) {
    const int R = j->R, whole = j->D % LANES == 0;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; part++) {
        const long first = units * part / threads, end = units * (part + 1) / threads;
        if (R == 4 && whole && bf16) run_units(j, step, first, end, part, eps, 4, 1, 1);
        else if (R == 4 && whole) run_units(j, step, first, end, part, eps, 4, 0, 1);
        else run_units(j, step, first, end, part, eps, R, bf16, 0);
    }
}

static void sum_parts(float *parts, long size, int threads) {
    for (int part = 1; part < threads; part++)
        for (long i = 0; i < size; i++) parts[i] += parts[part * size + i];
}

/* Both return 0. */
int engram_forward(int threads, int bf16, float eps, const job *j) {
    run(j, SCORE, j->B * j->T, threads, bf16, eps);
    run(j, SPEAK, j->B * j->T, threads, bf16, eps);
    return 0;
}

int engram_backward(int threads, int bf16, float eps, const job *j) {
    const long size = j->R * j->D, blocks = (j->D + BLOCK - 1) / BLOCK;
    memset(j->d_gain, 0, threads * size * sizeof(float));
    if (j->W) memset(j->d_taps, 0, threads * j->W * size * sizeof(float));
    if (j->W) run(j, CONV_BACK, j->B * blocks, threads, bf16, eps);
    run(j, GATE_BACK, j->B * j->T, threads, bf16, eps);
    sum_parts(j->d_gain, size, threads);
    if (j->W) sum_parts(j->d_taps, j->W * size, threads);
    return 0;
}
