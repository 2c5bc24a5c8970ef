/* SPDX-License-Identifier: MIT
 *
 * mla: latent rows as bf16, for the rungs that multiply bf16: AVX-512 BW.  Every e4m3 code times a
 * power of two is exact in bf16 and takes integer steps only; other scales go through fp32.
 */
#ifndef ATTN_CPU_X86_MLA_ROWS_AVX512_H
#define ATTN_CPU_X86_MLA_ROWS_AVX512_H

#include "cpu/mla_kernel.h"
#include "cpu/x86/vec_avx512.h"

/* What turns e4m3 codes into bf16 numbers times 2^e: s eeee mmm becomes s eeeeeeee mmm0000 with
 * (120 + e) added to the exponent; the subnormals m 2^-9 come from a table of eight. */
struct f8_scale {
    __m512i bias, small;
};

/* |e| at most 100, so that no exponent leaves bf16's range. */
VEC_INLINE struct f8_scale f8_scale_of(int e)
{
    const __m512i table = _mm512_castsi128_si512(
        _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    struct f8_scale s;
    s.bias = _mm512_set1_epi16((short)((120 + e) << 7));
    s.small = _mm512_maskz_add_epi16(0xfe, table, _mm512_set1_epi16((short)(e * 128)));
    return s;
}

VEC_INLINE __m512i bf16_from_f8(__m256i codes, struct f8_scale s)
{
    const __m512i w = _mm512_cvtepi8_epi16(codes);
    const __m512i magnitude = _mm512_and_si512(w, _mm512_set1_epi16(0x7f));
    const __mmask32 small = _mm512_testn_epi16_mask(w, _mm512_set1_epi16(0x78));
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
    __m512i x = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), s.bias);
    x = _mm512_mask_permutexvar_epi16(x, small, magnitude, s.small);
    x = _mm512_mask_mov_epi16(x, nan, _mm512_set1_epi16(0x7fc0));
    return _mm512_or_si512(x, _mm512_and_si512(w, _mm512_set1_epi16((short)0x8000)));
}

/* n a multiple of 64 */
VEC_INLINE void rescale_f8(const char *from, float scale, int n, uint16_t *to)
{
    const uint32_t bits = attn_float_bits(scale);
    const int e = (int)(bits >> 23) - 127;
    if ((bits & 0x7fffff) == 0 && e >= -100 && e <= 100) {
        const struct f8_scale s = f8_scale_of(e);
        for (int c = 0; c < n; c += 32)
            _mm512_storeu_si512(to + c, bf16_from_f8(_mm256_loadu_si256(
                                                         (const __m256i *)(const void *)(from + c)),
                                                     s));
        return;
    }
    for (int c = 0; c < n; c += 16)
        vec_store_bf16(to + c, vec_mul(vec_load_f8(from + c), vec_set1(scale)));
}

/* The row as d bf16 numbers at `to`, 64-byte aligned; a row that is so already is copied. */
VEC_INLINE void row_to_bf16(enum attn_mla_format format, const char *row, const char *scales,
                            int32_t d, uint16_t *to)
{
    switch ((int)format) {
    case ATTN_BF16: memcpy(to, row, (size_t)d * sizeof *to); break;
    case ATTN_F8: rescale_f8(row, 1.0f, d, to); break;
    case ATTN_MLA_V32:
        for (int i = 0; i < 4; i++) {
            float scale;
            memcpy(&scale, row + ATTN_MLA_LATENT + 4 * i, sizeof scale);
            rescale_f8(row + ATTN_V32_TILE * i, scale, ATTN_V32_TILE, to + ATTN_V32_TILE * i);
        }
        memcpy(to + ATTN_MLA_LATENT, row + ATTN_MLA_LATENT + 16, 2 * ATTN_MLA_ROPE);
        break;
    default:
        for (int i = 0; i < 7; i++)
            rescale_f8(row + ATTN_MODEL1_TILE * i, attn_e8m0_to_float((uint8_t)scales[i]),
                       ATTN_MODEL1_TILE, to + ATTN_MODEL1_TILE * i);
        memcpy(to + ATTN_MODEL1_QUANTISED, row + ATTN_MODEL1_QUANTISED, 2 * ATTN_MLA_ROPE);
    }
}

/* Rows a and b, or zeros for b NULL, interleaved: v[64 c ..] = the pairs (a[i], b[i]) of i in
 * [32 c, 32 c + 32) in the order that unpacking leaves:
 *   first 16 pairs: i = 8 (x / 4) + x % 4      last 16: i = 8 (x / 4) + x % 4 + 4 */
VEC_INLINE void interleave(const char *a, const char *b, char *v)
{
    for (int c = 0; c < ATTN_MLA_LATENT / 32; c++) {
        const __m512i x = _mm512_loadu_si512(a + 64 * c);
        const __m512i y = b ? _mm512_loadu_si512(b + 64 * c) : _mm512_setzero_si512();
        _mm512_store_si512(v + 128 * c, _mm512_unpacklo_epi16(x, y));
        _mm512_store_si512(v + 128 * c + 64, _mm512_unpackhi_epi16(x, y));
    }
}

/* 16 pairs of bf16: low[i] in the lower, high[i] in the upper half of dword i, ties away from 0. */
VEC_INLINE __m512i pair_bf16(vec low, vec high)
{
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i a = _mm512_add_epi32(_mm512_castps_si512(low), half);
    const __m512i b = _mm512_add_epi32(_mm512_castps_si512(high), half);
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(a, 16), b);
}

#endif
