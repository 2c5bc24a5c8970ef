/* SPDX-License-Identifier: MIT
 *
 * A vector of fp32 lanes, 8 wide: AVX2, FMA, F16C.  The names and promises of vec_avx512.h; what
 * differs is said here.  vec_load and vec_store want 32 bytes.
 */
#ifndef ATTN_CPU_X86_VEC_AVX2_H
#define ATTN_CPU_X86_VEC_AVX2_H

#include <immintrin.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "core/dtype.h"
#include "cpu/x86/unroll.h"

#define VEC_INLINE static inline __attribute__((always_inline))

enum { VEC_LANES = 8 };

typedef __m256 vec;
typedef __m256i vec_int; /* int32 lanes */
typedef __m256 vec_mask; /* all ones or all zeros a lane */

/* Values and memory */

VEC_INLINE vec vec_zero(void) { return _mm256_setzero_ps(); }
VEC_INLINE vec vec_set1(float x) { return _mm256_set1_ps(x); }
VEC_INLINE vec vec_load(const float *p) { return _mm256_load_ps(p); }
VEC_INLINE void vec_store(float *p, vec x) { _mm256_store_ps(p, x); }
/* Half of the lanes; p as aligned as its half. */
VEC_INLINE void vec_store_low(float *p, vec x) { _mm_store_ps(p, _mm256_castps256_ps128(x)); }
VEC_INLINE void vec_store_high(float *p, vec x) { _mm_store_ps(p, _mm256_extractf128_ps(x, 1)); }
VEC_INLINE vec_int vec_int_load(const int32_t *p)
{
    return _mm256_load_si256((const __m256i *)(const void *)p);
}

/* Arithmetic.  vec_max and vec_min give b where a or b is NaN. */

VEC_INLINE vec vec_add(vec a, vec b) { return _mm256_add_ps(a, b); }
VEC_INLINE vec vec_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
VEC_INLINE vec vec_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
VEC_INLINE vec vec_div(vec a, vec b) { return _mm256_div_ps(a, b); }
VEC_INLINE vec vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
VEC_INLINE vec vec_fnma(vec a, vec b, vec c) { return _mm256_fnmadd_ps(a, b, c); } /* c - a b */
VEC_INLINE vec vec_sqrt(vec x) { return _mm256_sqrt_ps(x); }
VEC_INLINE vec vec_max(vec a, vec b) { return _mm256_max_ps(a, b); }
VEC_INLINE vec vec_min(vec a, vec b) { return _mm256_min_ps(a, b); }

/* Sum and maximum over the lanes, in a fixed order. */
VEC_INLINE float vec_reduce_add(vec x)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
VEC_INLINE float vec_reduce_max(vec x)
{
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

/* Masks */

VEC_INLINE vec_mask vec_gt(vec a, vec b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
VEC_INLINE vec_mask vec_eq(vec a, vec b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
VEC_INLINE vec_mask vec_is_nan(vec x) { return _mm256_cmp_ps(x, x, _CMP_UNORD_Q); }
VEC_INLINE bool vec_any(vec_mask m) { return _mm256_movemask_ps(m) != 0; }
VEC_INLINE vec vec_select(vec_mask m, vec yes, vec no) { return _mm256_blendv_ps(no, yes, m); }

/* Lanes with lo <= j < hi. */
VEC_INLINE vec_mask vec_within(int32_t j, vec_int lo, vec_int hi)
{
    vec_int x = _mm256_set1_epi32(j);
    return _mm256_castsi256_ps(
        _mm256_andnot_si256(_mm256_cmpgt_epi32(lo, x), _mm256_cmpgt_epi32(hi, x)));
}

VEC_INLINE __m256i vec_first(int n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* Part of an 8- or 16-bit vector goes through the stack: no mask reaches so low. */
VEC_INLINE __m128i vec_load_bytes(const void *p, int bytes)
{
    __m128i x = _mm_setzero_si128();
    memcpy(&x, p, (size_t)bytes);
    return x;
}
VEC_INLINE void vec_store_bytes(void *p, __m128i x, int bytes) { memcpy(p, &x, (size_t)bytes); }

/* fp32 */

VEC_INLINE vec vec_load_f32(const void *p) { return _mm256_loadu_ps(p); }
VEC_INLINE vec vec_load_part_f32(const void *p, int n)
{
    return _mm256_maskload_ps(p, vec_first(n));
}
VEC_INLINE void vec_store_f32(void *p, vec x) { _mm256_storeu_ps(p, x); }
VEC_INLINE void vec_store_part_f32(void *p, vec x, int n)
{
    _mm256_maskstore_ps(p, vec_first(n), x);
}

/* bf16: the upper half of an fp32 */

VEC_INLINE vec vec_from_bf16(__m128i h)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

VEC_INLINE __m128i vec_to_bf16(vec x)
{
    __m256i u = _mm256_castps_si256(x), high = _mm256_srli_epi32(u, 16);
    __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, half), 16);
    __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    __m256i h = _mm256_blendv_epi8(rounded, quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}

VEC_INLINE vec vec_load_bf16(const void *p) { return vec_from_bf16(_mm_loadu_si128(p)); }
VEC_INLINE vec vec_load_part_bf16(const void *p, int n)
{
    return vec_from_bf16(vec_load_bytes(p, 2 * n));
}
VEC_INLINE void vec_store_bf16(void *p, vec x) { _mm_storeu_si128(p, vec_to_bf16(x)); }
VEC_INLINE void vec_store_part_bf16(void *p, vec x, int n)
{
    vec_store_bytes(p, vec_to_bf16(x), 2 * n);
}

/* fp16: the instructions convert subnormals whatever MXCSR says */

VEC_INLINE __m128i vec_to_f16(vec x)
{
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

VEC_INLINE vec vec_load_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
VEC_INLINE vec vec_load_part_f16(const void *p, int n)
{
    return _mm256_cvtph_ps(vec_load_bytes(p, 2 * n));
}
VEC_INLINE void vec_store_f16(void *p, vec x) { _mm_storeu_si128(p, vec_to_f16(x)); }
VEC_INLINE void vec_store_part_f16(void *p, vec x, int n)
{
    vec_store_bytes(p, vec_to_f16(x), 2 * n);
}

/* e4m3: its bits shifted to fp16's places are the value times 2^-8, subnormals included */

VEC_INLINE vec vec_from_f8(__m128i b)
{
    __m128i w = _mm_cvtepi8_epi16(b);
    __m128i magnitude = _mm_and_si128(_mm_slli_epi16(w, 7), _mm_set1_epi16(0x3f80));
    __m128i sign = _mm_and_si128(w, _mm_set1_epi16((short)0x8000));
    __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x3f80));
    __m128i h = _mm_or_si128(_mm_or_si128(magnitude, sign),
                             _mm_and_si128(nan, _mm_set1_epi16(0x7e00)));
    return _mm256_mul_ps(_mm256_cvtph_ps(h), _mm256_set1_ps(0x1p8f));
}

VEC_INLINE __m128i vec_to_f8(vec x)
{
    __m256i u = _mm256_castps_si256(x), a = _mm256_and_si256(u, _mm256_set1_epi32(0x7fffffff));
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(a, 20), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(_mm256_add_epi32(a, odd), _mm256_set1_epi32(0x7ffff - 0x3c000000));
    r = _mm256_srli_epi32(r, 20);
    /* Below 2^-6 the step is 2^-9, the ulp of 2^14: one addition rounds. */
    __m256 shifted = _mm256_add_ps(_mm256_castsi256_ps(a), _mm256_set1_ps(0x1p14f));
    __m256i steps = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(0x46800000));
    r = _mm256_blendv_epi8(r, steps, _mm256_cmpgt_epi32(_mm256_set1_epi32(0x3c800000), a));
    __m256i nan = _mm256_cmpgt_epi32(a, _mm256_set1_epi32(0x43e80000));
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7f), nan);
    r = _mm256_or_si256(r, _mm256_and_si256(_mm256_srli_epi32(u, 24), _mm256_set1_epi32(0x80)));
    __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
    return _mm_packus_epi16(h, h);
}

VEC_INLINE vec vec_load_f8(const void *p) { return vec_from_f8(_mm_loadl_epi64(p)); }
VEC_INLINE vec vec_load_part_f8(const void *p, int n) { return vec_from_f8(vec_load_bytes(p, n)); }
VEC_INLINE void vec_store_f8(void *p, vec x) { _mm_storel_epi64(p, vec_to_f8(x)); }
VEC_INLINE void vec_store_part_f8(void *p, vec x, int n) { vec_store_bytes(p, vec_to_f8(x), n); }

/* Functions */

/* 1 / x.  The 12-bit estimate and a Newton step would miss fp32. */
VEC_INLINE vec vec_recip(vec x) { return vec_div(vec_set1(1.0f), x); }

/* 2^x.  2^round(x) times a polynomial on [-1/2, 1/2] of degree 5, relative error at most 1.7e-7
 * and none at integers; below -126 exactly 0, from 127.5 on inf, NaN stays NaN.
 * Adding 1.5 * 2^23 + 127 leaves round(x) + 127, the biased exponent, in the low bits. */
VEC_INLINE vec vec_exp2(vec x)
{
    const vec magic = vec_set1(0x1.8p23f + 127.0f);
    vec live = _mm256_cmp_ps(x, vec_set1(-126.0f), _CMP_NLT_UQ);
    x = vec_max(vec_set1(-126.0f), vec_min(vec_set1(128.0f), x));
    vec shifted = vec_add(x, magic);
    vec f = vec_sub(x, vec_sub(shifted, magic));
    vec p = vec_fma(vec_set1(0x1.5bba14p-10f), f, vec_set1(0x1.3cea88p-7f));
    p = vec_fma(p, f, vec_set1(0x1.c6b752p-5f));
    p = vec_fma(p, f, vec_set1(0x1.ebf9bcp-3f));
    p = vec_fma(p, f, vec_set1(0x1.62e42ap-1f));
    p = vec_fma(p, f, vec_set1(1.0f));
    vec scale = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
    return _mm256_and_ps(vec_mul(p, scale), live);
}

/* 2^x for factors that are multiplied by the thousand: exact at 0 and to a rounding beside it
 * (degree 6, 2e-9), so that decays close to 1 do not drift.  Else as vec_exp2. */
VEC_INLINE vec vec_exp2_fine(vec x)
{
    const vec magic = vec_set1(0x1.8p23f + 127.0f);
    vec live = _mm256_cmp_ps(x, vec_set1(-126.0f), _CMP_NLT_UQ);
    x = vec_max(vec_set1(-126.0f), vec_min(vec_set1(128.0f), x));
    vec shifted = vec_add(x, magic);
    vec f = vec_sub(x, vec_sub(shifted, magic));
    vec p = vec_fma(vec_set1(0x1.41fbbcp-13f), f, vec_set1(0x1.5f3e54p-10f));
    p = vec_fma(p, f, vec_set1(0x1.3b2d4cp-7f));
    p = vec_fma(p, f, vec_set1(0x1.c6aee8p-5f));
    p = vec_fma(p, f, vec_set1(0x1.ebfbdcp-3f));
    p = vec_fma(p, f, vec_set1(0x1.62e430p-1f));
    p = vec_fma(p, f, vec_set1(1.0f));
    vec scale = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
    return _mm256_and_ps(vec_mul(p, scale), live);
}

/* r[i] lane j <-> r[j] lane i. */
VEC_INLINE void vec_transpose(vec r[VEC_LANES])
{
    vec t[8];
    VEC_UNROLL
    for (int i = 0; i < 8; i += 4) { /* 4 x 4 inside each 128-bit lane */
        __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(r[i], r[i + 1]));
        __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(r[i], r[i + 1]));
        __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(r[i + 2], r[i + 3]));
        __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(r[i + 2], r[i + 3]));
        t[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
        t[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
        t[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
        t[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
    }
    VEC_UNROLL
    for (int i = 0; i < 4; i++) { /* 2 x 2 of the 128-bit lanes */
        r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
}

#include "cpu/x86/vec_common.h"

#endif
