/* Numbers from counters; see reference.py beside this file. All return 0. */

#include "lanes.h"

#define GAMMA 0x9E3779B97F4A7C15u

INLINE uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

/* to[u][e]: near-normal numbers, `scale` = std / standard deviation of the sum of four quarters. */
int counter_normal(int threads, long U, long E, uint64_t key, float scale, const int64_t *rows, float *to) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long u = 0; u < U; u++) {
        const uint64_t hash = mix(key + (uint64_t)rows[u] * GAMMA);
        for (long e = 0; e < E; e++) {
            const uint64_t b = mix(hash + (uint64_t)(e + 1) * GAMMA);
            const int32_t sum = (int32_t)(b & 0xFFFF) + (int32_t)(b >> 16 & 0xFFFF) + (int32_t)(b >> 32 & 0xFFFF) + (int32_t)(b >> 48);
            to[u * E + e] = (float)(sum - 2 * 65535) * scale + 0.0f; /* no -0 where std is 0 */
        }
    }
    return 0;
}

/* to[u][e] = from[u][e] in bf16, up or down by the low 16 bits drawn for (row, count, e). */
int counter_round(int threads, long U, long E, uint64_t key, const float *from, const int64_t *rows, const int32_t *counts, uint16_t *to) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long u = 0; u < U; u++) {
        const uint64_t hash = mix(mix(key + (uint64_t)rows[u] * GAMMA) + (uint64_t)(int64_t)counts[u] * GAMMA);
        for (long e = 0; e < E; e++) {
            uint32_t pattern;
            memcpy(&pattern, from + u * E + e, sizeof pattern);
            const uint32_t up = pattern + (uint32_t)(mix(hash + (uint64_t)(e + 1) * GAMMA) & 0xFFFF);
            const uint32_t magnitude = pattern & 0x7FFFFFFF;
            to[u * E + e] = magnitude > 0x7F800000 ? 0x7FC0 : (magnitude == 0x7F800000 ? pattern : up) >> 16;
        }
    }
    return 0;
}
