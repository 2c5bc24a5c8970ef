/* SPDX-License-Identifier: MIT
 *
 * What kernels whose lanes run along a row (decode, rotary) need beyond vec_avx512.h.  row_avx2.h
 * gives the same names.
 *
 * A pair is 2 VEC_LANES consecutive elements as two vectors, in the order that costs least to
 * widen: bf16 gives the even elements, then the odd ones (a shift and an and); the others give
 * the first half, then the second.  Dot products and sums over rows are the same in any order;
 * vec_unpair restores the elements' own.  A pair of e4m3 elements is 2^-8 times their values, which
 * users fold into a factor they apply anyway: vec_pair_scale.
 */
#ifndef ATTN_CPU_X86_ROW_AVX512_H
#define ATTN_CPU_X86_ROW_AVX512_H

#include "cpu/x86/vec_avx512.h"

VEC_INLINE void vec_pair_from_bf16(__m512i x, vec *a, vec *b)
{
    *a = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    *b = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(-0x10000)));
}

/* e4m3's bits shifted to fp16's places, as vec_from_f8 does.  Adding one to the last place carries
 * into bit 14 for NaN alone, and that bit makes an fp16 NaN of it. */
VEC_INLINE void vec_pair_from_f8(__m256i bytes, vec *a, vec *b)
{
    __m512i w = _mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7);
    __m512i h = _mm512_and_si512(w, _mm512_set1_epi16((short)0xbf80));
    __m512i next = _mm512_add_epi16(h, _mm512_set1_epi16(0x80));
    h = _mm512_or_si512(h, _mm512_and_si512(next, _mm512_set1_epi16(0x4000)));
    *a = _mm512_cvtph_ps(_mm512_castsi512_si256(h));
    *b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1));
}

VEC_INLINE void vec_load_pair(enum attn_dtype t, const char *p, vec *a, vec *b)
{
    switch (t) {
    case ATTN_F32:
        *a = vec_load_f32(p);
        *b = vec_load_f32(p + 64);
        break;
    case ATTN_BF16: vec_pair_from_bf16(_mm512_loadu_si512(p), a, b); break;
    case ATTN_F16:
        *a = vec_load_f16(p);
        *b = vec_load_f16(p + 32);
        break;
    default: vec_pair_from_f8(_mm256_loadu_si256((const __m256i *)(const void *)p), a, b);
    }
}

/* The first n elements of a pair, zeros for the others; n is 8, 16 or 24. */
VEC_INLINE void vec_load_pair_part(enum attn_dtype t, const char *p, int n, vec *a, vec *b)
{
    __mmask32 m = (1u << n) - 1u;
    switch (t) {
    case ATTN_F32:
        *a = _mm512_maskz_loadu_ps((__mmask16)m, p);
        *b = _mm512_maskz_loadu_ps((__mmask16)(m >> 16), p + 64);
        break;
    case ATTN_BF16: vec_pair_from_bf16(_mm512_maskz_loadu_epi16(m, p), a, b); break;
    case ATTN_F16:
        *a = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)m, p));
        *b = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)(m >> 16), p + 32));
        break;
    default: vec_pair_from_f8(_mm256_maskz_loadu_epi8(m, p), a, b);
    }
}

/* What a pair is to be multiplied with to give its elements' values. */
VEC_INLINE float vec_pair_scale(enum attn_dtype t) { return t == ATTN_F8 ? 0x1p8f : 1.0f; }

VEC_INLINE void vec_unpair(enum attn_dtype t, vec *a, vec *b)
{
    if (t != ATTN_BF16) return;
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    vec even = *a, odd = *b;
    *a = _mm512_permutex2var_ps(even, first, odd);
    *b = _mm512_permutex2var_ps(even, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd);
}

/* Lane i of the result is lane i ^ k of x; k is 1, 2, 4 or 8. */
VEC_INLINE vec vec_swap(vec x, int k)
{
    switch (k) {
    case 1: return _mm512_permute_ps(x, 0xb1);
    case 2: return _mm512_permute_ps(x, 0x4e);
    case 4: return _mm512_shuffle_f32x4(x, x, 0xb1);
    default: return _mm512_shuffle_f32x4(x, x, 0x4e);
    }
}

/* Lanes 0 0 1 1 2 2 ... of x. */
VEC_INLINE vec vec_twice(vec x)
{
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
                                 x);
}

/* a b - c in even lanes, a b + c in odd ones. */
VEC_INLINE vec vec_fma_alternate(vec a, vec b, vec c) { return _mm512_fmaddsub_ps(a, b, c); }

/* Lane i of the result is the sum of the lanes of a[i], the same tree for every i:
 * (0 + 2) + (1 + 3) in each quarter q, then (q0 + q1) + (q2 + q3). */
VEC_INLINE vec vec_sums(const vec a[VEC_LANES])
{
    vec half[8], quarter[4], pair[2];
    VEC_UNROLL
    for (int i = 0; i < 8; i++)
        half[i] = vec_add(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]),
                          _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    VEC_UNROLL
    for (int i = 0; i < 4; i++) {
        __m512d x = _mm512_castps_pd(half[2 * i]), y = _mm512_castps_pd(half[2 * i + 1]);
        quarter[i] = vec_add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    VEC_UNROLL
    for (int i = 0; i < 2; i++)
        pair[i] = vec_add(_mm512_shuffle_f32x4(quarter[2 * i], quarter[2 * i + 1], 0x88),
                          _mm512_shuffle_f32x4(quarter[2 * i], quarter[2 * i + 1], 0xdd));
    return vec_add(_mm512_shuffle_f32x4(pair[0], pair[1], 0x88),
                   _mm512_shuffle_f32x4(pair[0], pair[1], 0xdd));
}

#endif
