/* SPDX-License-Identifier: MIT
 *
 * kda_fwd for AVX-512: see kda_fwd_vec.h.
 */
#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/row_avx512.h"

#include "cpu/x86/kda_fwd_vec.h"

const struct attn_kda_fwd_kernel attn_kda_fwd_avx512[ATTN_DTYPES] = {
    [ATTN_F32] = KDA_FWD_KERNEL(avx512, fp32),
    [ATTN_BF16] = KDA_FWD_KERNEL(avx512, bf16),
    [ATTN_F16] = KDA_FWD_KERNEL(avx512, fp16),
};
