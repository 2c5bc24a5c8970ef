/* SPDX-License-Identifier: MIT
 *
 * Softcap of a few vectors of scores beside tile products: x = cap log2(e) tanh(x scale / cap).
 *
 * By a table of polynomials (tanh_table.h) whose coefficients two-register permutes look up: they
 * are port 5's, while port 0 has most of the rest.  All factors are in the coefficients.  Adding
 * 1.5 2^23 leaves the number of the nearest piece in the low bits.
 *
 * Up to |score| = 0.4 cap an odd polynomial of three terms does it: most scores of most models, and
 * then without the table.  Which of the two is decided a lane at a time, so that no query's bits
 * depend on its neighbours.
 */
#ifndef ATTN_CPU_X86_SOFTCAP_AVX512_H
#define ATTN_CPU_X86_SOFTCAP_AVX512_H

#include "cpu/x86/tanh_table.h"
#include "cpu/x86/vec_avx512.h"

/* Loops over a few independent vectors: written stage by stage, so that what waits for its operands
 * never fills the scheduler and the tile products behind it get in. */
#define EACH(i, n) VEC_UNROLL for (int i = 0; i < (n); i++)

enum { FEW = 4 };

struct softcap {
    float table[TANH_TERMS][TANH_PIECES] __attribute__((aligned(64)));
    float inner, outer;               /* outer tanh(inner x) */
    float most, pieces;               /* largest |x| that the table wants; pieces an x */
    float short_terms[3], short_most; /* of x, x^3, x^5; largest x^2 that they are for */
};

/* tanh a to 6e-6 of it, 2.5e-6, for |a| <= TANH_SHORT. */
static const float tanh_short[3] = {0.99999391f, -0.33263363f, 0.12132675f};
#define TANH_SHORT 0.4f

static void softcap_begin(struct softcap *s, float cap, float scale)
{
    s->inner = scale / cap;
    s->outer = cap * 1.44269504f;
    s->most = fminf((TANH_PIECES - 1) * TANH_STEP / s->inner, 0x1p120f);
    s->pieces = s->inner / TANH_STEP;
    float factor = s->outer;
    for (int k = 0; k < TANH_TERMS; k++, factor *= s->inner)
        for (int i = 0; i < TANH_PIECES; i++) s->table[k][i] = tanh_table[k][i] * factor;
    factor = s->outer * s->inner;
    for (int k = 0; k < 3; k++, factor *= s->inner * s->inner)
        s->short_terms[k] = tanh_short[k] * factor;
    float most = fminf(TANH_SHORT / s->inner, 0x1p60f);
    s->short_most = s->inner < 0x1p6f ? most * most : 0; /* beyond, terms might overflow */
}

/* The lanes of x that the short polynomial is for; not those with NaN. */
VEC_INLINE __mmask16 cap_short_lanes(const struct softcap *s, __m512 x)
{
    return _mm512_cmp_ps_mask(_mm512_mul_ps(x, x), vec_set1(s->short_most), _CMP_LT_OQ);
}

/* x = cap(x) - m by the short polynomial. */
VEC_INLINE void cap_few_short(const struct softcap *s, __m512 *x, int n, __m512 m)
{
    const __m512 c0 = vec_set1(s->short_terms[0]), c1 = vec_set1(s->short_terms[1]);
    const __m512 c2 = vec_set1(s->short_terms[2]);
    __m512 square[FEW], y[FEW];
    EACH(i, n) square[i] = _mm512_mul_ps(x[i], x[i]);
    EACH(i, n) y[i] = _mm512_fmadd_ps(square[i], c2, c1);
    EACH(i, n) y[i] = _mm512_fmadd_ps(y[i], square[i], c0);
    EACH(i, n) x[i] = _mm512_fmsub_ps(x[i], y[i], m);
}

/* n is at most FEW; exact: to fp32's accuracy.  NaN stays NaN. */
VEC_INLINE void cap_few(const struct softcap *s, __m512 *x, int n, bool exact)
{
    if (exact) {
        EACH(i, n) x[i] = vec_tanh(vec_mul(x[i], vec_set1(s->inner)));
        /* Not a product, which a compiler may or may not fuse with what follows. */
        EACH(i, n) x[i] = vec_fma(x[i], vec_set1(s->outer), vec_zero());
        return;
    }
    const __m512 sign = _mm512_set1_ps(-0.0f), most = _mm512_set1_ps(s->most);
    const __m512 pieces = _mm512_set1_ps(s->pieces), shift = _mm512_set1_ps(0x1.8p23f);
    __m512 a[FEW], y[FEW];
    __m512i at[FEW];
    EACH(i, n) a[i] = _mm512_andnot_ps(sign, x[i]);
    EACH(i, n) /* two instructions for other ports than min's; NaN stays */
    a[i] = _mm512_mask_mov_ps(a[i], _mm512_cmp_ps_mask(a[i], most, _CMP_GT_OQ), most);
    EACH(i, n) at[i] = _mm512_castps_si512(_mm512_fmadd_ps(a[i], pieces, shift));
    EACH(i, n) y[i] = _mm512_setzero_ps();
    EACH(k, TANH_TERMS)
    {
        const float *c = s->table[TANH_TERMS - 1 - k];
        __m512 low = _mm512_load_ps(c), high = _mm512_load_ps(c + 16);
        EACH(i, n)
        {
            __m512 term = _mm512_permutex2var_ps(low, at[i], high);
            y[i] = k ? _mm512_fmadd_ps(y[i], a[i], term) : term;
        }
    }
    EACH(i, n) /* y or the sign of x */
    x[i] = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(y[i]),
                                                         _mm512_castps_si512(x[i]),
                                                         _mm512_castps_si512(sign), 0xf8));
}

#endif
