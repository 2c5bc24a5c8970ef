/* SPDX-License-Identifier: MIT
 *
 * The CUDA row of ops/backend.h.
 */
#include "cuda/mha_fwd_cuda.h"
#include "ops/backend.h"

static attn_status split_combine_run(const struct attn_split_combine_problem *problem, void *stream)
{
    (void)problem;
    (void)stream;
    return attn_fail(ATTN_E_NOT_BUILT, "split_combine: not built for CUDA devices");
}

const struct attn_backend attn_backend_cuda = {
    .device = kDLCUDA,
    .mha_fwd_plan = attn_mha_fwd_cuda_plan,
    .mha_fwd_run = attn_mha_fwd_cuda_run,
    .split_combine_run = split_combine_run,
};
