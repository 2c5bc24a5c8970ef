/* SPDX-License-Identifier: MIT
 *
 * The products of mha_decode_vec.h by dot products of bf16 pairs (VDPBF16PS), for bf16 and for fp8,
 * which is exact in bf16.  decode_fma.h gives the same names.
 *
 *   K Q   a step is one vector of 16 words, pairs (2i, 2i + 1) of the row's elements as they lie
 *   P V   two keys at a time: a word of V is an element of key 2i and of key 2i + 1, a word of P
 *         these keys' p, rounded to bf16, in the lane of key 2i
 */
#ifndef ATTN_CPU_X86_DECODE_DOT_H
#define ATTN_CPU_X86_DECODE_DOT_H

#include "core/dtype.h"

enum {
    STEP = 2 * VEC_LANES, /* elements of a row taken together */
    Q_STEP = VEC_LANES,   /* floats that a step of q takes in scratch */
    V_KEYS = 2,           /* keys whose V is taken together */
    ROUNDED = 1,          /* P is multiplied rounded to bf16 */
};

/* STEP elements of a row. */
struct step {
    __m512i words;
};

/* e4m3 as bf16.  Normal numbers: mantissa and exponent shifted to their places and the exponent's
 * bias moved; subnormals, m 2^-9, by a table of eight; NaN stays NaN. */
VEC_INLINE __m512i words_from_f8(__m256i bytes)
{
    const __m512i subnormal = _mm512_castsi128_si512(
        _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    __m512i w = _mm512_cvtepi8_epi16(bytes), sign = _mm512_set1_epi16((short)0x8000);
    __m512i magnitude = _mm512_and_si512(w, _mm512_set1_epi16(0x7f));
    __m512i x = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
    __mmask32 small = _mm512_testn_epi16_mask(w, _mm512_set1_epi16(0x78));
    __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
    x = _mm512_mask_permutexvar_epi16(x, small, magnitude, subnormal);
    x = _mm512_mask_mov_epi16(x, nan, _mm512_set1_epi16(0x7fc0));
    return _mm512_or_si512(x, _mm512_and_si512(w, sign));
}

VEC_INLINE struct step step_load(enum attn_dtype t, const char *p)
{
    if (t == ATTN_BF16) return (struct step){_mm512_loadu_si512(p)};
    return (struct step){words_from_f8(_mm256_loadu_si256((const __m256i *)(const void *)p))};
}

/* The first n; zeros for the others. */
VEC_INLINE struct step step_load_part(enum attn_dtype t, const char *p, int n)
{
    __mmask32 m = (1u << n) - 1u;
    if (t == ATTN_BF16) return (struct step){_mm512_maskz_loadu_epi16(m, p)};
    return (struct step){words_from_f8(_mm256_maskz_loadu_epi8(m, p))};
}

VEC_INLINE struct step step_zero(void) { return (struct step){_mm512_setzero_si512()}; }

/* What a step is to be multiplied with to give its elements' values. */
VEC_INLINE float step_scale(enum attn_dtype t)
{
    (void)t;
    return 1.0f;
}

VEC_INLINE struct step query_load(const float *q) { return (struct step){_mm512_load_si512(q)}; }

VEC_INLINE void query_store(float *q, struct step x) { _mm512_store_si512(q, x.words); }

/* sum + k . q, spread over lanes. */
VEC_INLINE vec step_dot(struct step k, struct step q, vec sum)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)k.words, (__m512bh)q.words);
}

/* A step of V of V_KEYS keys as two vectors of columns: elements 0-3, 8-11, ... and the others. */
VEC_INLINE void step_columns(const struct step v[V_KEYS], vec x[2])
{
    x[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(v[0].words, v[1].words));
    x[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(v[0].words, v[1].words));
}

VEC_INLINE vec add_values(vec weight, vec x, vec sum)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)x);
}

/* The two vectors of step_columns in the order of elements. */
VEC_INLINE void columns_in_order(enum attn_dtype t, vec *a, vec *b)
{
    (void)t;
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    vec low = *a, high = *b;
    *a = _mm512_permutex2var_ps(low, first, high);
    *b = _mm512_permutex2var_ps(low, _mm512_add_epi32(first, _mm512_set1_epi32(8)), high);
}

/* P as add_values wants it; *rounded: its values there. */
VEC_INLINE vec weights(vec p, vec *rounded)
{
    __m512i word = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(p));
    *rounded = _mm512_castsi512_ps(_mm512_slli_epi32(word, 16));
    __m512i odd = _mm512_castps_si512(vec_swap(*rounded, 1));
    return _mm512_castsi512_ps(_mm512_or_si512(word, odd));
}

#endif
