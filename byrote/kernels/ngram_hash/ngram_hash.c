/* N-grams to rows; see reference.py beside this file. */

#include <stddef.h>
#include <stdint.h>

/* The rows of one token; `id` points to its id, `document` to its document or is NULL. */
static void rows_of(long L, long M, long H, int64_t pad, const int64_t *id, const int64_t *document, const int64_t *multipliers,
                    const int64_t *primes, const int64_t *starts, int64_t *to) {
    for (long l = 0; l < L; l++, multipliers += M) {
        int64_t mix = id[0] * multipliers[0];
        int blocked = 0;
        for (long back = 1; back < M; back++) {
            blocked |= document && document[-back] != document[0];
            mix ^= (blocked ? pad : id[-back]) * multipliers[back];
            for (long h = 0; h < H; h++) *to++ = mix % *primes++ + *starts++;
        }
    }
}

/* 1: an id lies outside [0, vocab), and nothing was written. */
int ngram_hash(int threads, long B, long T, long L, long M, long H, int64_t vocab, int64_t pad, const int64_t *ids, const int64_t *document,
               const int64_t *multipliers, const int64_t *primes, const int64_t *starts, int64_t *to) {
    const long S = T + M - 1, N = L * (M - 1) * H;
    for (long i = 0; i < B * S; i++)
        if (ids[i] < 0 || ids[i] >= vocab) return 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long i = 0; i < B * T; i++) {
        const long at = i / T * S + i % T + M - 1;
        rows_of(L, M, H, pad, ids + at, document ? document + at : NULL, multipliers, primes, starts, to + i * N);
    }
    return 0;
}
