/* SPDX-License-Identifier: MIT
 *
 * The words of mha_fwd_vec.h as fp32: elements of all four types are widened, products are
 * multiply-adds.  fwd_dot.h gives the same names.
 */
#ifndef ATTN_CPU_X86_FWD_FMA_H
#define ATTN_CPU_X86_FWD_FMA_H

#include "core/dtype.h"

enum { PAIR = 1 }; /* elements of a word */

VEC_INLINE vec mul_add(vec a, vec b, vec sum) { return vec_fma(a, b, sum); }

VEC_INLINE vec load_some(enum attn_dtype t, const char *p, int32_t n)
{
    return n >= VEC_LANES ? vec_load_elem(t, p) : vec_load_part_elem(t, p, n);
}

/* d elements of a row of K. */
VEC_INLINE void key_words(enum attn_dtype t, const char *x, int32_t d, float *y)
{
    for (int32_t i = 0; i < d; i += VEC_LANES) {
        vec e = load_some(t, x + i * attn_dtype_bytes(t), d - i);
        if (d - i >= VEC_LANES)
            vec_store_f32(y + i, e);
        else
            vec_store_part_f32(y + i, e, d - i);
    }
}

/* d elements of a row of V, VEC_LANES / 2 in each of the panels, `panel` apart.  Whether some are
 * infinite or NaN. */
VEC_INLINE unsigned value_words(enum attn_dtype t, const char *const v[PAIR], int32_t d, float *y,
                                int64_t panel)
{
    vec poison = vec_zero();
    for (int32_t i = 0; i < d; i += VEC_LANES) {
        vec e = load_some(t, v[0] + i * attn_dtype_bytes(t), d - i);
        poison = vec_fma(e, vec_zero(), poison);
        vec_store_low(y, e);
        if (d - i >= VEC_LANES) vec_store_high(y + panel, e);
        y += 2 * panel;
    }
    return vec_any(vec_is_nan(poison));
}

/* d elements of each of up to VEC_LANES rows, scaled, become d vectors `width` floats apart. */
VEC_INLINE void query_words(enum attn_dtype t, const char *x, const int64_t *at, int32_t rows,
                            int32_t d, float scale, float *y, int width)
{
    for (int32_t i = 0; i < d; i += VEC_LANES) {
        int32_t n = d - i < VEC_LANES ? d - i : VEC_LANES;
        vec e[VEC_LANES];
        VEC_UNROLL
        for (int r = 0; r < VEC_LANES; r++) {
            e[r] = vec_zero();
            if (r >= rows) continue;
            e[r] = vec_mul(load_some(t, x + at[r] + i * attn_dtype_bytes(t), n), vec_set1(scale));
        }
        vec_transpose(e);
        VEC_UNROLL
        for (int k = 0; k < VEC_LANES; k++)
            if (k < n) vec_store(y + (i + k) * width, e[k]);
    }
}

/* A word of P. */
VEC_INLINE vec weight_words(vec p[PAIR]) { return p[0]; }

#endif
