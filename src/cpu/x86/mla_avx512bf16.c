/* SPDX-License-Identifier: MIT
 *
 * mla on VDPBF16PS, for bf16 rows and rows that are exact in bf16: 8 x 3 sums of 16 lanes.  See
 * mla_vec.h.
 */
#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/mla_rows_avx512.h"

#define MLA_STEP 2
#include "cpu/x86/mla_vec.h"

static void run_bf16(const struct attn_mla_task *t, char *s)
{
    attend(t, (enum attn_mla_format)ATTN_BF16, s);
}
static void run_f8(const struct attn_mla_task *t, char *s)
{
    attend(t, (enum attn_mla_format)ATTN_F8, s);
}
static void run_v32(const struct attn_mla_task *t, char *s) { attend(t, ATTN_MLA_V32, s); }
static void run_model1(const struct attn_mla_task *t, char *s) { attend(t, ATTN_MLA_MODEL1, s); }

const struct attn_mla_kernel attn_mla_avx512bf16[ATTN_MLA_FORMATS] = {
    [ATTN_BF16] = {"attn_mla_bf16_avx512bf16", ROWS_MAX, mla_scratch_bytes, run_bf16},
    [ATTN_F8] = {"attn_mla_fp8_avx512bf16", ROWS_MAX, mla_scratch_bytes, run_f8},
    [ATTN_MLA_V32] = {"attn_mla_v32_avx512bf16", ROWS_MAX, mla_scratch_bytes, run_v32},
    [ATTN_MLA_MODEL1] = {"attn_mla_model1_avx512bf16", ROWS_MAX, mla_scratch_bytes, run_model1},
};
