/* SPDX-License-Identifier: MIT
 *
 * The tile instructions of tile_amx.h in C, on a thread-local file of eight tiles.
 *
 * A use without configuration, a reserved tile number or a configuration that is not the full one
 * traps, and tile_end() fills the file with NaN, so a kernel that works here keeps the rules that
 * the hardware enforces.  Products are summed pair by pair in fp32; that denormals are flushed, as
 * TDPBF16PS does, rests on the MXCSR that kernels run in.
 */
#ifndef ATTN_CPU_X86_TILE_EMU_H
#define ATTN_CPU_X86_TILE_EMU_H

#include <stdbool.h>
#include <string.h>

static _Thread_local struct {
    bool configured;
    uint8_t bytes[8][TILE_BYTES] __attribute__((aligned(64)));
} tile_file;

static inline uint8_t *tile_emu(int t)
{
    if (!tile_file.configured || t < 0 || t > 7) __builtin_trap();
    return tile_file.bytes[t];
}

static inline void tile_begin(void)
{
    for (int t = 0; t < 8; t++) {
        if (tile_config_full.rows[t] != 16 || tile_config_full.row_bytes[t] != TILE_ROW_BYTES)
            __builtin_trap();
    }
    tile_file.configured = tile_config_full.palette == 1;
    memset(tile_file.bytes, 0, sizeof tile_file.bytes);
}

static inline void tile_end(void)
{
    memset(tile_file.bytes, 0xff, sizeof tile_file.bytes);
    tile_file.configured = false;
}

static inline void tile_zero(int t) { memset(tile_emu(t), 0, TILE_BYTES); }

static inline void tile_load(int t, const void *p) { memcpy(tile_emu(t), p, TILE_BYTES); }

static inline void tile_load_once(int t, const void *p) { tile_load(t, p); }

static inline void tile_load_row(int t, const void *p)
{
    for (int i = 0; i < 16; i++) memcpy(tile_emu(t) + i * TILE_ROW_BYTES, p, TILE_ROW_BYTES);
}

static inline void tile_store_row(int t, void *p)
{
    for (int i = 1; i < 16; i++)
        if (memcmp(tile_emu(t), tile_emu(t) + i * TILE_ROW_BYTES, TILE_ROW_BYTES)) __builtin_trap();
    memcpy(p, tile_emu(t), TILE_ROW_BYTES);
}

static inline void tile_store(int t, void *p) { memcpy(p, tile_emu(t), TILE_BYTES); }

static inline void tile_load_at(int t, const void *p, int64_t row)
{
    for (int i = 0; i < 16; i++)
        memcpy(tile_emu(t) + i * TILE_ROW_BYTES, (const char *)p + i * row, TILE_ROW_BYTES);
}

static inline void tile_load_at_once(int t, const void *p, int64_t row) { tile_load_at(t, p, row); }

static inline void tile_store_at(int t, void *p, int64_t row)
{
    for (int i = 0; i < 16; i++)
        memcpy((char *)p + i * row, tile_emu(t) + i * TILE_ROW_BYTES, TILE_ROW_BYTES);
}

static inline void tile_dpbf16(int c, int a, int b)
{
    const __m512i odd = _mm512_set1_epi32(-0x10000);
    for (int m = 0; m < 16; m++) {
        __m512 sum = _mm512_load_ps(tile_emu(c) + m * TILE_ROW_BYTES);
        for (int p = 0; p < 16; p++) {
            uint32_t x;
            memcpy(&x, tile_emu(a) + m * TILE_ROW_BYTES + 4 * p, 4);
            __m512i y = _mm512_load_si512(tile_emu(b) + p * TILE_ROW_BYTES);
            __m512i x_odd = _mm512_set1_epi32((int32_t)(x & 0xffff0000u));
            sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32((int32_t)(x << 16))),
                                  _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), sum);
            sum = _mm512_fmadd_ps(_mm512_castsi512_ps(x_odd),
                                  _mm512_castsi512_ps(_mm512_and_si512(y, odd)), sum);
        }
        _mm512_store_ps(tile_emu(c) + m * TILE_ROW_BYTES, sum);
    }
}

#endif
