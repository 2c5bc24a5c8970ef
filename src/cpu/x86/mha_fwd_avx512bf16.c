/* SPDX-License-Identifier: MIT
 *
 * mha_fwd on dot products of bf16 pairs, for bf16 and for fp8: see mha_fwd_vec.h and fwd_dot.h.
 */
#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/vec_avx512.h"

#include "cpu/x86/fwd_dot.h"
#include "cpu/x86/mha_fwd_vec.h"

FWD_RUN(bf16, ATTN_BF16)
FWD_RUN(fp8, ATTN_F8)

const struct attn_mha_kernel attn_mha_fwd_bf16_avx512bf16 = FWD_KERNEL(bf16, avx512bf16);
const struct attn_mha_kernel attn_mha_fwd_fp8_avx512bf16 = FWD_KERNEL(fp8, avx512bf16);
