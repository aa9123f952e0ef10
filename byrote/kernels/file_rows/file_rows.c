/* Records of a file at ascending offsets, many reads in flight; see reference.py beside this file.

   The threads wait for a disk, not for a core, so there may be more of them than cores; their stacks are small. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define STACK (1 << 16)
#define WAITING 64  /* reads asked for before the first is waited for */

typedef struct {
    int handle;
    long U, bytes, near, longest;
    const int64_t *offsets;
    char *to;
    long next;  /* first record of the next run, guarded by `lock` */
    int error;
    pthread_mutex_t lock;
} job;

static int read_whole(int handle, char *to, long bytes, int64_t at) {
    while (bytes > 0) {
        const ssize_t got = pread(handle, to, bytes, at);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return errno;
        if (got == 0) return -1;
        to += got, at += got, bytes -= got;
    }
    return 0;
}

static long end_of_run(const job *j, long first) {
    const int64_t *o = j->offsets;
    long u = first + 1;
    while (u < j->U && o[u] - o[u - 1] - j->bytes <= j->near && o[u] + j->bytes - o[first] <= j->longest) u++;
    return u;
}

static void *work(void *argument) {
    job *j = argument;
    const long room = j->longest > j->bytes ? j->longest : j->bytes;
    char *block = malloc(room);
    int error = block ? 0 : ENOMEM;
    for (;;) {
        pthread_mutex_lock(&j->lock);
        if (error && !j->error) j->error = error;
        const long first = j->error ? j->U : j->next, end = first < j->U ? end_of_run(j, first) : j->U;
        j->next = end;
        pthread_mutex_unlock(&j->lock);
        if (first >= j->U) break;
        const int64_t start = j->offsets[first], span = j->offsets[end - 1] + j->bytes - start;
        if (span == (end - first) * j->bytes) {
            error = read_whole(j->handle, j->to + first * j->bytes, span, start);
        } else {
            error = read_whole(j->handle, block, span, start);
            for (long u = first; u < end && !error; u++) memcpy(j->to + u * j->bytes, block + (j->offsets[u] - start), j->bytes);
        }
    }
    free(block);
    return NULL;
}

/* 0, an errno, or -1 where the file ends inside a record. */
int file_rows_read(int threads, int handle, long U, long bytes, long near, long longest, const int64_t *offsets, char *to) {
    job j = {handle, U, bytes, near, longest, offsets, to, 0, 0, PTHREAD_MUTEX_INITIALIZER};
    pthread_t others[threads > 1 ? threads : 1];
    pthread_attr_t small;
    int started = 0;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, STACK);
    while (started < threads - 1 && !pthread_create(&others[started], &small, work, &j)) started++;
    work(&j);
    for (int t = 0; t < started; t++) pthread_join(others[t], NULL);
    pthread_attr_destroy(&small);
    pthread_mutex_destroy(&j.lock);
    return j.error;
}

typedef struct {
    int64_t first, last, handle;
} part;

static const part *part_of(const part *parts, long P, int64_t slot) {
    long low = 0, high = P;
    while (low < high) {
        const long middle = (low + high) / 2;
        if (parts[middle].last <= slot) low = middle + 1;
        else high = middle;
    }
    return low < P && parts[low].first <= slot ? parts + low : NULL;
}

/* What the page cache holds is copied at once; 1: it must come from the disk, which is asked for it and not waited for. */
static int read_or_ask(int handle, char *to, long bytes, int64_t at) {
#ifdef RWF_NOWAIT
    const struct iovec room = {to, bytes};
    if (preadv2(handle, &room, 1, at, RWF_NOWAIT) == bytes) return 0;
    posix_fadvise(handle, at, bytes, POSIX_FADV_WILLNEED);
#endif
    return 1;
}

/* The first `wanted` bytes of each row's record. 0, an errno, -1: a file ends inside a record, -2: a row has none, -3: a row is outside 0 .. N,
   -4: no file holds a slot. What waits is read last, so that a disk has all reads before it that it must make, without threads. */
int file_rows_pick(long U, long N, long P, long size, long wanted, const int64_t *rows, const uint32_t *slots, const part *parts, char *to) {
    long waiting[WAITING], W = 0;
    int error = 0;
    for (long u = 0; u < U; u++) {
        if (rows[u] < 0 || rows[u] >= N) return -3;
        if (!slots[rows[u]]) return -2;
    }
    for (long u = 0; u < U && !error; u++) {
        const int64_t slot = slots[rows[u]];
        const part *p = part_of(parts, P, slot);
        if (!p) return -4;
        if (read_or_ask(p->handle, to + u * wanted, wanted, (slot - p->first) * size)) waiting[W++] = u;
        while (W && !error && (W == WAITING || u + 1 == U)) {
            const long v = waiting[--W], late = slots[rows[v]];
            p = part_of(parts, P, late);
            error = read_whole(p->handle, to + v * wanted, wanted, (late - p->first) * size);
        }
    }
    return error;
}
