/* SPDX-License-Identifier: MIT
 *
 * A vector of fp32 lanes, 16 wide: AVX-512 F, BW, VL, DQ.  vec_avx2.h gives the same names for 8
 * lanes, so that a kernel body written over vec_ compiles for both rungs.
 *
 * Arithmetic is always fp32; vec_load_elem and vec_store_elem convert from and to the four element
 * types, rounding to nearest even and keeping NaN, as core/dtype.h defines.  Memory of elements
 * needs no alignment; vec_load and vec_store want 64 bytes.  The _part forms touch the first n
 * lanes' memory only, a load gives 0 in the others.
 *
 * Everything is static: nothing compiled with this file's -m flags can leak out of its rung.
 */
#ifndef ATTN_CPU_X86_VEC_AVX512_H
#define ATTN_CPU_X86_VEC_AVX512_H

#include <immintrin.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/dtype.h"
#include "cpu/x86/unroll.h"

#define VEC_INLINE static inline __attribute__((always_inline))

enum { VEC_LANES = 16 };

typedef __m512 vec;
typedef __m512i vec_int; /* int32 lanes */
typedef __mmask16 vec_mask;

/* Values and memory */

VEC_INLINE vec vec_zero(void) { return _mm512_setzero_ps(); }
VEC_INLINE vec vec_set1(float x) { return _mm512_set1_ps(x); }
VEC_INLINE vec vec_load(const float *p) { return _mm512_load_ps(p); }
VEC_INLINE void vec_store(float *p, vec x) { _mm512_store_ps(p, x); }
/* Half of the lanes; p as aligned as its half. */
VEC_INLINE void vec_store_low(float *p, vec x) { _mm256_store_ps(p, _mm512_castps512_ps256(x)); }
VEC_INLINE void vec_store_high(float *p, vec x)
{
    _mm256_store_ps(p, _mm512_extractf32x8_ps(x, 1));
}
VEC_INLINE vec_int vec_int_load(const int32_t *p) { return _mm512_load_si512(p); }

/* Arithmetic.  vec_max and vec_min give b where a or b is NaN. */

VEC_INLINE vec vec_add(vec a, vec b) { return _mm512_add_ps(a, b); }
VEC_INLINE vec vec_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
VEC_INLINE vec vec_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
VEC_INLINE vec vec_div(vec a, vec b) { return _mm512_div_ps(a, b); }
VEC_INLINE vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
VEC_INLINE vec vec_fnma(vec a, vec b, vec c) { return _mm512_fnmadd_ps(a, b, c); } /* c - a b */
VEC_INLINE vec vec_sqrt(vec x) { return _mm512_sqrt_ps(x); }
VEC_INLINE vec vec_max(vec a, vec b) { return _mm512_max_ps(a, b); }
VEC_INLINE vec vec_min(vec a, vec b) { return _mm512_min_ps(a, b); }

/* Sum and maximum over the lanes, in a fixed order. */
VEC_INLINE float vec_reduce_add(vec x) { return _mm512_reduce_add_ps(x); }
VEC_INLINE float vec_reduce_max(vec x) { return _mm512_reduce_max_ps(x); }

/* Masks */

VEC_INLINE vec_mask vec_gt(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
VEC_INLINE vec_mask vec_eq(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
VEC_INLINE vec_mask vec_is_nan(vec x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
VEC_INLINE bool vec_any(vec_mask m) { return m != 0; }
VEC_INLINE vec vec_select(vec_mask m, vec yes, vec no) { return _mm512_mask_blend_ps(m, no, yes); }

/* Lanes with lo <= j < hi. */
VEC_INLINE vec_mask vec_within(int32_t j, vec_int lo, vec_int hi)
{
    vec_int x = _mm512_set1_epi32(j);
    return _mm512_mask_cmpgt_epi32_mask(_mm512_cmple_epi32_mask(lo, x), hi, x);
}

VEC_INLINE __mmask16 vec_first(int n) { return (__mmask16)((1u << n) - 1u); }

/* fp32 */

VEC_INLINE vec vec_load_f32(const void *p) { return _mm512_loadu_ps(p); }
VEC_INLINE vec vec_load_part_f32(const void *p, int n)
{
    return _mm512_maskz_loadu_ps(vec_first(n), p);
}
VEC_INLINE void vec_store_f32(void *p, vec x) { _mm512_storeu_ps(p, x); }
VEC_INLINE void vec_store_part_f32(void *p, vec x, int n)
{
    _mm512_mask_storeu_ps(p, vec_first(n), x);
}

/* bf16: the upper half of an fp32 */

VEC_INLINE vec vec_from_bf16(__m256i h)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

VEC_INLINE __m256i vec_to_bf16(vec x)
{
    __m512i u = _mm512_castps_si512(x), high = _mm512_srli_epi32(u, 16);
    __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, half), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
}

VEC_INLINE vec vec_load_bf16(const void *p) { return vec_from_bf16(_mm256_loadu_si256(p)); }
VEC_INLINE vec vec_load_part_bf16(const void *p, int n)
{
    return vec_from_bf16(_mm256_maskz_loadu_epi16(vec_first(n), p));
}
VEC_INLINE void vec_store_bf16(void *p, vec x) { _mm256_storeu_si256(p, vec_to_bf16(x)); }
VEC_INLINE void vec_store_part_bf16(void *p, vec x, int n)
{
    _mm256_mask_storeu_epi16(p, vec_first(n), vec_to_bf16(x));
}

/* fp16: the instructions convert subnormals whatever MXCSR says */

VEC_INLINE __m256i vec_to_f16(vec x)
{
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

VEC_INLINE vec vec_load_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
VEC_INLINE vec vec_load_part_f16(const void *p, int n)
{
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(vec_first(n), p));
}
VEC_INLINE void vec_store_f16(void *p, vec x) { _mm256_storeu_si256(p, vec_to_f16(x)); }
VEC_INLINE void vec_store_part_f16(void *p, vec x, int n)
{
    _mm256_mask_storeu_epi16(p, vec_first(n), vec_to_f16(x));
}

/* e4m3: its bits shifted to fp16's places are the value times 2^-8, subnormals included */

VEC_INLINE vec vec_from_f8(__m128i b)
{
    __m256i w = _mm256_cvtepi8_epi16(b);
    __m256i magnitude = _mm256_and_si256(_mm256_slli_epi16(w, 7), _mm256_set1_epi16(0x3f80));
    __m256i sign = _mm256_and_si256(w, _mm256_set1_epi16((short)0x8000));
    __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x3f80));
    __m256i h = _mm256_or_si256(magnitude, sign);
    h = _mm256_mask_mov_epi16(h, nan, _mm256_set1_epi16(0x7e00));
    return _mm512_mul_ps(_mm512_cvtph_ps(h), _mm512_set1_ps(0x1p8f));
}

VEC_INLINE __m128i vec_to_f8(vec x)
{
    __m512i u = _mm512_castps_si512(x), a = _mm512_and_si512(u, _mm512_set1_epi32(0x7fffffff));
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(a, 20), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(a, odd), _mm512_set1_epi32(0x7ffff - 0x3c000000));
    r = _mm512_srli_epi32(r, 20);
    /* Below 2^-6 the step is 2^-9, the ulp of 2^14: one addition rounds. */
    __m512 shifted = _mm512_add_ps(_mm512_castsi512_ps(a), _mm512_set1_ps(0x1p14f));
    __mmask16 small = _mm512_cmplt_epi32_mask(a, _mm512_set1_epi32(0x3c800000));
    r = _mm512_mask_sub_epi32(r, small, _mm512_castps_si512(shifted),
                              _mm512_set1_epi32(0x46800000));
    __mmask16 nan = _mm512_cmpgt_epi32_mask(a, _mm512_set1_epi32(0x43e80000));
    r = _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7f));
    __m512i sign = _mm512_and_si512(_mm512_srli_epi32(u, 24), _mm512_set1_epi32(0x80));
    return _mm512_cvtepi32_epi8(_mm512_or_si512(r, sign));
}

VEC_INLINE vec vec_load_f8(const void *p) { return vec_from_f8(_mm_loadu_si128(p)); }
VEC_INLINE vec vec_load_part_f8(const void *p, int n)
{
    return vec_from_f8(_mm_maskz_loadu_epi8(vec_first(n), p));
}
VEC_INLINE void vec_store_f8(void *p, vec x) { _mm_storeu_si128(p, vec_to_f8(x)); }
VEC_INLINE void vec_store_part_f8(void *p, vec x, int n)
{
    _mm_mask_storeu_epi8(p, vec_first(n), vec_to_f8(x));
}

/* Functions */

/* 1 / x to 1 ulp for x in the normal range: 14 bits and one Newton step. */
VEC_INLINE vec vec_recip(vec x)
{
    vec r = _mm512_rcp14_ps(x);
    return vec_fma(r, _mm512_fnmadd_ps(x, r, vec_set1(1.0f)), r);
}

/* 2^x.  2^floor(x) times a polynomial on [0, 1) of degree 5, relative error at most 1.5e-7 and none
 * at integers; -inf gives exactly 0, inf gives inf, NaN stays NaN, results below 2^-126 are flushed
 * where MXCSR flushes. */
VEC_INLINE vec vec_exp2(vec x)
{
    vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); /* x - floor(x) */
    vec p = vec_fma(vec_set1(0x1.e974fcp-10f), f, vec_set1(0x1.277854p-7f));
    p = vec_fma(p, f, vec_set1(0x1.c91ce6p-5f));
    p = vec_fma(p, f, vec_set1(0x1.ebdb56p-3f));
    p = vec_fma(p, f, vec_set1(0x1.62e4bap-1f));
    p = vec_fma(p, f, vec_set1(1.0f));
    return _mm512_scalef_ps(p, x);
}

/* 2^x for factors that are multiplied by the thousand: exact at 0 and to a rounding beside it
 * (degree 6 on [-1/2, 1/2], 2e-9), so that decays close to 1 do not drift.  Else as vec_exp2. */
VEC_INLINE vec vec_exp2_fine(vec x)
{
    vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vec p = vec_fma(vec_set1(0x1.41fbbcp-13f), f, vec_set1(0x1.5f3e54p-10f));
    p = vec_fma(p, f, vec_set1(0x1.3b2d4cp-7f));
    p = vec_fma(p, f, vec_set1(0x1.c6aee8p-5f));
    p = vec_fma(p, f, vec_set1(0x1.ebfbdcp-3f));
    p = vec_fma(p, f, vec_set1(0x1.62e430p-1f));
    p = vec_fma(p, f, vec_set1(1.0f));
    return _mm512_scalef_ps(p, vec_sub(x, f));
}

/* r[i] lane j <-> r[j] lane i. */
VEC_INLINE void vec_transpose(vec r[VEC_LANES])
{
    vec t[16];
    VEC_UNROLL
    for (int i = 0; i < 16; i += 4) { /* 4 x 4 inside each 128-bit lane */
        __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[i], r[i + 1]));
        __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(r[i], r[i + 1]));
        __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r[i + 2], r[i + 3]));
        __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(r[i + 2], r[i + 3]));
        t[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        t[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        t[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        t[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    VEC_UNROLL
    for (int i = 0; i < 4; i++) { /* 4 x 4 of the 128-bit lanes */
        vec a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88);
        vec b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
        vec c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
        vec d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
        r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
        r[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
        r[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
}

#include "cpu/x86/vec_common.h"

#endif
