/* SPDX-License-Identifier: MIT
 *
 * split_combine: the contract.
 */
#ifndef ATTN_OPS_SPLIT_COMBINE_H
#define ATTN_OPS_SPLIT_COMBINE_H

#include "core/dtype.h"
#include "core/status.h"

/* Partials (s, i, t, h) of fp32 rows; strides in elements. */
struct attn_split_combine_problem {
    DLDevice device;
    int32_t threads;
    int64_t splits, b, s, h, d_v;
    const float *out_partial, *lse_partial;
    int64_t out_partial_stride[4]; /* splits, b, s, h; the last extent has stride 1 */
    int64_t lse_partial_stride[4]; /* splits, b, s, h */
    enum attn_dtype out_dtype;
    char *out;
    int64_t out_stride[3]; /* b, s, h */
    float *lse;
    int64_t lse_stride[3]; /* b, s, h */
};

attn_status attn_split_combine_check(const struct attn_split_combine_args *args,
                                     struct attn_split_combine_problem *problem);

#endif
