/* SPDX-License-Identifier: MIT
 *
 * What the host hands to kda_pack: plain C, the same bytes on both sides.  Strides in elements.
 */
#ifndef ATTN_KDA_PACK_PARAMS_H
#define ATTN_KDA_PACK_PARAMS_H

#include <stdint.h>

struct attn_kda_pack_params {
    const uint16_t *from; /* [b, t, h, d], last stride 1 */
    uint16_t *to;         /* [b, t, h, d], dense, 16-byte aligned */
    int64_t from_b, from_t, from_h;
    int64_t chunks; /* b t h d / 8 */
    int32_t t, h, d, reserved;
};

#ifdef __cplusplus
static_assert(sizeof(struct attn_kda_pack_params) == 64, "the host's and the kernel's layout");
#else
_Static_assert(sizeof(struct attn_kda_pack_params) == 64, "the host's and the kernel's layout");
#endif
#endif
