/* SPDX-License-Identifier: MIT
 *
 * rotary for AVX2: see rotary_vec.h.
 */
#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/row_avx2.h"

#include "cpu/x86/rotary_vec.h"

const struct attn_rotary_kernel attn_rotary_avx2[ATTN_DTYPES] = {
    [ATTN_F32] = {"attn_rotary_fp32_avx2", rotate_fp32},
    [ATTN_BF16] = {"attn_rotary_bf16_avx2", rotate_bf16},
    [ATTN_F16] = {"attn_rotary_fp16_avx2", rotate_fp16},
    [ATTN_F8] = {"attn_rotary_fp8_avx2", rotate_fp8},
};
