/* SPDX-License-Identifier: MIT
 *
 * split_combine on Hopper.
 */
#include <string.h>

#include "cuda/kernels/split_combine_params.h"
#include "cuda/split_combine_cuda.h"

#define ROWS_A_BLOCK 4

static attn_status launch(const struct attn_split_combine_problem *p, cu_device device,
                          cu_stream stream)
{
    const struct attn_cuda_driver *cu;
    struct attn_cuda_kernel *kernel;
    cu_kernel handle;
    ATTN_TRY(attn_cuda_driver(&cu));
    ATTN_TRY(attn_plain_kernel("attn_split_combine_sm90", &kernel));
    ATTN_TRY(attn_cuda_kernel_load(kernel, device, &handle));

    struct attn_split_combine_params params = {
        .out_partial = p->out_partial,
        .lse_partial = p->lse_partial,
        .out = p->out,
        .lse = p->lse,
        .rows = p->b * p->s * p->h,
        .splits = (int32_t)p->splits,
        .s = (int32_t)p->s,
        .h = (int32_t)p->h,
        .d_v = (int32_t)p->d_v,
        .type = p->out_dtype == ATTN_F32    ? ATTN_COMBINE_FP32
                : p->out_dtype == ATTN_BF16 ? ATTN_COMBINE_BF16
                                            : ATTN_COMBINE_FP16,
    };
    memcpy(params.out_partial_stride, p->out_partial_stride, sizeof params.out_partial_stride);
    memcpy(params.lse_partial_stride, p->lse_partial_stride, sizeof params.lse_partial_stride);
    memcpy(params.out_stride, p->out_stride, sizeof params.out_stride);
    memcpy(params.lse_stride, p->lse_stride, sizeof params.lse_stride);
    int64_t blocks = (params.rows + ROWS_A_BLOCK - 1) / ROWS_A_BLOCK;
    ATTN_CHECK(blocks <= INT32_MAX, ATTN_E_NOT_BUILT,
               "out_partial: fewer than 2^33 rows are built for Hopper, got %lld",
               (long long)params.rows);
    struct cu_launch_config config = {
        .grid = {(unsigned)blocks, 1, 1},
        .block = {ROWS_A_BLOCK * 32, 1, 1},
        .stream = stream,
    };
    void *arguments[] = {&params};
    return attn_cuda_status(cu->launch_kernel_ex(&config, handle, arguments, NULL), kernel->name);
}

attn_status attn_split_combine_cuda_run(const struct attn_split_combine_problem *p, void *stream)
{
    struct attn_cuda_device device;
    if (p->b * p->s * p->h == 0) return ATTN_OK;
    ATTN_TRY(attn_cuda_enter(p->device.device_id, &device));
    attn_status status = launch(p, device.device, stream);
    attn_cuda_leave(&device);
    return status;
}
