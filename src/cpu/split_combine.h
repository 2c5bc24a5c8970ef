/* SPDX-License-Identifier: MIT
 *
 * split_combine on a CPU: the driver, and the scalar reference of one row.
 */
#ifndef ATTN_CPU_SPLIT_COMBINE_H
#define ATTN_CPU_SPLIT_COMBINE_H

#include "ops/split_combine.h"

attn_status attn_split_combine_cpu_run(const struct attn_split_combine_problem *p, void *stream);

/* As attn_split_combine_kernel.run, with fp64 sums. */
void attn_split_combine_ref(const float *o, int64_t o_split, const float *lse, int64_t lse_split,
                            int32_t splits, int32_t d_v, const float *sink, void *out,
                            enum attn_dtype out_dtype, float *lse_out);

#endif
