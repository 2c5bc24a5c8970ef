/* SPDX-License-Identifier: MIT
 *
 * The CUDA row of ops/backend.h.
 */
#include "cuda/mha_fwd_cuda.h"
#include "cuda/module.h"
#include "ops/backend.h"

static attn_status split_combine_run(const struct attn_split_combine_problem *problem, void *stream)
{
    (void)problem;
    (void)stream;
    return attn_fail(ATTN_E_NOT_BUILT, "split_combine: not built for CUDA devices");
}

static const char *kernel_name(int index)
{
    return index < attn_mha_fwd_kernel_count ? attn_mha_fwd_kernels[index].name : NULL;
}

const struct attn_backend attn_backend_cuda = {
    .device = kDLCUDA,
    .mha_fwd_plan = attn_mha_fwd_cuda_plan,
    .mha_fwd_run = attn_mha_fwd_cuda_run,
    .split_combine_run = split_combine_run,
    .kernel_name = kernel_name,
};
