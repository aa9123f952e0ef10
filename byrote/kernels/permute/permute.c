/* Sorting small integers, copying rows by index, summing rows by index; see reference.py beside this file.

   All return 0, or 1 for an index that does not exist. */

#include "lanes.h"

/* Stable counting sort of M experts: order lists the pairs expert by expert, place is the inverse. `starts` is work space [E]. */
int permute_sort(long M, long E, const int64_t *experts, int64_t *starts, int64_t *order, int64_t *place) {
    memset(starts, 0, E * sizeof *starts);
    for (long m = 0; m < M; m++) {
        if (experts[m] < 0 || experts[m] >= E) return 1;
        starts[experts[m]]++;
    }
    for (long e = 0, before = 0; e < E; e++) {
        const int64_t count = starts[e];
        starts[e] = before;
        before += count;
    }
    for (long m = 0; m < M; m++) {
        const int64_t at = starts[experts[m]]++;
        order[at] = m;
        place[m] = at;
    }
    return 0;
}

/* to[m] = from[index[m] / slots], rows of `bytes`, those of `from` `stride` bytes apart. */
int permute_spread(int threads, long M, long bytes, long sources, long stride, long slots, const char *from, const int64_t *index, char *to) {
    int bad = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : bad)
    for (long m = 0; m < M; m++) {
        const long source = index[m] / slots;
        if (index[m] < 0 || source >= sources) bad = 1;
        else memcpy(to + m * bytes, from + source * stride, bytes);
    }
    return bad;
}

INLINE int sum_token(long n, long K, long D, long sources, long stride, const char *from, const int64_t *index, void *to, const int bf16, const int whole) {
    const long size = bf16 ? 2 : 4;
    const row out = row_at(to, n, D, bf16, whole);
    for (long k = 0; k < K; k++)
        if (index[n * K + k] < 0 || index[n * K + k] >= sources) return 1;
    for (long d = 0; d < D; d += LANES) {
        lanes sum = {0};
        for (long k = 0; k < K; k++) sum += load_row((row){(char *)from + index[n * K + k] * stride * size, D, bf16, whole}, d);
        store_row(out, d, sum);
    }
    return 0;
}

/* to[n] = sum over k of from[index[n K + k]], N rows of D numbers, those of `from` `stride` numbers apart. */
int permute_gather_sum(int threads, int bf16, long N, long K, long D, long sources, long stride, const char *from, const int64_t *index, void *to) {
    int bad = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : bad)
    for (long n = 0; n < N; n++) {
        if (bf16 && D % LANES == 0) bad |= sum_token(n, K, D, sources, stride, from, index, to, 1, 1);
        else if (D % LANES == 0) bad |= sum_token(n, K, D, sources, stride, from, index, to, 0, 1);
        else bad |= sum_token(n, K, D, sources, stride, from, index, to, bf16, 0);
    }
    return bad;
}
