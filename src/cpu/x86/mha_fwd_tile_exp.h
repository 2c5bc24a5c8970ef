/* SPDX-License-Identifier: MIT
 *
 * Exponentials of mha_fwd_tile.h: P = 2^(S c - m) of a few keys x 16 queries, to be taken between
 * tile products.
 */
#ifndef ATTN_CPU_X86_MHA_FWD_TILE_EXP_H
#define ATTN_CPU_X86_MHA_FWD_TILE_EXP_H

#include <math.h>

#include "cpu/x86/mha_fwd_tile_work.h"

/* x = 2^x by a degree 3 polynomial in x - floor(x), relative error 7.5e-5; -inf gives 0. */
static inline __attribute__((always_inline)) void exp2_few(__m512 *x, int n)
{
    __m512 f[VECTORS], y[VECTORS];
    EACH(i, n) f[i] = _mm512_reduce_ps(x[i], 0x09);
    EACH(i, n)
    y[i] = _mm512_fmadd_ps(f[i], _mm512_set1_ps(0.0780245226f), _mm512_set1_ps(0.226067155f));
    EACH(i, n) y[i] = _mm512_fmadd_ps(y[i], f[i], _mm512_set1_ps(0.69583354f));
    EACH(i, n) y[i] = _mm512_fmadd_ps(y[i], f[i], _mm512_set1_ps(0.999925219f));
    EACH(i, n) x[i] = _mm512_scalef_ps(y[i], x[i]);
}

/* Degree 5 in `exact` lanes, to 7.5e-8, and in the others the bits of exp2_few. */
static inline __attribute__((always_inline)) void exp2_few_mixed(__m512 *x, int n, __mmask16 exact)
{
#define EITHER(yes, no) _mm512_mask_mov_ps(_mm512_set1_ps(no), exact, _mm512_set1_ps(yes))
    const __m512 c[] = {
        EITHER(0.999999925f, 0.999925219f), EITHER(0.693153073f, 0.69583354f),
        EITHER(0.240153617f, 0.226067155f), EITHER(0.0558263181f, 0.0780245226f),
        EITHER(0.00898934009f, 0),          EITHER(0.00187757668f, 0),
    };
#undef EITHER
    __m512 f[VECTORS], y[VECTORS];
    EACH(i, n) f[i] = _mm512_reduce_ps(x[i], 0x09);
    EACH(i, n) y[i] = _mm512_fmadd_ps(f[i], c[5], c[4]);
    EACH(i, n) y[i] = _mm512_fmadd_ps(y[i], f[i], c[3]);
    EACH(i, n) y[i] = _mm512_fmadd_ps(y[i], f[i], c[2]);
    EACH(i, n) y[i] = _mm512_fmadd_ps(y[i], f[i], c[1]);
    EACH(i, n) y[i] = _mm512_fmadd_ps(y[i], f[i], c[0]);
    EACH(i, n) x[i] = _mm512_scalef_ps(y[i], x[i]);
}

static inline __attribute__((always_inline)) void exp2_few_exact(__m512 *x, int n)
{
    exp2_few_mixed(x, n, 0xffff);
}

static inline __m512 exp2_16_exact(__m512 t)
{
    exp2_few_exact(&t, 1);
    return t;
}

/* log2 of x >= 0: x = 2^e y with y in [0.75, 1.5), log y = 2 atanh((y - 1) / (y + 1)). */
static inline __m512 log2_16(__m512 x)
{
    __m512 one = _mm512_set1_ps(1.0f);
    __m512 y = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    __m512 e = _mm512_sub_ps(_mm512_getexp_ps(x), _mm512_getexp_ps(y));
    __m512 z = _mm512_div_ps(_mm512_sub_ps(y, one), _mm512_add_ps(y, one));
    __m512 z2 = _mm512_mul_ps(z, z), p = _mm512_set1_ps(2.88539008f / 9);
    p = _mm512_fmadd_ps(p, z2, _mm512_set1_ps(2.88539008f / 7));
    p = _mm512_fmadd_ps(p, z2, _mm512_set1_ps(2.88539008f / 5));
    p = _mm512_fmadd_ps(p, z2, _mm512_set1_ps(2.88539008f / 3));
    p = _mm512_fmadd_ps(p, z2, _mm512_set1_ps(2.88539008f));
    __mmask16 zero = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_EQ_OQ);
    return _mm512_mask_mov_ps(_mm512_fmadd_ps(p, z, e), zero, _mm512_set1_ps(-INFINITY));
}

/* Dwords of bf16 pairs: even below, odd above, rounded to nearest (ties away from zero). */
static inline __m512i bf16_pairs(__m512 even, __m512 odd)
{
    __m512i half = _mm512_set1_epi32(0x8000);
    __m512i high_words = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
    __m512i low = _mm512_add_epi32(_mm512_castps_si512(even), half);
    __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
    low = _mm512_shuffle_epi8(low, high_words);
    return _mm512_mask_mov_epi16(low, 0xaaaaaaaa, high);
}

/* What hides keys from the queries of a tile. */
struct mask {
    __m512i lo, seen;
};

static inline struct mask load_mask(const struct work *w, int tile)
{
    return (struct mask){
        _mm512_load_si512(w->lo + 16 * tile),
        _mm512_load_si512(w->seen + 16 * tile),
    };
}

/* The queries that do not see a key. */
static inline __mmask16 hidden(const struct mask *k, int32_t key)
{
    __m512i at = _mm512_sub_epi32(_mm512_set1_epi32(key), k->lo);
    return _mm512_cmpge_epu32_mask(at, k->seen);
}

static inline __m512 mask_score(const struct mask *k, __m512 x, int32_t key)
{
    return _mm512_mask_mov_ps(x, hidden(k, key), _mm512_set1_ps(-INFINITY));
}

/* Whether step `step` needs no mask for a tile: all queries see all its keys. */
static inline bool is_plain(const struct work *w, int tile, int64_t step)
{
    return step * STEP_KEYS >= w->all_lo[tile] && (step + 1) * STEP_KEYS <= w->all_hi[tile];
}

/* Stores the bf16 planes of P of two keys, a pair each lane. */
static inline void store_p(char *p, __m512 e0, __m512 e1)
{
    VEC_UNROLL
    for (int i = 0; i < PLANES; i++) {
        __m512i high = bf16_pairs(e0, e1);
        _mm512_store_si512(p + i * PAIR_BYTES, high);
        e0 = _mm512_sub_ps(e0, _mm512_castsi512_ps(_mm512_slli_epi32(high, 16)));
        high = _mm512_and_si512(high, _mm512_set1_epi32(-0x10000));
        e1 = _mm512_sub_ps(e1, _mm512_castsi512_ps(high));
    }
}

/* How scores are capped: not at all; all of the chunk by the short polynomial; each as it wants. */
enum capping { CAP_NONE, CAP_SHORT, CAP_ANY };

/* x = cap(x) - m for VECTORS vectors, whatever their size. */
static inline __attribute__((always_inline)) void cap_minus(const struct work *w, __m512 *x,
                                                            __m512 m)
{
    __m512 few[VECTORS];
    EACH(i, VECTORS) few[i] = x[i];
    cap_few(&w->cap, x, VECTORS, PLANES == 3);
    EACH(i, VECTORS) x[i] = _mm512_sub_ps(x[i], m);
    if (PLANES == 3) return;
    __mmask16 lanes[VECTORS];
    EACH(i, VECTORS) lanes[i] = cap_short_lanes(&w->cap, few[i]);
    cap_few_short(&w->cap, few, VECTORS, m);
    EACH(i, VECTORS) x[i] = _mm512_mask_mov_ps(x[i], lanes[i], few[i]);
}

/* One chunk: some keys x 16 queries from s[keys][16] to p[keys / 2][16 pairs].  Exponentials are
 * exact for rows that do not see all keys of the step: such a row may see few, and the error of
 * each is that of its lse.  Which these are is asked row by row, since no row may depend on its
 * neighbours. */
static inline __attribute__((always_inline)) void exp_rows(struct work *w, int tile, int32_t key,
                                                           const float *s, char *p, bool plain,
                                                           enum capping cap)
{
    float *beat_l = w->beat_l + tile % 2 * 16;
    int32_t *beat_or = w->beat_or + tile % 2 * 16;
    __m512 scale = _mm512_set1_ps(w->scale), m = _mm512_load_ps(w->m + 16 * tile);
    __m512 l0 = _mm512_load_ps(beat_l), l1 = _mm512_setzero_ps();
    __m512i any = _mm512_load_si512(beat_or);
    struct mask mask = {0};
    __mmask16 exact = 0;
    if (!plain) {
        const int32_t first = key & -STEP_KEYS, last = first + STEP_KEYS - 1;
        mask = load_mask(w, tile);
        exact = hidden(&mask, first) | hidden(&mask, last);
    }
    VEC_UNROLL
    for (int j = 0; j < chunk_keys(cap != CAP_NONE); j += VECTORS) {
        __m512 x[VECTORS];
        EACH(i, VECTORS) x[i] = _mm512_load_ps(s + 16 * (j + i));
        switch (cap) {
        case CAP_NONE: EACH(i, VECTORS) x[i] = _mm512_fmsub_ps(x[i], scale, m); break;
        case CAP_SHORT: cap_few_short(&w->cap, x, VECTORS, m); break;
        case CAP_ANY: cap_minus(w, x, m); break;
        }
        if (!plain) EACH(i, VECTORS) x[i] = mask_score(&mask, x[i], key + j + i);
        if (PLANES > 1)
            exp2_few_exact(x, VECTORS);
        else if (plain)
            exp2_few(x, VECTORS);
        else
            exp2_few_mixed(x, VECTORS, exact);
        EACH(i, VECTORS / 2)
        {
            __m512 e0 = x[2 * i], e1 = x[2 * i + 1];
            l0 = _mm512_add_ps(l0, e0);
            l1 = _mm512_add_ps(l1, e1);
            any = _mm512_ternarylogic_epi32(any, _mm512_castps_si512(e0), _mm512_castps_si512(e1),
                                            0xfe);
            store_p(p + (j / 2 + i) * TILE_ROW_BYTES, e0, e1);
        }
    }
    _mm512_store_ps(beat_l, _mm512_add_ps(l0, l1));
    _mm512_store_si512(beat_or, any);
}

/* Out of line, so that the loops of products stay small: few steps hide keys, few scores come near
 * the cap. */
static __attribute__((noinline)) void exp_rows_rare(struct work *w, int tile, int32_t key,
                                                    const float *s, char *p, bool plain,
                                                    bool capped)
{
    if (!capped)
        exp_rows(w, tile, key, s, p, false, CAP_NONE);
    else if (plain)
        exp_rows(w, tile, key, s, p, true, CAP_ANY);
    else
        exp_rows(w, tile, key, s, p, false, CAP_ANY);
}

/* Whether the short polynomial caps all scores of a chunk. */
static inline __attribute__((always_inline)) bool all_short(const struct work *w, const float *s)
{
    __mmask16 lanes = 0xffff;
    EACH(j, chunk_keys(true)) lanes &= cap_short_lanes(&w->cap, _mm512_load_ps(s + 16 * j));
    return lanes == 0xffff;
}

/* Chunk number `chunk` of w->exp: its steps, in each its tiles, in each its keys. */
static inline __attribute__((always_inline)) void exp_chunk(struct work *w, int chunk, bool capped)
{
    const int tile_chunks = STEP_KEYS / chunk_keys(capped);
    int at = chunk / tile_chunks / 2, side = chunk / tile_chunks % 2, c = chunk % tile_chunks;
    int64_t step = w->exp.begin + at;
    int tile = 2 * w->exp.pair + side, j = c * chunk_keys(capped);
    const float *s = (const float *)(const void *)(s_quad(w, &w->exp, step) + j / 16 * PAIR_BYTES +
                                                   side * TILE_BYTES + j % 16 * TILE_ROW_BYTES);
    char *p = w->p + (w->exp.parity * BLOCK_STEPS + step % BLOCK_STEPS) * OPERAND_BYTES +
              side * TILE_BYTES + j / 2 * TILE_ROW_BYTES;
    int32_t key = (int32_t)step * STEP_KEYS + j;
    bool plain = is_plain(w, tile, step);
    if (!plain || (capped && (PLANES == 3 || !all_short(w, s))))
        exp_rows_rare(w, tile, key, s, p, plain, capped);
    else if (capped)
        exp_rows(w, tile, key, s, p, true, CAP_SHORT);
    else
        exp_rows(w, tile, key, s, p, true, CAP_NONE);
}

/* The same beside no product. */
static __attribute__((noinline)) void exp_chunk_alone(struct work *w, int chunk)
{
    if (w->capped)
        exp_chunk(w, chunk, true);
    else
        exp_chunk(w, chunk, false);
}

#endif
