/* SPDX-License-Identifier: MIT
 *
 * What vec_avx2.h and vec_avx512.h have in common, written over what they define; each includes it
 * at its end.
 */
#ifndef ATTN_CPU_X86_VEC_COMMON_H
#define ATTN_CPU_X86_VEC_COMMON_H

/* The four types by name; t is a constant where these are called. */

VEC_INLINE vec vec_load_elem(enum attn_dtype t, const void *p)
{
    switch (t) {
    case ATTN_F32: return vec_load_f32(p);
    case ATTN_BF16: return vec_load_bf16(p);
    case ATTN_F16: return vec_load_f16(p);
    default: return vec_load_f8(p);
    }
}

VEC_INLINE vec vec_load_part_elem(enum attn_dtype t, const void *p, int n)
{
    switch (t) {
    case ATTN_F32: return vec_load_part_f32(p, n);
    case ATTN_BF16: return vec_load_part_bf16(p, n);
    case ATTN_F16: return vec_load_part_f16(p, n);
    default: return vec_load_part_f8(p, n);
    }
}

VEC_INLINE void vec_store_elem(enum attn_dtype t, void *p, vec x)
{
    switch (t) {
    case ATTN_F32: vec_store_f32(p, x); break;
    case ATTN_BF16: vec_store_bf16(p, x); break;
    case ATTN_F16: vec_store_f16(p, x); break;
    default: vec_store_f8(p, x); break;
    }
}

VEC_INLINE void vec_store_part_elem(enum attn_dtype t, void *p, vec x, int n)
{
    switch (t) {
    case ATTN_F32: vec_store_part_f32(p, x, n); break;
    case ATTN_BF16: vec_store_part_bf16(p, x, n); break;
    case ATTN_F16: vec_store_part_f16(p, x, n); break;
    default: vec_store_part_f8(p, x, n); break;
    }
}

/* tanh x = x P(x^2) / Q(x^2) up to |x| = 9, where it is 1 in fp32; relative error at most 4e-7,
 * near 0 too.  NaN stays NaN. */
VEC_INLINE vec vec_tanh(vec x)
{
    x = vec_max(vec_set1(-9.0f), vec_min(vec_set1(9.0f), x));
    vec z = vec_mul(x, x);
    vec p = vec_fma(vec_set1(0x1.ca491cp-27f), z, vec_set1(0x1.598c5cp-16f));
    vec q = vec_fma(vec_set1(0x1.a11ee8p-21f), z, vec_set1(0x1.586342p-12f));
    p = vec_fma(p, z, vec_set1(0x1.ca117ap-9f));
    q = vec_fma(q, z, vec_set1(0x1.a7eafcp-6f));
    p = vec_fma(p, z, vec_set1(0x1.120784p-3f));
    q = vec_fma(q, z, vec_set1(0x1.de590cp-2f));
    p = vec_fma(p, z, vec_set1(1.0f));
    q = vec_fma(q, z, vec_set1(1.0f));
    return vec_mul(vec_mul(x, p), vec_recip(q));
}

#endif
