/* SPDX-License-Identifier: MIT
 *
 * Keys that rule a row of mha_fwd_tile.h, where P is one plane of bf16: those with a p above all
 * before and RULES of l or more.  Rounding such a p by half a unit would move out by as much, while
 * the rounding of many small ones cancels.  The key that m was set by has P_FIRST, exactly; of a
 * later one what rounding took is added in the end, times its V.  Rows are ruled when beats are
 * closed, by lanes alone.
 */
#ifndef ATTN_CPU_X86_MHA_FWD_TILE_RULER_H
#define ATTN_CPU_X86_MHA_FWD_TILE_RULER_H

#include "cpu/x86/mha_fwd_tile_exp.h"

/* Rounded p of 32 keys x 16 queries, those of a step of the beat w->exp: a line holds two keys. */
static inline const char *p_tile(const struct work *w, int64_t step, int side)
{
    return w->p + (w->exp.parity * BLOCK_STEPS + step % BLOCK_STEPS) * OPERAND_BYTES +
           side * TILE_BYTES;
}

/* Makes the key of the beat whose rounded p is `top` the ruler of its row, in these lanes. */
static __attribute__((noinline)) void set_rulers(struct work *w, int side, __mmask16 lanes,
                                                 __m512 top)
{
    const int pair = w->exp.pair, at = 32 * pair + 16 * side;
    __m512i key = _mm512_setzero_si512();
    for (int64_t step = w->exp.begin; step < w->exp.end; step++) {
        for (int j = 0; j < STEP_KEYS; j += 2) {
            __m512i two = _mm512_load_si512(p_tile(w, step, side) + j / 2 * TILE_ROW_BYTES);
            __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(two, 16));
            __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(two, _mm512_set1_epi32(-0x10000)));
            __mmask16 is_even = _mm512_cmp_ps_mask(even, top, _CMP_EQ_OQ);
            __mmask16 is_odd = _mm512_cmp_ps_mask(odd, top, _CMP_EQ_OQ);
            key = _mm512_mask_mov_epi32(key, is_even, _mm512_set1_epi32(STEP_KEYS * (int)step + j));
            key = _mm512_mask_mov_epi32(key, is_odd,
                                        _mm512_set1_epi32(STEP_KEYS * (int)step + j + 1));
        }
    }
    _mm512_mask_store_epi32(w->ruler + at, lanes, key);
    _mm512_mask_store_ps(w->ruler_p + at, lanes, top);
}

/* Looks for keys of the beat that rule their rows, among these lanes: p above all before and a
 * share of l. */
static __attribute__((noinline)) void find_rulers(struct work *w, int side, __mmask16 lanes,
                                                  __m512 share)
{
    __m512i top = _mm512_setzero_si512();
    for (int64_t step = w->exp.begin; step < w->exp.end; step++)
        for (int j = 0; j < STEP_KEYS / 2; j++) {
            const char *line = p_tile(w, step, side) + j * TILE_ROW_BYTES;
            top = _mm512_max_epu16(top, _mm512_load_si512(line));
        }
    top = _mm512_max_epu16(top, _mm512_slli_epi32(top, 16));
    __m512 p = _mm512_castsi512_ps(_mm512_and_si512(top, _mm512_set1_epi32(-0x10000)));
    __m512 before = _mm512_load_ps(w->ruler_p + 32 * w->exp.pair + 16 * side);
    lanes = _mm512_mask_cmp_ps_mask(lanes, p, before, _CMP_GT_OQ);
    lanes = _mm512_mask_cmp_ps_mask(lanes, p, share, _CMP_GT_OQ);
    if (lanes) set_rulers(w, side, lanes, p);
}

/* The queries of a tile whose ruler still has half of that share. */
static inline __mmask16 still_ruled(const struct work *w, int tile)
{
    __m512 l = _mm512_load_ps(w->l + 16 * tile), p = _mm512_load_ps(w->ruler_p + 16 * tile);
    __mmask16 any = _mm512_movepi32_mask(_mm512_load_si512(w->ruler + 16 * tile));
    return _mm512_mask_cmp_ps_mask((__mmask16)~any, p, _mm512_mul_ps(l, _mm512_set1_ps(RULES / 2)),
                                   _CMP_GT_OQ);
}

/* What rounding took from the rulers of these queries: their p is taken again. */
static __attribute__((noinline)) __m512 rulers_lost(const struct work *w, int tile, __mmask16 lanes)
{
    const __m512i ruler = _mm512_load_si512(w->ruler + 16 * tile);
    __m512 lost = _mm512_setzero_ps();
    while (lanes) {
        int32_t key = w->ruler[16 * tile + __builtin_ctz(lanes)];
        __mmask16 same = _mm512_mask_cmpeq_epi32_mask(lanes, ruler, _mm512_set1_epi32(key));
        __m512 x = plain_score(w, tile / 2, key / STEP_KEYS, key % STEP_KEYS, tile % 2);
        if (w->capped) cap_few(&w->cap, &x, 1, false);
        x = _mm512_fmsub_ps(x, _mm512_set1_ps(w->scale), _mm512_load_ps(w->m + 16 * tile));
        x = _mm512_sub_ps(exp2_16_exact(x), _mm512_load_ps(w->ruler_p + 16 * tile));
        lost = _mm512_mask_mov_ps(lost, same, x);
        lanes &= (__mmask16)~same;
    }
    return lost;
}

/* Adds f times elements [32 s, 32 s + 32) of the V of the key that rules row r, infinities and NaNs
 * left out. */
static __attribute__((noinline)) void add_ruler(const struct work *w, int r, int64_t s, float f,
                                                __m512i *low, __m512i *high)
{
    const struct attn_mha_task *t = w->task;
    const char *v = t->kv.v + attn_kv_v_offset(&t->kv, w->ruler[r]);
    struct elements e = load_row(w->dtype, v, t->d_v, NULL, 0, s);
    __m512i words = _mm512_maskz_mov_epi16((__mmask32)~not_finite(ATTN_BF16, e), e.part[0]);
    __m256i half[2] = {_mm512_castsi512_si256(words), _mm512_extracti64x4_epi64(words, 1)};
    __m512i *out[2] = {low, high};
    for (int i = 0; i < 2; i++) {
        __m512 x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half[i]), 16));
        x = _mm512_fmadd_ps(_mm512_set1_ps(f), x, _mm512_castsi512_ps(*out[i]));
        *out[i] = _mm512_castps_si512(x);
    }
}

#endif
