/* The K-th best of many scores, found by its bits, most significant first (radix selection): exact, no sorting, and as fast for equal
   scores as for different ones. */

#pragma once
#include "lanes.h"

#define HIGH_BITS 11 /* of a score: the first round sees all of them, the other two only those that share these */
#define BINS (1 << HIGH_BITS)

/* Order of floats as order of integers; NaN before all, 0 and -0 equal. */
INLINE uint32_t rank_of(float score) {
    uint32_t bits;
    score += 0.0f;
    memcpy(&bits, &score, sizeof bits);
    return score != score ? UINT32_MAX : bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* The bin in which the `*wanted`-th largest lies; `*wanted` becomes its place inside. */
static long bin_of(const uint32_t *counts, long bins, long *wanted) {
    long bin = bins - 1;
    for (; *wanted > counts[bin]; bin--) *wanted -= counts[bin];
    return bin;
}

/* The `wanted`-th largest of n ranks; `*equals` receives how many of its equals are among the largest. */
static uint32_t threshold(const uint32_t *rank, long n, long wanted, uint32_t *left, long *equals) {
    uint32_t counts[BINS] = {0}, found;
    long kept = 0;
    for (long i = 0; i < n; i++) counts[rank[i] >> 21]++;
    found = (uint32_t)bin_of(counts, BINS, &wanted) << 21;
    for (long i = 0; i < n; i++)
        if (rank[i] >> 21 == found >> 21) left[kept++] = rank[i];
    memset(counts, 0, sizeof counts);
    for (long i = 0; i < kept; i++) counts[left[i] >> 10 & (BINS - 1)]++;
    found |= (uint32_t)bin_of(counts, BINS, &wanted) << 10;
    memset(counts, 0, sizeof counts);
    for (long i = 0; i < kept; i++)
        if (left[i] >> 10 == found >> 10) counts[left[i] & 1023]++;
    found |= (uint32_t)bin_of(counts, 1024, &wanted);
    *equals = wanted;
    return found;
}

/* index[0 ... count): the places of the `count` largest of n > count scores, ascending, from `first` on; of equals the first. The scores are
   overwritten; `left` has room for n. */
static void pick(float *scores, long n, long count, uint32_t *left, long first, int64_t *index) {
    uint32_t *rank = (uint32_t *)scores;
    long equals, at = 0;
    for (long i = 0; i < n; i++) rank[i] = rank_of(scores[i]);
    const uint32_t least = threshold(rank, n, count, left, &equals);
    for (long i = 0; at < count; i++) {
        const int equal = rank[i] == least && equals > 0;
        index[at] = first + i;
        at += rank[i] > least || equal;
        equals -= equal;
    }
}
