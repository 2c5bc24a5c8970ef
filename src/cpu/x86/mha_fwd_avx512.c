/* SPDX-License-Identifier: MIT
 *
 * mha_fwd on AVX-512 FMA, all element types: 8 x 3 accumulators, 3 vectors of B and a broadcast
 * fill 28 of the 32 registers.
 */
#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/vec_avx512.h"

#include "cpu/x86/fwd_fma.h"
#include "cpu/x86/mha_fwd_vec.h"

FWD_RUN(fp32, ATTN_F32)
FWD_RUN(bf16, ATTN_BF16)
FWD_RUN(fp16, ATTN_F16)
FWD_RUN(fp8, ATTN_F8)

const struct attn_mha_kernel attn_mha_fwd_avx512[ATTN_DTYPES] = {
    [ATTN_F32] = FWD_KERNEL(fp32, avx512),
    [ATTN_BF16] = FWD_KERNEL(bf16, avx512),
    [ATTN_F16] = FWD_KERNEL(fp16, avx512),
    [ATTN_F8] = FWD_KERNEL(fp8, avx512),
};
