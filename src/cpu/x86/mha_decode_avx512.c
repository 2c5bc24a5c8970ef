/* SPDX-License-Identifier: MIT
 *
 * mha_decode for AVX-512: see mha_decode_vec.h.
 */
#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/row_avx512.h"

#include "cpu/x86/decode_fma.h"
#include "cpu/x86/mha_decode_vec.h"

DECODE_RUN(fp32, ATTN_F32)
DECODE_RUN(bf16, ATTN_BF16)
DECODE_RUN(fp16, ATTN_F16)
DECODE_RUN(fp8, ATTN_F8)

const struct attn_mha_kernel attn_mha_decode_avx512[ATTN_DTYPES] = {
    [ATTN_F32] = DECODE_KERNEL(fp32, avx512),
    [ATTN_BF16] = DECODE_KERNEL(bf16, avx512),
    [ATTN_F16] = DECODE_KERNEL(fp16, avx512),
    [ATTN_F8] = DECODE_KERNEL(fp8, avx512),
};
