/* Rotary positions and the assembly of q, k and v, forward and backward; formulas in reference.py beside this file.

   Shapes: B batch, T tokens, H heads, K rotary width, P = K / 2 pairs, N no-position width, V value width. Strides count
   numbers. The projections q [B, T, H (N + K)], kv [B, T, H (N + V)] and k_rope [B, T, K] have one stride from token to token. */

#include "lanes.h"

typedef struct { /* mirrored in cpu.py */
    long B, T, H, N, K, V, half;
    long q_stride, kv_stride, rope_stride;
    long head_strides[3][3]; /* q, k, v [B, H, T, width]: from batch to batch, head to head, token to token */
} sizes;

typedef struct {
    char *q, *kv, *k_rope; /* the projections, or their cotangents, which are dense */
    char *heads[3];        /* q, k, v, or their cotangents */
    const float *cos, *sin;
} data;

/* to = from, each pair turned by (cos, sin); `half` pairs channel p with p + pairs, otherwise 2p with 2p + 1. */
INLINE void turn_by(const float *from, float *to, long pairs, const float *cos, const float *sin, const int half) {
    for (long p = 0; p < pairs; p++) {
        const long i = half ? p : 2 * p, j = half ? p + pairs : 2 * p + 1;
        const float a = from[i], b = from[j], c = cos[p], s = sin[p];
        to[i] = a * c - b * s;
        to[j] = a * s + b * c;
    }
}

INLINE void read_row(float *to, row from) {
    for (long k = 0; k < from.length; k += LANES) store(to + k, load_row(from, k));
}

INLINE void write_row(row to, const float *from) {
    for (long k = 0; k < to.length; k += LANES) store_row(to, k, load(from + k));
}

static void turn(const float *from, float *to, long pairs, const float *cos, const float *sin, int half) {
    if (half) turn_by(from, to, pairs, cos, sin, 1);
    else turn_by(from, to, pairs, cos, sin, 0);
}

INLINE char *at(const void *base, long index, int bf16) { return (char *)base + index * (bf16 ? 2 : 4); }

INLINE row rope_at(char *base, long length, int bf16) { return (row){base, length, bf16, 0}; }

/* Row of head h of tensor `which` (0 q, 1 k, 2 v) for token (b, t). */
INLINE char *head_at(const sizes *s, const data *a, int which, long b, long h, long t, int bf16) {
    const long *strides = s->head_strides[which];
    return at(a->heads[which], b * strides[0] + h * strides[1] + t * strides[2], bf16);
}

INLINE void assemble_token(const sizes *s, const data *a, long b, long t, const int bf16) {
    const long token = b * s->T + t, K = s->K, nope = s->N * (bf16 ? 2 : 4), value = s->V * (bf16 ? 2 : 4);
    const float *cos = a->cos + token * (K / 2), *sin = a->sin + token * (K / 2);
    float wide[K + LANES], turned[K + LANES], shared[K + LANES];
    read_row(wide, rope_at(at(a->k_rope, token * s->rope_stride, bf16), K, bf16));
    turn(wide, shared, K / 2, cos, sin, s->half);
    for (long h = 0; h < s->H; h++) {
        char *q = at(a->q, token * s->q_stride + h * (s->N + K), bf16), *kv = at(a->kv, token * s->kv_stride + h * (s->N + s->V), bf16);
        char *to_q = head_at(s, a, 0, b, h, t, bf16), *to_k = head_at(s, a, 1, b, h, t, bf16);
        memcpy(to_q, q, nope);
        memcpy(to_k, kv, nope);
        memcpy(head_at(s, a, 2, b, h, t, bf16), kv + nope, value);
        read_row(wide, rope_at(q + nope, K, bf16));
        turn(wide, turned, K / 2, cos, sin, s->half);
        write_row(rope_at(to_q + nope, K, bf16), turned);
        write_row(rope_at(to_k + nope, K, bf16), shared);
    }
}

/* The same backwards; `sin` has been negated, and the cotangent of the shared key is summed over heads before it is turned. */
INLINE void assemble_back_token(const sizes *s, const data *a, long b, long t, const int bf16) {
    const long token = b * s->T + t, K = s->K, nope = s->N * (bf16 ? 2 : 4), value = s->V * (bf16 ? 2 : 4);
    const float *cos = a->cos + token * (K / 2), *sin = a->sin + token * (K / 2);
    float wide[K + LANES], turned[K + LANES], shared[K + LANES];
    memset(shared, 0, sizeof shared);
    for (long h = 0; h < s->H; h++) {
        char *q = at(a->q, token * s->q_stride + h * (s->N + K), bf16), *kv = at(a->kv, token * s->kv_stride + h * (s->N + s->V), bf16);
        char *from_q = head_at(s, a, 0, b, h, t, bf16), *from_k = head_at(s, a, 1, b, h, t, bf16);
        memcpy(q, from_q, nope);
        memcpy(kv, from_k, nope);
        memcpy(kv + nope, head_at(s, a, 2, b, h, t, bf16), value);
        read_row(wide, rope_at(from_k + nope, K, bf16));
        for (long k = 0; k < K; k++) shared[k] += wide[k];
        read_row(wide, rope_at(from_q + nope, K, bf16));
        turn(wide, turned, K / 2, cos, sin, s->half);
        write_row(rope_at(q + nope, K, bf16), turned);
    }
    turn(shared, turned, K / 2, cos, sin, s->half);
    write_row(rope_at(at(a->k_rope, token * s->rope_stride, bf16), K, bf16), turned);
}

/* Both return 0. */
int rotary_assemble(int threads, int bf16, int back, const sizes *s, void *q, void *kv, void *k_rope, void *q_heads, void *k_heads, void *v_heads,
                    const float *cos, const float *sin) {
    const data a = {q, kv, k_rope, {q_heads, k_heads, v_heads}, cos, sin};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long token = 0; token < s->B * s->T; token++) {
        const long b = token / s->T, t = token % s->T;
        if (back && bf16) assemble_back_token(s, &a, b, t, 1);
        else if (back) assemble_back_token(s, &a, b, t, 0);
        else if (bf16) assemble_token(s, &a, b, t, 1);
        else assemble_token(s, &a, b, t, 0);
    }
    return 0;
}

/* y = x turned; N rows of K numbers, `stride` apart in x; `shared` neighbours have one angle. */
int rotary_rotate(int threads, int bf16, long N, long K, long stride, long shared, int half, const void *x, const float *cos, const float *sin, void *y) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < N; n++) {
        const long angle = n / shared * (K / 2);
        float wide[K + LANES], turned[K + LANES];
        read_row(wide, rope_at(at(x, n * stride, bf16), K, bf16));
        turn(wide, turned, K / 2, cos + angle, sin + angle, half);
        write_row(row_at(y, n, K, bf16, 0), turned);
    }
    return 0;
}
