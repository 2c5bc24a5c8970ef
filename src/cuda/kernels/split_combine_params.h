/* SPDX-License-Identifier: MIT
 *
 * What the host hands to split_combine: plain C, the same bytes on both sides; strides in elements.
 */
#ifndef ATTN_SPLIT_COMBINE_PARAMS_H
#define ATTN_SPLIT_COMBINE_PARAMS_H

#include <stdint.h>

enum attn_combine_type { ATTN_COMBINE_FP32, ATTN_COMBINE_BF16, ATTN_COMBINE_FP16 };

struct attn_split_combine_params {
    const float *out_partial; /* [splits, b, s, h, d_v], last stride 1 */
    const float *lse_partial; /* [splits, b, s, h] */
    void *out;                /* [b, s, h, d_v], last stride 1 */
    float *lse;               /* [b, s, h] */
    int64_t out_partial_stride[4], lse_partial_stride[4];
    int64_t out_stride[3], lse_stride[3];
    int64_t rows; /* b * s * h */
    int32_t splits, s, h, d_v;
    int32_t type; /* enum attn_combine_type */
    int32_t reserved;
};

#ifdef __cplusplus
static_assert(sizeof(struct attn_split_combine_params) == 176, "host and kernel agree");
#else
_Static_assert(sizeof(struct attn_split_combine_params) == 176, "host and kernel agree");
#endif
#endif
