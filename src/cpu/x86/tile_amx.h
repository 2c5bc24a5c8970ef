/* SPDX-License-Identifier: MIT
 *
 * The tile registers as the AMX kernels use them: eight tiles of 16 rows x 64 bytes, one
 * configuration for a whole task, no tails (operands are padded with zeros instead).
 *
 *   tile_dpbf16(C, A, B):  C[m][n] += sum over p of A[m][2p] B[p][2n] + A[m][2p + 1] B[p][2n + 1]
 *     A: 16 rows m of 32 bf16        B: 16 rows p of 16 pairs of bf16        C: 16 x 16 fp32
 *
 * tile_load_once (TILELOADDT1) leaves the lines where they are, in L2, and so keeps L1 for operands
 * that are used again.  The _row forms make all 16 rows one line of memory, by a stride of 0; to
 * store, all rows have to be equal.  The _at forms take rows `row` bytes apart.
 *
 * Tile numbers are literals.  gcc 12's tile load has no memory clobber, so a store of an operand
 * may sink below the load that wants it: put tile_fence() between them.
 *
 * Built with ATTN_AMX_EMU the tiles are plain memory, so that the same kernels run, and have their
 * configuration checked, on any machine with AVX-512-BF16.
 */
#ifndef ATTN_CPU_X86_TILE_AMX_H
#define ATTN_CPU_X86_TILE_AMX_H

#include <immintrin.h>
#include <stdint.h>

enum { TILE_BYTES = 1024, TILE_ROW_BYTES = 64 };

/* The operand of LDTILECFG.  Intel's manual, volume 1, "Palette 1". */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

_Static_assert(sizeof(struct tile_config) == 64, "LDTILECFG reads 64 bytes");

static const struct tile_config tile_config_full = {
    .palette = 1,
    .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

#ifdef ATTN_AMX_EMU
#include "cpu/x86/tile_emu.h"
#else
#define tile_begin() _tile_loadconfig(&tile_config_full)
#define tile_end() _tile_release()
#define tile_zero(t) _tile_zero(t)
#define tile_load(t, p) _tile_loadd(t, p, TILE_ROW_BYTES)
#define tile_load_once(t, p) _tile_stream_loadd(t, p, TILE_ROW_BYTES)
#define tile_load_row(t, p) _tile_loadd(t, p, 0)
#define tile_store_row(t, p) _tile_stored(t, p, 0)
#define tile_store(t, p) _tile_stored(t, p, TILE_ROW_BYTES)
#define tile_load_at(t, p, row) _tile_loadd(t, p, row)
#define tile_load_at_once(t, p, row) _tile_stream_loadd(t, p, row)
#define tile_store_at(t, p, row) _tile_stored(t, p, row)
#define tile_dpbf16(c, a, b) _tile_dpbf16ps(c, a, b)
#endif

#define tile_fence() __asm__ volatile("" ::: "memory")

#endif
