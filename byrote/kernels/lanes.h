/* The widest float vector of the machine, written once in GNU C so that gcc and clang fill in AVX-512, AVX2 or NEON.

   `lanes` holds LANES floats. Streams lie in memory as float or bfloat16; they are widened on load and rounded to nearest
   even on store, and a NaN stays a NaN. Rows whose length is no multiple of LANES end in a partial load or store. */

#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(LANES * 4)));
typedef int32_t signed_lanes __attribute__((vector_size(LANES * 4)));
typedef uint32_t bit_lanes __attribute__((vector_size(LANES * 4)));
typedef uint16_t short_lanes __attribute__((vector_size(LANES * 2)));

INLINE lanes splat(float value) { return value - (lanes){0}; }

INLINE lanes load(const float *from) {
    lanes v;
    memcpy(&v, from, sizeof v);
    return v;
}

/* The same, to be kept in a register: left to itself gcc reads memory again at every use. */
INLINE lanes hold(const float *from) {
    lanes v = load(from);
#if defined(__x86_64__)
    __asm__("" : "+v"(v));
#endif
    return v;
}

INLINE void store(float *to, lanes v) { memcpy(to, &v, sizeof v); }

INLINE lanes select_lanes(signed_lanes mask, lanes yes, lanes no) {
    return (lanes)((mask & (signed_lanes)yes) | (~mask & (signed_lanes)no));
}

INLINE lanes widen(short_lanes h) {
#if defined(__AVX512F__)
    __m256i packed;
    memcpy(&packed, &h, sizeof packed);
    return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(packed), 16);
#else
    return (lanes)(__builtin_convertvector(h, bit_lanes) << 16);
#endif
}

/* LANES whole numbers of a byte. */
INLINE lanes widen_bytes(const int8_t *from) {
#if defined(__AVX512F__)
    return (lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif defined(__AVX2__)
    return (lanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    typedef int8_t byte_lanes __attribute__((vector_size(LANES)));
    byte_lanes v;
    memcpy(&v, from, sizeof v);
    return __builtin_convertvector(__builtin_convertvector(v, signed_lanes), lanes);
#endif
}

INLINE short_lanes narrow(lanes v) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    short_lanes out;
    memcpy(&out, &h, sizeof out);
    return out;
#else
    bit_lanes bits = (bit_lanes)v;
    bit_lanes rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    bit_lanes is_nan = (bit_lanes)(v != v);
    return __builtin_convertvector((is_nan & ((bits >> 16) | 0x40)) | (~is_nan & rounded), short_lanes);
#endif
}

/* A row of `length` stream numbers; `whole` promises that length is a multiple of LANES, so that no end needs care. */
typedef struct {
    void *start;
    long length;
    int bf16, whole;
} row;

INLINE row row_at(const void *base, long index, long length, int bf16, int whole) {
    return (row){(char *)base + index * length * (bf16 ? 2 : 4), length, bf16, whole};
}

/* Lanes [at, at + LANES); zeros beyond the end. */
INLINE lanes load_row(row r, long at) {
    const long left = r.length - at;
    short_lanes h = {0};
    lanes v = {0};
    if (r.bf16 && (r.whole || left >= LANES)) memcpy(&h, (uint16_t *)r.start + at, sizeof h);
    else if (r.whole || left >= LANES) memcpy(&v, (float *)r.start + at, sizeof v);
    else if (r.bf16) memcpy(&h, (uint16_t *)r.start + at, left * 2);
    else memcpy(&v, (float *)r.start + at, left * 4);
    return r.bf16 ? widen(h) : v;
}

/* Writes them and returns what memory now holds, widened again. */
INLINE lanes store_row(row r, long at, lanes v) {
    const long left = r.length - at;
    if (!r.bf16) {
        if (r.whole || left >= LANES) memcpy((float *)r.start + at, &v, sizeof v);
        else memcpy((float *)r.start + at, &v, left * 4);
        return v;
    }
    short_lanes h = narrow(v);
    if (r.whole || left >= LANES) memcpy((uint16_t *)r.start + at, &h, sizeof h);
    else memcpy((uint16_t *)r.start + at, &h, left * 2);
    return widen(h);
}

INLINE float sum_lanes(lanes v) {
    typedef float four __attribute__((vector_size(16)));
    four part[LANES / 4], sum = {0};
    float p[4];
    memcpy(part, &v, sizeof v);
#pragma GCC unroll 4
    for (int i = 0; i < LANES / 4; i++) sum += part[i];
    memcpy(p, &sum, sizeof sum);
    return (p[0] + p[2]) + (p[1] + p[3]);
}

INLINE float max_of(lanes v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float high = v[0];
    for (int i = 1; i < LANES; i++) high = v[i] > high ? v[i] : high;
    return high;
#endif
}

/* The smaller or larger of both; a NaN in v stays. */
INLINE lanes at_most(lanes v, lanes limit) {
#if defined(__AVX512F__)
    return (lanes)_mm512_min_ps((__m512)limit, (__m512)v);
#else
    return select_lanes(v > limit, limit, v);
#endif
}

INLINE lanes at_least(lanes v, lanes limit) {
#if defined(__AVX512F__)
    return (lanes)_mm512_max_ps((__m512)limit, (__m512)v);
#else
    return select_lanes(v < limit, limit, v);
#endif
}

/* e^v to about 1 unit in the last place between -87 and 88; saturates outside. */
INLINE lanes exp_lanes(lanes v) {
    v = at_most(at_least(v, splat(-87.0f)), splat(88.0f));
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    lanes n = (v * 1.44269504f + shift) - shift;
    lanes r = v - n * 0.693359375f; /* ln 2 in two pieces */
    r = r - n * -2.12194440e-4f;
    lanes p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
    return (lanes)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    bit_lanes power = ((bit_lanes)__builtin_convertvector(n, signed_lanes) + 127) << 23;
    return p * (lanes)power;
#endif
}

INLINE lanes sigmoid_lanes(lanes v) { return 1.0f / (1.0f + exp_lanes(-v)); }

/* 2^v to 2e-7 for v <= 127, exactly 1 at 0; below -125 it stays near 2^-125. */
INLINE lanes power_lanes(lanes v) {
    v = at_least(v, splat(-125.0f));
    const lanes shifted = v + 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, which then ends the bits */
    const lanes r = v - (shifted - 12582912.0f);
    lanes p = splat(1.326472731307149e-3f);
    p = p * r + 9.671512991189957e-3f;
    p = p * r + 5.550733581185341e-2f;
    p = p * r + 2.4022242426872253e-1f;
    p = p * r + 6.931470036506653e-1f;
    p = p * r + 1.0f;
    return (lanes)((bit_lanes)p + ((bit_lanes)shifted << 23));
}
