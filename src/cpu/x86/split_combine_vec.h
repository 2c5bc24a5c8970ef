/* SPDX-License-Identifier: MIT
 *
 * split_combine: one row from its partial rows.  Compiled once a rung over vec_ names.
 *
 *   M = max(lse_s, sink)      w_s = e^(lse_s - M)      L = sum_s w_s + e^(sink - M)
 *   out = sum_s w_s o_s / L   lse = M + ln L           nothing but -inf: out 0, lse -inf
 *
 * Splits add up in their order, sixteen at a time and then those sums, so that rounding grows with
 * n / 16 + 16 terms and not with n = 256.  One whose lse is -inf saw no key: its o is not read.
 */
#ifndef ATTN_CPU_X86_SPLIT_COMBINE_VEC_H
#define ATTN_CPU_X86_SPLIT_COMBINE_VEC_H

#include "cpu/kernels.h"

enum {
    COLUMNS = 4,  /* vectors of a row that are summed in one walk over the splits */
    TOGETHER = 16 /* splits that are summed before their sum joins the others */
};

struct partials {
    const float *o, *lse; /* [splits][d_v], [splits] */
    int64_t o_split, lse_split;
    int32_t splits;
    float max;
};

/* e^x for x <= 0, in all lanes. */
VEC_INLINE vec weight(float x) { return vec_exp2(vec_set1(x * 1.44269504088896341f)); }

/* out[0 .. vectors) = sum of w o / total for the columns at c; part > 0: only that many of one. */
VEC_INLINE void combine_columns(const struct partials *p, int32_t c, int vectors, int part,
                                vec total, enum attn_dtype type, char *out)
{
    vec sum[COLUMNS];
    VEC_UNROLL
    for (int i = 0; i < vectors; i++) sum[i] = vec_zero();
    for (int32_t first = 0; first < p->splits; first += TOGETHER) {
        const int32_t end = first + TOGETHER < p->splits ? first + TOGETHER : p->splits;
        vec few[COLUMNS];
        VEC_UNROLL
        for (int i = 0; i < vectors; i++) few[i] = vec_zero();
        for (int32_t s = first; s < end; s++) {
            const float lse = p->lse[s * p->lse_split], *o = p->o + s * p->o_split + c;
            if (lse == -INFINITY) continue;
            vec w = weight(lse - p->max);
            VEC_UNROLL
            for (int i = 0; i < vectors; i++) {
                vec x = part ? vec_load_part_f32(o, part) : vec_load_f32(o + i * VEC_LANES);
                few[i] = vec_fma(w, x, few[i]);
            }
        }
        VEC_UNROLL
        for (int i = 0; i < vectors; i++) sum[i] = vec_add(sum[i], few[i]);
    }
    const int64_t size = attn_dtype_bytes(type);
    VEC_UNROLL
    for (int i = 0; i < vectors; i++) {
        vec x = vec_div(sum[i], total);
        if (part)
            vec_store_part_elem(type, out + c * size, x, part);
        else
            vec_store_elem(type, out + (c + i * VEC_LANES) * size, x);
    }
}

static void combine(const float *o, int64_t o_split, const float *lse, int64_t lse_split,
                    int32_t splits, int32_t d_v, const float *sink, void *out,
                    enum attn_dtype out_dtype, float *lse_out)
{
    struct partials p = {o, lse, o_split, lse_split, splits, sink ? *sink : -INFINITY};
    for (int32_t s = 0; s < splits; s++) {
        float x = lse[s * lse_split];
        if (x > p.max || x != x) p.max = x; /* NaN stays, and with it everything is NaN */
    }
    vec total = vec_set1(1.0f);
    if (p.max == -INFINITY) { /* no split saw a key */
        p.splits = 0;
        *lse_out = -INFINITY;
    } else {
        total = sink ? weight(*sink - p.max) : vec_zero();
        for (int32_t first = 0; first < splits; first += TOGETHER) {
            vec few = vec_zero();
            for (int32_t s = first; s < splits && s < first + TOGETHER; s++)
                few = vec_add(few, weight(lse[s * lse_split] - p.max));
            total = vec_add(total, few);
        }
        *lse_out = p.max + logf(vec_reduce_max(total));
    }

    int32_t c = 0;
    for (; c + COLUMNS * VEC_LANES <= d_v; c += COLUMNS * VEC_LANES)
        combine_columns(&p, c, COLUMNS, 0, total, out_dtype, out);
    for (; c + VEC_LANES <= d_v; c += VEC_LANES)
        combine_columns(&p, c, 1, 0, total, out_dtype, out);
    if (c < d_v) combine_columns(&p, c, 1, d_v - c, total, out_dtype, out);
}

#endif
