/* SPDX-License-Identifier: MIT
 *
 * mha_fwd on AMX tiles for fp32, each operand exactly three planes of bf16: see mha_fwd_tile.h.
 */
enum { PLANES = 3 };

#include "cpu/x86/mha_fwd_tile.h"

TILE_KERNEL(fp32, ATTN_F32);
