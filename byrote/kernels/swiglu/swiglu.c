/* silu(gate) * up * weight over N rows of 2 F numbers, `stride` apart, and its backward; see reference.py beside this file.

   An infinite `limit` cuts nothing. NULL stands for weights of one. */

#include "lanes.h"

typedef struct {
    long F, stride;
    float limit;
    const void *gate_up;
    const float *weight;
    void *hidden;     /* forward */
    const void *grad; /* backward */
    void *d_gate_up;
    float *d_weight;
} data;

INLINE row half_at(const void *base, long offset, long F, int bf16, int whole) {
    return (row){(char *)base + offset * (bf16 ? 2 : 4), F, bf16, whole};
}

INLINE void forward_rows(const data *a, long first, long end, const int bf16, const int whole) {
    const lanes limit = splat(a->limit);
    for (long n = first; n < end; n++) {
        const row gates = half_at(a->gate_up, n * a->stride, a->F, bf16, whole), ups = half_at(a->gate_up, n * a->stride + a->F, a->F, bf16, whole);
        const row out = row_at(a->hidden, n, a->F, bf16, whole);
        const float weight = a->weight ? a->weight[n] : 1.0f;
        for (long f = 0; f < a->F; f += LANES) {
            lanes gate = load_row(gates, f), up = load_row(ups, f);
            gate = at_most(gate, limit);
            up = at_least(at_most(up, limit), -limit);
            store_row(out, f, gate * sigmoid_lanes(gate) * up * weight);
        }
    }
}

INLINE void backward_rows(const data *a, long first, long end, const int bf16, const int whole) {
    const lanes limit = splat(a->limit), zero = {0};
    for (long n = first; n < end; n++) {
        const row gates = half_at(a->gate_up, n * a->stride, a->F, bf16, whole), ups = half_at(a->gate_up, n * a->stride + a->F, a->F, bf16, whole);
        const row d_gates = half_at(a->d_gate_up, n * 2 * a->F, a->F, bf16, whole), d_ups = half_at(a->d_gate_up, (n * 2 + 1) * a->F, a->F, bf16, whole);
        const row above = row_at(a->grad, n, a->F, bf16, whole);
        const float weight = a->weight ? a->weight[n] : 1.0f;
        lanes d_weight = {0};
        for (long f = 0; f < a->F; f += LANES) {
            lanes gate = load_row(gates, f), up = load_row(ups, f), grad = load_row(above, f);
            signed_lanes cut_gate = gate > limit, cut_up = (up > limit) | (up < -limit);
            gate = select_lanes(cut_gate, limit, gate);
            up = select_lanes(up > limit, limit, select_lanes(up < -limit, -limit, up));
            lanes open = sigmoid_lanes(gate), silu = gate * open;
            d_weight += grad * silu * up;
            grad *= weight;
            store_row(d_gates, f, select_lanes(cut_gate, zero, grad * up * (open + silu * (1.0f - open))));
            store_row(d_ups, f, select_lanes(cut_up, zero, grad * silu));
        }
        if (a->d_weight) a->d_weight[n] = sum_lanes(d_weight);
    }
}

static void run_part(const data *a, long first, long end, int bf16) {
    const int whole = a->F % LANES == 0;
    if (a->hidden && whole && bf16) forward_rows(a, first, end, 1, 1);
    else if (a->hidden && whole) forward_rows(a, first, end, 0, 1);
    else if (a->hidden) forward_rows(a, first, end, bf16, 0);
    else if (whole && bf16) backward_rows(a, first, end, 1, 1);
    else if (whole) backward_rows(a, first, end, 0, 1);
    else backward_rows(a, first, end, bf16, 0);
}

static int run(int threads, int bf16, long N, const data *a) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; part++) run_part(a, N * part / threads, N * (part + 1) / threads, bf16);
    return 0;
}

/* Both return 0. */
int swiglu_forward(int threads, int bf16, long N, long F, long stride, float limit, const void *gate_up, const float *weight, void *hidden) {
    const data a = {F, stride, limit, gate_up, weight, .hidden = hidden};
    return run(threads, bf16, N, &a);
}

int swiglu_backward(int threads, int bf16, long N, long F, long stride, float limit, const void *gate_up, const float *weight, const void *grad,
                    void *d_gate_up, float *d_weight) {
    const data a = {F, stride, limit, gate_up, weight, .grad = grad, .d_gate_up = d_gate_up, .d_weight = d_weight};
    return run(threads, bf16, N, &a);
}
