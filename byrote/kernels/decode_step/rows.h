/* Products of a few rows with weights that are read where they lie, each weight once; and the norm before them.

   Weights come from memory faster the straighter they are read: rows one after the other run at twice the speed of four rows side
   by side, whatever is prefetched. So a row of the weight meets all rows of x before the next begins. Weights of int8 become fp32 in
   registers; a row's scale meets its sum (kernels/int8). */

#pragma once
#include "decode_step/tape.h"

#define BLOCK 4  /* rows of x that meet a row of the weight together */
#define CHUNK 16 /* rows of gates before their linear parts */

enum { SET, ADD, SWIGLU };

typedef struct {
    const float *weight;    /* [outputs][width], or for SWIGLU [2 outputs][width]: gates, then linear parts */
    const int8_t *bytes;    /* the same as int8, instead */
    const float *row_scale; /* of bytes: [rows of the weight] */
    long width, outputs, stride, count;
    const float *x[MOST_ROWS];
    float *y[MOST_ROWS];
    float scale[MOST_ROWS]; /* of the hidden state, for SWIGLU */
    float limit;
} product;

INLINE lanes part_of(const float *from, long left) {
#if defined(__AVX512F__)
    return (lanes)_mm512_maskz_loadu_ps((__mmask16)((1u << left) - 1), from);
#else
    lanes v = {0};
    memcpy(&v, from, left * sizeof(float));
    return v;
#endif
}

/* The same of bytes. */
INLINE lanes part_of_bytes(const int8_t *from, long left) {
    int8_t whole[LANES] = {0};
    memcpy(whole, from, left);
    return widen_bytes(whole);
}

/* The sums of four vectors, formed together. */
INLINE void sum_four(const lanes *v, float *sums) {
#if defined(__AVX512F__)
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512 low = _mm512_shuffle_ps(ab, cd, 0x44), high = _mm512_shuffle_ps(ab, cd, 0xee), four = _mm512_add_ps(low, high);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_castps512_ps256(_mm512_shuffle_f32x4(four, four, 0x4e)));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
    for (int i = 0; i < 4; i++) sums[i] = sum_lanes(v[i]);
#endif
}

/* total[m]: w times x[m], not yet summed; one row goes along four chains and two along two, so that none waits for its own last addition.
   w is fp32, or int8 if `bytes`. */
INLINE void dots_of(const void *w, const float *const *x, long width, lanes *total, const int M, const int bytes) {
    const float *numbers = w;
    const int8_t *small = w;
    const int chains = M > 2 ? 1 : BLOCK / M;
    lanes part[BLOCK];
    long d = 0;
#pragma GCC unroll 4
    for (int i = 0; i < chains * M; i++) part[i] = splat(0);
    for (; d + chains * LANES <= width; d += chains * LANES)
#pragma GCC unroll 4
        for (int c = 0; c < chains; c++) {
            const lanes a = bytes ? widen_bytes(small + d + c * LANES) : hold(numbers + d + c * LANES);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) part[c * M + m] += a * load(x[m] + d + c * LANES);
        }
    for (; d + LANES <= width; d += LANES)
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) part[m] += (bytes ? widen_bytes(small + d) : load(numbers + d)) * load(x[m] + d);
    if (d < width)
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
            part[m] += (bytes ? part_of_bytes(small + d, width - d) : part_of(numbers + d, width - d)) * part_of(x[m] + d, width - d);
    if (M == 1) total[0] = (part[0] + part[1]) + (part[2] + part[3]);
#pragma GCC unroll 4
    for (int m = 0; m < M && M > 1; m++) total[m] = chains == 1 ? part[m] : part[m] + part[M + m];
}

INLINE void dots(const float *w, const float *const *x, long width, lanes *total, const int M) { dots_of(w, x, width, total, M, 0); }

INLINE float silu(float v) { return v / (1.0f + __builtin_expf(-v)); }

INLINE float gated(float gate, float up, float limit) {
    gate = gate > limit ? limit : gate; /* a NaN stays */
    up = up > limit ? limit : up < -limit ? -limit : up;
    return silu(gate) * up;
}

/* sums[m][i] = <row i of w, x[m]> for the M rows from `first` on, which meet every row of w together. */
INLINE void dots_together(const product *p, const char *w, long first, long count, float sums[MOST_ROWS][CHUNK], const int M, const int bytes) {
    const int each = BLOCK / M; /* rows of w whose sums are formed together */
    const long row = p->stride * (bytes ? sizeof(int8_t) : sizeof(float));
    lanes total[BLOCK];
    float four[BLOCK];
    total[BLOCK - 1] = splat(0); /* of three rows there is no fourth */
    for (long i = 0; i < count; i += each) {
#pragma GCC unroll 4
        for (int r = 0; r < each; r++) dots_of(w + (i + r < count ? i + r : i) * row, p->x + first, p->width, total + r * M, M, bytes);
        sum_four(total, four);
#pragma GCC unroll 4
        for (int r = 0; r < each; r++)
            for (int b = 0; b < M; b++)
                if (i + r < count) sums[first + b][i + r] = four[r * M + b];
    }
}

/* sums[m][i] = <row f + i of the weight, x[m]> */
INLINE void dots_of_rows(const product *p, long f, long count, float sums[MOST_ROWS][CHUNK], const int bytes) {
    const char *w = bytes ? (const char *)(p->bytes + f * p->stride) : (const char *)(p->weight + f * p->stride);
    long m = 0;
    for (; m + BLOCK <= p->count; m += BLOCK) dots_together(p, w, m, count, sums, BLOCK, bytes);
    if (p->count - m == 3) dots_together(p, w, m, count, sums, 3, bytes);
    else if (p->count - m == 2) dots_together(p, w, m, count, sums, 2, bytes);
    else if (p->count - m == 1) dots_together(p, w, m, count, sums, 1, bytes);
    for (m = 0; bytes && m < p->count; m++)
        for (long i = 0; i < count; i++) sums[m][i] *= p->row_scale[f + i];
}

INLINE void product_kind(const product *p, long first, long end, const int kind, const int bytes) {
    float sums[MOST_ROWS][CHUNK], ups[MOST_ROWS][CHUNK];
    for (long f = first; f < end; f += CHUNK) {
        const long count = end - f < CHUNK ? end - f : CHUNK;
        dots_of_rows(p, f, count, sums, bytes);
        if (kind == SWIGLU) dots_of_rows(p, p->outputs + f, count, ups, bytes);
        for (long m = 0; m < p->count; m++)
            for (long i = 0; i < count; i++) {
                if (kind == SET) p->y[m][f + i] = sums[m][i];
                else if (kind == ADD) p->y[m][f + i] += sums[m][i];
                else p->y[m][f + i] = gated(sums[m][i], ups[m][i], p->limit) * p->scale[m];
            }
    }
}

#define PRODUCT(name, kind, bytes) \
    static __attribute__((noinline)) void name(const product *p, long first, long end) { product_kind(p, first, end, kind, bytes); }
PRODUCT(product_set, SET, 0)
PRODUCT(product_add, ADD, 0)
PRODUCT(product_swiglu, SWIGLU, 0)
PRODUCT(product_set_bytes, SET, 1)
PRODUCT(product_add_bytes, ADD, 1)
PRODUCT(product_swiglu_bytes, SWIGLU, 1)

/* y[.][first, end) of the product. */
static void run_product(const product *p, long first, long end, int kind) {
    static void (*const run[2][3])(const product *, long, long) = {{product_set, product_add, product_swiglu},
                                                                   {product_set_bytes, product_add_bytes, product_swiglu_bytes}};
    run[p->bytes != NULL][kind](p, first, end);
}

/* The product reads the weight of an operation, w[0], from row `first` on: fp32, or int8 where w[2] has a scale for each of its rows. */
INLINE void read_weight(product *p, const op *o, long first) {
    if (o->w[2]) p->bytes = (const int8_t *)o->w[0] + first * p->stride, p->row_scale = o->w[2] + first;
    else p->weight = o->w[0] + first * p->stride;
}

INLINE float dot(const float *a, const float *b, long width) {
    lanes total;
    dots(a, &b, width, &total, 1);
    return sum_lanes(total);
}

INLINE float inverse_rms(const float *x, long width, float eps) { return 1.0f / __builtin_sqrtf(dot(x, x, width) / width + eps); }

/* y = x / rms * gain; no gain stands for ones. */
INLINE void norm_row(float *y, const float *x, const float *gain, long width, float eps) {
    const float scale = inverse_rms(x, width, eps);
    for (long d = 0; d < width; d++) y[d] = gain ? x[d] * scale * gain[d] : x[d] * scale;
}

/* The rows an operation reads: normed by this thread for itself if `is_normed`. */
static const float *rows_of(worker *w, const op *o, const float *x, const float *gain, int is_normed) {
    if (!is_normed) return x;
    for (long m = 0; m < w->rows; m++) norm_row(w->normed + m * o->width, x + m * o->width, gain, o->width, o->eps);
    return w->normed;
}
