/* SPDX-License-Identifier: MIT
 *
 * The CPU's row in the table of back ends.
 */
#include "cpu/kda.h"
#include "cpu/mha_fwd.h"
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
    .kernel_name = attn_cpu_kernel_name,
};
