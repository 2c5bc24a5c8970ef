/* SPDX-License-Identifier: MIT
 *
 * Tile layouts of mha_fwd_tile.h and the code that makes them.  A tile is 1 KB; operands of a 2 x 2
 * tile product lie in pairs, so that each of its steps reads 2 KB of A and 2 KB of B in a row.
 *
 *   K, A    [32 keys][d_s / 32]      [planes][2 tiles of 16 keys]    [16 keys][32 d]
 *   V, A    [d_v / 32][32 keys]      [planes][2 tiles of 16 d]       [16 d][32 keys]
 *   Q, B    [32 queries][d_s / 32]   [planes][2 tiles of 16 queries] [16 pairs of d][16 queries][2]
 *   P, B    [32 queries][32 keys]    [planes][2 tiles of 16 queries] [16 key pairs][16 queries][2]
 *   S, C    [32 queries]             [2 x 16 keys][2 x 16 queries]   [16 keys][16 queries] fp32
 *   O, C    [32 queries][d_v / 32]   [2 x 16 d][2 x 16 queries]      [16 d][16 queries] fp32
 *
 * Tiles hold bf16.  bf16 itself, and fp8, which is exact in it, have one plane.  fp16 has two
 * and fp32 three: x is exactly the sum of x1 = bf16(x), x2 = bf16(x - x1) and x3 = x - x1 - x2.  Of
 * an infinity or NaN all planes but the first are 0.
 *
 * A packed block of n keys is its K tiles, its V tiles and 64 bytes with a bit for every key whose
 * V row, and then whose K row, has an infinity or a NaN.  V's are packed as zeros, since 0 * NaN
 * would reach rows that do not see the key, and are added at the end to the rows that do.  Widths
 * are padded with zeros.
 *
 * Who includes this file defines PLANES before.
 */
#ifndef ATTN_CPU_X86_MHA_FWD_AMX_PACK_H
#define ATTN_CPU_X86_MHA_FWD_AMX_PACK_H

#include <immintrin.h>

#include "core/dtype.h"
#include "cpu/kernels.h"
#include "cpu/x86/tile_amx.h"
#include "cpu/x86/unroll.h"

enum {
    BLOCK_KEYS = 256, /* keys of a packed block: the depth of one P V product */
    STEP_KEYS = 32,   /* keys of a tile product S = K Q, and of a step of P V */
    BLOCK_STEPS = BLOCK_KEYS / STEP_KEYS,
    PAIR_BYTES = 2 * TILE_BYTES, /* a plane of an operand of one step */
    OPERAND_BYTES = PLANES * PAIR_BYTES,
    QUAD_BYTES = 4 * TILE_BYTES, /* the result of one product */
};

/* Widths in steps of 32. */
static inline int64_t width_steps(int64_t d) { return (d + 31) / 32; }

/* Where a block's V tiles and its bits begin. */
static inline int64_t block_v(int64_t d_s)
{
    return width_steps(d_s) * BLOCK_STEPS * OPERAND_BYTES;
}

static inline int64_t block_bits(int64_t d_s, int64_t d_v)
{
    return block_v(d_s) + width_steps(d_v) * BLOCK_STEPS * OPERAND_BYTES;
}

static int64_t pack_bytes(int64_t d_s, int64_t d_v) { return block_bits(d_s, d_v) + 64; }

/* Transposes 16 x 16 dwords. */
static inline void transpose16(__m512i r[16])
{
    __m512i t[16];
    VEC_UNROLL
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    VEC_UNROLL
    for (int i = 0; i < 16; i += 4) { /* r[i + j]: rows i..i+3 of columns j, j + 4, j + 8, j + 12 */
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    VEC_UNROLL
    for (int i = 0; i < 4; i++) { /* 128-bit lanes: even and odd ones of rows 0-7, 8-15 */
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    VEC_UNROLL
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

/* e4m3 to bf16, exactly.  The exponent moves to its new place; the eight numbers below 2^-6 come
 * from a table of m 2^-9, code 127 is NaN. */
static inline __m512i bf16_from_f8(__m256i bytes)
{
    const __m512i tiny = _mm512_set4_epi64(0, 0, 0x3c603c403c203c00, 0x3bc03b803b000000);
    __m512i w = _mm512_cvtepi8_epi16(bytes), code = _mm512_and_si512(w, _mm512_set1_epi16(0x7f));
    __m512i x = _mm512_add_epi16(_mm512_slli_epi16(code, 4), _mm512_set1_epi16(120 << 7));
    __mmask32 small = _mm512_testn_epi16_mask(w, _mm512_set1_epi16(0x78));
    __mmask32 nan = _mm512_cmpeq_epi16_mask(code, _mm512_set1_epi16(0x7f));
    x = _mm512_mask_permutexvar_epi16(x, small, w, tiny);
    x = _mm512_mask_mov_epi16(x, nan, _mm512_set1_epi16(0x7fc0));
    return _mm512_or_si512(x, _mm512_and_si512(w, _mm512_set1_epi16((short)0x8000)));
}

/* 32 elements as they are loaded: words of 16 bits (fp8 as bf16), or fp32 in two halves. */
enum { PARTS = PLANES == 3 ? 2 : 1 };

struct elements {
    __m512i part[PARTS];
};

/* Those of 32 elements from x on that the mask names, others 0.  x may lie outside its row where
 * lanes are masked. */
static inline struct elements load_lanes(enum attn_dtype t, __mmask32 lanes, const char *x)
{
    struct elements e;
    switch (t) {
    case ATTN_F32:
        e.part[0] = _mm512_maskz_loadu_epi32((__mmask16)lanes, x);
        e.part[PARTS - 1] = _mm512_maskz_loadu_epi32((__mmask16)(lanes >> 16), x + 64);
        break;
    case ATTN_F8: e.part[0] = bf16_from_f8(_mm256_maskz_loadu_epi8(lanes, x)); break;
    default: e.part[0] = _mm512_maskz_loadu_epi16(lanes, x);
    }
    return e;
}

/* Elements [32 s, 32 s + 32) of the row x[d_x] followed by y[d_y] (NULL: none), then zeros; all
 * zeros where x is NULL. */
static inline struct elements load_row(enum attn_dtype t, const char *x, int64_t d_x, const char *y,
                                       int64_t d_y, int64_t s)
{
    const int64_t bytes = attn_dtype_bytes(t);
    if (!x) return (struct elements){{_mm512_setzero_si512()}};
    const char *from = x + 32 * bytes * s;
    if (32 * s + 32 <= d_x) return load_lanes(t, 0xffffffff, from);
    struct elements e = load_lanes(t, lanes_within(s, 0, d_x), from), more;
    if (!y) return e;
    from = (const char *)((uintptr_t)y + (uintptr_t)(bytes * (32 * s - d_x)));
    more = load_lanes(t, lanes_within(s, d_x, d_x + d_y), from);
    for (int i = 0; i < PARTS; i++) e.part[i] = _mm512_or_si512(e.part[i], more.part[i]);
    return e;
}

/* The lanes that are infinities or NaNs. */
static inline __mmask32 not_finite(enum attn_dtype t, struct elements e)
{
    if (t == ATTN_F32) {
        __mmask16 low = _mm512_fpclass_ps_mask(_mm512_castsi512_ps(e.part[0]), 0x99);
        __mmask16 high = _mm512_fpclass_ps_mask(_mm512_castsi512_ps(e.part[PARTS - 1]), 0x99);
        return _mm512_kunpackw(high, low);
    }
    /* Doubled, which drops the sign. */
    __m512i least = _mm512_set1_epi16((short)(t == ATTN_F16 ? 0xf800 : 0xff00));
    return _mm512_cmpge_epu16_mask(_mm512_add_epi16(e.part[0], e.part[0]), least);
}

static inline __m512i to_bf16(const __m512 f[2])
{
    return (__m512i)_mm512_cvtne2ps_pbh(f[1], f[0]);
}

static inline void subtract_bf16(__m512 f[2], __m512i plane)
{
    __m512i high[2] = {_mm512_cvtepu16_epi32(_mm512_castsi512_si256(plane)),
                       _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(plane, 1))};
    for (int i = 0; i < 2; i++)
        f[i] = _mm512_sub_ps(f[i], _mm512_castsi512_ps(_mm512_slli_epi32(high[i], 16)));
}

/* The planes of 32 elements.  Of fp32 what would round to infinity is cut off instead. */
static inline void split_planes(enum attn_dtype t, struct elements e, __m512i plane[PLANES])
{
    const __m512 most = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f7f0000));
    if (PLANES == 1) {
        plane[0] = e.part[0];
        return;
    }
    __mmask32 bad = not_finite(t, e);
    __m512 f[2], within[2];
    for (int i = 0; i < 2; i++) {
        if (t == ATTN_F16)
            within[i] = f[i] = _mm512_cvtph_ps(i ? _mm512_extracti64x4_epi64(e.part[0], 1)
                                                 : _mm512_castsi512_si256(e.part[0]));
        else
            f[i] = _mm512_castsi512_ps(e.part[PARTS == 2 ? i : 0]);
        if (t == ATTN_F32) /* the smaller magnitude, with the sign of f */
            within[i] = _mm512_mask_range_ps(f[i], (__mmask16)(~bad >> 16 * i), f[i], most, 0x2);
    }
    plane[0] = to_bf16(within);
    for (int i = 1; i < PLANES; i++) {
        subtract_bf16(f, plane[i - 1]);
        plane[i] = _mm512_maskz_mov_epi16((__mmask32)~bad, to_bf16(f));
    }
}

/* 32 rows of K (and V, with qv) to A tiles.  A NULL row is zeros.  Returns the keys that have an
 * infinity or a NaN, a bit each. */
static inline __attribute__((always_inline)) uint32_t pack_k_step(enum attn_dtype t,
                                                                  const char *const k[STEP_KEYS],
                                                                  const char *const v[STEP_KEYS],
                                                                  int64_t d_qk, int64_t d_v,
                                                                  bool qv, char *tiles)
{
    int64_t steps = width_steps(qv ? d_qk + d_v : d_qk);
    uint32_t keys = 0;
    for (int64_t j = 0; j < STEP_KEYS; j++) {
        char *to = tiles + j / 16 * TILE_BYTES + j % 16 * TILE_ROW_BYTES;
        for (int64_t s = 0; s < steps; s++, to += OPERAND_BYTES) {
            __m512i plane[PLANES];
            struct elements e = load_row(t, k[j], d_qk, qv ? v[j] : NULL, d_v, s);
            if (PLANES > 1 && not_finite(t, e)) keys |= 1u << j;
            split_planes(t, e, plane);
            for (int i = 0; i < PLANES; i++) _mm512_store_si512(to + i * PAIR_BYTES, plane[i]);
        }
    }
    return keys;
}

/* 32 rows of 32 words of V to two A tiles of V^T: pairs of keys are interleaved to dwords, 16 x 16
 * dwords transposed.  Unpacking leaves d = 8 (i / 4) + i % 4 (low half) and 4 more (high half) in
 * dword i. */
static inline void transpose_v(const __m512i row[STEP_KEYS], char *to)
{
    __m512i low[16], high[16];
    VEC_UNROLL
    for (int j = 0; j < 16; j++) {
        low[j] = _mm512_unpacklo_epi16(row[2 * j], row[2 * j + 1]);
        high[j] = _mm512_unpackhi_epi16(row[2 * j], row[2 * j + 1]);
    }
    transpose16(low);
    transpose16(high);
    for (int i = 0; i < 16; i++) {
        char *d = to + (8 * (i / 4) + i % 4) * TILE_ROW_BYTES;
        _mm512_store_si512(d, low[i]);
        _mm512_store_si512(d + 4 * TILE_ROW_BYTES, high[i]);
    }
}

/* 32 rows of V to A tiles of V^T.  Infinities and NaNs are packed as zeros; returns the keys that
 * have any, a bit each. */
static inline __attribute__((always_inline)) uint32_t pack_v_step(enum attn_dtype t,
                                                                  const char *const v[STEP_KEYS],
                                                                  int64_t d_v, char *tiles)
{
    uint32_t keys = 0;
    for (int64_t s = 0; s < width_steps(d_v); s++) {
        __m512i plane[PLANES][STEP_KEYS];
        for (int j = 0; j < STEP_KEYS; j++) {
            __m512i mine[PLANES];
            struct elements e = load_row(t, v[j], d_v, NULL, 0, s);
            __mmask32 bad = not_finite(t, e);
            if (bad) keys |= 1u << j;
            split_planes(t, e, mine);
            for (int i = 0; i < PLANES; i++)
                plane[i][j] = _mm512_maskz_mov_epi16((__mmask32)~bad, mine[i]);
        }
        for (int i = 0; i < PLANES; i++)
            transpose_v(plane[i], tiles + s * BLOCK_STEPS * OPERAND_BYTES + i * PAIR_BYTES);
    }
    return keys;
}

/* 16 rows of Q (and qv) to B tiles, an operand's step apart.  negate flips every sign.  Returns
 * whether some element is an infinity or a NaN. */
static inline __attribute__((always_inline)) bool
pack_q_rows(enum attn_dtype t, const char *const q[16], const char *const qv[16], int64_t d_qk,
            int64_t d_v, bool negate, char *tiles)
{
    __m512i sign = _mm512_set1_epi16(negate ? (short)0x8000 : 0);
    bool bad = false;
    for (int64_t s = 0; s < width_steps(qv ? d_qk + d_v : d_qk); s++) {
        __m512i r[PLANES][16];
        for (int i = 0; i < 16; i++) {
            __m512i plane[PLANES];
            struct elements e = load_row(t, q[i], d_qk, qv ? qv[i] : NULL, d_v, s);
            bad = bad || (PLANES > 1 && not_finite(t, e));
            split_planes(t, e, plane);
            for (int k = 0; k < PLANES; k++) r[k][i] = _mm512_xor_si512(plane[k], sign);
        }
        for (int k = 0; k < PLANES; k++) {
            transpose16(r[k]);
            for (int i = 0; i < 16; i++)
                _mm512_store_si512(tiles + s * OPERAND_BYTES + k * PAIR_BYTES + i * TILE_ROW_BYTES,
                                   r[k][i]);
        }
    }
    return bad;
}

#endif
