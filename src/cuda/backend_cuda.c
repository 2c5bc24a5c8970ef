/* SPDX-License-Identifier: MIT
 *
 * The CUDA row of ops/backend.h.
 */
#include "cuda/mha_fwd_cuda.h"
#include "cuda/split_combine_cuda.h"
#include "ops/backend.h"

static const char *kernel_name(int index)
{
    if (index < attn_mha_fwd_kernel_count) return attn_mha_fwd_kernels[index].name;
    index -= attn_mha_fwd_kernel_count;
    return index < attn_plain_kernel_count ? attn_plain_kernels[index].name : NULL;
}

static attn_status kda_fwd_plan(const struct attn_kda_problem *problem,
                                struct attn_kda_fwd_plan *plan)
{
    (void)problem, (void)plan;
    return attn_fail(ATTN_E_NOT_BUILT, "kda_fwd: expected on a CPU, got a CUDA device");
}

static attn_status kda_fwd_run(const struct attn_kda_problem *problem,
                               const struct attn_kda_fwd_plan *plan, char *workspace,
                               int64_t workspace_bytes, void *stream)
{
    (void)problem, (void)plan, (void)workspace, (void)workspace_bytes, (void)stream;
    return attn_fail(ATTN_E_NOT_BUILT, "kda_fwd: expected on a CPU, got a CUDA device");
}

static attn_status kda_step_run(const struct attn_kda_problem *problem, void *stream)
{
    (void)problem, (void)stream;
    return attn_fail(ATTN_E_NOT_BUILT, "kda_step: expected on a CPU, got a CUDA device");
}

const struct attn_backend attn_backend_cuda = {
    .device = kDLCUDA,
    .mha_fwd_plan = attn_mha_fwd_cuda_plan,
    .mha_fwd_run = attn_mha_fwd_cuda_run,
    .split_combine_run = attn_split_combine_cuda_run,
    .kda_fwd_plan = kda_fwd_plan,
    .kda_fwd_run = kda_fwd_run,
    .kda_step_run = kda_step_run,
    .kernel_name = kernel_name,
};
