/* SPDX-License-Identifier: MIT
 *
 * Tile layouts of mha_fwd_amx.c and the code that makes them.  A tile is 1 KB; operands of a 2 x 2
 * tile product lie in pairs, so that each of its steps reads 2 KB of A and 2 KB of B in a row.
 *
 *   K, A    [32 keys][d_s / 32]      [2 tiles of 16 keys]    [16 keys][32 d]
 *   V, A    [d_v / 32][32 keys]      [2 tiles of 16 d]       [16 d][32 keys]
 *   Q, B    [32 queries][d_s / 32]   [2 tiles of 16 queries] [16 pairs of d][16 queries][2]
 *   P, B    [32 queries][32 keys]    [2 tiles of 16 queries] [16 pairs of keys][16 queries][2]
 *   S, C    [32 queries]             [2 x 16 keys][2 x 16 queries]   [16 keys][16 queries] fp32
 *   O, C    [32 queries][d_v / 32]   [2 x 16 d][2 x 16 queries]      [16 d][16 queries] fp32
 *
 * A packed block of n keys is its K tiles, its V tiles and 64 bytes with a bit for every key whose
 * V row has an infinity or a NaN: these are packed as zeros, since 0 * NaN would reach rows that do
 * not see the key, and are added at the end to the rows that do.  Widths are padded with zeros.
 */
#ifndef ATTN_CPU_X86_MHA_FWD_AMX_PACK_H
#define ATTN_CPU_X86_MHA_FWD_AMX_PACK_H

#include <immintrin.h>

#include "cpu/kernels.h"
#include "cpu/x86/tile_amx.h"

enum {
    BLOCK_KEYS = 256, /* keys of a packed block: the depth of one P V product */
    STEP_KEYS = 32,   /* keys of a tile product S = K Q, and of a step of P V */
    BLOCK_STEPS = BLOCK_KEYS / STEP_KEYS,
    PAIR_BYTES = 2 * TILE_BYTES, /* an operand of one step */
    QUAD_BYTES = 4 * TILE_BYTES, /* the result of one product */
};

/* Widths in steps of 32. */
static inline int64_t width_steps(int64_t d) { return (d + 31) / 32; }

/* Where a block's V tiles and its bits begin. */
static inline int64_t block_v(int64_t d_s) { return width_steps(d_s) * BLOCK_STEPS * PAIR_BYTES; }

static inline int64_t block_bits(int64_t d_s, int64_t d_v)
{
    return block_v(d_s) + width_steps(d_v) * BLOCK_STEPS * PAIR_BYTES;
}

static int64_t pack_bytes(int64_t d_s, int64_t d_v) { return block_bits(d_s, d_v) + 64; }

/* Transposes 16 x 16 dwords. */
static inline void transpose16(__m512i r[16])
{
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) { /* r[i + j]: rows i..i+3 of columns j, j + 4, j + 8, j + 12 */
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* 128-bit lanes: even and odd ones of rows 0-7, 8-15 */
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* Lanes of 16-bit elements 32 s + lane that lie in [begin, end). */
static inline __mmask32 lanes_within(int64_t s, int64_t begin, int64_t end)
{
    int64_t from = begin - 32 * s, to = end - 32 * s;
    if (from < 0) from = 0;
    if (to > 32) to = 32;
    if (from >= to) return 0;
    return (__mmask32)((to == 32 ? 0 : 1ull << to) - (1ull << from));
}

/* Elements [32 s, 32 s + 32) of the row x[d_x] followed by y[d_y] (NULL: none), then zeros.  Lanes
 * outside a row are masked, so the address of lane 0 may lie before it. */
static inline __m512i load_row(const char *x, int64_t d_x, const char *y, int64_t d_y, int64_t s)
{
    const char *from = x + 64 * s;
    if (32 * s + 32 <= d_x) return _mm512_loadu_si512(from);
    __m512i row = _mm512_maskz_loadu_epi16(lanes_within(s, 0, d_x), from);
    if (!y) return row;
    from = (const char *)((uintptr_t)y + (uintptr_t)(64 * s) - (uintptr_t)(2 * d_x));
    return _mm512_mask_loadu_epi16(row, lanes_within(s, d_x, d_x + d_y), from);
}

/* 32 rows of K (and V, with qv) to A tiles.  A NULL row is zeros. */
static inline void pack_k_step(const char *const k[STEP_KEYS], const char *const v[STEP_KEYS],
                               int64_t d_qk, int64_t d_v, bool qv, char *tiles)
{
    int64_t steps = width_steps(qv ? d_qk + d_v : d_qk);
    for (int64_t j = 0; j < STEP_KEYS; j++) {
        char *to = tiles + j / 16 * TILE_BYTES + j % 16 * TILE_ROW_BYTES;
        for (int64_t s = 0; s < steps; s++)
            _mm512_store_si512(to + s * PAIR_BYTES,
                               k[j] ? load_row(k[j], d_qk, qv ? v[j] : NULL, d_v, s)
                                    : _mm512_setzero_si512());
    }
}

/* Doubled words r + r drop the sign; from 0xff00 on they were infinities and NaNs. */
static inline __mmask32 not_finite(__m512i r)
{
    return _mm512_cmpge_epu16_mask(_mm512_add_epi16(r, r), _mm512_set1_epi16((short)0xff00));
}

/* 32 rows of V to A tiles of V^T: pairs of keys are interleaved to dwords, 16 x 16 dwords
 * transposed.  Unpacking leaves d = 8 (i / 4) + i % 4 (low half) and 4 more (high half) in dword i.
 * Infinities and NaNs are packed as zeros; returns the keys that have any, a bit each. */
static inline uint32_t pack_v_step(const char *const v[STEP_KEYS], int64_t d_v, char *tiles)
{
    uint32_t keys = 0;
    for (int64_t s = 0; s < width_steps(d_v); s++) {
        __m512i row[STEP_KEYS], most = _mm512_setzero_si512(), low[16], high[16];
        for (int j = 0; j < STEP_KEYS; j++) {
            row[j] = v[j] ? load_row(v[j], d_v, NULL, 0, s) : _mm512_setzero_si512();
            most = _mm512_max_epu16(most, _mm512_add_epi16(row[j], row[j]));
        }
        if (_mm512_cmpge_epu16_mask(most, _mm512_set1_epi16((short)0xff00))) {
            for (int j = 0; j < STEP_KEYS; j++) {
                __mmask32 bad = not_finite(row[j]);
                if (bad) keys |= 1u << j;
                row[j] = _mm512_maskz_mov_epi16((__mmask32)~bad, row[j]);
            }
        }
        for (int j = 0; j < 16; j++) {
            low[j] = _mm512_unpacklo_epi16(row[2 * j], row[2 * j + 1]);
            high[j] = _mm512_unpackhi_epi16(row[2 * j], row[2 * j + 1]);
        }
        transpose16(low);
        transpose16(high);
        char *to = tiles + s * BLOCK_STEPS * PAIR_BYTES;
        for (int i = 0; i < 16; i++) {
            char *d = to + (8 * (i / 4) + i % 4) * TILE_ROW_BYTES;
            _mm512_store_si512(d, low[i]);
            _mm512_store_si512(d + 4 * TILE_ROW_BYTES, high[i]);
        }
    }
    return keys;
}

/* 16 rows of Q (and qv) to B tiles, a pair's step apart.  negate flips every sign. */
static inline void pack_q_rows(const char *const q[16], const char *const qv[16], int64_t d_qk,
                               int64_t d_v, bool negate, char *tiles)
{
    __m512i sign = _mm512_set1_epi16(negate ? (short)0x8000 : 0);
    for (int64_t s = 0; s < width_steps(qv ? d_qk + d_v : d_qk); s++) {
        __m512i r[16];
        for (int i = 0; i < 16; i++) {
            r[i] = q[i] ? load_row(q[i], d_qk, qv ? qv[i] : NULL, d_v, s) : _mm512_setzero_si512();
            r[i] = _mm512_xor_si512(r[i], sign);
        }
        transpose16(r);
        for (int i = 0; i < 16; i++)
            _mm512_store_si512(tiles + s * PAIR_BYTES + i * TILE_ROW_BYTES, r[i]);
    }
}

#endif
