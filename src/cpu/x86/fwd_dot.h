/* SPDX-License-Identifier: MIT
 *
 * The words of mha_fwd_vec.h as pairs of bf16, for bf16 and for fp8, which is exact in it: products
 * are VDPBF16PS, which multiplies a pair by a pair and adds to one fp32 lane.  A key's word holds
 * elements 2i and 2i + 1 of its row, a word of V or P those of keys 2j and 2j + 1.
 */
#ifndef ATTN_CPU_X86_FWD_DOT_H
#define ATTN_CPU_X86_FWD_DOT_H

#include "core/dtype.h"

enum { PAIR = 2 }; /* elements of a word */

VEC_INLINE vec mul_add(vec a, vec b, vec sum)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

/* 16 elements, of which n are there, as bf16; the others are 0. */
VEC_INLINE __m256i load_bf16(enum attn_dtype t, const char *x, int32_t n)
{
    __mmask16 lanes = n >= VEC_LANES ? 0xffff : vec_first(n);
    if (t == ATTN_BF16) return _mm256_maskz_loadu_epi16(lanes, x);
    return vec_to_bf16(vec_from_f8(_mm_maskz_loadu_epi8(lanes, x)));
}

/* d elements of a row of K. */
VEC_INLINE void key_words(enum attn_dtype t, const char *x, int32_t d, float *y)
{
    for (int32_t i = 0; i < d; i += VEC_LANES) {
        __mmask16 lanes = d - i >= VEC_LANES ? 0xffff : vec_first(d - i);
        _mm256_mask_storeu_epi16(y + i / 2, lanes,
                                 load_bf16(t, x + i * attn_dtype_bytes(t), d - i));
    }
}

/* Zeros infinities and NaNs and says whether there were any. */
VEC_INLINE bool keep_finite(__m256i *x)
{
    __m256i twice = _mm256_add_epi16(*x, *x); /* drops the sign */
    __mmask16 bad = _mm256_cmpge_epu16_mask(twice, _mm256_set1_epi16((short)0xff00));
    *x = _mm256_maskz_mov_epi16((__mmask16)~bad, *x);
    return bad;
}

/* d elements of two rows of V (the second may be NULL: zeros), 8 words in each of the panels,
 * `panel` apart.  Infinities and NaNs become zeros; a bit for each row that has any. */
VEC_INLINE unsigned value_words(enum attn_dtype t, const char *const v[PAIR], int32_t d, float *y,
                                int64_t panel)
{
    unsigned bad = 0;
    for (int32_t i = 0; i < d; i += VEC_LANES, y += 2 * panel) {
        const int64_t at = i * attn_dtype_bytes(t);
        __m256i even = load_bf16(t, v[0] + at, d - i), odd = _mm256_setzero_si256();
        if (v[1]) odd = load_bf16(t, v[1] + at, d - i);
        if (keep_finite(&even)) bad |= 1;
        if (keep_finite(&odd)) bad |= 2;
        vec words = _mm512_castsi512_ps(
            _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                            _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16)));
        vec_store_low(y, words);
        if (d - i >= VEC_LANES) vec_store_high(y + panel, words);
    }
    return bad;
}

/* d elements of each of up to VEC_LANES rows become d / 2 vectors of words, `width` apart; of the
 * scale they take the sign. */
VEC_INLINE void query_words(enum attn_dtype t, const char *x, const int64_t *at, int32_t rows,
                            int32_t d, float scale, float *y, int width)
{
    const __m256i sign = _mm256_set1_epi16(scale < 0 ? (short)0x8000 : 0);
    for (int32_t i = 0; i < d; i += 2 * VEC_LANES) {
        vec e[VEC_LANES];
        for (int r = 0; r < VEC_LANES; r++) {
            e[r] = vec_zero();
            if (r >= rows) continue;
            const char *row = x + at[r] + i * attn_dtype_bytes(t);
            __m256i low = _mm256_xor_si256(load_bf16(t, row, d - i), sign), high = low;
            if (d - i > VEC_LANES)
                high = _mm256_xor_si256(load_bf16(t, row + VEC_LANES * attn_dtype_bytes(t),
                                                  d - i - VEC_LANES),
                                        sign);
            e[r] = _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
        }
        vec_transpose(e);
        for (int k = 0; k < VEC_LANES && i + 2 * k < d; k++)
            vec_store(y + (i / 2 + k) * width, e[k]);
    }
}

/* A word of P of two keys, rounded to nearest (ties away from zero), which p becomes, too. */
VEC_INLINE vec weight_words(vec p[PAIR])
{
    __m512i high[PAIR];
    VEC_UNROLL
    for (int u = 0; u < PAIR; u++) {
        high[u] = _mm512_add_epi32(_mm512_castps_si512(p[u]), _mm512_set1_epi32(0x8000));
        high[u] = _mm512_and_si512(high[u], _mm512_set1_epi32(-0x10000));
        p[u] = _mm512_castsi512_ps(high[u]);
    }
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(high[0], 16), high[1]));
}

#endif
