/* SPDX-License-Identifier: MIT
 *
 * kda_fwd for bf16 on AMX tiles: see kda_fwd_tile.h.
 */
#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/row_avx512.h"
#include "cpu/x86/tile_amx.h"

#define kda_begin() tile_begin()
#define kda_end() tile_end()

/* Tiles 0 to 3 are C, 4 and 5 A, 6 and 7 B. */
static inline __attribute__((always_inline)) void
kda_product(float (*c)[32], bool add, const char *a, int64_t a_next, const char *b, int64_t steps)
{
    const int64_t row = 32 * sizeof(float);
    tile_fence();
    if (add) {
        tile_load_at(0, c[0], row);
        tile_load_at(1, c[0] + 16, row);
        tile_load_at(2, c[16], row);
        tile_load_at(3, c[16] + 16, row);
    } else {
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
    }
    for (int64_t i = 0; i < steps; ++i) {
        tile_load(6, b + 2 * i * TILE_BYTES);
        tile_load(7, b + (2 * i + 1) * TILE_BYTES);
        tile_load_once(4, a + i * TILE_BYTES);
        tile_load_once(5, a + a_next + i * TILE_BYTES);
        tile_dpbf16(0, 4, 6);
        tile_dpbf16(1, 4, 7);
        tile_dpbf16(2, 5, 6);
        tile_dpbf16(3, 5, 7);
    }
    tile_store_at(0, c[0], row);
    tile_store_at(1, c[0] + 16, row);
    tile_store_at(2, c[16], row);
    tile_store_at(3, c[16] + 16, row);
}

#include "cpu/x86/kda_fwd_tile.h"

const struct attn_kda_fwd_kernel attn_kda_fwd_bf16_amx = {
    "attn_kda_fwd_bf16_amx", KDA_CHUNK,   KDA_SLICE, kda_record_bytes,
    kda_scratch_bytes,       kda_prepare, kda_scan,
};
