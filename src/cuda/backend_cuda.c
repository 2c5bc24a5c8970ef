/* SPDX-License-Identifier: MIT
 *
 * The CUDA row of ops/backend.h.
 */
#include "cuda/kda_cuda.h"
#include "cuda/mha_fwd_cuda.h"
#include "cuda/mla_decode_cuda.h"
#include "cuda/split_combine_cuda.h"
#include "ops/backend.h"

static const char *kernel_name(int index)
{
    if (index < attn_mha_fwd_kernel_count) return attn_mha_fwd_kernels[index].name;
    index -= attn_mha_fwd_kernel_count;
    if (index < attn_kda_fwd_kernel_count) return attn_kda_fwd_kernels[index].name;
    index -= attn_kda_fwd_kernel_count;
    if (index < attn_mha_decode_kernel_count) return attn_mha_decode_kernels[index].name;
    index -= attn_mha_decode_kernel_count;
    if (index < attn_mla_decode_kernel_count) return attn_mla_decode_kernels[index].name;
    index -= attn_mla_decode_kernel_count;
    if (index < attn_mla_decode_few_kernel_count) return attn_mla_decode_few_kernels[index].name;
    index -= attn_mla_decode_few_kernel_count;
    return index < attn_plain_kernel_count ? attn_plain_kernels[index].name : NULL;
}

const struct attn_backend attn_backend_cuda = {
    .device = kDLCUDA,
    .mha_fwd_plan = attn_mha_fwd_cuda_plan,
    .mha_fwd_run = attn_mha_fwd_cuda_run,
    .split_combine_run = attn_split_combine_cuda_run,
    .kda_fwd_plan = attn_kda_fwd_cuda_plan,
    .kda_fwd_run = attn_kda_fwd_cuda_run,
    .kda_step_run = attn_kda_step_cuda_run,
    .mla_plan = attn_mla_cuda_plan,
    .mla_run = attn_mla_cuda_run,
    .kernel_name = kernel_name,
};
