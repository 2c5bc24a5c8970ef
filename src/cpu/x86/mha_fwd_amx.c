/* SPDX-License-Identifier: MIT
 *
 * mha_fwd on AMX tiles for bf16, and for fp8, which is decoded to bf16: see mha_fwd_tile.h.
 */
enum { PLANES = 1 };

#include "cpu/x86/mha_fwd_tile.h"

TILE_KERNEL(bf16, ATTN_BF16);
TILE_KERNEL(fp8, ATTN_F8);
