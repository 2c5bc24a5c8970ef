/* SPDX-License-Identifier: MIT
 *
 * mha_fwd on AMX tiles for fp16, each operand exactly two planes of bf16: see mha_fwd_tile.h.
 */
enum { PLANES = 2 };

#include "cpu/x86/mha_fwd_tile.h"

TILE_KERNEL(fp16, ATTN_F16);
