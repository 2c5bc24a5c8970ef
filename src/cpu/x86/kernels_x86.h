/* SPDX-License-Identifier: MIT
 *
 * Every x86 kernel's descriptor, by rung.  init_x86.c builds the ladder from these names.
 */
#ifndef ATTN_CPU_X86_KERNELS_X86_H
#define ATTN_CPU_X86_KERNELS_X86_H

#include "cpu/kernels.h"

/* Indexed by enum attn_dtype. */
extern const struct attn_mha_kernel attn_mha_fwd_avx2[ATTN_DTYPES];
extern const struct attn_mha_kernel attn_mha_fwd_avx512[ATTN_DTYPES];
extern const struct attn_mha_kernel attn_mha_fwd_bf16_avx512bf16, attn_mha_fwd_fp8_avx512bf16;
extern const struct attn_mha_kernel attn_mha_fwd_bf16_amx, attn_mha_fwd_fp16_amx,
    attn_mha_fwd_fp8_amx, attn_mha_fwd_fp32_amx;

extern const struct attn_mha_kernel attn_mha_decode_avx2[ATTN_DTYPES];
extern const struct attn_mha_kernel attn_mha_decode_avx512[ATTN_DTYPES];
extern const struct attn_mha_kernel attn_mha_decode_bf16_avx512bf16, attn_mha_decode_fp8_avx512bf16;

extern const struct attn_rotary_kernel attn_rotary_avx2[ATTN_DTYPES];
extern const struct attn_rotary_kernel attn_rotary_avx512[ATTN_DTYPES];

extern const struct attn_split_combine_kernel attn_split_combine_avx2;
extern const struct attn_split_combine_kernel attn_split_combine_avx512;

/* Indexed by enum attn_mla_format. */
extern const struct attn_mla_kernel attn_mla_avx2[ATTN_MLA_FORMATS];
extern const struct attn_mla_kernel attn_mla_avx512[ATTN_MLA_FORMATS];
/* Of these some have no run: the formats that are no bf16. */
extern const struct attn_mla_kernel attn_mla_avx512bf16[ATTN_MLA_FORMATS];
extern const struct attn_mla_kernel attn_mla_amx[ATTN_MLA_FORMATS];
extern const struct attn_mla_finish_kernel attn_mla_finish_avx2;
extern const struct attn_mla_finish_kernel attn_mla_finish_avx512;
extern const struct attn_kda_fwd_kernel attn_kda_fwd_avx2[ATTN_DTYPES];
extern const struct attn_kda_fwd_kernel attn_kda_fwd_avx512[ATTN_DTYPES];
extern const struct attn_kda_fwd_kernel attn_kda_fwd_bf16_avx512bf16;
extern const struct attn_kda_fwd_kernel attn_kda_fwd_bf16_amx;
extern const struct attn_kda_step_kernel attn_kda_step_avx2[ATTN_DTYPES];
extern const struct attn_kda_step_kernel attn_kda_step_avx512[ATTN_DTYPES];

#endif
