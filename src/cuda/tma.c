/* SPDX-License-Identifier: MIT
 *
 * Encodes tensor maps through the driver; about 0.1 us each, so they are made per call and nothing
 * is remembered.
 */
#include "cuda/tma.h"

attn_status attn_tma_encode(const struct attn_tma *t, bool fp16, const char *name,
                            struct attn_tensor_map *map)
{
    const struct attn_cuda_driver *cu;
    const uint32_t ones[ATTN_TMA_RANK] = {1, 1, 1, 1, 1};
    uint64_t extent[ATTN_TMA_RANK], stride[ATTN_TMA_RANK - 1];
    uint32_t box[ATTN_TMA_RANK];

    ATTN_TRY(attn_cuda_driver(&cu));
    for (int i = 0; i < t->rank; i++) {
        extent[i] = t->extent[i] > 0 ? (uint64_t)t->extent[i] : 1;
        box[i] = (uint32_t)t->box[i];
    }
    /* The stride of an extent of 1 is never used, and may be anything: any legal one will do. */
    for (int i = 0; i + 1 < t->rank; i++)
        stride[i] = extent[i + 1] > 1 ? (uint64_t)t->stride[i] * 2 : 16;
    return attn_cuda_status(cu->tensor_map_encode_tiled(map,
                                                        fp16 ? CU_TENSOR_FLOAT16
                                                             : CU_TENSOR_BFLOAT16,
                                                        (uint32_t)t->rank, t->base, extent, stride,
                                                        box, ones, 0, CU_TENSOR_SWIZZLE_128B,
                                                        t->alone ? CU_TENSOR_L2_PROMOTION_128B
                                                                 : CU_TENSOR_L2_PROMOTION_256B,
                                                        0),
                            name);
}
