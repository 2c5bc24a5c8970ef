/* SPDX-License-Identifier: MIT
 *
 * mha_decode on dot products of bf16 pairs: see mha_decode_vec.h and decode_dot.h.
 */
#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/row_avx512.h"

#include "cpu/x86/decode_dot.h"
#include "cpu/x86/mha_decode_vec.h"

DECODE_RUN(bf16, ATTN_BF16)
DECODE_RUN(fp8, ATTN_F8)

const struct attn_mha_kernel attn_mha_decode_bf16_avx512bf16 = DECODE_KERNEL(bf16, avx512bf16);
const struct attn_mha_kernel attn_mha_decode_fp8_avx512bf16 = DECODE_KERNEL(fp8, avx512bf16);
