/* SPDX-License-Identifier: MIT
 *
 * What the host hands to kda_order: plain C, the same bytes on both sides.
 */
#ifndef ATTN_KDA_ORDER_PARAMS_H
#define ATTN_KDA_ORDER_PARAMS_H

#include <stdint.h>

struct attn_kda_order_params {
    const void
        *cu_seqlens; /* [n + 1], int32 or int64; wild values count as the nearest of 0 and t */
    int32_t *order;  /* [n], written */
    int32_t *ticket; /* becomes 0 */
    int32_t n, t, cu_is_64;
};

#ifdef __cplusplus
static_assert(sizeof(struct attn_kda_order_params) == 40, "the host's and the kernel's layout");
#else
_Static_assert(sizeof(struct attn_kda_order_params) == 40, "the host's and the kernel's layout");
#endif
#endif
