/* SPDX-License-Identifier: MIT
 *
 * Seconds that attn_mha_fwd_run takes at the smallest shape (one query, one key, one head of width
 * d, bf16), called from C: what is left of an eager Python call beyond it is Python and binding.
 * Usage: smallest <libattn.so> <d>.   Prints the best mean of 20 rounds of 20000 calls.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <attn/attn.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static DLTensor tensor(void *data, DLDataTypeCode code, int bits, int32_t ndim, int64_t *shape)
{
    return (DLTensor){.data = data,
                      .device = {kDLCPU, 0},
                      .ndim = ndim,
                      .shape = shape,
                      .dtype = {(uint8_t)code, (uint8_t)bits, 1}};
}

int main(int count, char **args)
{
    void *library = count > 2 ? dlopen(args[1], RTLD_NOW) : NULL;
    if (!library) return 1;
    attn_status (*plan_fwd)(const struct attn_mha_fwd_args *,
                            struct attn_mha_fwd_plan *) = dlsym(library, "attn_mha_fwd_plan");
    attn_status (*run_fwd)(const struct attn_mha_fwd_args *, const struct attn_mha_fwd_plan *,
                           void *, int64_t, void *) = dlsym(library, "attn_mha_fwd_run");
    if (!plan_fwd || !run_fwd) return 1;

    static _Alignas(64) char rows[4][1024];
    int64_t shape[4] = {1, 1, 1, atoi(args[2])}, lse_shape[3] = {1, 1, 1};
    DLTensor q = tensor(rows[0], kDLBfloat, 16, 4, shape),
             k = tensor(rows[1], kDLBfloat, 16, 4, shape),
             v = tensor(rows[2], kDLBfloat, 16, 4, shape),
             out = tensor(rows[3], kDLBfloat, 16, 4, shape);
    float sum;
    DLTensor lse = tensor(&sum, kDLFloat, 32, 3, lse_shape);
    int64_t strides[4] = {shape[3], shape[3], shape[3], 1}, lse_strides[3] = {1, 1, 1};
    q.strides = k.strides = v.strides = out.strides = strides;
    lse.strides = lse_strides;
    struct attn_mha_fwd_args a = {.size = sizeof a,
                                  .q = &q,
                                  .k = &k,
                                  .v = &v,
                                  .out = &out,
                                  .lse = &lse,
                                  .softmax_scale = 1,
                                  .window_left = -1,
                                  .window_right = -1,
                                  .num_splits = 1,
                                  .pack_gqa = -1};
    struct attn_mha_fwd_plan plan = {.size = sizeof plan};
    if (plan_fwd(&a, &plan)) return 1;
    void *workspace = aligned_alloc(64, (size_t)(plan.workspace_bytes + 127) / 64 * 64);
    double best = 1;
    for (int round = 0; round < 20; round++) {
        double start = now();
        for (int i = 0; i < 20000; i++)
            if (run_fwd(&a, &plan, workspace, plan.workspace_bytes, NULL)) return 1;
        double each = (now() - start) / 20000;
        if (each < best) best = each;
    }
    printf("%.4g\n", best);
    return 0;
}
