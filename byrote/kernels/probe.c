/* How many threads take part in a parallel loop when `threads` are asked for. */

int probe_threads(int threads) {
    int part[64] = {0}, count = 0;
    if (threads > 64) threads = 64;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int i = 0; i < threads; i++) part[i] = 1;
#pragma omp atomic
        count++;
    }
    return count;
}
