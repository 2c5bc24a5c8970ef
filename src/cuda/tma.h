/* SPDX-License-Identifier: MIT
 *
 * Tensor maps: what the copy engine must know of a tensor, from plain integers.
 */
#ifndef ATTN_CUDA_TMA_H
#define ATTN_CUDA_TMA_H

#include <stdbool.h>

#include "cuda/driver.h"
#include "cuda/kernels/mha_fwd_params.h"

#define ATTN_TMA_RANK 5

/* A tensor of 16-bit elements as the copy engine sees it: innermost dimension first, its stride 1
 * and not stored.  Boxes are 64 columns wide and land swizzled by 128 bytes; elements outside the
 * extents arrive as zero. */
struct attn_tma {
    int rank;
    void *base; /* 16-byte aligned */
    int64_t extent[ATTN_TMA_RANK];
    int64_t stride[ATTN_TMA_RANK - 1]; /* elements, multiples of 8; of dimension 1 and up */
    int32_t box[ATTN_TMA_RANK];
    bool alone; /* what lies beside a box is not wanted with it: L2 fetches 128 bytes, not 256 */
};

attn_status attn_tma_encode(const struct attn_tma *tensor, bool fp16, const char *name,
                            struct attn_tensor_map *map);

#endif
