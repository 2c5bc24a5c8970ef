/* SPDX-License-Identifier: MIT
 *
 * kda_fwd for bf16 on AMX tiles: see kda_fwd_tile.h.
 */
#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/row_avx512.h"
#include "cpu/x86/tile_amx.h"

/* Tiles 0 to 3 are C, 4 and 5 A, 6 and 7 B. */
static inline __attribute__((always_inline)) void kda_product(float (*c)[32], bool add,
                                                              const char *a, int64_t a_next,
                                                              const char *b, int64_t b_next,
                                                              int64_t steps)
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
        tile_load(6, b + i * b_next);
        tile_load(7, b + i * b_next + TILE_BYTES);
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

/* C[16 m][32] of row tile m: loaded, multiplied and stored while its neighbours are.  Tiles 0 and 1
 * or 2 and 3 are C, 4 or 5 A; 6 and 7, B, stay. */
#define KDA_ROWS_LOAD(c0, c1, a0, m)                                                               \
    tile_load_at(c0, c[16 * (m)], row);                                                            \
    tile_load_at(c1, c[16 * (m)] + 16, row);                                                       \
    tile_load_once(a0, a + (m) * TILE_BYTES)
#define KDA_ROWS_MULTIPLY(c0, c1, a0)                                                              \
    tile_dpbf16(c0, a0, 6);                                                                        \
    tile_dpbf16(c1, a0, 7)
#define KDA_ROWS_STORE(c0, c1, m)                                                                  \
    tile_store_at(c0, c[16 * (m)], row);                                                           \
    tile_store_at(c1, c[16 * (m)] + 16, row)

static inline __attribute__((always_inline)) void kda_product_rows(float (*c)[32], const char *a,
                                                                   const char *b, int64_t tiles)
{
    const int64_t row = 32 * sizeof(float);
    tile_fence();
    tile_load(6, b);
    tile_load(7, b + TILE_BYTES);
    KDA_ROWS_LOAD(0, 1, 4, 0);
    for (int64_t m = 0; m < tiles; m += 2) {
        KDA_ROWS_MULTIPLY(0, 1, 4);
        KDA_ROWS_LOAD(2, 3, 5, m + 1);
        KDA_ROWS_MULTIPLY(2, 3, 5);
        KDA_ROWS_STORE(0, 1, m);
        if (m + 2 < tiles) {
            KDA_ROWS_LOAD(0, 1, 4, m + 2);
        }
        KDA_ROWS_STORE(2, 3, m + 1);
    }
}

#include "cpu/x86/kda_fwd_tile.h"

static void kda_begin(void) { tile_begin(); }

static void kda_end(void)
{
    tile_end();
    _mm_sfence(); /* of out */
}

const struct attn_kda_fwd_kernel attn_kda_fwd_bf16_amx = {
    "attn_kda_fwd_bf16_amx",
    KDA_CHUNK,
    KDA_SLICE,
    kda_record_bytes,
    kda_scratch_bytes,
    kda_prepare,
    kda_scan,
    kda_begin,
    kda_end,
};
