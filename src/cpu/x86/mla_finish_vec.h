/* SPDX-License-Identifier: MIT
 *
 * mla: one row of the result from its pieces.  Compiled once a rung over vec_ names.
 *
 *   M = max m_j over pieces with keys      w_j = 2^(m_j - M)      L = sum_j w_j l_j
 *   lse = (M + log2 L) ln 2      out = v_scale / (1 + e^(sink - lse)) / L * sum_j w_j o_j
 *
 * Pieces add up in their order.
 */
#ifndef ATTN_CPU_X86_MLA_FINISH_VEC_H
#define ATTN_CPU_X86_MLA_FINISH_VEC_H

#include "cpu/kernels.h"

enum { FINISH_COLUMNS = 8 }; /* vectors of a row that are summed in one walk over the pieces */

static void mla_finish(const struct attn_mla_pieces *in, enum attn_dtype type, void *out,
                       float *lse, float *max)
{
    const float ln2 = 0.693147180559945309f;
    float m = -INFINITY, top = -INFINITY, total = 0;
    for (int32_t j = 0; j < in->pieces; j++) {
        const int64_t at = j * in->piece;
        if (in->l[at] == 0) continue;
        m = m > in->m[at] ? m : in->m[at];
        top = top > in->top[at] ? top : in->top[at];
    }
    for (int32_t j = 0; j < in->pieces; j++)
        if (in->l[j * in->piece] != 0)
            total += exp2f(in->m[j * in->piece] - m) * in->l[j * in->piece];
    const bool empty = total == 0;
    const float sum = (m + log2f(total)) * ln2;
    const vec factor = vec_set1(empty ? 0 : in->v_scale / ((1 + expf(in->sink - sum)) * total));
    *lse = empty ? INFINITY : sum;
    if (max) *max = empty ? -INFINITY : top * ln2;

    const int64_t size = attn_dtype_bytes(type);
    for (int32_t c = 0; c < ATTN_MLA_LATENT; c += FINISH_COLUMNS * VEC_LANES) {
        vec acc[FINISH_COLUMNS];
        VEC_UNROLL
        for (int i = 0; i < FINISH_COLUMNS; i++) acc[i] = vec_zero();
        for (int32_t j = 0; j < in->pieces; j++) {
            const int64_t at = j * in->piece;
            if (in->l[at] == 0) continue;
            const vec w = vec_set1(exp2f(in->m[at] - m));
            VEC_UNROLL
            for (int i = 0; i < FINISH_COLUMNS; i++)
                acc[i] = vec_fma(w, vec_load_f32(in->o + at + c + i * VEC_LANES), acc[i]);
        }
        VEC_UNROLL
        for (int i = 0; i < FINISH_COLUMNS; i++)
            vec_store_elem(type, (char *)out + (c + i * VEC_LANES) * size, vec_mul(acc[i], factor));
    }
}

#endif
