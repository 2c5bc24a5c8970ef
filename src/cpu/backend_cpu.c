/* SPDX-License-Identifier: MIT
 *
 * The CPU's row in the table of back ends.
 */
#include "cpu/kda.h"
#include "cpu/mha_fwd.h"
#include "cpu/mla.h"
#include "cpu/split_combine.h"
#include "ops/backend.h"

const struct attn_backend attn_backend_cpu = {
    .device = kDLCPU,
    .mha_fwd_plan = attn_mha_fwd_cpu_plan,
    .mha_fwd_run = attn_mha_fwd_cpu_run,
    .split_combine_run = attn_split_combine_cpu_run,
    .kda_fwd_plan = attn_kda_fwd_cpu_plan,
    .kda_fwd_run = attn_kda_fwd_cpu_run,
    .kda_step_run = attn_kda_step_cpu_run,
    .mla_plan = attn_mla_cpu_plan,
    .mla_run = attn_mla_cpu_run,
    .mla_cache_quantize_run = attn_mla_cache_quantize_cpu,
    .mla_cache_dequantize_run = attn_mla_cache_dequantize_cpu,
    .kernel_name = attn_cpu_kernel_name,
};
