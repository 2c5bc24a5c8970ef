/* SPDX-License-Identifier: MIT
 *
 * The names of all CPU kernels compiled in, for people and tests.
 */
#include "cpu/x86/kernels_x86.h"

/* Kernel i of the table a rung fills, in a fixed order; NULL where the rung leaves a gap. */
static const char *name_in(const struct attn_cpu_kernels *t, int i)
{
    int op = i / ATTN_DTYPES, dtype = i % ATTN_DTYPES;
    if (op == 0) return t->mha_fwd[dtype] ? t->mha_fwd[dtype]->name : NULL;
    if (op == 1) return t->mha_decode[dtype] ? t->mha_decode[dtype]->name : NULL;
    if (op == 2) return t->rotary[dtype] ? t->rotary[dtype]->name : NULL;
    if (op == 3) return dtype == 0 && t->split_combine ? t->split_combine->name : NULL;
    if (op == 4) return t->kda_fwd[dtype] ? t->kda_fwd[dtype]->name : NULL;
    if (op == 5) return t->kda_step[dtype] ? t->kda_step[dtype]->name : NULL;
    i -= 6 * ATTN_DTYPES;
    if (i < ATTN_MLA_FORMATS) return t->mla[i] ? t->mla[i]->name : NULL;
    return t->mla_finish ? t->mla_finish->name : NULL;
}

const char *attn_cpu_kernel_name(int index)
{
    static const unsigned rungs[] = {
        ATTN_CPU_AVX2,
        ATTN_CPU_AVX2 | ATTN_CPU_AVX512,
        ATTN_CPU_AVX2 | ATTN_CPU_AVX512 | ATTN_CPU_AVX512BF16,
        ATTN_CPU_AVX2 | ATTN_CPU_AVX512 | ATTN_CPU_AVX512BF16 | ATTN_CPU_AMX,
    };
    struct attn_cpu_kernels table, below = {0};
    for (size_t r = 0; r < sizeof rungs / sizeof *rungs; ++r) {
        attn_cpu_init_x86(&table, rungs[r]);
        for (int i = 0; i < 6 * ATTN_DTYPES + ATTN_MLA_FORMATS + 1; ++i) {
            const char *name = name_in(&table, i), *same = name_in(&below, i);
            if (name && name != same && index-- == 0) return name;
        }
        below = table;
    }
    return NULL;
}
