/* SPDX-License-Identifier: MIT
 *
 * kda_step for AVX2: see kda_step_vec.h.
 */
#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/row_avx2.h"

#include "cpu/x86/kda_step_vec.h"

const struct attn_kda_step_kernel attn_kda_step_avx2[ATTN_DTYPES] = {
    [ATTN_F32] = {"attn_kda_step_fp32_avx2", step_fp32},
    [ATTN_BF16] = {"attn_kda_step_bf16_avx2", step_bf16},
    [ATTN_F16] = {"attn_kda_step_fp16_avx2", step_fp16},
};
