/* SPDX-License-Identifier: MIT
 *
 * The names and promises of row_avx512.h for 8 lanes.
 */
#ifndef ATTN_CPU_X86_ROW_AVX2_H
#define ATTN_CPU_X86_ROW_AVX2_H

#include "cpu/x86/vec_avx2.h"

VEC_INLINE __m128i vec_bytes16(const char *p)
{
    return _mm_loadu_si128((const __m128i *)(const void *)p);
}

VEC_INLINE void vec_pair_from_bf16(__m256i x, vec *a, vec *b)
{
    *a = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    *b = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(-0x10000)));
}

VEC_INLINE void vec_pair_from_f8(__m128i bytes, vec *a, vec *b)
{
    __m256i w = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
    __m256i h = _mm256_and_si256(w, _mm256_set1_epi16((short)0xbf80));
    __m256i next = _mm256_add_epi16(h, _mm256_set1_epi16(0x80));
    h = _mm256_or_si256(h, _mm256_and_si256(next, _mm256_set1_epi16(0x4000)));
    *a = _mm256_cvtph_ps(_mm256_castsi256_si128(h));
    *b = _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1));
}

VEC_INLINE void vec_load_pair(enum attn_dtype t, const char *p, vec *a, vec *b)
{
    switch (t) {
    case ATTN_F32:
        *a = vec_load_f32(p);
        *b = vec_load_f32(p + 32);
        break;
    case ATTN_BF16:
        vec_pair_from_bf16(_mm256_loadu_si256((const __m256i *)(const void *)p), a, b);
        break;
    case ATTN_F16:
        *a = vec_load_f16(p);
        *b = vec_load_f16(p + 16);
        break;
    default: vec_pair_from_f8(vec_bytes16(p), a, b);
    }
}

/* Here n can only be 8: half a pair. */
VEC_INLINE void vec_load_pair_part(enum attn_dtype t, const char *p, int n, vec *a, vec *b)
{
    (void)n;
    if (t == ATTN_BF16) {
        vec_pair_from_bf16(_mm256_zextsi128_si256(vec_bytes16(p)), a, b);
    } else if (t == ATTN_F8) {
        vec_pair_from_f8(_mm_loadl_epi64((const __m128i *)(const void *)p), a, b);
    } else {
        *a = vec_load_elem(t, p);
        *b = vec_zero();
    }
}

VEC_INLINE float vec_pair_scale(enum attn_dtype t) { return t == ATTN_F8 ? 0x1p8f : 1.0f; }

VEC_INLINE void vec_unpair(enum attn_dtype t, vec *a, vec *b)
{
    if (t != ATTN_BF16) return;
    vec lo = _mm256_unpacklo_ps(*a, *b), hi = _mm256_unpackhi_ps(*a, *b);
    *a = _mm256_permute2f128_ps(lo, hi, 0x20);
    *b = _mm256_permute2f128_ps(lo, hi, 0x31);
}

/* k is 1, 2 or 4. */
VEC_INLINE vec vec_swap(vec x, int k)
{
    switch (k) {
    case 1: return _mm256_permute_ps(x, 0xb1);
    case 2: return _mm256_permute_ps(x, 0x4e);
    default: return _mm256_permute2f128_ps(x, x, 1);
    }
}

VEC_INLINE vec vec_twice(vec x)
{
    return _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
}

VEC_INLINE vec vec_fma_alternate(vec a, vec b, vec c) { return _mm256_fmaddsub_ps(a, b, c); }

/* (0 + 2) + (1 + 3) in each half h, then h0 + h1. */
VEC_INLINE vec vec_sums(const vec a[VEC_LANES])
{
    vec half[4], quarter[2];
    VEC_UNROLL
    for (int i = 0; i < 4; i++)
        half[i] = vec_add(_mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]),
                          _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    VEC_UNROLL
    for (int i = 0; i < 2; i++) {
        __m256d x = _mm256_castps_pd(half[2 * i]), y = _mm256_castps_pd(half[2 * i + 1]);
        quarter[i] = vec_add(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)),
                             _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
    }
    return vec_add(_mm256_permute2f128_ps(quarter[0], quarter[1], 0x20),
                   _mm256_permute2f128_ps(quarter[0], quarter[1], 0x31));
}

#endif
