/* y [rows][outputs] = x [rows][inputs] times int8 weights [outputs][inputs] with a scale per output (reference.py); rows <= MOST_ROWS. */

#include "decode_step/rows.h"

int int8_product(int threads, long rows, long inputs, long outputs, const float *x, const int8_t *values, const float *scale, float *y) {
    product p = {.bytes = values, .row_scale = scale, .width = inputs, .stride = inputs, .outputs = outputs, .count = rows};
    for (long m = 0; m < rows; m++) p.x[m] = x + m * inputs, p.y[m] = y + m * outputs;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long thread = 0; thread < threads; thread++) run_product(&p, share_at(outputs, thread, threads), share_at(outputs, thread + 1, threads), SET);
    return 0;
}
