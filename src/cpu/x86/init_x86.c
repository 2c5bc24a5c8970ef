/* SPDX-License-Identifier: MIT
 *
 * The ladder: each rung overwrites the entries it does better.
 */
#include "cpu/x86/kernels_x86.h"

void attn_cpu_init_x86(struct attn_cpu_kernels *t, unsigned have)
{
    *t = (struct attn_cpu_kernels){0};
    if (!(have & ATTN_CPU_AVX2)) return;
    for (int i = 0; i < ATTN_DTYPES; ++i) {
        t->mha_fwd[i] = t->mha_fwd_short[i] = &attn_mha_fwd_avx2[i];
        t->mha_decode[i] = &attn_mha_decode_avx2[i];
        t->rotary[i] = &attn_rotary_avx2[i];
    }
    t->split_combine = &attn_split_combine_avx2;
    for (int i = 0; i < ATTN_MLA_FORMATS; ++i) t->mla[i] = &attn_mla_avx2[i];
    t->mla_finish = &attn_mla_finish_avx2;
    for (int i = 0; i < ATTN_F8; ++i) { /* fp32, bf16, fp16 */
        t->kda_fwd[i] = &attn_kda_fwd_avx2[i];
        t->kda_step[i] = &attn_kda_step_avx2[i];
    }

    if (!(have & ATTN_CPU_AVX512)) return;
    for (int i = 0; i < ATTN_DTYPES; ++i) {
        t->mha_fwd[i] = t->mha_fwd_short[i] = &attn_mha_fwd_avx512[i];
        t->mha_decode[i] = &attn_mha_decode_avx512[i];
        t->rotary[i] = &attn_rotary_avx512[i];
    }
    t->split_combine = &attn_split_combine_avx512;
    for (int i = 0; i < ATTN_MLA_FORMATS; ++i) t->mla[i] = &attn_mla_avx512[i];
    t->mla_finish = &attn_mla_finish_avx512;
    for (int i = 0; i < ATTN_F8; ++i) { /* fp32, bf16, fp16 */
        t->kda_fwd[i] = &attn_kda_fwd_avx512[i];
        t->kda_step[i] = &attn_kda_step_avx512[i];
    }

    if (have & ATTN_CPU_AVX512BF16) {
        t->mha_fwd[ATTN_BF16] = t->mha_fwd_short[ATTN_BF16] = &attn_mha_fwd_bf16_avx512bf16;
        t->mha_fwd[ATTN_F8] = t->mha_fwd_short[ATTN_F8] = &attn_mha_fwd_fp8_avx512bf16;
        t->mha_decode[ATTN_BF16] = &attn_mha_decode_bf16_avx512bf16;
        t->mha_decode[ATTN_F8] = &attn_mha_decode_fp8_avx512bf16;
        t->kda_fwd[ATTN_BF16] = &attn_kda_fwd_bf16_avx512bf16;
        for (int i = 0; i < ATTN_MLA_FORMATS; ++i)
            if (attn_mla_avx512bf16[i].run) t->mla[i] = &attn_mla_avx512bf16[i];
    }

    if (!(have & ATTN_CPU_AMX)) return;
    t->mha_fwd[ATTN_BF16] = &attn_mha_fwd_bf16_amx;
    t->kda_fwd[ATTN_BF16] = &attn_kda_fwd_bf16_amx;
    t->mha_fwd[ATTN_F16] = &attn_mha_fwd_fp16_amx;
    t->mha_fwd[ATTN_F32] = &attn_mha_fwd_fp32_amx;
    t->mha_fwd[ATTN_F8] = &attn_mha_fwd_fp8_amx;
    for (int i = 0; i < ATTN_MLA_FORMATS; ++i)
        if (attn_mla_amx[i].run) t->mla[i] = &attn_mla_amx[i];
}
